# SPDX-License-Identifier: Apache-2.0
"""What is put together with a router: layers with different numbers of experts, and modalities beside everything else."""

import pytest
import torch
import transformers
from conftest import assert_close
from router_cases import ALL_CASES, build_model, router_config, with_routing_inputs

from hf_moe.models.capacity import CAPACITY_POLICIES
from hf_moe.models.routers import ROUTERS
from hf_moe.training.load_balancing import DEFAULT_COEF, LoadBalancer


# --- Layers with different numbers of experts --------------------------------------------------------------------------

COUNTS = [4, 8, 8]
# What a case needs for 4 experts too.
FOR_FEWER = {
    "hierarchical_noisy_topk": {"n_group": 2},
    "hierarchical": {"n_group": 2},
    "zero-computation experts": {"router_residual": False},
}
NEED_THE_SAME = {
    "soft": "must be at least `num_experts_per_tok`",
    "modality": r"must sum to the number of experts of every layer \(\[4, 8\]\)",
    "zero-computation experts": "`router_residual` needs the same number of experts in all layers",
}


@pytest.mark.parametrize("case", NEED_THE_SAME)
def test_what_needs_the_same_number_everywhere_says_so(case):
    with pytest.raises(Exception, match=NEED_THE_SAME[case]):
        router_config(case, num_experts_per_layer=COUNTS)


@pytest.mark.parametrize("case", [name for name in ALL_CASES if name not in ("soft", "modality")])
def test_layers_with_different_numbers_of_experts(case, batch, tmp_path):
    made = build_model(case, num_experts_per_layer=COUNTS, **FOR_FEWER.get(case, {})).train()
    num_zero = made.config.num_zero_computation_experts
    given = with_routing_inputs(batch, made)
    output = made(**given, output_router_logits=True)
    assert [logits.shape[-1] for logits in output.router_logits] == [count + num_zero for count in COUNTS]
    output.loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert ".gate." not in name or parameter.grad.abs().max() > 0, name
    assert output.aux_loss.isfinite()
    made.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mlp.num_experts for layer in loaded.model.layers] == COUNTS
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert_close(loaded(**given).logits, made(**given).logits, 1e-6)


# --- Modalities --------------------------------------------------------------------------------------------------------

WITH_MODALITIES = [name for name, router in ROUTERS.items() if "num_experts_per_modality" in router.options]
PARTS = [6, 2]  # images have as many experts as a token gets


def with_modalities(router_type: str, **values):
    """A model in training, and what its blocks hand to their experts."""
    no_groups = {"n_group": 1, "topk_group": 1} if "n_group" in ROUTERS[router_type].options else {}
    made = build_model(router_type, **{**no_groups, "num_experts_per_modality": PARTS, **values}).train()
    handed = []
    for layer in made.model.layers:
        layer.mlp._run_experts = lambda states, index, weights, run=layer.mlp._run_experts: (
            handed.append(index) or run(states, index, weights)
        )
    return made, handed


def check_step(router_type: str, batch, kind: str | None = None, **values) -> None:
    """A step in which all is finite and no token gets an expert of another modality."""
    made, handed = with_modalities(router_type, **values)
    given = with_routing_inputs(batch, made)
    if kind is not None:
        LoadBalancer(kind, coef=0.1, num_devices=2 if kind == "device" else None).attach(made)
    output = made(**given, output_router_logits=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.aux_loss.isfinite()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), name
    is_text_T1 = (given["mm_token_type_ids"].flatten() == 0)[:, None]
    for index_TK in handed:
        assert ((index_TK == sum(PARTS)) | ((index_TK < PARTS[0]) == is_text_T1)).all()


def test_all_experts_for_every_token_are_not_those_of_a_modality():
    with pytest.raises(Exception, match="`num_experts_per_modality`=.* has no effect on router_type='soft'"):
        router_config("soft", num_experts_per_modality=PARTS)


@pytest.mark.parametrize("router_type", WITH_MODALITIES)
def test_modalities_beside_bias_residual_and_capacities(router_type, batch):
    options = ROUTERS[router_type].options
    check_step(router_type, batch)
    if "use_expert_bias" in options:
        check_step(router_type, batch, use_expert_bias=True)
    if "router_residual" in options:
        with pytest.raises(Exception, match="`router_residual` cannot go together"):
            with_modalities(router_type, router_residual=True)
    for policy in sorted(set(CAPACITY_POLICIES) - {"none", "recycle"}):
        check_step(router_type, batch, capacity_policy=policy, capacity_factor=0.7, min_capacity=1)
    with pytest.raises(Exception, match="`capacity_policy='recycle'` sends tokens to any expert"):
        with_modalities(router_type, capacity_policy="recycle")


@pytest.mark.parametrize("kind", DEFAULT_COEF)
@pytest.mark.parametrize("router_type", WITH_MODALITIES)
def test_modalities_beside_balance_losses(router_type, kind, batch):
    refused = {"heterogeneous": "zero-computation experts", "sparsity": "relu of their logits"}
    if kind in refused and (kind, router_type) != ("sparsity", "relu"):
        with pytest.raises(ValueError, match=refused[kind]):
            check_step(router_type, batch, kind)
    else:
        check_step(router_type, batch, kind)
