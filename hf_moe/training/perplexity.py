# SPDX-License-Identifier: Apache-2.0
"""`perplexity`: how well a language model predicts a text, per token and per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """
    What [`perplexity`] measured.

    Args:
        loss (`float`): Mean negative log-likelihood of the predicted tokens, in nats.
        num_tokens (`int`): Number of tokens that were predicted.
        num_bytes (`int`, *optional*): Length of their text in UTF-8; None if the tokenizer cannot say where its tokens are.
    """

    loss: float
    num_tokens: int
    num_bytes: int | None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`"""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())  # infinite where math.exp fails

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text, which models with other tokenizers can be compared by."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Everything as plain values."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
        }


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    length: int = 512,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Perplexity:
    """
    The perplexity of a causal language model on a text, without balance losses and in evaluation mode.

    The text is cut into windows of `length` tokens that do not overlap. The first token of a window is not predicted, so a
    text of n tokens gives about `n - n / length` predictions; all of them count alike.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, which is called with its defaults, so it adds the
            special tokens that it adds in training.
        text (`str` or `Sequence[str]`): A text, or several; no window spans two of them.
        length (`int`, *optional*, defaults to 512): Tokens of a window, 2 or more. Longer windows give more context, and a
            lower perplexity: compare equal lengths only.
        max_tokens (`int`, *optional*): Tokens to read in all, an equal share of each text (default: all).
        batch_size (`int`, *optional*, defaults to 1): Windows to run at once.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        [`Perplexity`]

    Raises:
        ValueError: if there is nothing to predict, or the windows are longer than the model's positions.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_moe import perplexity

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    >>> result = perplexity(model, tokenizer, open("essay.txt").read())
    >>> result.perplexity, result.bits_per_byte
    ```
    """
    _check_length(model, length)
    texts = [text] if isinstance(text, str) else list(text)
    windows: list[torch.Tensor] = []
    num_bytes: int | None = 0
    for one_text in texts:
        limit = None if max_tokens is None else max_tokens // len(texts)
        ids, spans = _tokenize(tokenizer, one_text, limit)
        starts = range(0, len(ids) - 1, length)  # a last window of one token predicts nothing
        windows += [ids[start : start + length] for start in starts]
        if spans is None or num_bytes is None:
            num_bytes = None
        else:
            num_bytes += sum(_num_bytes(one_text, spans[start : start + length]) for start in starts)
    num_tokens = sum(len(window) - 1 for window in windows)
    if not num_tokens:
        raise ValueError("There is nothing to predict: a text needs two tokens or more.")
    loss = _sum_of_losses(model, windows, batch_size, progress) / num_tokens
    return Perplexity(loss, num_tokens, num_bytes)


def _check_length(model: PreTrainedModel, length: int) -> None:
    if length < 2:
        raise ValueError(f"length is 2 or more, since the first token of a window is not predicted; got {length}.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"length is {length}, but the model has {longest} positions. Give a length of at most {longest}."
        )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None
) -> tuple[torch.Tensor, list[tuple[int, int]] | None]:
    """`(S,)` token ids, and where in the text each of them is, if the tokenizer knows."""
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = torch.tensor(encoded["input_ids"][:limit], dtype=torch.long)
    return ids, encoded["offset_mapping"][:limit] if tokenizer.is_fast else None


def _num_bytes(text: str, spans: list[tuple[int, int]]) -> int:
    """Length in UTF-8 of the text from the end of a window's first token to the end of its last. Special tokens are at 0."""
    start, end = spans[0][1], max(span[1] for span in spans)
    return len(text[start:end].encode())


@torch.no_grad()
def _sum_of_losses(model: PreTrainedModel, windows: list[torch.Tensor], batch_size: int, progress: bool) -> float:
    was_training = model.training
    model.eval()
    total = 0.0
    batches = _batches(windows, batch_size)
    try:
        # huggingface_hub's bar, which shows nothing in the quiet modes of its command line.
        for batch_BS in tqdm(batches, desc="Perplexity", unit=" batches", disable=None if progress else True):
            batch_BS = batch_BS.to(model.device)
            logits_BSV = model(batch_BS, use_cache=False).logits[:, :-1].float()
            targets_BS = batch_BS[:, 1:].to(logits_BSV.device)
            total += F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum").item()
    finally:
        model.train(was_training)
    return total


def _batches(windows: list[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
    """`(B, S)` windows of equal length, without padding."""
    batches: list[list[torch.Tensor]] = []
    for window in sorted(windows, key=len, reverse=True):
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
