# SPDX-License-Identifier: Apache-2.0
"""The classes that are handed to DeepSpeed, which is not installed for tests: a stand-in takes its place."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from conftest import dense_model
from router_gradients import trainable
from small_models import ALL, small_moe
from test_callbacks import make_trainer

from hf_moe import set_zero3_leaf_modules


@pytest.fixture
def leaves(monkeypatch) -> list[tuple]:
    """What DeepSpeed's function was called with."""
    calls: list[tuple] = []
    deepspeed, utils = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    utils.set_z3_leaf_modules = lambda model, classes: calls.append((model, [of.__name__ for of in classes]))
    deepspeed.utils, deepspeed.__spec__ = utils, ModuleSpec("deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    return calls


@pytest.mark.parametrize("kind", ALL)
def test_the_blocks_of_any_model(kind, leaves):
    model = small_moe(kind)
    classes = set_zero3_leaf_modules(model)
    assert leaves == [(model, [of.__name__ for of in classes])]
    blocks = [module for module in model.modules() if isinstance(module, tuple(classes))]
    assert all(hasattr(block, "experts") for block in blocks)
    assert len(blocks) == sum(
        hasattr(module, "down_proj") and hasattr(module, "num_experts") for module in model.modules()
    )


def test_trainers_that_run_zero3(leaves, monkeypatch, tmp_path):
    make_trainer(trainable("mixtral"), tmp_path)
    assert not leaves
    monkeypatch.setattr("hf_moe.training.add_callbacks.is_deepspeed_zero3_enabled", lambda: True)
    make_trainer(trainable("mixtral"), tmp_path)
    assert [names for _, names in leaves] == [["MixtralSparseMoeBlock"]]


def test_what_is_refused(leaves, monkeypatch):
    with pytest.raises(ValueError, match="LlamaForCausalLM declares no router"):
        set_zero3_leaf_modules(dense_model("llama"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", None)
    with pytest.raises(ImportError, match="`pip install deepspeed`"):
        set_zero3_leaf_modules(small_moe("mixtral"))
