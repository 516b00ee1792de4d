# SPDX-License-Identifier: Apache-2.0
"""Memory beside what AdamW, PEFT and the cache really hold; advice beside the evidence it names."""

import pytest
import torch
from conftest import dense_config, dense_model
from peft import LoraConfig, get_peft_model

from hf_moe import UpcycleConfig, plan_upcycle, upcycle_model
from hf_moe.upcycling.advice import LORA_RANK, advise, estimate_memory, parse_tokens
from hf_moe.upcycling.errors import UpcycleError


RECIPE = UpcycleConfig(num_experts=4, num_experts_per_tok=2)


def test_memory_to_train_is_what_adamw_holds():
    dense = dense_model("llama")
    memory = estimate_memory(plan_upcycle(dense.config, RECIPE))
    moe = upcycle_model(dense, RECIPE)
    optimizer = torch.optim.AdamW(moe.parameters())
    moe(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
    for parameter in moe.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(
        parameter.nbytes + parameter.grad.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        for parameter, state in optimizer.state.items()
    )
    assert memory.train == held


@pytest.mark.parametrize("method", ["copy", "residual"])
def test_memory_for_lora_is_that_of_peft(method):
    dense = dense_model("qwen3")
    recipe = UpcycleConfig(method=method, num_experts=4, num_experts_per_tok=2, target="hf_moe")
    plan = plan_upcycle(dense.config, recipe)
    linear = [f"self_attn.{name}_proj" for name in "qkvo"]
    linear += [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")] if method == "residual" else []
    lora = LoraConfig(
        r=LORA_RANK,
        target_modules=linear,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    trained, _ = get_peft_model(upcycle_model(dense, recipe), lora).get_nb_trainable_parameters()
    assert estimate_memory(plan).train_lora == plan.bytes + 16 * trained


def test_memory_to_serve_counts_the_cache():
    dense = dense_model("qwen3")
    plan = plan_upcycle(dense.config, RECIPE)
    moe = upcycle_model(dense, RECIPE)
    length = dense.config.max_position_embeddings
    with torch.no_grad():
        cache = moe(input_ids=torch.full((1, length), 5), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate_memory(plan).serve == plan.bytes + held


def test_a_classifier_has_no_cache():
    config = dense_config("llama", architectures=["LlamaForSequenceClassification"])
    plan = plan_upcycle(config, RECIPE)
    assert estimate_memory(plan).serve == plan.bytes


@pytest.mark.parametrize(
    ("tokens", "dense_tokens", "method"),
    [
        (1e8, None, "copy"),
        (5e10, None, "copy"),
        (4.9e11, None, "copy"),
        (5e11, None, "drop"),
        (5e11, 1e12, "drop"),
        (5e11, 2.5e11, "from scratch"),
        (5e11, 2.6e11, "drop"),
    ],
)
def test_advice_follows_the_evidence(tokens, dense_tokens, method):
    advice = advise(tokens, dense_tokens)
    assert advice.method == method
    assert all(statement.source.startswith("https://huggingface.co/papers/") for statement in advice.evidence)


@pytest.mark.parametrize(
    ("text", "tokens"), [("50B", 5e10), ("1.5t", 1.5e12), ("3e11", 3e11), ("200 M", 2e8), ("7", 7)]
)
def test_numbers_of_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["fifty", "", "-5B", "5X", "1.2.3B"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UpcycleError, match="looks like 50B"):
        parse_tokens(text)


@pytest.mark.parametrize("values", [(0,), (float("inf"),), (1e9, 0)])
def test_budgets_must_be_positive(values):
    with pytest.raises(UpcycleError, match="positive number of tokens"):
        advise(*values)
