# SPDX-License-Identifier: Apache-2.0
"""
The proof of a composition: each expert alone beside the checkpoint that it comes from.

All tokens are sent to one expert in every layer. Its feed-forwards then compute what those of the checkpoint do, and the
whole model does where everything else is equal too, which is looked at tensor by tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from .checkpoint import Checkpoint
from .errors import UpcycleError
from .parity import FLOAT32_BOUND, compare
from .plan import UpcyclePlan
from .recipe import UpcycleConfig
from .sample import Sample
from .streaming import Readable, Side
from .targets import dense_class


def measure_expert_parity(
    checkpoints: Mapping[str, Checkpoint],
    result: Side,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    sample: Sample,
    *,
    rounded_from: Mapping[str, torch.dtype],
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    Compare each expert alone with its checkpoint on one text, in float32.

    Args:
        checkpoints (`Mapping[str, Checkpoint]`): By their entries in the recipe's `experts`.
        rounded_from (`Mapping[str, torch.dtype]`): Data types of those that were rounded, by entry.

    Returns:
        `list[dict]`: For each checkpoint its `name`, the `experts` made from it, the number of tensors outside the experts
        in which the result differs from it (`num_differing_tensors`), why the result may differ (`inexact_because`, None
        if it must not), the largest relative error of each layer's feed-forward (`layers`) and, unless `verify="layers"`,
        what was measured on the logits: `max_relative_error`, `top1_agreement` and `kl_divergence`.
    """
    entries, whole_model = recipe.experts or [], recipe.verify != "layers"
    measured = []
    for entry in dict.fromkeys(entries):
        checkpoint, experts = checkpoints[entry], [index for index, other in enumerate(entries) if other == entry]
        num_layers = checkpoint.config.num_hidden_layers
        differing = _differing_tensors(checkpoint, result.checkpoint)
        with tqdm(
            total=num_layers + (num_layers if whole_model else len(plan.experts_in_layer)),
            desc=f"Verifying experts {', '.join(map(str, experts))}",
            unit=" layers",
            disable=None if progress else True,
        ) as bar:
            errors, _ = compare(
                Side(dense_class(checkpoint.config), checkpoint, result.layers),
                result,
                plan,
                _known_tokens(sample, checkpoint),
                torch.float32,
                whole_model,
                bar,
                forced_experts=experts,
            )
        measured.append(
            {
                "name": checkpoint.name,
                "experts": experts,
                "num_differing_tensors": len(differing),
                "inexact_because": _change(recipe, rounded_from.get(entry)) or _difference(differing),
                **errors,
            }
        )
    return measured


def largest_error(measured: Mapping[str, Any]) -> float:
    """The largest relative error of an expert's logits, or of its feed-forwards if the logits were not compared."""
    return measured.get("max_relative_error", max(measured["layers"].values()))


def check_expert_parity(
    expert_parity: list[dict[str, Any]], recipe: UpcycleConfig, rounded_from: Mapping[str, torch.dtype], folder: Path
) -> None:
    """
    Fail if an expert does not compute what its checkpoint does although it should.

    Raises:
        UpcycleError: if the error of a feed-forward, or that of the logits where all other tensors are equal, is above 1e-5.
    """
    for entry, measured in zip(dict.fromkeys(recipe.experts or []), expert_parity, strict=True):
        if _change(recipe, rounded_from.get(entry)) is not None:
            continue
        errors = list(measured["layers"].values())
        if measured["inexact_because"] is None:
            errors.append(largest_error(measured))
        if max(errors) > FLOAT32_BOUND:
            raise UpcycleError(
                f"Experts {measured['experts']} do not compute what {entry!r} computes: the largest relative difference is "
                f"{max(errors):.1e}, where {FLOAT32_BOUND:.0e} is allowed. The files are left in {folder} for inspection; delete "
                "that folder to try again. Please report this with the configuration of the source."
            )


def _change(recipe: UpcycleConfig, rounded_from: torch.dtype | None) -> str | None:
    """Why the experts' own weights are not those of their checkpoint; None if they are."""
    if rounded_from is not None:
        return f"its weights were rounded from {str(rounded_from).removeprefix('torch.')}"
    return f"noise was added (expert_noise={recipe.expert_noise})" if recipe.expert_noise else None


def _difference(names: list[str]) -> str | None:
    if not names:
        return None
    return f"{len(names)} tensors outside the experts differ from its own, among them {names[0]}"


def _differing_tensors(parent: Readable, result: Readable) -> list[str]:
    """Tensors of the result that have the name of one of the parent's and not its values, in the rows that both have."""
    names = set(parent)
    return [
        name
        for name in result
        if name in names and not _equal(parent.read(name, check_finite=False), result.read(name, check_finite=False))
    ]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    dtype, rows = torch.promote_types(one.dtype, other.dtype), min(len(one), len(other))
    return torch.equal(one[:rows].to(dtype), other[:rows].to(dtype))


def _known_tokens(sample: Sample, checkpoint: Checkpoint) -> Sample:
    """The sample without ids that the checkpoint has no embedding for: others take their places."""
    if "input_ids" not in sample.inputs:
        return sample
    input_ids = sample.inputs["input_ids"] % checkpoint.config.vocab_size
    return sample._replace(inputs={**sample.inputs, "input_ids": input_ids})
