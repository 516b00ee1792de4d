# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder MiniLM-L6 end to end. Run by `make test-slow`."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from transformers import AutoModel, AutoTokenizer

from hf_moe import RoutingRecorder, UpcycleConfig, upcycle


pytestmark = pytest.mark.slow

SENTENCES = [
    "The harbour master counted the boats twice.",
    "He looked at every ship in the port, and then once more.",
    "How do I reset my password? " * 30,
    "def add(a, b): return a + b",
]
COMPANIONS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    folder = os.environ.get("HF_MOE_TEST_ENCODER")
    if folder is None:
        pytest.fail("HF_MOE_TEST_ENCODER names no folder: run these tests with `make test-slow`.")
    return Path(folder).resolve()


def embed(folder: Path, **arguments) -> torch.Tensor:
    """Embeddings as the sentence encoder defines them: the mean over the tokens, normalised."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not loading["missing_keys"]
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled)


@pytest.mark.parametrize("method", ["copy", "residual"])
@torch.no_grad()
def test_sentence_embeddings(minilm, method, tmp_path):
    report = upcycle(minilm, tmp_path / "moe", UpcycleConfig(num_experts=4, num_experts_per_tok=2, method=method))
    assert report.model_type == "moe_bert"
    assert report.parity["text"]
    assert report.exact
    dense, moe = embed(minilm), embed(tmp_path / "moe")
    print(f"\n{method}: {report.max_relative_error:.1e}, embeddings {(moe - dense).abs().max():.1e}")
    if method == "residual":
        assert report.max_relative_error == 0.0
        assert torch.equal(moe, dense)
    else:
        assert_close(moe, dense, 1e-6)
    similarity = dense @ dense.T
    assert similarity[0, 1] > similarity[0, 3] + 0.2, "the sentences mean something to the model"
    for name in COMPANIONS:
        assert (tmp_path / "moe" / name).read_bytes() == (minilm / name).read_bytes()
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["architectures"] == ["MoeBertModel"]


@torch.no_grad()
def test_every_expert_has_work(minilm, tmp_path):
    upcycle(minilm, tmp_path / "moe", UpcycleConfig(num_experts=4, num_experts_per_tok=2, verify="none"))
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "moe"), AutoTokenizer.from_pretrained(tmp_path / "moe")
    with RoutingRecorder(model) as recorder:
        model(**tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt"))
    layers = recorder.statistics().layers
    assert len(layers) == 6
    for name, layer in layers.items():
        print(name, [f"{share:.2f}" for share in layer.load.tolist()])
        assert not layer.dead_experts
