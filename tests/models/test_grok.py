# SPDX-License-Identifier: Apache-2.0
"""Grok-1 as a configuration of `MoeGemma2`, against its layers written out; options of the block that families lack."""

import math
from dataclasses import fields

import pytest
import torch
from conftest import FAMILIES, UNGATED_FAMILIES, assert_close, dense_config, moe_class, moe_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.models.configuration_block import BLOCK_OPTIONS


REFUSED = (StrictDataclassError, ValueError)
LAYERS, EXPERTS, WIDTH, INNER, HEADS, GROUPS, HEAD = 3, 8, 32, 24, 4, 2, 16
OUTPUT_MULTIPLIER = 0.5773502691896257
GROK = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "norm_topk_prob": False,
    "router_dtype": "float32",
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": None,
    "logits_scaling": 1 / OUTPUT_MULTIPLIER,
    "layer_types": ["full_attention"] * LAYERS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def grok_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a tiny Grok-1, in float64 and in its layout: matrices map their rows to their columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.15) -> torch.Tensor:
        return (std * torch.randn(shape, generator=generator)).double()

    weights = {"embeddings": normal(96, WIDTH), "norm": 1 + normal(WIDTH)}
    for layer in range(LAYERS):
        weights |= {
            f"{layer}.query": normal(WIDTH, HEADS * HEAD, std=2.0),  # so that the cap of 30 matters
            f"{layer}.key": normal(WIDTH, GROUPS * HEAD, std=2.0),
            f"{layer}.value": normal(WIDTH, GROUPS * HEAD),
            f"{layer}.output": normal(HEADS * HEAD, WIDTH),
            f"{layer}.router": normal(WIDTH, EXPERTS, std=0.5),
            f"{layer}.linear": normal(EXPERTS, WIDTH, INNER),
            f"{layer}.linear_v": normal(EXPERTS, WIDTH, INNER),
            f"{layer}.linear_1": normal(EXPERTS, INNER, WIDTH),
        }
        weights |= {f"{layer}.norm_{place}": 1 + normal(WIDTH) for place in range(4)}
    return weights


def state_dict_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How a checkpoint of Grok-1 maps to ours."""
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    state = {"embed_tokens.weight": weights["embeddings"], "norm.weight": weights["norm"] - 1}
    for layer in range(LAYERS):
        old, new = f"{layer}.", f"layers.{layer}."
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            state[f"{new}self_attn.{ours}_proj.weight"] = weights[old + theirs].T
        for place, name in enumerate(norms):
            state[f"{new}{name}_layernorm.weight"] = weights[f"{old}norm_{place}"] - 1
        gate_up = torch.cat([weights[old + "linear"], weights[old + "linear_v"]], dim=-1)
        state[f"{new}mlp.gate.weight"] = weights[old + "router"].T
        state[f"{new}mlp.experts.gate_up_proj"] = gate_up.transpose(1, 2)
        state[f"{new}mlp.experts.down_proj"] = weights[old + "linear_1"].transpose(1, 2)
    return {f"model.{name}": tensor.float().contiguous() for name, tensor in state.items()}


def rms_norm(inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale * inputs / (inputs.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def rotate(head: torch.Tensor, position: int) -> torch.Tensor:
    first, second = head.chunk(2)
    angles = position / 10000.0 ** (torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned)


def grok_attention(rows: torch.Tensor, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Position by position, head by head."""
    query, key, value = (rows @ weights[f"{layer}.{name}"] for name in ("query", "key", "value"))
    outputs = torch.zeros(len(rows), HEADS * HEAD, dtype=torch.float64)
    for head in range(HEADS):
        own = slice(head * HEAD, (head + 1) * HEAD)
        group = head // (HEADS // GROUPS)
        shared = slice(group * HEAD, (group + 1) * HEAD)
        for position in range(len(rows)):
            turned = rotate(query[position, own], position)
            logits = torch.stack([turned @ rotate(key[past, shared], past) for past in range(position + 1)])
            logits = 30.0 * torch.tanh(logits * HEAD**-0.5 / 30.0)
            outputs[position, own] = logits.softmax(0) @ value[: position + 1, shared]
    return outputs @ weights[f"{layer}.output"]


def grok_experts(rows: torch.Tensor, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """The two most probable experts of eight, weighted by their probabilities as they are."""
    outputs = []
    for row in rows:
        probabilities = (row @ weights[f"{layer}.router"]).softmax(0)
        total = torch.zeros_like(row)
        for expert in sorted(range(EXPERTS), key=lambda expert: -probabilities[expert])[:2]:
            gate = row @ weights[f"{layer}.linear"][expert]
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            inner = gate * (row @ weights[f"{layer}.linear_v"][expert])
            total += probabilities[expert] * (inner @ weights[f"{layer}.linear_1"][expert])
        outputs.append(total)
    return torch.stack(outputs)


def grok_layer(rows: torch.Tensor, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """A norm before and a norm behind both parts, the latter before the residual sum."""
    norms = [weights[f"{layer}.norm_{place}"] for place in range(4)]
    rows = rows + rms_norm(grok_attention(rms_norm(rows, norms[0]), weights, layer), norms[1])
    return rows + rms_norm(grok_experts(rms_norm(rows, norms[2]), weights, layer), norms[3])


def grok_logits(input_ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = weights["embeddings"][input_ids] * math.sqrt(WIDTH)
    for layer in range(LAYERS):
        rows = grok_layer(rows, weights, layer)
    return rms_norm(rows, weights["norm"]) @ weights["embeddings"].T * OUTPUT_MULTIPLIER


def grok_model(weights: dict[str, torch.Tensor], **values):
    model = moe_class("gemma2", "ForCausalLM")(moe_config("gemma2", **{**GROK, **values}))
    missing, unexpected = model.load_state_dict(state_dict_of(weights), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model.eval()


@torch.no_grad()
def test_layer_equals_grok():
    weights = grok_weights()
    model, rows = grok_model(weights), torch.randn(7, WIDTH, dtype=torch.float64)
    layer = model.model.layers[1]
    positions = torch.arange(7)[None]
    mask = torch.full((1, 1, 7, 7), torch.finfo(torch.float32).min).triu(1)
    actual = layer(
        rows.float()[None], position_embeddings=model.model.rotary_emb(rows.float(), positions), attention_mask=mask
    )
    assert_close(actual[0], grok_layer(rows, weights, 1))
    # The norm behind the experts hides whether the weights sum to 1.
    assert_close(layer.mlp(rows.float()[None])[0], grok_experts(rows, weights, 1))


@torch.no_grad()
def test_model_equals_grok(tmp_path):
    weights = grok_weights()
    model, input_ids = grok_model(weights), torch.randint(3, 96, (9,))
    expected = grok_logits(input_ids, weights)
    assert_close(model(input_ids[None]).logits[0], expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(input_ids[None]).logits[0], expected)
    generated = model.generate(input_ids[None], max_new_tokens=3, min_new_tokens=3, pad_token_id=0)[0]
    for length in (9, 10, 11):
        logits = grok_logits(generated[:length], weights)[-1]
        logits[2] = -torch.inf  # the end, which `min_new_tokens` keeps away
        assert generated[length] == logits.argmax()


@pytest.mark.parametrize(
    "values",
    [
        {"attn_logit_softcapping": None},
        {"query_pre_attn_scalar": 2 * HEAD},
        {"logits_scaling": 1.0},
        {"hidden_activation": "silu"},
        {"sliding_window": 4, "layer_types": ["sliding_attention"] * LAYERS},
    ],
    ids=lambda values: next(iter(values)),
)
@torch.no_grad()
def test_every_option_of_grok_matters(values):
    weights = grok_weights()
    input_ids = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(0))
    actual, expected = grok_model(weights, **values)(input_ids[None]).logits[0], grok_logits(input_ids, weights)
    assert (actual - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_logits_are_divided_before_they_are_capped():
    weights, input_ids = grok_weights(), torch.randint(3, 96, (9,))
    expected = 2.0 * torch.tanh(grok_logits(input_ids, weights) / 2.0)
    assert_close(grok_model(weights, final_logit_softcapping=2.0)(input_ids[None]).logits[0], expected)


@torch.no_grad()
def test_router_of_zeros_gives_an_eighth_each():
    weights = grok_weights()
    for layer in range(LAYERS):
        weights[f"{layer}.router"].zero_()
        for name in ("linear", "linear_v", "linear_1"):
            weights[f"{layer}.{name}"][:] = weights[f"{layer}.{name}"][0].clone()
    block, rows = grok_model(weights).model.layers[0].mlp, torch.randn(5, WIDTH)
    _, top_k_weights, _ = block.gate(rows)
    assert (top_k_weights == 1 / 8).all()
    gate, up = (rows @ weights[f"0.{name}"][0].float() for name in ("linear", "linear_v"))
    expert = (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weights["0.linear_1"][0].float()
    assert_close(block(rows[None])[0], expert / 4)


@torch.no_grad()
def test_router_computes_in_float32():
    model = grok_model(grok_weights()).to(torch.bfloat16)
    gate, rows = model.model.layers[0].mlp.gate, torch.randn(5, WIDTH, dtype=torch.bfloat16)
    logits, weights, index = gate(rows)
    expected = rows.float() @ gate.weight.float().T
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert_close(weights, expected.softmax(-1).gather(-1, index))


def test_scale_of_the_logits_must_be_positive():
    with pytest.raises(REFUSED, match="`logits_scaling` must be positive, got 0"):
        moe_config("gemma2", logits_scaling=0)


ALL = {**FAMILIES, **UNGATED_FAMILIES}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("option", BLOCK_OPTIONS)
def test_options_that_a_family_lacks_are_refused(family, option):
    able, neutral, instead = BLOCK_OPTIONS[option]
    config_class = moe_class(family, "Config")
    if option in {field.name for field in fields(config_class)}:
        assert config_class.__name__ in able
        value = 3 if option == "query_pre_attn_scalar" else 3.0
        assert getattr(moe_config(family, **{option: value}), option) == value
        return
    assert config_class.__name__ not in able
    named = instead or " or ".join(able)
    with pytest.raises(REFUSED) as error:
        moe_config(family, **{option: 3.5})
    assert f"`{option}`=3.5 has no effect on {config_class.__name__}" in str(error.value)
    assert f"Use {named}." in str(error.value)
    for value in neutral:
        moe_config(family, **{option: value})


@pytest.mark.parametrize("family", ALL)
def test_saved_configurations_load(family, tmp_path):
    dense = dense_config(family).to_dict()
    shared = {name: value for name, value in dense.items() if name not in ("model_type", "architectures")}
    config = moe_class(family, "Config")(**shared)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
