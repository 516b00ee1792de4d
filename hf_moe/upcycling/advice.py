# SPDX-License-Identifier: Apache-2.0
"""
What a result will cost, and which method the published evidence supports: `estimate_memory` and `advise`.

Everything is computed from a plan, so from the configuration alone. Each statement of `advise` names where it was
published; what nobody has published is said to be so.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import UpcycleError
from .plan import UpcyclePlan
from .targets import meta_model


# Weight, gradient and the two moments of AdamW in float32: what `Trainer` keeps per trained parameter.
BYTES_PER_TRAINED_PARAMETER = 16
LORA_RANK = 16
CONTEXT = 4096


class Memory(NamedTuple):
    """
    Bytes that a result needs, without the activations of training, which depend on the batch.

    Args:
        train (`int`): Weights, gradients and AdamW's moments in float32 for all parameters.
        train_lora (`int`): Weights as stored, and the same for LoRA of rank 16 on attention, experts and shared experts.
        serve (`int`): Weights as stored, and the keys and values of one sequence of 4,096 tokens.
    """

    train: int
    train_lora: int
    serve: int


def estimate_memory(plan: UpcyclePlan) -> Memory:
    """What it takes to train and to serve the result of a plan."""
    model = meta_model(plan.model_class, plan.config)
    lora = 0
    for name, parameter in model.named_parameters():
        in_block = re.search(r"\.(self_attn|attn|attention|mlp|block_sparse_moe)\.", name)
        if in_block and parameter.dim() >= 2 and not re.search(r"(gate|router\.layer|norm)\.weight$|_bias$", name):
            *experts, rows, columns = parameter.shape
            lora += LORA_RANK * (rows + columns) * (experts[0] if experts else 1)
    config = plan.config
    cache = 0
    if model.can_generate():
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        itemsize = (config.dtype or torch.float32).itemsize
        context = min(CONTEXT, config.max_position_embeddings)
        cache = 2 * config.num_hidden_layers * heads * head_dim * itemsize * context
    return Memory(
        train=BYTES_PER_TRAINED_PARAMETER * plan.num_parameters,
        train_lora=plan.bytes + BYTES_PER_TRAINED_PARAMETER * lora,
        serve=plan.bytes + cache,
    )


@dataclass(frozen=True)
class Statement:
    """A finding that bears on the choice of a method, and where it was published."""

    text: str
    source: str


@dataclass(frozen=True)
class Advice:
    """The method that the evidence supports for a training budget, and the evidence."""

    method: str
    because: str
    evidence: list[Statement]


FINERMOE = Statement(
    "After 50B tokens, mean of ten benchmarks for Qwen2.5 0.5B / 1.5B / 7B: continued dense training 41.3 / 55.2 / 68.6, "
    "copy (32 experts, top-2) 41.3 / 56.5 / 69.9, granular 37.1 / 52.1 / 65.2, split (16, top-4) 24.2 / 26.3 / 35.8, drop "
    "(r = 0.5) 22.6 / 23.5 / 25.9",
    "https://huggingface.co/papers/2603.13364, table 1",
)
NVIDIA = Statement(
    "After 1T tokens from Nemotron-4 15B: MMLU 65.3 for continued dense training, 66.2 for granular with 64 experts at the "
    "same operations per token, 67.6 for copy with 8 experts, top-2, at more operations",
    "https://huggingface.co/papers/2410.07524, table 1",
)
DROP = Statement(
    "Drop with 5.9B active parameters equals a dense model of 13B at about a quarter of the operations, after 500B tokens as "
    "https://huggingface.co/papers/2603.13364 reports it",
    "https://huggingface.co/papers/2502.19261, abstract",
)
SPARSE_UPCYCLING = Statement(
    "Copy beats continued dense training from about half of the dense model's own training cost on, and a mixture of experts "
    "trained from scratch up to all of it",
    "https://huggingface.co/papers/2212.05055, abstract",
)
SKYWORK = Statement(
    "Upcycle when the budget is far below the cost of the dense model; train from scratch from twice that cost on",
    "https://huggingface.co/papers/2406.06563, section 3",
)
SCALING = Statement(
    "The longer the dense model was trained, the less upcycling it gains over going on with it",
    "https://huggingface.co/papers/2502.03009, abstract",
)


def advise(tokens: float, dense_tokens: float | None = None) -> Advice:
    """
    Which method the published evidence supports for a budget of `tokens`.

    Args:
        tokens (`float`): Tokens that the result will be trained on.
        dense_tokens (`float`, *optional*): Tokens that the dense model was trained on.

    Raises:
        UpcycleError: if a number of tokens is not positive.
    """
    for name, value in (("tokens", tokens), ("dense_tokens", dense_tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise UpcycleError(f"`{name}` must be a positive number of tokens, got {value}.")
    if dense_tokens is not None and tokens >= 2 * dense_tokens:
        because = "the budget is at least twice the dense model's own training, where training from scratch is reported to win"
        return Advice("from scratch", because, [SKYWORK, SCALING])
    if tokens < 1e9:
        because = (
            "no comparison was published for so few tokens; a method that preserves the function is the only one that starts "
            "from the dense model's quality ('residual' if the router must not disturb it while it learns)"
        )
        return Advice("copy", because, [FINERMOE])
    if tokens < 5e11:
        because = (
            "at 50B tokens it is the one of these methods reported to match or beat continued dense training at every size; drop "
            "and split have not recovered there, and no comparison of these methods was published up to 500B"
        )
        return Advice("copy", because, [FINERMOE, SPARSE_UPCYCLING, SCALING])
    because = (
        "from 500B tokens on re-initialised neurons are reported to pay; 'granular' does at equal operations, and plain 'copy' "
        "at more of them"
    )
    return Advice("drop", because, [DROP, NVIDIA, FINERMOE, SKYWORK, SCALING])


def parse_tokens(text: str) -> float:
    """
    `5e10` for `"50B"`; K, M, B and T stand for 1e3, 1e6, 1e9 and 1e12.

    Raises:
        UpcycleError: if the text is no number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise UpcycleError(f"A number of tokens looks like 50B, 1.5T or 3e11, got {text!r}.")
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()]
