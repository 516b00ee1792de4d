# SPDX-License-Identifier: Apache-2.0
"""Every router as the result of an upcycling: promised exactness beside what the proof measures, and all tensors there."""

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_close, dense_model

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.models.routers import ROUTERS
from hf_moe.training.statistics import LayerRouting, RoutingStatistics
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.layouts import FusedLayout
from hf_moe.upcycling.upcycle import _warn_of_dead_experts


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, NUM_EXPERTS, ROUTER_CASES


# What `copy` promises with any router of the case's kind, and with one of zeros: 1 where weights sum to a number.
COPY_IS_EXACT = {
    "soft": (True, True),
    "noisy_topk": (True, True),
    "hierarchical_noisy_topk": (True, True),
    "gshard": (True, True),
    "switch": (False, True),
    "softmax_topk": (True, True),
    "sigmoid_topk": (True, True),
    "llama4": (False, False),
    "attention": (True, True),
    "normalized_logits": (True, True),
    "expert_choice": (False, False),
    "top_p": (False, True),
    "relu": (False, None),
    "prototypes": (False, True),
    "grouped": (False, True),
    "hash": (True, None),
    "modality": (True, True),
    "hierarchical": (False, True),
    "zero-computation experts": (False, False),
    "a selection bias": (True, True),
    "groups of DeepSeek-V2": (False, True),
    "capacity by position": (True, True),
    "capacity by probability": (True, True),
    "capacity by batch priority": (True, True),
    "capacity with zero-computation experts": (False, False),
}
LOUD = ("zero-computation experts", "capacity with zero-computation experts")  # which copy their input


def recipe(case: str, **values) -> UpcycleConfig:
    """A recipe for the router of a case."""
    fields = {"num_experts_per_tok": 2, **copy.deepcopy(ALL_CASES[case])}
    own = {
        name: fields.pop(name) for name in ("router_type", "num_experts_per_tok", "norm_topk_prob") if name in fields
    }
    return UpcycleConfig(**{"num_experts": NUM_EXPERTS, "target": "hf_moe", **own, "router_options": fields, **values})


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("dense")
    model = dense_model("llama", num_hidden_layers=2)
    model.save_pretrained(folder)
    model.config.dtype = torch.float32
    return model, folder


def test_every_case_has_a_promise():
    assert set(COPY_IS_EXACT) == set(ALL_CASES)


@pytest.mark.parametrize("router_init", ["normal", "zero"])
@pytest.mark.parametrize("method", ["copy", "residual"])
@pytest.mark.parametrize("case", ALL_CASES)
def test_what_is_promised_is_measured(case, method, router_init, dense, tmp_path):
    """The proof fails if a method that promises exactness misses it; one that does not must really differ."""
    promise = COPY_IS_EXACT[case][router_init == "zero"] if method == "copy" else case not in LOUD
    if ROUTERS[ALL_CASES[case]["router_type"]].has_rows is False and router_init == "zero":
        with pytest.raises(Exception, match="has no weights to initialise"):
            recipe(case, method=method, router_init=router_init)
        return
    if case == "relu" and router_init == "zero":
        return  # it chooses nothing and is refused
    config = recipe(case, method=method, router_init=router_init)
    plan = plan_upcycle(dense[0].config, config)
    assert plan.exact == promise
    assert (plan.inexact_because is None) == promise
    report = upcycle(dense[1], tmp_path / "moe", config, progress=False)
    assert report.exact == promise
    assert promise or report.max_relative_error > 1e-3
    assert report.num_parameters == plan.num_parameters
    assert report.routing is not None
    for layer in report.routing.layers.values():
        assert len(layer.counts) == NUM_EXPERTS + plan.config.num_zero_computation_experts
        assert layer.num_tokens >= 256
    if case in ROUTER_CASES and not ROUTERS[case].has_variable_top_k:
        assert layer.experts_per_token == config.num_experts_per_tok


@pytest.mark.parametrize("case", ALL_CASES)
def test_streamed_in_memory_and_loaded_are_equal(case, dense, tmp_path, caplog):
    """Bit by bit, nothing missing, and what is random differs by layer."""
    config = recipe(case)
    upcycle(dense[1], tmp_path / "moe", config, progress=False)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert "newly initialized" not in caplog.text
    in_memory = upcycle_model(dense[0], config).state_dict()
    assert loaded.state_dict().keys() == in_memory.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, in_memory[name]), name
        assert tensor.dtype == in_memory[name].dtype
        if ".gate." in name and "layers.0." in name and tensor.float().std() > 0:
            assert not torch.equal(tensor, in_memory[name.replace("layers.0.", "layers.1.")]), name
    gate = loaded.model.layers[0].mlp.gate
    assert type(gate) is ROUTERS[config.router_type]


def test_logits_have_the_std_asked_for(dense):
    """Also of rows for zero-computation experts, and of groups."""
    for case in ("zero-computation experts", "hierarchical", "attention"):
        model = upcycle_model(dense[0], recipe(case, router_logit_std=0.7))
        for layer in model.model.layers:
            states = torch.randn(2000, 32)
            states = states * states.square().mean(-1, keepdim=True).rsqrt() * layer.post_attention_layernorm.weight
            gate = layer.mlp.gate
            for name in ("weight", "group_weight", "query"):
                if hasattr(gate, name):
                    std = (states @ getattr(gate, name).T).std(0).square().mean().sqrt()
                    assert 0.4 < std < 1.1, (case, name)


def test_only_layers_are_proved_too(dense, tmp_path):
    for case in ("top_p", "llama4", "hash", "capacity by position"):
        report = upcycle(dense[1], tmp_path / case, recipe(case, method="residual", verify="layers"), progress=False)
        assert report.exact


@pytest.mark.parametrize("case", ["switch", "sigmoid_topk"])
def test_weights_that_do_not_sum_to_1_are_made_up_for(case, dense):
    """Switch's 1 / E of a router of zeros, DeepSeek-V3's factor of 2.5."""
    model = upcycle_model(
        dense[0], recipe(case, router_init="zero", scale_on="down") if case == "switch" else recipe(case)
    )
    scale = NUM_EXPERTS if case == "switch" else 1 / 2.5
    experts, mlp = model.model.layers[0].mlp.experts, dense[0].model.layers[0].mlp
    gate, up = experts.gate_up_proj[3].chunk(2)
    assert_close(gate, mlp.gate_proj.weight, 1e-6)
    product = experts.down_proj[3].norm() * up.norm()
    assert_close(product, scale * mlp.down_proj.weight.norm() * mlp.up_proj.weight.norm(), 1e-5)


def test_native_classes_hold_their_own_router_only(dense):
    for router_type, options in (("switch", None), ("softmax_topk", {"capacity_policy": "position"})):
        config = UpcycleConfig(num_experts_per_tok=1, router_type=router_type, router_options=options, target="native")
        with pytest.raises(UpcycleError, match="Mixtral: it.* was asked for"):
            plan_upcycle(dense[0].config, config)
        assert not plan_upcycle(dense[0].config, UpcycleConfig(**{**config.to_dict(), "target": "auto"})).native
    assert plan_upcycle(dense[0].config, UpcycleConfig(router_type="softmax_topk")).native
    phi3 = dense_model("phi3").config
    assert plan_upcycle(phi3, UpcycleConfig()).architecture.startswith("Glm4Moe")
    assert not plan_upcycle(phi3, UpcycleConfig(router_type="softmax_topk")).architecture.startswith("Glm4Moe")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_options": {"router_top_p": 0.4}}, r"router_type='softmax_topk' may have .*got \['router_top_p'\]"),
        ({"router_options": {"num_experts_per_tok": 4}}, r"`router_options` may have .*got \['num_experts_per_tok'\]"),
        ({"router_type": "magic"}, r"`router_type` must be one of .* got 'magic'\.$"),
        ({"router_type": "switsh"}, "Did you mean 'switch' for 'switsh'?"),
        ({"router_options": {"router_topp": 0.3}}, r"got \['router_topp'\]\. Did you mean 'router_top_p' for"),
        (
            {"method": "compose", "experts": ["a", "b"], "router_type": "top_p"},
            "weights sum to 1.*router_type='top_p'",
        ),
    ],
)
def test_recipes_that_are_refused(values, message):
    with pytest.raises(Exception, match=message):
        UpcycleConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_type": "switch"}, "set `num_experts_per_tok=1`, got 2"),
        ({"router_type": "soft"}, "set `num_experts_per_tok=8`, got 2"),
        ({"router_type": "grouped"}, "`n_group` must be at least 2"),
        ({"router_type": "expert_choice"}, "later tokens decide"),
        ({"method": "granular", "granularity": 2, "router_type": "prototypes"}, "parts of a copy equal scores"),
    ],
)
def test_plans_that_are_refused(values, message, dense):
    with pytest.raises(UpcycleError, match=message):
        plan_upcycle(dense[0].config, UpcycleConfig(**values))


@pytest.mark.parametrize("router_type", ["attention", "normalized_logits", "sigmoid_topk", "noisy_topk", "soft"])
def test_granular_is_exact_where_equal_scores_go_together(router_type, dense, tmp_path):
    config = UpcycleConfig(
        method="granular",
        granularity=2,
        num_experts_per_tok=8 if router_type == "soft" else 4,
        router_type=router_type,
        target="hf_moe",
    )
    assert plan_upcycle(dense[0].config, config).exact
    assert upcycle(dense[1], tmp_path / "moe", config, progress=False).exact


@pytest.mark.parametrize(
    ("num_experts", "values"),
    [
        (5, {"router_type": "top_p"}),
        (15, {"router_type": "top_p"}),
        (8, {"router_type": "top_p", "router_options": {"router_top_p": 1.0}}),
        (
            8,
            {
                "router_type": "modality",
                "router_options": {"num_experts_per_modality": [6, 2]},
                "norm_topk_prob": False,
            },
        ),
        (
            8,
            {
                "router_type": "modality",
                "router_options": {"num_experts_per_modality": [4, 4]},
                "norm_topk_prob": False,
            },
        ),
        (
            8,
            {
                "router_type": "switch",
                "router_options": {"num_experts_per_modality": [4, 4]},
                "num_experts_per_tok": 1,
            },
        ),
    ],
)
def test_what_a_router_of_zeros_gives_is_asked_of_it(num_experts, values, dense, tmp_path):
    """Not computed a second time: rounding decides how many experts top-p takes, and a modality has a part of them."""
    config = UpcycleConfig(num_experts=num_experts, router_init="zero", target="hf_moe", **values)
    plan = plan_upcycle(dense[0].config, config)
    assert plan.exact == (values.get("router_options", {}).get("num_experts_per_modality") != [6, 2])
    assert upcycle(dense[1], tmp_path / "moe", config, progress=False).exact == plan.exact


SPLIT_OPTIONS = {
    "hierarchical_noisy_topk": {"n_group": 2, "topk_group": 2},
    "hierarchical": {"n_group": 2, "topk_group": 2},
    "expert_choice": {"allow_causal_expert_choice": True, "capacity_group": 32},
    "grouped": {"n_group": 2},
    "modality": {"num_experts_per_modality": [4]},
}
# Where `split` with K = E preserves the function only with a router of zeros, not even then, and whatever the rows are.
SPLIT_IS_NEVER_EXACT, SPLIT_IS_ALWAYS_EXACT = ("llama4", "relu", "top_p"), ("hash", "prototypes")


@pytest.mark.parametrize("router_type", sorted(set(ROUTERS) - {"switch", "gshard"}))  # which do not choose E experts
def test_split_with_all_experts_is_exact_where_it_is_promised(router_type, tmp_path):
    model = dense_model("llama", intermediate_size=64)
    model.save_pretrained(tmp_path / "dense")
    model.config.dtype = torch.float32
    for router_init in ("normal",) if router_type in ("hash", "relu") else ("zero", "normal"):
        config = UpcycleConfig(
            method="split",
            num_experts=4,
            num_experts_per_tok=4,
            router_type=router_type,
            router_options=SPLIT_OPTIONS.get(router_type),
            router_init=router_init,
            target="hf_moe",
        )
        promise = router_type not in SPLIT_IS_NEVER_EXACT
        promise &= router_init == "zero" or router_type in SPLIT_IS_ALWAYS_EXACT
        plan = plan_upcycle(model.config, config)
        assert plan.exact == promise, plan.inexact_because
        assert upcycle(tmp_path / "dense", tmp_path / router_init, config, progress=False).exact == promise


def test_split_says_why_it_is_not_exact(dense):
    """`num_experts_per_tok` is an upper bound of what top-p gives; with all of the probability it gives all experts."""
    values = {"method": "split", "num_experts": 2, "num_experts_per_tok": 2, "router_init": "zero", "target": "hf_moe"}
    plan = plan_upcycle(dense[0].config, UpcycleConfig(router_type="top_p", **values))
    assert plan.inexact_because == "the number of experts of a token varies (router_type='top_p')"
    everything = UpcycleConfig(router_type="top_p", router_options={"router_top_p": 1.0}, **values)
    assert plan_upcycle(dense[0].config, everything).exact
    plan = plan_upcycle(dense[0].config, UpcycleConfig(router_type="llama4", **values))
    assert "multiplies what goes into the experts" in plan.inexact_because


@pytest.mark.parametrize("case", ["hash", "modality"])
def test_the_proof_looks_at_every_domain_and_modality(case, dense, tmp_path, caplog, monkeypatch):
    """So that nobody is told of experts that got no token, and a wrong expert of the last one is found."""
    with caplog.at_level(logging.WARNING, logger="transformers"):
        report = upcycle(dense[1], tmp_path / "moe", recipe(case), progress=False)
    assert report.parity["in_each_of"] == {"hash": "2 domains", "modality": "2 modalities"}[case]
    assert report.parity["num_tokens"] == 512
    assert "got none of" not in caplog.text
    assert all(layer.counts.min() > 0 for layer in report.routing.layers.values())
    read = FusedLayout.read
    monkeypatch.setattr(
        FusedLayout,
        "read",
        lambda self, reader, layer, index, *shape: (
            read(self, reader, layer, index, *shape)._replace(down_proj=torch.zeros(32, 48))
            if index == NUM_EXPERTS - 1
            else read(self, reader, layer, index, *shape)
        ),
    )
    with pytest.raises(UpcycleError, match="does not compute what the dense model computes"):
        upcycle(dense[1], tmp_path / "wrong", recipe(case), progress=False)


def test_noise_is_searched_in_every_domain(dense, tmp_path):
    report = upcycle(dense[1], tmp_path / "moe", recipe("hash", max_kl=1e-3), progress=False)
    assert report.expert_noise > 0
    assert 5e-4 < report.parity["float32"]["kl_divergence"] <= 1e-3


def test_advice_can_be_followed(dense, caplog):
    """None that needs rows of a router that has none, or a bias where there can be none."""
    routing = RoutingStatistics({"layers.0.mlp": LayerRouting(torch.tensor([0, 4]), 4)})
    for case, expected in (("hash", "gives each of them as many token ids"), ("top_p", "another `router_init`")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="transformers"):
            _warn_of_dead_experts(routing, recipe(case))
        assert expected in caplog.text
