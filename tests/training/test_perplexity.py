# SPDX-License-Identifier: Apache-2.0
"""Perplexity beside the losses of transformers, and models of which it is known."""

import math

import pytest
import torch
from conftest import dense_model, moe_model, save_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

from hf_moe import perplexity


TEXT = "".join(chr(32 + 7 * index * index % 91) for index in range(100))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)  # one token for each character
    return AutoTokenizer.from_pretrained(folder)


def mean_loss(model, tokenizer, texts: list[str], length: int) -> float:
    """From the losses that transformers computes, window by window."""
    losses, predicted = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for window in ids.split(length, dim=1):
            if window.shape[1] > 1:
                with torch.no_grad():
                    losses += model(window, labels=window).loss.item() * (window.shape[1] - 1)
                predicted += window.shape[1] - 1
    return losses / predicted


@pytest.mark.parametrize("length", [2, 33, 50, 512])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_loss_is_that_of_transformers(kind, length, tokenizer):
    model = dense_model("llama") if kind == "dense" else moe_model("llama")
    found = perplexity(model, tokenizer, TEXT, length)
    assert found.loss == pytest.approx(mean_loss(model, tokenizer, [TEXT], length), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.num_tokens == found.num_bytes == {2: 50, 33: 96, 50: 98, 512: 99}[length]
    assert found.to_dict()["bits_per_byte"] == pytest.approx(found.loss / math.log(2))


def test_balance_loss_is_left_out(tokenizer):
    model = moe_model("llama", output_router_logits=True, router_aux_loss_coef=5.0)
    assert perplexity(model, tokenizer, TEXT).loss == pytest.approx(
        perplexity(moe_model("llama"), tokenizer, TEXT).loss
    )


def test_texts_in_batches(tokenizer):
    model, texts = dense_model("llama"), [TEXT, TEXT[30:75], TEXT[:9], "x"]
    found = perplexity(model, tokenizer, texts, 8, batch_size=3)
    assert found.loss == pytest.approx(mean_loss(model, tokenizer, texts, 8), rel=1e-5)
    assert found.num_tokens == 100 - 13 + 45 - 6 + 9 - 2


def test_max_tokens_is_shared(tokenizer):
    model = dense_model("llama")
    found = perplexity(model, tokenizer, [TEXT, TEXT[50:]], 8, max_tokens=40)
    assert found == perplexity(model, tokenizer, [TEXT[:20], TEXT[50:70]], 8)


def test_model_that_knows_nothing(tokenizer):
    model = dense_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tokenizer, TEXT)
    assert found.perplexity == pytest.approx(96, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(96), rel=1e-5)


def test_bytes_are_those_of_utf8(tokenizer):
    # Unknown to the tokenizer, and 2, 3 and 4 bytes long.
    found = perplexity(dense_model("llama"), tokenizer, "aé€😀b", 3)
    assert (found.num_tokens, found.num_bytes) == (3, 2 + 3 + 1)


def test_tokenizer_that_does_not_say_where_its_tokens_are():
    found = perplexity(dense_model("llama", vocab_size=400), ByT5Tokenizer(), "some text")
    assert (found.num_tokens, found.num_bytes, found.bits_per_byte) == (9, None, None)


def test_dropout_is_off_and_the_mode_is_kept(tokenizer):
    model = dense_model("gpt2")
    expected = perplexity(model, tokenizer, TEXT)
    assert perplexity(model.train(), tokenizer, TEXT) == expected
    assert model.training


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        (TEXT, 1, "length is 2 or more.* got 1"),
        (TEXT, 513, "length is 513, but the model has 512 positions"),
        ("", 8, "nothing to predict"),
        (["a", "b"], 8, "nothing to predict"),
    ],
)
def test_what_has_no_perplexity_is_refused(text, length, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        perplexity(dense_model("llama"), tokenizer, text, length)
