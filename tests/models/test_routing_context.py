# SPDX-License-Identifier: Apache-2.0
"""What models are given for their routers: checks, generation with an assistant, vocabularies of another size."""

import pytest
import torch
from conftest import FAMILIES, moe_model
from router_cases import build_model, router_config, with_routing_inputs
from torch.distributed.utils import _apply_to_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import MoeLlamaForCausalLM
from hf_moe.models.routing_context import RoutingContext


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        ("hash", "domain_ids", torch.tensor([0, 2]), r"`domain_ids` must be from 0 to 1, got \[0, 2\]"),
        ("hash", "domain_ids", torch.tensor([-1, 0]), r"from 0 to 1, got \[-1, 0\]"),
        ("hash", "domain_ids", torch.tensor([0.0, 1.0]), "tensor of integers, got a tensor of torch.float32"),
        ("hash", "domain_ids", [0, 1], "tensor of integers, got a list"),
        ("hash", "domain_ids", torch.tensor([0, 1, 1]), r"shape \(2,\), got \(3,\)"),
        ("modality", "mm_token_type_ids", torch.full((2, 10), -1), r"0 for text, .* got \[-1\]"),
        (
            "modality",
            "mm_token_type_ids",
            torch.zeros(2, 9, dtype=torch.long),
            r"shape \(2, 10\), as the tokens, got \(2, 9\)",
        ),
    ],
)
def test_values_that_no_router_can_use_are_refused(case, name, value, message):
    model = build_model(case)
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.ones(2, 10, dtype=torch.long), **{name: value})


@pytest.mark.parametrize(("case", "name"), [("modality", "mm_token_type_ids"), ("hash", "domain_ids")])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_integers_of_any_kind(case, name, dtype, batch):
    model = build_model(case)
    given = with_routing_inputs(batch, model)
    with torch.no_grad():
        assert torch.equal(model(**{**given, name: given[name].to(dtype)}).logits, model(**given).logits)


@pytest.mark.parametrize("case", ["modality", "hash"])
def test_an_assistant_changes_nothing(case):
    """Its proposals make the inputs longer than what the caller gave for the prompt."""
    model = build_model(case)
    torch.manual_seed(1)
    dense = LlamaConfig(
        **{key: getattr(model.config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    )
    dense.num_hidden_layers, dense.num_attention_heads, dense.num_key_value_heads = 1, 4, 2
    given = {"input_ids": torch.randint(3, 90, (1, 7)), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    if case == "modality":
        given["mm_token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    else:
        given["domain_ids"] = torch.tensor([1])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options, assistant_model=LlamaForCausalLM(dense).eval()), alone)
    assert torch.equal(model.generate(**given, **options, prompt_lookup_num_tokens=3), alone)


def test_new_token_ids_get_experts():
    model = build_model("hash")
    before = model.model.layers[0].mlp.gate.expert_of_token.clone()
    num_domains, vocab_size, top_k = before.shape
    model.resize_token_embeddings(vocab_size + 40)
    after = model.model.layers[0].mlp.gate.expert_of_token
    assert after.shape == (num_domains, vocab_size + 40, top_k)
    assert torch.equal(after[:, :vocab_size], before)
    new = after[1, vocab_size:]
    assert set(new.flatten().tolist()) == {4, 5, 6, 7}, "the experts of the second of two domains"
    assert torch.bincount(new.flatten().long())[4:].tolist() == [20] * 4
    ids = torch.tensor([[vocab_size + 39, 1]])
    assert model(input_ids=ids, domain_ids=torch.tensor([0])).logits.shape[-1] == vocab_size + 40
    model.resize_token_embeddings(vocab_size)
    assert torch.equal(model.model.layers[0].mlp.gate.expert_of_token, before)


def test_a_resized_vocabulary_is_saved(tmp_path):
    model = build_model("hash")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path)
    loaded = MoeLlamaForCausalLM.from_pretrained(tmp_path)
    given = {"input_ids": torch.arange(100, 107)[None] % model.config.vocab_size, "domain_ids": torch.tensor([1])}
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router_type": "no such router"}, "`router_type` must be one of"),
        ({"router_type": "grouped", "n_group": 3}, "must divide the number of experts"),
        ({"router_top_p": 0.3}, "has no effect on router_type='softmax_topk'"),
        ({"num_experts_per_tok": 9}, "must lie between 1 and `num_experts`"),
    ],
)
def test_fields_changed_while_loading_are_validated(overrides, message, tmp_path):
    MoeLlamaForCausalLM(router_config("softmax_topk")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MoeLlamaForCausalLM.from_pretrained(tmp_path, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_from_embeddings(family):
    model = moe_model(family)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(2)), torch.ones(2, 6).long()
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 6:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **options), expected)


def test_generates_from_embeddings_of_modalities():
    model = build_model("modality")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(2))
    given = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 0, 0]])}
    expected = model.generate(input_ids=ids, **given, **options)[:, 6:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **given, **options), expected)


def test_only_our_own_fields_are_validated_anew():
    config = router_config("softmax_topk", output_attentions=True)
    assert MoeLlamaForCausalLM(config)(torch.tensor([[3, 4]])).logits.shape == (1, 2, config.vocab_size)


def test_layers_of_a_wrapped_model_share_the_context():
    """FSDP casts the inputs of what it wraps, and rebuilds dataclasses on the way."""
    routing = RoutingContext()
    assert _apply_to_tensors(lambda tensor: tensor.clone(), {"routing": routing})["routing"] is routing
