# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3's bias beside its update by hand, and what all ways of balancing make of a skewed stream."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from router_gradients import rows
from small_models import small_moe

from hf_moe import BiasBalancer, LoadBalancer, RoutingRecorder, load_router_bias
from hf_moe.models.routers import ROUTERS
from hf_moe.training.bias_balancing import selection_biases
from hf_moe.training.routers import find_routers


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, build_model, build_router, router_config, with_routing_inputs


def stream(number: int, rows: int = 8) -> list[torch.Tensor]:
    """Hidden states that have much in common, which some routers' experts like more than others."""
    generator = torch.Generator().manual_seed(0)
    return [1 + torch.randn(rows, 32, 32, generator=generator) for _ in range(number)]


def skewed(kind: str, **values) -> transformers.PreTrainedModel:
    """A model whose routers prefer the first experts for what the stream has in common."""
    model = small_moe(kind, **values)
    with torch.no_grad():
        for router in find_routers(model).values():
            router.module.weight.add_(0.05 * torch.linspace(1, -1, len(router.module.weight))[:, None])
    return model.train()


def max_violation(model: torch.nn.Module) -> float:
    with RoutingRecorder(model) as recorder, torch.no_grad():
        for inputs_embeds in stream(16):
            model(inputs_embeds=inputs_embeds)
    return recorder.statistics().summary()["max_violation"]


def test_the_update_by_hand():
    model = small_moe("deepseek_v3").train()
    balancer = BiasBalancer(0.01).attach(model)
    routers, chosen = find_routers(model), {}
    for name, router in routers.items():
        router.module.register_forward_hook(lambda m, a, o, name=name: chosen.setdefault(name, []).append(o[2]))
    before = {name: router.module.e_score_correction_bias.clone() for name, router in routers.items()}
    for inputs_embeds in stream(2):  # two micro-batches
        model(inputs_embeds=inputs_embeds)
    balancer.step()
    for name, router in routers.items():
        counts = torch.bincount(torch.cat(chosen[name]).flatten(), minlength=4).float()
        change = 0.01 * torch.sign(counts.mean() - counts)
        expected = before[name] + change - change.mean()
        assert torch.allclose(router.module.e_score_correction_bias, expected, atol=1e-7)


# The experts that compete with each other; how much each of them should serve, by the others of its part.
PARTS = {
    "modality": ({}, [range(5), range(5, 8)]),
    "softmax_topk": ({"num_experts_per_modality": [3, 5]}, [range(3), range(3, 8)]),
    "sigmoid_topk": (
        {"num_experts_per_modality": [4, 2, 2], "n_group": 1, "topk_group": 1},
        [range(4), range(4, 6), range(6, 8)],
    ),
    "llama4": ({"num_experts_per_modality": [3, 5]}, [range(3), range(3, 8)]),
    "grouped": ({}, [range(4), range(4, 8)]),
    "groups of DeepSeek-V2": ({}, [range(8)]),
    "zero-computation experts": ({"zero_expert_tau": 0.25}, [range(12)]),
}


@pytest.mark.parametrize("case", PARTS)
def test_experts_are_compared_with_those_they_compete_with(case, batch):
    values, parts = PARTS[case]
    model = build_model(case, use_expert_bias=True, **values).train()
    inputs, (text, *_) = with_routing_inputs(batch, model), parts
    balancer = BiasBalancer(0.01).attach(model)
    for is_text_alone in (False, True):
        if is_text_alone and len(parts) > 1 and case != "grouped":
            inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            parts = [text]  # no other expert moves
        before = {name: bias.clone() for name, bias in selection_biases(model).items()}
        with RoutingRecorder(model) as recorder:
            model(**inputs)
        balancer.step()
        for name, bias in selection_biases(model).items():
            counts, expected = recorder.statistics()[name].counts.tolist(), before[name].tolist()
            for part in parts:
                shares = [0.25 if case.startswith("zero") and expert < 8 else 1.0 for expert in part]
                served = sum(counts[expert] for expert in part)
                even = [served * share / sum(shares) for share in shares]
                signs = [(e > counts[expert]) - (e < counts[expert]) for e, expert in zip(even, part, strict=True)]
                for sign, expert in zip(signs, part, strict=True):
                    expected[expert] += 0.01 * (sign - sum(signs) / len(part))
            assert bias.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", ALL_CASES)
def test_parts_are_all_of_the_experts(case):
    router = build_router(router_config(case))
    assert sum(router.sizes_of_parts) == router.num_experts
    assert len(router.sizes_of_parts) == {
        **{"hierarchical_noisy_topk": 4, "hierarchical": 4, "prototypes": 2, "grouped": 2, "modality": 2, "hash": 2}
    }.get(case, 1)


def test_small_changes_add_up_in_bfloat16():
    """The bias of 0.5 stays 0.5 in bfloat16 when 0.001 is added."""
    model = small_moe("deepseek_v3").train()
    name, bias = next(iter(selection_biases(model).items()))
    module = model.get_submodule(name)
    module.e_score_correction_bias = torch.full_like(bias, 0.5, dtype=torch.bfloat16)
    balancer = BiasBalancer(1e-3).attach(model)
    for _ in range(20):
        model(inputs_embeds=stream(1)[0])
        balancer.step()
    assert (module.e_score_correction_bias - 0.5).abs().max() > 0.005
    assert balancer.state_dict()[name] == pytest.approx(module.e_score_correction_bias.tolist(), abs=4e-3)


@pytest.mark.parametrize("kind", ["deepseek_v3", "moe_llama", "minimax_m2", "lfm2_moe", "ernie4_5_moe"])
def test_biases_are_found_wherever_they_are(kind):
    """A buffer of the router, of its block, or a parameter of a module in the block."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "num_experts_per_tok": 2,
    }
    fields |= {
        "minimax_m2": {"num_local_experts": 4, "head_dim": 8},
        "lfm2_moe": {
            "num_experts": 4,
            "num_dense_layers": 0,
            "layer_types": ["full_attention"] * 2,
            "use_expert_bias": True,
        },
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    }.get(kind, {})
    if kind == "deepseek_v3":
        model = small_moe(kind)
    elif kind == "moe_llama":
        model = small_moe(kind, num_hidden_layers=2, use_expert_bias=True)
    else:
        config = transformers.AutoConfig.for_model(kind, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
    biases = selection_biases(model)
    assert len(biases) == 2
    before = {name: bias.clone() for name, bias in biases.items()}
    balancer = BiasBalancer(0.1).attach(model.train())
    model(inputs_embeds=stream(1)[0])
    balancer.step()
    assert all((bias != before[name]).any() for name, bias in selection_biases(model).items())


@pytest.mark.parametrize(("kind", "values"), [("deepseek_v3", {}), ("moe_llama", {"use_expert_bias": True})])
def test_the_bias_balances_a_skewed_stream(kind, values):
    model = skewed(kind, **values)
    assert max_violation(model) > 0.5
    balancer = BiasBalancer(0.005).attach(model)
    for inputs_embeds in stream(200):
        model(inputs_embeds=inputs_embeds)
        balancer.step()
    balancer.detach()
    assert max_violation(model) < 0.1


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [("switch", 1), ("global_batch", 1), ("global_batch", 4), ("sequence", 1), ("importance_load", 1)],
)
def test_losses_balance_a_skewed_stream(kind, micro_batches):
    model = skewed("mixtral")
    assert max_violation(model) > 0.5
    parameters = [router.module.weight for router in find_routers(model).values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    balancer = LoadBalancer(kind, 1.0).attach(model)
    for inputs_embeds in stream(150):
        for part in inputs_embeds.chunk(micro_batches):
            (model(inputs_embeds=part).logits.sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    balancer.detach()
    assert max_violation(model) < 0.1


def test_without_balancing_it_stays_skewed():
    model = skewed("mixtral")
    before = max_violation(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for inputs_embeds in stream(50):
        model(inputs_embeds=inputs_embeds).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max_violation(model) > max(0.3, before / 2)


def test_models_without_a_bias_are_refused():
    with pytest.raises(ValueError, match="MixtralTopKRouter.* have no bias to choose experts with"):
        BiasBalancer().attach(small_moe("mixtral"))
    readers = [name for name, router in ROUTERS.items() if "use_expert_bias" in router.options]
    assert len(readers) == 7
    with pytest.raises(ValueError, match=f"`router_type` of {', '.join(map(repr, sorted(readers)))}, or"):
        BiasBalancer().attach(small_moe("moe_llama"))
    with pytest.raises(ValueError, match="update_rate is -1"):
        BiasBalancer(-1)


def test_a_saved_bias_is_given_to_routers_that_have_none(tmp_path):
    model = small_moe("moe_llama", use_expert_bias=True)
    balancer = BiasBalancer(0.5).attach(model.train().requires_grad_(True))
    model(torch.stack([row["input_ids"] for row in rows()]))
    balancer.step()
    balancer.save(tmp_path)
    other = small_moe("moe_llama")
    load_router_bias(other, tmp_path)
    for name, bias in selection_biases(model).items():
        assert bias.any()
        assert torch.equal(selection_biases(other)[name], bias)
    other.save_pretrained(tmp_path / "saved")
    assert selection_biases(type(other).from_pretrained(tmp_path / "saved")).keys() == selection_biases(model).keys()
    smaller = small_moe("moe_llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="are not those of this MoeLlamaForCausalLM"):
        load_router_bias(smaller, tmp_path)
    assert smaller.model.layers[0].mlp.gate.e_score_correction_bias is None


def test_the_biases_of_another_model_are_refused():
    balancer = BiasBalancer()
    balancer.load_state_dict({"model.layers.9.mlp.gate": [0.0] * 4})
    with pytest.raises(ValueError, match=r"those of another model: it has no router 'model.layers.9.mlp.gate'"):
        balancer.attach(small_moe("deepseek_v3"))
