# SPDX-License-Identifier: Apache-2.0
"""`score_experts` and `select_experts`: which experts serve the text of a task, after ESFT."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .errors import ExpertLoraError
from .layers import check_replaceable, experts_by_layer
from .served_slots import watch_served_slots


logger = logging.get_logger(__name__)

KINDS = ("token", "gate")
FORM = (
    'Such a file has the form {"experts": {"1": [8, 26], ...}, "shared_experts": false, "non_expert_modules": false}.'
)


@dataclass(frozen=True)
class ExpertScores:
    """
    How much the experts of every layer were used.

    Args:
        kind (`str`): `"token"` or `"gate"`.
        layers (`dict[int, torch.Tensor]`): By the number of the layer, `(num_experts,)` in float64.
        num_tokens (`int`): Number of tokens seen, padding left out.
    """

    kind: str
    layers: dict[int, torch.Tensor]
    num_tokens: int


@dataclass(frozen=True)
class ExpertSelection:
    """
    The experts to train, in the format of the ESFT project's `expert_cfg.json`.

    Args:
        experts (`dict[int, list[int]]`): By the number of the layer, the experts in the order of their scores.
        shared_experts (`bool`, *optional*, defaults to `False`): Whether shared experts are trained as well.
        non_expert_modules (`bool`, *optional*, defaults to `False`): Whether everything that is no expert is trained as well.
    """

    experts: dict[int, list[int]] = field(default_factory=dict)
    shared_experts: bool = False
    non_expert_modules: bool = False

    def save(self, path: str | os.PathLike) -> None:
        """Write it as ESFT's JSON."""
        values = {
            "experts": {str(layer): experts for layer, experts in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }
        Path(path).write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExpertSelection":
        """
        Read ESFT's JSON.

        Raises:
            ExpertLoraError: if the file is something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            experts = {int(layer): list(ids) for layer, ids in values["experts"].items()}
            switches = {name: values.get(name, False) for name in ("shared_experts", "non_expert_modules")}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExpertLoraError(
                f"{path} is no selection of experts ({type(error).__name__}: {error}). {FORM}"
            ) from error
        is_valid = len(experts) == len(values["experts"]) and all(type(value) is bool for value in switches.values())
        if not is_valid or not all(type(expert) is int for ids in experts.values() for expert in ids):
            raise ExpertLoraError(f"{path} is no selection of experts. {FORM}")
        return cls(experts, **switches)

    def ranks(self, num_experts: int | Mapping[int, int], hot: int, cold: int = 0) -> dict[int, list[int]]:
        """
        Ranks for [`ExpertLoraConfig`]: LoRA for the selected experts, and less or none for the others.

        Args:
            num_experts (`int` or `Mapping[int, int]`): Number of experts in a layer; by the number of the layer where they differ.
            hot (`int`): Rank of the selected experts.
            cold (`int`, *optional*, defaults to 0): Rank of the others.

        Raises:
            ExpertLoraError: if an expert or a layer is selected that there is not.
        """
        by_layer = dict.fromkeys(self.experts, num_experts) if isinstance(num_experts, int) else num_experts
        if missing := [layer for layer in self.experts if layer not in by_layer]:
            raise ExpertLoraError(
                f"num_experts has the layers {sorted(by_layer)}, but the selection is of layer {missing[0]} too."
            )
        for layer, experts in self.experts.items():
            if unknown := [expert for expert in experts if not 0 <= expert < by_layer[layer]]:
                raise ExpertLoraError(
                    f"The selection has expert {unknown[0]} in layer {layer}, but with num_experts={by_layer[layer]} there are the "
                    f"experts 0 to {by_layer[layer] - 1}."
                )
        return {
            layer: [hot if expert in experts else cold for expert in range(by_layer[layer])]
            for layer, experts in self.experts.items()
        }


@torch.no_grad()
def score_experts(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    kind: str = "token",
    num_tokens: int | None = None,
) -> ExpertScores:
    """
    How much the text of a task uses each expert, from one pass over it (https://huggingface.co/papers/2407.01906).

    Args:
        model (`torch.nn.Module`): A mixture of experts. It is put into evaluation mode and back.
        dataloader (`Iterable[Mapping[str, Any]]`): Batches to call the model with. Padding is left out by `attention_mask`;
            `labels` are not needed.
        kind (`str`, *optional*, defaults to `"token"`): `"token"`: the share of the tokens' choices that fell on the expert,
            summing to 1 over a layer. `"gate"`: the mean routing weight that tokens gave it, as the model uses it; over a layer
            these sum to what the weights of a token sum to. Neither counts what a capacity drops, nor zero-computation experts,
            which have nothing to train.
        num_tokens (`int`, *optional*): Stop after the batch with which so many tokens were seen (ESFT takes 131,072).

    Returns:
        [`ExpertScores`]

    Raises:
        ExpertLoraError: if the model has no experts, or no batch is given.
    """
    if kind not in KINDS:
        raise ExpertLoraError(f"kind is {kind!r}. Choose from {', '.join(map(repr, KINDS))}.")
    experts = experts_by_layer(model)
    for name, module in experts.values():
        check_replaceable(name, module)  # whose forward pass takes what is counted here
    device = next(model.parameters()).device
    sums: dict[int, torch.Tensor] = {}
    mask_T: torch.Tensor | None = None
    seen = 0

    def count(layer: int, top_k_weights_TK: torch.Tensor, top_k_index_TK: torch.Tensor) -> None:
        values_TK = top_k_weights_TK.double() if kind == "gate" else torch.ones_like(top_k_weights_TK).double()
        if mask_T is not None:
            values_TK = values_TK * mask_T[:, None].to(values_TK.device)
        num_experts = experts[layer][1].num_experts
        # Behind the feed-forwards, those without computation and empty slots together.
        scores_E = values_TK.new_zeros(num_experts + 1)
        scores_E.index_add_(0, top_k_index_TK.reshape(-1).clamp(max=num_experts), values_TK.reshape(-1))
        sums[layer] = sums.get(layer, 0) + scores_E[:-1]

    handles = watch_served_slots(model, {layer: module for layer, (_, module) in experts.items()}, count)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in dataloader:
            if not isinstance(batch, Mapping):
                raise ExpertLoraError(
                    f"A batch is a {type(batch).__name__}. Give a DataLoader, or a list, of what the tokenizer returns: mappings with "
                    "`input_ids` and `attention_mask`."
                )
            batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
            tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
            if tokens is None or (mask is not None and mask.shape != tokens.shape):
                given = {name: tuple(getattr(value, "shape", ())) for name, value in batch.items()}
                raise ExpertLoraError(
                    f"A batch has {given}. Give `input_ids` (batch, length), and `attention_mask` of the same shape where there is "
                    "padding."
                )
            mask_T = None if mask is None else mask.reshape(-1).to(torch.float64)
            model(**{name: value for name, value in batch.items() if name != "labels"})
            seen += tokens.numel() if mask is None else int(mask.sum())
            if num_tokens is not None and seen >= num_tokens:
                break
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for handle in handles:
            handle.remove()
    if not seen:
        raise ExpertLoraError(
            "No token was seen, so that no expert can be scored: the data has no batch, or only padding."
        )
    if num_tokens is not None and seen < num_tokens:
        logger.warning(f"score_experts: the data has {seen} tokens, fewer than the {num_tokens} that were asked for.")
    totals = {layer: seen if kind == "gate" else scores_E.sum().clamp(min=1) for layer, scores_E in sums.items()}
    layers = {layer: (scores_E / totals[layer]).cpu() for layer, scores_E in sorted(sums.items())}
    return ExpertScores(kind, layers, seen)


def select_experts(scores: ExpertScores, top_p: float = 0.2) -> ExpertSelection:
    """
    The fewest experts of each layer that reach a share of its scores, the highest first.

    Args:
        scores ([`ExpertScores`]): From [`score_experts`].
        top_p (`float`, *optional*, defaults to 0.2): The share of the sum of a layer's scores to reach. ESFT takes 0.2 with token
            scores. With gate scores it takes 0.1 of scores that sum to 0.38, which is a share of 0.26. Experts that were
            never used are not selected.

    Raises:
        ExpertLoraError: if `top_p` is not above 0 and at most 1.
    """
    if not 0.0 < top_p <= 1.0:
        raise ExpertLoraError(f"top_p is {top_p}. Choose more than 0 and at most 1.")
    selected = {}
    for layer, scores_E in scores.layers.items():
        shares_E = scores_E.double() / scores_E.double().sum().clamp(min=1e-12)
        sorted_E, order_E = shares_E.sort(descending=True, stable=True)
        # The sum of those before an expert, with room for the rounding of sums that should be 1.
        before_E = sorted_E.cumsum(0) - sorted_E
        selected[layer] = order_E[(before_E < top_p - 1e-9) & (sorted_E > 0)].tolist()
    return ExpertSelection(selected)
