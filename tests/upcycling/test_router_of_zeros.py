# SPDX-License-Identifier: Apache-2.0
"""`router_init="zero"`: what is said of it is true, what is advised works, and what could not train is refused."""

import pytest
import torch
import transformers
from conftest import dense_model

from hf_moe import BiasBalancer, RoutingRecorder, UpcycleConfig, plan_upcycle, upcycle_model
from hf_moe.upcycling.errors import UpcycleError


@pytest.fixture(scope="module")
def dense() -> transformers.PreTrainedModel:
    return dense_model("llama", num_hidden_layers=1)


REMEDIES = {
    "a balance loss": {},
    "`expert_noise`": {"expert_noise": 0.1},
    "a selection bias": {"router_options": {"use_expert_bias": True}},
}


@pytest.mark.parametrize(
    ("router_type", "values", "works"),
    [
        ("softmax_topk", {"num_experts_per_tok": 1}, ["a balance loss", "a selection bias"]),
        ("sigmoid_topk", {}, [*REMEDIES]),
        ("sigmoid_topk", {"method": "residual"}, [*REMEDIES]),
        ("attention", {}, [*REMEDIES]),
        ("top_p", {}, ["a balance loss", "`expert_noise`"]),
    ],
)
def test_what_is_said_of_a_router_of_zeros_is_true(router_type, values, works, dense):
    """All tokens go to the same experts, whatever jitter does, until training with what is advised gives some to each."""
    values = {"num_experts": 4, "router_type": router_type, "router_init": "zero", "target": "hf_moe", **values}
    (warning,) = plan_upcycle(dense.config, UpcycleConfig(**values)).warnings
    assert [remedy for remedy in REMEDIES if remedy in warning] == works
    assert "jitter" not in warning
    jittered = upcycle_model(dense, UpcycleConfig(**values, router_options={"router_jitter_noise": 0.3}))
    assert set(_serve(jittered, num_steps=1).tolist()) == {0, 64}
    for remedy in works:
        model = upcycle_model(dense, UpcycleConfig(**values, **REMEDIES[remedy]))
        counts_E = _serve(model, 8, has_loss=remedy == "a balance loss", has_bias=remedy == "a selection bias")
        assert counts_E.min() > 0, remedy


def _serve(model, num_steps: int, has_loss: bool = False, has_bias: bool = False) -> torch.Tensor:
    """How many tokens the experts of the first layer get in some steps of training."""
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
    balancer = BiasBalancer().attach(model) if has_bias else None
    counts_E = torch.zeros(4)
    for _ in range(num_steps):
        with RoutingRecorder(model) as recorder:
            model(ids, labels=ids, output_router_logits=has_loss).loss.backward()
        counts_E += next(iter(recorder.statistics().layers.values())).counts
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step()
    return counts_E


@pytest.mark.parametrize(
    "values",
    [
        {"router_type": "noisy_topk"},  # its noise breaks the tie
        {"router_type": "soft", "num_experts_per_tok": 4},
        {"router_type": "top_p", "router_options": {"router_top_p": 1.0}},
        {"router_type": "expert_choice", "router_options": {"allow_causal_expert_choice": True}},
    ],
)
def test_nothing_is_said_of_zeros_with_which_all_experts_learn(values, dense):
    recipe = UpcycleConfig(num_experts=4, router_init="zero", target="hf_moe", **values)
    assert not plan_upcycle(dense.config, recipe).warnings


@pytest.mark.parametrize("method", ["copy", "residual"])
def test_zeros_with_which_no_expert_is_chosen_are_refused(method, dense):
    recipe = UpcycleConfig(method=method, num_experts=4, router_type="relu", router_init="zero", target="hf_moe")
    with pytest.raises(UpcycleError, match="router_type='relu' chooses no expert.*Use 'normal'"):
        plan_upcycle(dense.config, recipe)
