# SPDX-License-Identifier: Apache-2.0
"""Capacity policies beside loops; recorded and native ones are in `test_routers_golden.py` and `test_routers_native.py`."""

import math

import pytest
import torch
from conftest import assert_close
from router_cases import NUM_EXPERTS, build_block, build_router, router_config

from hf_moe.models.capacity import ExpertCapacity, recycle
from hf_moe.models.routing_context import Tokens


def choose(policy: str, num_tokens: int = 48, router_type: str = "softmax_topk", factor: float = 0.75, **values):
    """A router's choice, and its capacity."""
    config = router_config(
        router_type, capacity_policy=policy, capacity_factor=factor, **{"min_capacity": 1, **values}
    )
    router = build_router(config)
    states = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(2)) + 0.5  # more of some experts
    capacity = ExpertCapacity(config, router.num_experts, router.score, router.queues_by_choice).train()
    return router(states), capacity


def loop(logits_TE, weights_TK, index_TK, capacity: ExpertCapacity, num_groups: int, mask_T) -> torch.Tensor:
    """`(T, K)`: which slots are kept, one after the other."""
    num_tokens, top_k = index_TK.shape
    is_kept_TK = torch.zeros(num_tokens, top_k, dtype=torch.bool)
    best_T = logits_TE.softmax(-1).amax(-1)
    size = num_tokens // num_groups
    for start in range(0, num_tokens, size):
        slots = [(token, choice) for token in range(start, start + size) for choice in range(top_k) if mask_T[token]]
        real = sum(bool(mask_T[token]) for token in range(start, start + size))
        room = max(capacity.min_capacity, math.ceil(capacity.factor * top_k * real / capacity.num_experts - 1e-9))
        if capacity.policy == "probability":
            slots.sort(key=lambda slot: -float(weights_TK[slot]))
        elif capacity.policy == "batch_prioritized":
            slots.sort(key=lambda slot: (slot[1], -float(best_T[slot[0]])))
        elif capacity.queues_by_choice:
            slots.sort(key=lambda slot: slot[1])
        taken = [0] * capacity.num_experts
        for slot in slots:
            expert = int(index_TK[slot])
            is_kept_TK[slot] = taken[expert] < room
            taken[expert] += 1
    return is_kept_TK


@pytest.mark.parametrize("group", ["batch", "sequence", 12])
@pytest.mark.parametrize("policy", ["position", "probability", "batch_prioritized"])
@pytest.mark.parametrize("router_type", ["softmax_topk", "gshard"])
def test_policies_beside_a_loop(policy, group, router_type):
    (logits_TE, weights_TK, index_TK), capacity = choose(policy, router_type=router_type, capacity_group=group)
    mask_T = torch.ones(48, dtype=torch.bool)
    mask_T[[0, 1, 2, 30]] = False
    tokens = Tokens(batch_size=3, mask_T=mask_T)
    kept_weights_TK, kept_index_TK = capacity(logits_TE, weights_TK, index_TK, tokens)
    num_groups = {"batch": 1, "sequence": 3, 12: 4}[group]
    is_kept_TK = loop(logits_TE, weights_TK, index_TK, capacity, num_groups, mask_T)
    assert 10 < is_kept_TK.sum() < 80
    assert torch.equal(kept_index_TK, torch.where(is_kept_TK, index_TK, NUM_EXPERTS))
    assert torch.equal(kept_weights_TK, weights_TK * is_kept_TK)


def test_random_drops_keep_the_room_and_are_even():
    (logits_TE, weights_TK, index_TK), capacity = choose("random", num_tokens=64)
    index_TK = torch.zeros_like(index_TK[:, :1])  # all want the first expert
    kept_T = torch.zeros(64)
    torch.manual_seed(0)
    for _ in range(400):
        _, kept_TK = capacity(logits_TE, weights_TK[:, :1], index_TK, Tokens(batch_size=1))
        assert (kept_TK == 0).sum() == 12
        kept_T += (kept_TK == 0)[:, 0]
    assert kept_T.min() > 40, "75 of 400 expected, with a standard deviation of 8"
    assert kept_T.max() < 115
    capacity.eval()
    capacity.eval_factor = 0.75
    _, kept_TK = capacity(logits_TE, weights_TK[:, :1], index_TK, Tokens(batch_size=1))
    assert (kept_TK[:, 0] == 0).nonzero().flatten().tolist() == list(range(12)), "in evaluation the first ones"


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_recycle(factor):
    """Hunyuan-Large: nothing is dropped while there is room, nobody gets more than his room, and who has a place keeps it."""
    (logits_TE, weights_TK, index_TK), capacity = choose(
        "recycle", num_tokens=64, factor=factor, num_experts_per_tok=1, norm_topk_prob=False
    )
    tokens = Tokens(batch_size=1)
    capacity.policy = "position"
    _, by_position_TK = capacity(logits_TE, weights_TK, index_TK, tokens)
    capacity.policy = "recycle"
    torch.manual_seed(0)
    new_weights_TK, new_index_TK = capacity(logits_TE, weights_TK, index_TK, tokens)
    has_place_TK = by_position_TK < NUM_EXPERTS
    assert not has_place_TK.all()
    assert torch.equal(new_index_TK[has_place_TK], index_TK[has_place_TK])
    assert torch.equal(new_weights_TK[has_place_TK], weights_TK[has_place_TK])
    room = math.ceil(factor * 64 / NUM_EXPERTS)
    load_E = torch.bincount(new_index_TK.flatten(), minlength=NUM_EXPERTS + 1)
    assert load_E[:NUM_EXPERTS].max() <= room
    assert load_E[NUM_EXPERTS] == max(0, 64 - NUM_EXPERTS * room)
    is_recycled_TK = ~has_place_TK & (new_index_TK < NUM_EXPERTS)
    expected_T = logits_TE.softmax(-1).gather(-1, new_index_TK.clamp(max=NUM_EXPERTS - 1))
    assert_close(new_weights_TK[is_recycled_TK], expected_T[is_recycled_TK], 1e-6)


def test_recycled_slots_are_spread_over_the_free_places():
    index_TK = torch.zeros(30, 1, dtype=torch.long)
    index_TK[4:] = 4
    room_BE = torch.tensor([[4, 3, 9, 0]])
    counts = torch.zeros(5)
    torch.manual_seed(0)
    for _ in range(300):
        is_overflow = torch.zeros(30, 1, dtype=torch.bool)
        is_overflow[torch.randperm(26)[:6] + 4] = True
        new = recycle(index_TK, is_overflow, room_BE, 1)
        assert torch.equal(new[~is_overflow], index_TK[~is_overflow])
        counts += torch.bincount(new[is_overflow], minlength=5)
    assert counts[0] == counts[3] == counts[4] == 0
    assert counts[2] / counts[1] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("top_k", [2, 4])
def test_recycling_gives_no_expert_twice_and_is_deterministic_in_evaluation(top_k):
    chosen, capacity = choose("recycle", num_tokens=64, factor=1.0, num_experts_per_tok=top_k)
    capacity.eval_factor = 1.0
    for is_training in (True, False):
        torch.manual_seed(0)
        _, index_TK = capacity.train(is_training)(*chosen, Tokens(batch_size=1))
        per_token_TE = torch.zeros(64, NUM_EXPERTS + 1).scatter_add_(1, index_TK, torch.ones(64, top_k))
        assert per_token_TE[:, :-1].max() == 1
        assert per_token_TE[:, :-1].sum(0).max() <= 64 * top_k / NUM_EXPERTS
        assert per_token_TE[:, -1].sum() <= 0.05 * 64 * top_k, "there is room for nearly all"
    state = torch.get_rng_state()
    _, again_TK = capacity(*chosen, Tokens(batch_size=1))
    assert torch.equal(again_TK, index_TK)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_1_keeps_its_weight_so_that_the_router_learns():
    """Divided by its sum a single weight is 1, and its gradient 0: refused."""
    values = {"num_experts_per_tok": 1, "capacity_policy": "recycle", "capacity_factor": 1.0, "min_capacity": 1}
    block = build_block(router_config("softmax_topk", norm_topk_prob=False, **values)).train()
    block(torch.randn(2, 24, 32)).square().sum().backward()
    assert block.gate.weight.grad.abs().max() > 1e-2
    with pytest.raises(Exception, match="needs `norm_topk_prob=False`"):
        router_config("softmax_topk", **values)


@pytest.mark.parametrize("case", ["grouped", "prototypes", "hierarchical", "modality"])
def test_recycle_is_refused_where_a_token_may_not_have_any_expert(case):
    with pytest.raises(Exception, match="capacity_policy"):
        router_config(case, capacity_policy="recycle")


def test_zero_computation_experts_have_room_of_their_own():
    """MoE++: gamma tau T / (tau N + Z) for a feed-forward, gamma T / (tau N + Z) for another."""
    _, capacity = choose("position", factor=1.1, num_copy_experts=3, num_zero_experts=1, zero_expert_tau=0.5)
    room_BE = capacity.room(Tokens(batch_size=1), 1, 480, 1.1, torch.device("cpu"))
    parts = 0.5 * 8 + 4
    expected = [math.ceil(1.1 * 2 * 480 * 0.5 / parts)] * 8 + [math.ceil(1.1 * 2 * 480 / parts)] * 4
    assert room_BE.tolist() == [expected]


def test_evaluation_drops_only_if_asked():
    for factor, drops in ((None, False), (0.5, True)):
        (logits_TE, weights_TK, index_TK), capacity = choose("position", eval_capacity_factor=factor)
        _, kept_TK = capacity.eval()(logits_TE, weights_TK, index_TK, Tokens(batch_size=1))
        assert (kept_TK == NUM_EXPERTS).any() == drops


def test_a_dropped_token_passes_on_through_the_residual_stream():
    block = build_block(router_config("switch", capacity_factor=0.01, min_capacity=0)).train()
    block.capacity.factor = 1e-12
    assert (block(torch.randn(2, 5, 32)) == 0).all()


def test_groups_that_do_not_divide_the_tokens_are_refused():
    (logits_TE, weights_TK, index_TK), capacity = choose("position", capacity_group=13)
    with pytest.raises(ValueError, match=r"`capacity_group` \(13\) must divide"):
        capacity(logits_TE, weights_TK, index_TK, Tokens(batch_size=1))
