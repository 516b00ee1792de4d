# SPDX-License-Identifier: Apache-2.0
"""Each method on one feed-forward, beside closed forms: what is kept, what is drawn anew, how far the output moves."""

import math

import pytest
import torch
from conftest import assert_close, dense_config

from hf_moe import UpcycleConfig, plan_upcycle
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.feed_forward import FeedForward, LayerContext
from hf_moe.upcycling.methods import METHODS, build_sparse_layer
from hf_moe.upcycling.partition import balanced_assignment, balanced_kmeans
from hf_moe.upcycling.scaling import scale_output


HIDDEN, INTERMEDIATE = 64, 256


def feed_forward(is_gated: bool = True, has_bias: bool = False, dtype=torch.float32, seed: int = 0) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    up_shape = (INTERMEDIATE, HIDDEN)
    biases = (
        [normal(INTERMEDIATE) if is_gated else None, normal(INTERMEDIATE), normal(HIDDEN)] if has_bias else [None] * 3
    )
    return FeedForward(
        normal(*up_shape) if is_gated else None, normal(*up_shape), normal(HIDDEN, INTERMEDIATE), *biases
    )


def context(method: str, num_experts: int = 8, **values) -> LayerContext:
    recipe = UpcycleConfig(method=method, num_experts=num_experts, **{"num_experts_per_tok": 2, **values})
    return LayerContext(recipe, 3, num_experts)


def output(expert: FeedForward, hidden_states: torch.Tensor) -> torch.Tensor:
    return expert.forward(hidden_states, torch.nn.functional.silu)[1]


def hidden_states(count: int = 512) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


def intact_neurons(expert: FeedForward, dense: FeedForward) -> torch.Tensor:
    """Which neurons are the dense ones in every matrix."""
    same = (expert.up_proj == dense.up_proj).all(dim=1) & (expert.down_proj == dense.down_proj).all(dim=0)
    return same if dense.gate_proj is None else same & (expert.gate_proj == dense.gate_proj).all(dim=1)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("scale_on", ["up_down", "down"])
def test_granular_copies_add_up(is_gated, has_bias, k, scale_on):
    dense, x = feed_forward(is_gated, has_bias), hidden_states()
    task = context("granular", num_experts_per_tok=k, granularity=4, scale_on=scale_on)
    layer = build_sparse_layer(dense, task)
    weights = [0.7, 0.3] if k == 8 else [1.0]
    mixed = sum(
        weight / 4 * output(layer.expert(copy * 4 + shard), x)
        for copy, weight in enumerate(weights)
        for shard in range(4)
    )
    assert_close(mixed, output(dense, x))


@pytest.mark.parametrize("scale", [2.0, 4.0, 8.0])
def test_scaling_by_a_power_of_two_rounds_nothing(scale):
    dense = feed_forward(dtype=torch.bfloat16)
    scaled = scale_output(dense, scale, "up_down")
    factors = [(scaled[i].float() / dense[i].float()).unique() for i in range(3)]
    assert [len(factor) for factor in factors] == [1, 1, 1]
    assert factors[0] == 1
    assert factors[1] * factors[2] == scale


# The errors that Megatron's scaling was measured to have: research on 2410.07524's released code.
@pytest.mark.parametrize(
    ("scale", "low", "high"), [(2, 0.06, 0.08), (4, 0.13, 0.15), (8, 0.21, 0.21), (16, 0.26, 0.30)]
)
def test_megatron_scaling_changes_a_gated_feed_forward(scale, low, high):
    # Weights of the size that trained models have: pre-activations of a standard deviation of about 1.
    dense = FeedForward(*(tensor / math.sqrt(tensor.shape[1]) for tensor in feed_forward()[:3]))
    x = hidden_states(4096)
    error = relative_error(output(scale_output(dense, scale, "megatron"), x) / scale, output(dense, x))
    assert 0.8 * low <= error <= 1.2 * high


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_residual_is_silent(is_gated, has_bias):
    dense, x = feed_forward(is_gated, has_bias), hidden_states(8)
    layer = build_sparse_layer(dense, context("residual", granularity=4, expert_noise=0.1))
    assert layer.shared_expert is dense
    assert not output(layer.expert(5), x).any()
    plain = build_sparse_layer(dense, context("residual", granularity=4))
    neurons = torch.cat([plain.expert(e).up_proj for e in range(4)])
    assert torch.equal(neurons.sort(dim=0).values, dense.up_proj.sort(dim=0).values)
    assert not torch.equal(plain.expert(0).up_proj, plain.expert(4).up_proj)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("index_sets", ["shared", "independent"])
def test_drop_keeps_what_it_says(ratio, index_sets):
    dense = feed_forward()
    layer = build_sparse_layer(dense, context("drop", reinit_ratio=ratio, index_sets=index_sets))
    intact = intact_neurons(layer.expert(0), dense).sum().item()
    if index_sets == "shared":
        assert intact == INTERMEDIATE - math.floor(ratio * INTERMEDIATE)
    else:
        expected = INTERMEDIATE * (1 - ratio) ** 3
        assert abs(intact - expected) < 4 * math.sqrt(expected)
    assert torch.equal(layer.expert(0).up_proj, layer.expert(0).up_proj)
    assert not torch.equal(layer.expert(0).up_proj, layer.expert(1).up_proj)
    new = layer.expert(0).down_proj
    assert new.mean() == pytest.approx(dense.down_proj.mean().item(), abs=0.02)
    assert new.std() == pytest.approx(dense.down_proj.std().item(), rel=0.05)


# A share p of the neurons' outputs is replaced by independent ones: the squared error is 2 p.
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("index_sets", ["shared", "independent"])
def test_drop_moves_the_output_as_far_as_it_must(ratio, index_sets):
    dense, x = feed_forward(), hidden_states(2048)
    expert = build_sparse_layer(dense, context("drop", reinit_ratio=ratio, index_sets=index_sets)).expert(0)
    replaced = ratio if index_sets == "shared" else 1 - (1 - ratio) ** 3
    assert relative_error(output(expert, x), output(dense, x)) == pytest.approx(math.sqrt(2 * replaced), rel=0.2)


def test_drop_replaces_biases_with_their_rows():
    dense = feed_forward(has_bias=True)
    expert = build_sparse_layer(dense, context("drop")).expert(0)
    intact = intact_neurons(expert, dense)
    assert torch.equal(expert.up_bias == dense.up_bias, intact)
    assert torch.equal(expert.gate_bias == dense.gate_bias, intact)
    assert torch.equal(expert.down_bias, dense.down_bias)


def test_qwen_shuffles_slices_and_replaces_half():
    dense = feed_forward()
    untouched = build_sparse_layer(dense, context("qwen", granularity=4, reinit_ratio=0.0))
    one_copy = torch.cat([untouched.expert(e).gate_proj for e in range(4)])
    assert torch.equal(one_copy.sort(dim=0).values, dense.gate_proj.sort(dim=0).values)
    assert not torch.equal(one_copy, dense.gate_proj)
    layer = build_sparse_layer(dense, context("qwen", granularity=4))
    for before, after in zip(untouched.expert(2)[:3], layer.expert(2)[:3], strict=True):
        assert (before == after).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("split_by", ["random", "kmeans"])
@pytest.mark.parametrize("is_gated", [True, False])
def test_split_loses_no_neuron(split_by, is_gated):
    dense = feed_forward(is_gated, has_bias=True)
    layer = build_sparse_layer(dense, context("split", split_by=split_by, scale_on="down"))
    experts = [layer.expert(e) for e in range(8)]
    assert {expert.intermediate_size for expert in experts} == {INTERMEDIATE // 8}
    neurons = torch.cat([expert.up_proj for expert in experts])
    assert torch.equal(neurons.sort(dim=0).values, dense.up_proj.sort(dim=0).values)
    x = hidden_states(8)
    everything = context("split", split_by=split_by, num_experts_per_tok=8, router_init="zero")
    parts = build_sparse_layer(dense, everything)
    assert_close(sum(output(parts.expert(e), x) / 8 for e in range(8)), output(dense, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_relative_to_each_tensor(dtype):
    dense = feed_forward(dtype=dtype)
    dense = dense._replace(down_proj=dense.down_proj * 1e-3)
    expert = build_sparse_layer(dense, context("copy", expert_noise=0.1)).expert(0)
    for before, after in zip(dense[:3], expert[:3], strict=True):
        assert after.dtype == dtype
        assert ((after.float() - before.float()).std() / before.float().std()) == pytest.approx(0.1, rel=0.05)


def test_copies_make_up_for_weights_that_do_not_sum_to_one():
    dense, x = feed_forward(), hidden_states(8)
    layer = build_sparse_layer(dense, context("copy", norm_topk_prob=False, router_init="zero"))
    assert_close(2 / 8 * output(layer.expert(0), x), output(dense, x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "granular", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 3},
            "must divide the dense",
        ),
        (
            {"method": "granular", "granularity": 4, "num_experts": 8, "num_experts_per_tok": 2},
            "multiple of `granularity`",
        ),
        (
            {"method": "granular", "granularity": 4, "num_experts": 6, "num_experts_per_tok": 4},
            "multiple of `granularity`",
        ),
        ({"method": "split", "num_experts": 6}, "does not come out even"),
    ],
)
def test_what_does_not_divide_is_refused(values, message):
    recipe = UpcycleConfig(**values)
    with pytest.raises(UpcycleError, match=message):
        METHODS[recipe.method].sizes(recipe, recipe.num_experts, INTERMEDIATE)


def test_experts_that_grouped_products_cannot_run_are_refused():
    with pytest.raises(UpcycleError, match="intermediate size of 12, but .* multiple of 8"):
        plan_upcycle(dense_config("llama"), UpcycleConfig(method="split", num_experts=4, num_experts_per_tok=2))


def test_balanced_kmeans_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(6, 16, generator=generator)
    planted = torch.arange(120) % 6
    points = centers[planted] + torch.randn(120, 16, generator=generator)
    labels, centroids = balanced_kmeans(points, 6, generator)
    assert len({(a, b) for a, b in zip(planted.tolist(), labels.tolist(), strict=True)}) == 6
    assert torch.cdist(centroids, centers).min(dim=1).values.max() < 2


def test_balanced_assignment_gives_every_cluster_its_share():
    labels = balanced_assignment(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)))
    assert labels.bincount().tolist() == [12] * 5
