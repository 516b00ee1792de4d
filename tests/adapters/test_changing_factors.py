# SPDX-License-Identifier: Apache-2.0
"""Factors that change between two passes, also in ways that leave no trace, are seen by the next; during one they must not."""

import copy

import pytest
import torch
from conftest import assert_close
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter
from small_adapters import fill, ids, targets, with_adapter
from small_models import small_moe

from hf_moe.adapters.grouped_lora import enable_grouped_lora


def write_to(model: torch.nn.Module, folder) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)


def write_to_data(model: torch.nn.Module, folder) -> None:
    """As many optimizers and averages of weights do."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5)


def swap(model: torch.nn.Module, folder) -> None:
    with_adapter(small_moe("mixtral"), seed=5, r=4).save_pretrained(folder)
    hotswap_adapter(model, folder, "default")


def replace(model: torch.nn.Module, folder) -> None:
    model.delete_adapter("default")
    torch.manual_seed(7)
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=6, target_parameters=targets(small_moe("mixtral"))))
    model.set_adapter("default")
    fill(model, 8)


@torch.no_grad()
@pytest.mark.parametrize("change", [write_to, write_to_data, swap, replace])
def test_the_next_pass_sees_it(change, tmp_path):
    vanilla = with_adapter(small_moe("mixtral"), r=4).eval()
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    before = model(ids()).logits
    assert_close(before, vanilla(ids()).logits)
    for of in (model, vanilla):
        change(of, tmp_path)
    after = model(ids()).logits
    assert (after - before).abs().max() > 0.01
    assert_close(after, vanilla(ids()).logits)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_backward_refuses_factors_that_were_written_to(rank, factor):
    model = enable_grouped_lora(with_adapter(small_moe("mixtral"), r=rank))
    loss = model(input_ids=ids(), labels=ids()).loss
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if factor in name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
