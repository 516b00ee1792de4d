# SPDX-License-Identifier: Apache-2.0
"""The model card says what is known and nothing else."""

import pytest
from conftest import dense_model
from huggingface_hub import ModelCard

from hf_moe import UpcycleConfig, upcycle


@pytest.mark.parametrize(
    ("recipe", "expected", "absent"),
    [
        (
            {},
            [
                "MixtralForCausalLM",
                "The method is exact",
                "(https://huggingface.co/papers/2212.05055)",
                "| float32 |",
                "3 of 3",
            ],
            ["hf-moe\n", "trust_remote_code"],
        ),
        ({"target": "hf_moe"}, ["import hf_moe", "trust_remote_code=True", "MoeLlamaForCausalLM"], []),
        (
            {"norm_topk_prob": False},
            ["does not compute what the dense model computes: the weights of the chosen", "norm_topk_prob: false"],
            ["The method is exact"],
        ),
        ({"method": "residual"}, ["keeps all experts in use"], ["experts start equal", "paper"]),
        ({"verify": "layers"}, ["worst layer"], ["same top token"]),
        ({"verify": "none"}, ["## Recipe"], ["What was preserved", "worst layer"]),
    ],
)
def test_card(recipe, expected, absent, tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4, **recipe))
    text = (tmp_path / "moe" / "README.md").read_text()
    for phrase in ["4 experts, top-2", "not been trained", *expected]:
        assert phrase in text, phrase
    for phrase in ["None", "null\n\n", "[More Information Needed]", "{{", "base_model", str(tmp_path), *absent]:
        assert phrase not in text, phrase
    data = ModelCard.load(tmp_path / "moe" / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"moe", "mixture-of-experts", "upcycled", "hf_moe"} <= set(data.tags)


@pytest.mark.parametrize(
    ("recipe", "expected", "absent"),
    [
        (
            {"router_type": "hash", "router_options": {"num_hash_domains": 2}},
            [
                "4 experts, 2 per token",
                "`expert_of_token`, no weight",
                "`domain_ids`, a tensor of shape (batch,) with the domain of each sequence, 0 to 1: each has 2 experts",
                "no load-balancing loss to switch on, and nothing in the router is trained",
                "the same in each of 2 domains",
            ],
            ["top-2", "output_router_logits", "the router no gradient", "| in_each_of"],
        ),
        (
            {"router_type": "top_p"},
            ["4 experts, a varying number per token", "if it takes 2 experts", "exceeds `router_top_p`"],
            ["top-2", "the router no gradient"],
        ),
        (
            {"router_type": "modality", "router_options": {"num_experts_per_modality": [2, 2]}},
            ["4 experts, top-2", "`mm_token_type_ids`", "the same in each of 2 modalities"],
            [],
        ),
        (
            {"router_options": {"num_copy_experts": 1, "num_zero_experts": 2, "capacity_policy": "position"}},
            ["zero-computation experts | 1 copy, 2 zero", "| capacity | in training 1.25 times", "`attention_mask`"],
            ["| balance loss"],
        ),
        (
            {"router_type": "soft", "num_experts_per_tok": 4},
            ["4 experts, all for every token", "no load-balancing loss to switch on."],
            ["top-4", "output_router_logits"],
        ),
    ],
    ids=["hash", "top_p", "modality", "zero-computation", "soft"],
)
def test_card_says_what_the_router_does(recipe, expected, absent, tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4, **recipe), progress=False)
    text = (tmp_path / "moe" / "README.md").read_text()
    assert [phrase for phrase in expected if phrase not in text] == []
    assert [phrase for phrase in ["None", "{{", *absent] if phrase in text] == []


def test_card_of_layers_with_other_numbers_of_experts(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=[4, 2, 4]), progress=False)
    assert "# dense, 2 or 4 experts, top-2" in (tmp_path / "moe" / "README.md").read_text()
