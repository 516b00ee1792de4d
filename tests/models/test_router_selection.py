# SPDX-License-Identifier: Apache-2.0
"""Blocks beside their papers' equations, written once more for one token at a time: scores, choice, weights and experts.

Nothing here asks the router what it chose, so that a wrong choice shows too, in the output and in every gradient.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import assert_close
from router_cases import ALL_CASES, NUM_EXPERTS, build_block, loop_over_slots, router_config

from hf_moe.models.routers import ROUTERS
from hf_moe.models.routing_context import RoutingContext


BATCH, LENGTH = 3, 8
Choice = dict[int, torch.Tensor]  # the experts of a token, and their weights


def softmax(values) -> torch.Tensor:
    exponentials = torch.exp(torch.stack(list(values)))
    return exponentials / exponentials.sum()


def sigmoid(value: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-value))


def best(count: int, values, among=None) -> list[int]:
    """The places of the largest values, the largest first."""
    places = range(len(values)) if among is None else among
    return sorted(places, key=lambda place: -float(values[place]))[:count]


def group_of(size: int, group: int) -> list[int]:
    return [*range(group * size, (group + 1) * size)]


def divided(weights: Choice) -> Choice:
    total = sum(weights.values())
    return {expert: weight / total for expert, weight in weights.items()}


def logits(gate, x_H, rows=None) -> list[torch.Tensor]:
    return [(row_H * x_H).sum() for row_H in (gate.weight if rows is None else rows)]


def soft(gate, config, x_H, token) -> Choice:
    return dict(enumerate(softmax(logits(gate, x_H))))


def top_k_then_softmax(gate, config, x_H, token) -> Choice:
    """Shazeer et al., in evaluation: G(x) = Softmax(KeepTopK(H(x), k))."""
    z_E = logits(gate, x_H)
    chosen = best(config.num_experts_per_tok, z_E)
    return dict(zip(chosen, softmax(z_E[expert] for expert in chosen), strict=True))


def hierarchical_top_k(gate, config, x_H, token) -> Choice:
    """Shazeer et al., appendix B: G_primary(x)_i G_i(x)_j."""
    size, count = NUM_EXPERTS // config.n_group, config.num_experts_per_tok // config.topk_group
    z_E, z_G = logits(gate, x_H), logits(gate, x_H, gate.group_weight)
    groups = best(config.topk_group, z_G)
    choice = {}
    for group, of_group in zip(groups, softmax(z_G[group] for group in groups), strict=True):
        chosen = best(count, z_E, group_of(size, group))
        inside = softmax(z_E[expert] for expert in chosen)
        choice |= {expert: of_group * weight for expert, weight in zip(chosen, inside, strict=True)}
    return choice


def gshard(gate, config, x_H, token) -> Choice:
    """g1 / (g1 + g2) and g2 / (g1 + g2)."""
    p_E = softmax(logits(gate, x_H))
    return divided({expert: p_E[expert] for expert in best(2, p_E)})


def switch(gate, config, x_H, token) -> Choice:
    p_E = softmax(logits(gate, x_H))
    return {expert: p_E[expert] for expert in best(1, p_E)}


def softmax_top_k(gate, config, x_H, token, z_E=None) -> Choice:
    """Mixtral and Qwen-MoE; DeepSeekMoE and Grok-1 without the division; DeepSeek-V2's groups by their best expert."""
    p_E = softmax(logits(gate, x_H) if z_E is None else z_E)
    bias_E = torch.zeros(len(p_E)) if gate.e_score_correction_bias is None else gate.e_score_correction_bias
    for_choice_E = [p + bias for p, bias in zip(p_E, bias_E, strict=True)]
    size = len(p_E) // config.n_group
    of_groups = [max(float(for_choice_E[expert]) for expert in group_of(size, g)) for g in range(config.n_group)]
    allowed = [expert for group in best(config.topk_group, of_groups) for expert in group_of(size, group)]
    choice = {expert: p_E[expert] for expert in best(config.num_experts_per_tok, for_choice_E, sorted(allowed))}
    choice = divided(choice) if config.norm_topk_prob else choice
    return {expert: config.routed_scaling_factor * weight for expert, weight in choice.items()}


def with_residual(gate, config, x_H, token) -> Choice:
    """MoE++: W x plus a matrix times the logits of the layer before."""
    z_E = [
        z + (row_E * token["previous_E"]).sum()
        for z, row_E in zip(logits(gate, x_H), gate.residual_weight, strict=True)
    ]
    return softmax_top_k(gate, config, x_H, token, z_E)


def deepseek_v3(gate, config, x_H, token) -> Choice:
    """Equations 12 to 16: s + b chooses, in the groups whose two best sum to most; s / sum(s) weighs."""
    s_E = [sigmoid(z) for z in logits(gate, x_H)]
    for_choice_E = [s + bias for s, bias in zip(s_E, gate.e_score_correction_bias, strict=True)]
    size = NUM_EXPERTS // config.n_group
    of_groups = [
        sum(sorted(float(for_choice_E[expert]) for expert in group_of(size, group))[-2:])
        for group in range(config.n_group)
    ]
    allowed = [expert for group in best(config.topk_group, of_groups) for expert in group_of(size, group)]
    choice = divided(
        {expert: s_E[expert] for expert in best(config.num_experts_per_tok, for_choice_E, sorted(allowed))}
    )
    return {expert: config.routed_scaling_factor * weight for expert, weight in choice.items()}


def llama4(gate, config, x_H, token) -> Choice:
    z_E = logits(gate, x_H)
    return {expert: sigmoid(z_E[expert]) for expert in best(config.num_experts_per_tok, z_E)}


def yuan(gate, config, x_H, token) -> Choice:
    """P_i = sum_j softmax_j(q_i k_j) v_j."""
    q_E, k_E, v_E = (logits(gate, x_H, rows) for rows in (gate.query, gate.key, gate.weight))
    z_E = [(softmax(q * k for k in k_E) * torch.stack(v_E)).sum() for q in q_E]
    return softmax_top_k(gate, config, x_H, token, z_E)


def skywork(gate, config, x_H, token) -> Choice:
    """Equation 6, with the unbiased deviation."""
    z_E = logits(gate, x_H)
    mean = sum(z_E) / NUM_EXPERTS
    std = (sum((z - mean) ** 2 for z in z_E) / (NUM_EXPERTS - 1)) ** 0.5
    return softmax_top_k(gate, config, x_H, token, [config.router_logit_scale * (z - mean) / std for z in z_E])


def top_p(gate, config, x_H, token) -> Choice:
    p_E = softmax(logits(gate, x_H))
    choice, total = {}, 0.0
    for expert in best(NUM_EXPERTS, p_E):
        choice[expert] = p_E[expert]
        total += float(p_E[expert])
        if total > config.router_top_p:
            break
    return choice


def remoe(gate, config, x_H, token) -> Choice:
    return {expert: z for expert, z in enumerate(logits(gate, x_H)) if z > 0}


def prototypes(gate, config, x_H, token) -> Choice:
    z_E, size, choice = logits(gate, x_H), NUM_EXPERTS // config.num_experts_per_tok, {}
    for group in range(config.num_experts_per_tok):
        experts = group_of(size, group)
        p_M = softmax(z_E[expert] for expert in experts)
        (place,) = best(1, p_M)
        choice[experts[place]] = p_M[place]
    return choice


def moge(gate, config, x_H, token) -> Choice:
    p_E, size = softmax(logits(gate, x_H)), NUM_EXPERTS // config.n_group
    chosen = [
        expert
        for group in range(config.n_group)
        for expert in best(config.num_experts_per_tok // config.n_group, p_E, group_of(size, group))
    ]
    return {expert: p_E[expert] * gate.router_scale[expert] for expert in chosen}


def hashed(gate, config, x_H, token) -> Choice:
    experts = gate.expert_of_token[token["domain"], token["id"]].tolist()
    return {expert: x_H.new_tensor(1 / config.num_experts_per_tok) for expert in experts}


def of_modality(gate, config, x_H, token) -> Choice:
    z_E, first = logits(gate, x_H), config.num_experts_per_modality[0]
    experts = range(first) if token["modality"] == 0 else range(first, NUM_EXPERTS)
    p_M = softmax(z_E[expert] for expert in experts)
    return divided({experts[place]: p_M[place] for place in best(config.num_experts_per_tok, p_M)})


def cas(gate, config, x_H, token) -> Choice:
    """p(g) p(i | g)."""
    z_E, p_G = logits(gate, x_H), softmax(logits(gate, x_H, gate.group_weight))
    size, choice = NUM_EXPERTS // config.n_group, {}
    for group in best(config.topk_group, p_G):
        experts = group_of(size, group)
        p_M = softmax(z_E[expert] for expert in experts)
        for place in best(config.num_experts_per_tok // config.topk_group, p_M):
            choice[experts[place]] = p_G[group] * p_M[place]
    return divided(choice) if config.norm_topk_prob else choice


def expert_choice(gate, config, hidden_TH) -> list[Choice]:
    """Every expert takes the K / E of a sequence's tokens that it scores highest."""
    scores = [softmax(logits(gate, x_H)) for x_H in hidden_TH]
    choices: list[Choice] = [{} for _ in scores]
    for sequence in range(BATCH):
        for expert in range(NUM_EXPERTS):
            of_expert = [p_E[expert] for p_E in scores]
            for token in best(
                LENGTH * config.num_experts_per_tok // NUM_EXPERTS, of_expert, group_of(LENGTH, sequence)
            ):
                choices[token][expert] = of_expert[token]
    return choices


BY_HAND: dict[str, tuple[Callable, dict]] = {
    "soft": (soft, {}),
    "noisy_topk": (top_k_then_softmax, {}),
    "hierarchical_noisy_topk": (hierarchical_top_k, {}),
    "hierarchical_noisy_topk, some of a group": (hierarchical_top_k, {"n_group": 2}),
    "gshard": (gshard, {}),
    "switch": (switch, {}),
    "softmax_topk": (softmax_top_k, {}),
    "softmax_topk, not divided": (softmax_top_k, {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    "sigmoid_topk": (deepseek_v3, {}),
    "llama4": (llama4, {}),
    "attention": (yuan, {}),
    "normalized_logits": (skywork, {}),
    "top_p": (top_p, {}),
    "relu": (remoe, {}),
    "prototypes": (prototypes, {}),
    "grouped": (moge, {"num_experts_per_tok": 4}),
    "hash": (hashed, {}),
    "modality": (of_modality, {}),
    "hierarchical": (cas, {}),
    "hierarchical, divided": (cas, {"topk_group": 2, "norm_topk_prob": True}),
    "zero-computation experts": (with_residual, {}),
    "a selection bias": (softmax_top_k, {}),
    "groups of DeepSeek-V2": (softmax_top_k, {}),
}


def test_every_router_is_written_by_hand():
    assert {ALL_CASES[name.partition(",")[0]]["router_type"] for name in BY_HAND} | {"expert_choice"} == set(ROUTERS)


@pytest.mark.parametrize("name", [*BY_HAND, "expert_choice"])
def test_output_and_gradients_are_those_of_the_equations(name):
    select, values = BY_HAND.get(name, (expert_choice, {}))
    config = router_config(name.partition(",")[0], **values)
    config._experts_implementation = "eager"
    block = build_block(config).double()
    by_hand = copy.deepcopy(block)
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(BATCH, LENGTH, 32, generator=generator, dtype=torch.float64)
    context = {
        "input_ids": torch.randint(0, 96, (BATCH, LENGTH), generator=generator),
        "mm_token_type_ids": torch.randint(0, 2, (BATCH, LENGTH), generator=generator),
        "domain_ids": torch.arange(BATCH) % 2,
    }
    previous_TE = torch.randn(BATCH * LENGTH, block.gate.num_experts, generator=generator, dtype=torch.float64)
    inputs = [states.clone().requires_grad_() for _ in range(2)]
    block.routing = RoutingContext(**context)
    block.routing.keep_logits(0, previous_TE)
    output = block(inputs[0])

    hidden_TH = inputs[1].view(-1, 32)
    if name == "expert_choice":
        choices = select(by_hand.gate, config, hidden_TH)
    else:
        choices = []
        for place, x_H in enumerate(hidden_TH):
            token = {
                "id": context["input_ids"].flatten()[place],
                "modality": context["mm_token_type_ids"].flatten()[place],
                "domain": context["domain_ids"][place // LENGTH],
                "previous_E": previous_TE[place],
            }
            choices.append(select(by_hand.gate, config, x_H, token))
    expected = loop_over_slots(by_hand, hidden_TH, [choice.items() for choice in choices]).view(states.shape)

    assert_close(output, expected, 1e-6)
    direction = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-6)
    for (parameter_name, parameter), of_hand in zip(block.named_parameters(), by_hand.parameters(), strict=True):
        assert (parameter.grad is None) == (of_hand.grad is None), parameter_name
        if parameter.grad is not None:
            assert_close(parameter.grad, of_hand.grad, 1e-6)
