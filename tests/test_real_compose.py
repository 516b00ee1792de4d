# SPDX-License-Identifier: Apache-2.0
"""Two real fine-tunes of SmolLM2 and the base in one mixture, each expert beside its parent. Run by `make test-slow`."""

import os
from pathlib import Path

import pytest
from conftest import force_expert
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe import UpcycleConfig, upcycle


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def smollm2() -> str:
    folder = os.environ.get("HF_MOE_TEST_MODEL")
    if folder is None:
        pytest.fail("HF_MOE_TEST_MODEL names no folder: run these tests with `make test-slow`.")
    return str(Path(folder).resolve())


def test_each_expert_has_the_perplexity_of_its_parent(smollm2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from domain_experts import perplexity, train_domain_expert
    from domain_texts import token_blocks

    parents = {domain: str(tmp_path / domain) for domain in ("code", "licences")}
    for domain, folder in parents.items():
        train_domain_expert(smollm2, folder, domain, steps=24)

    recipe = UpcycleConfig(method="compose", experts=[*parents.values(), "base"], verify="per_expert")
    report = upcycle(smollm2, tmp_path / "moe", recipe)
    assert report.model_type == "mixtral"
    for row in report.parity["per_expert"]:
        assert row["num_differing_tensors"] == 0
        assert row["inexact_because"] is None
        print(
            f"\n{row['name']}: logits {row['max_relative_error']:.1e}, worst layer {max(row['layers'].values()):.1e}"
        )
    assert max(report.expert_errors.values()) <= 1e-5

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="float32")
    for index, (domain, folder) in enumerate(parents.items()):
        blocks = token_blocks(tokenizer, domain, "validation", 256, 6)
        before = perplexity(base, blocks)
        parent = perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), blocks)
        alone = perplexity(force_expert(moe, index), blocks)
        print(f"{domain}: base {before:.4f}, fine-tune {parent:.4f}, its expert alone {alone:.4f}")
        assert parent < 0.98 * before, "the fine-tune learned something"
        assert alone == pytest.approx(parent, rel=1e-4)
    assert perplexity(force_expert(moe, 2), blocks) == pytest.approx(before, rel=1e-4)
