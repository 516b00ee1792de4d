# SPDX-License-Identifier: Apache-2.0
"""The plan beside the models it announces, and recipes as YAML."""

import logging

import pytest
import torch
from conftest import dense_config, dense_model
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode

from hf_moe import UpcycleConfig, plan_upcycle, upcycle_model
from hf_moe.upcycling.errors import UpcycleError


def matrix_flops(model, tokens: int) -> int:
    """Operations of linear layers, counted by torch while one sequence runs; attention scores are left out."""
    model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 96, (1, tokens)))
    by_operator = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in by_operator.items() if "attention" not in str(operator))


@pytest.mark.parametrize("method", ["copy", "residual"])
@pytest.mark.parametrize("tied", [True, False])
def test_plan_is_what_comes_true(core_family, method, tied):
    recipe = UpcycleConfig(method=method, num_experts=6, num_experts_per_tok=2, layers=[0, 2])
    dense = dense_model(core_family, tie_word_embeddings=tied)
    plan = plan_upcycle(dense.config, recipe)
    moe = upcycle_model(dense, recipe)
    assert plan.architecture == type(moe).__name__
    assert plan.num_parameters == moe.num_parameters()
    assert plan.num_dense_parameters == dense.num_parameters()
    assert plan.bytes == 4 * moe.num_parameters()
    one_expert = sum(parameter[0].numel() for parameter in moe.model.layers[0].mlp.experts.parameters())
    assert plan.num_active_parameters == moe.num_parameters() - 2 * 4 * one_expert
    moe.set_experts_implementation("batched_mm")
    assert plan.flops_per_token * 8 == matrix_flops(moe, 8)
    assert plan.dense_flops_per_token * 8 == matrix_flops(dense, 8)


def test_plan_needs_no_weights(tmp_path):
    dense_config("llama").save_pretrained(tmp_path)
    plan = plan_upcycle(tmp_path)
    assert plan.model_type == "mixtral"
    assert plan.to_dict()["sparse_layers"] == [0, 1, 2]


def test_recipe_as_yaml(tmp_path):
    recipe = UpcycleConfig(num_experts=16, layers=[1, 2], router_logit_std=0.5)
    (tmp_path / "recipe.yml").write_text(recipe.to_yaml())
    assert UpcycleConfig.from_yaml(tmp_path / "recipe.yml") == recipe
    (tmp_path / "recipe.yml").write_text("- num_experts\n")
    with pytest.raises(UpcycleError, match="mapping"):
        UpcycleConfig.from_yaml(tmp_path / "recipe.yml")
    (tmp_path / "recipe.yml").write_text("num_experts: [4\n")
    with pytest.raises(UpcycleError, match="is no YAML"):
        UpcycleConfig.from_yaml(tmp_path / "recipe.yml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "between 1 and `num_experts` \\(4\\), got 5"),
        ({"num_experts": 1}, "at least 2"),
        ({"method": "clone"}, "copy"),
        ({"router_init": "zeros"}, "normal"),
        ({"verify": True}, "verify"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, "each once"),
        ({"router_logit_std": -1.0}, "finite number and not negative"),
        ({"router_logit_std": float("nan")}, "finite number"),
        ({"router_aux_loss_coef": -0.1}, "finite number"),
        ({"num_experts": "8"}, "num_experts"),
        ({"scale_on": "megatron"}, "`scale_on`='megatron' has no effect: with weights that sum to 1, method 'copy'"),
        ({"method": "qwen", "granularity": 2, "scale_on": "down"}, "method 'qwen' scales nothing"),
    ],
)
def test_bad_recipes_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        UpcycleConfig(**values)


def test_layers_named_twice_are_refused_in_the_model_where_they_are_the_same():
    config = dense_config("llama")
    assert plan_upcycle(config, UpcycleConfig(layers="0,-1:")).sparse_layers == [0, 2]
    with pytest.raises(UpcycleError, match=r"'1,0-2' names \[1\] more often"):
        plan_upcycle(config, UpcycleConfig(layers="1,0-2"))
    with pytest.raises(UpcycleError, match=r"'2,-1:' names \[2\] more often"):
        plan_upcycle(config, UpcycleConfig(layers="2,-1:"))


def test_layers_outside_the_model_are_refused():
    with pytest.raises(UpcycleError, match=r"names \[3\], but the model has layers 0 to 2"):
        plan_upcycle(dense_config("llama"), UpcycleConfig(layers=[1, 3]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_init": "zero"}, "all logits tie"),
        ({"method": "granular", "granularity": 2, "scale_on": "megatron"}, "changes what goes through the activation"),
        ({"method": "drop"}, "starts far from the dense model"),
        ({"method": "qwen", "granularity": 2, "reinit_ratio": 0.0}, "starts far from the dense model"),
    ],
)
def test_warnings(values, message, caplog):
    recipe = UpcycleConfig(num_experts=4, **values)
    dense = dense_model("llama")
    assert [warning for warning in plan_upcycle(dense.config, recipe).warnings if message in warning]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    upcycle_model(dense, recipe)
    logger.removeHandler(caplog.handler)
    assert message in caplog.text
    assert not plan_upcycle(dense.config, UpcycleConfig(num_experts=4)).warnings


@pytest.mark.parametrize(
    "values",
    [
        {"method": "drop", "reinit_ratio": 0.0},
        {"method": "split", "num_experts": 6, "num_experts_per_tok": 6, "router_init": "zero"},
    ],
)
def test_a_method_that_is_exact_here_is_not_far(values):
    plan = plan_upcycle(dense_model("llama").config, UpcycleConfig(**{"num_experts": 4, **values}))
    assert plan.exact
    assert not [warning for warning in plan.warnings if "far from the dense" in warning]


@pytest.mark.parametrize(
    "values",
    [
        {"router_init": "normal"},
        {"router_init": "zero", "scale_on": "megatron"},
        {"router_init": "zero", "num_experts": 6},
    ],
)
def test_drop_that_replaces_nothing_is_as_exact_as_copy(values):
    dense = dense_model("llama", dtype=torch.bfloat16)
    common = {"num_experts": 4, "norm_topk_prob": False, **values}
    copied = plan_upcycle(dense.config, UpcycleConfig(method="copy", **common)).inexact_because
    dropped = plan_upcycle(dense.config, UpcycleConfig(method="drop", reinit_ratio=0.0, **common)).inexact_because
    assert dropped == copied
    assert copied is not None
