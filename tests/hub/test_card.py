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
