# SPDX-License-Identifier: Apache-2.0
"""
What the operations share: `EditedLayer` and `edit_steps` say what becomes of the experts, `write_edit` writes the result,
compares it with the source and tells where it comes from, and `EditReport` is what the caller gets.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.card import licence, read_parent_card, write_edit_card
from ..upcycling.checkpoint import Checkpoint
from ..upcycling.convert import Step
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.layouts import Piece
from ..upcycling.legacy_config import add_legacy_keys
from ..upcycling.output import OutputFolder, write_model_files, write_provenance
from ..upcycling.parity import FLOAT32_BOUND
from ..upcycling.readers import misreadings
from ..upcycling.router_facts import describe_router
from ..upcycling.routing import kinds_of_tokens_of
from ..upcycling.sample import Sample, of_every_kind, sample_of
from ..upcycling.targets import meta_model
from ..version import __version__
from .measure import Subject, measure
from .moe_checkpoint import MoeCheckpoint
from .sparse_block import SparseBlock, find_blocks


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """
    What an operation on a mixture of experts did.

    Args:
        output_dir (`Path`): The folder that was written.
        operation (`str`): Name of the operation.
        model_type (`str`): Model type of the result.
        num_experts (`int`, *optional*): Routed experts per layer, the largest number; None for a dense result.
        num_experts_per_tok (`int`, *optional*): Routed experts per token; None for a dense result.
        exact (`bool`): Whether the result was measured to compute what the source computes, within 1e-5 in float32. False
            as well if nothing was measured.
        inexact_because (`str`, *optional*): Why it need not; None if that was claimed, and checked if anything was measured.
        max_relative_error (`float`, *optional*): Largest difference of the outputs in float32, divided by the largest
            value. None if nothing was measured.
        measured (`dict`, *optional*): Everything that was measured, see [`~hf_moe.editing.measure.measure`].
        details (`dict`): What the operation chose in every layer.
        num_parameters (`int`): Parameters of the result.
        num_active_parameters (`int`): Parameters that one token uses.
        bytes_written (`int`): Bytes of the weight files.
        seconds (`float`): Wall time of writing and measuring.
    """

    output_dir: Path
    operation: str
    model_type: str
    num_experts: int | None
    num_experts_per_tok: int | None
    exact: bool
    inexact_because: str | None
    max_relative_error: float | None
    measured: dict[str, Any] | None
    details: dict[str, Any]
    num_parameters: int
    num_active_parameters: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class EditedLayer:
    """
    What becomes of the routed experts of one layer.

    Args:
        num_experts (`int`): Their number.
        expert: From the index of an expert to its weights, which are made when they are asked for.
        rows: From the name of a tensor of the router and its value, one row per expert, to the new value.
    """

    num_experts: int
    expert: Callable[[int], FeedForward]
    rows: Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Edit:
    """
    A change of a checkpoint that is ready to be written.

    Args:
        operation (`str`), arguments (`dict`): What was asked for.
        details (`dict`): What was chosen in every layer.
        config (`PreTrainedConfig`), model_class (`type`): The result.
        steps (`list[Step]`): How its tensors are made.
        inexact_because (`str`, *optional*): Why the result need not compute what the source computes; None if it must.
        top_k (`int`, *optional*): Routed experts per token; None if the result is dense.
    """

    operation: str
    arguments: dict[str, Any]
    details: dict[str, Any]
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    steps: list[Step]
    inexact_because: str | None
    top_k: int | None


def selected(moe: MoeCheckpoint, block: SparseBlock, experts: list[int]) -> EditedLayer:
    """The layer with these of its experts in this order; an expert may come more than once."""
    return EditedLayer(
        len(experts),
        lambda index: moe.read_expert(block, experts[index]),
        lambda name, rows: rows[torch.tensor(experts)],
    )


def edit_steps(moe: MoeCheckpoint, layers: dict[int, EditedLayer]) -> list[Step]:
    """
    The steps that write the checkpoint with other experts, in the order of its tensors.

    Args:
        layers (`dict[int, EditedLayer]`): What becomes of every layer that changes, by its index.
    """
    layer_of: dict[str, int] = {}
    for index in layers:
        block = moe.blocks[index]
        names = [*moe.expert_tensors(block), *(moe.name_on_disk[rows.name] for rows in block.rows.values())]
        layer_of |= dict.fromkeys(names, index)
    steps, seen = [], set()
    for name in moe.checkpoint:
        if name not in layer_of:
            steps.append(_copy_step(moe, name))
        elif (index := layer_of[name]) not in seen:
            seen.add(index)
            steps.append(_layer_step(moe, moe.blocks[index], layers[index]))
    return steps


def _copy_step(moe: MoeCheckpoint, name: str) -> Step:
    return Step.of(
        name,
        {name: moe.checkpoint.dtype_and_shape(name)},
        lambda: iter([Piece(name, 0, moe.checkpoint.read(name))]),
    )


def _layer_step(moe: MoeCheckpoint, block: SparseBlock, layer: EditedLayer) -> Step:
    dtype = moe.dtype_of(block)
    shapes = moe.layout.shapes(block.layer, layer.num_experts, block.expert)
    tensors = {name: (dtype, shape) for name, shape in shapes.items()}
    for rows in block.rows.values():
        row_dtype, shape = moe.info(rows.name)
        new_shape = (*shape[: rows.dimension], layer.num_experts, *shape[rows.dimension + 1 :])
        tensors[moe.name_on_disk[rows.name]] = (row_dtype, new_shape)

    def pieces() -> Iterator[Piece]:
        for local, value in moe.read_rows(block).items():
            rows = block.rows[local]
            yield Piece(moe.name_on_disk[rows.name], 0, layer.rows(local, value).movedim(0, rows.dimension))
        for index in range(layer.num_experts):
            yield from moe.layout.pieces(block.layer, index, layer.expert(index))

    return Step.of(block.experts, tensors, pieces)


def write_edit(
    moe: MoeCheckpoint,
    output: OutputFolder,
    edit: Edit,
    *,
    verify: bool,
    max_shard_size: str | int,
    progress: bool,
) -> EditReport:
    """
    Write the result beside its tokenizer, provenance and card, and compare it with the source.

    Raises:
        UpcycleError: if it cannot be written, or if a change that must be exact is not.
    """
    started = time.perf_counter()
    checkpoint, model = moe.checkpoint, meta_model(edit.model_class, edit.config)
    result = _describe(model, edit.config, edit.top_k)
    parent_data = read_parent_card(checkpoint.folder / "README.md")
    sample = _draw_sample(moe) if verify else None
    parent = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "license": licence(parent_data),
        "sha256": checkpoint.sha256(progress),
    }
    asked = {"operation": edit.operation, "arguments": edit.arguments, "details": edit.details}
    with output.locked() as incomplete:
        fingerprint = json.dumps({"hf_moe": __version__, **asked, "sha256": parent["sha256"]})
        writer = output.open(edit.steps, checkpoint, fingerprint, max_shard_size)
        output.write_weights(writer, edit.steps, progress, edit.operation.capitalize())
        write_model_files(incomplete, model, edit.config, checkpoint, checkpoint)
        if result["native"] and edit.top_k is not None:
            add_legacy_keys(incomplete / "config.json", edit.config)
        measured = None
        if sample is not None:
            layers = [block.layer.removesuffix(".") for block in moe.blocks.values()]
            target = None if edit.top_k is None else moe.target
            measured = measure(
                Subject(moe.model_class, checkpoint, moe.config, moe.target, layers),
                Subject(edit.model_class, Checkpoint(incomplete), edit.config, target, layers),
                sample,
                progress,
            )
            if edit.inexact_because is None and measured["float32"]["max_relative_error"] > FLOAT32_BOUND:
                writer.journal.unlink()  # never go on from files that failed
                raise UpcycleError(
                    f"The result does not compute what the source computes: the largest relative difference is "
                    f"{measured['float32']['max_relative_error']:.1e}, where {edit.operation!r} should be exact here. The files "
                    f"are left in {incomplete} for inspection; delete that folder to try again. Please report this."
                )
        provenance = {
            "hf_moe_version": __version__,
            **asked,
            "parent": {**parent, **_describe(moe.model, moe.config, moe.top_k)},
            "result": result,
            "inexact_because": edit.inexact_because,
            "measured": measured,
            "history": moe.history,
        }
        write_provenance(incomplete, provenance)
        write_edit_card(incomplete, provenance, parent_data)
        output.publish()
    error = None if measured is None else measured["float32"]["max_relative_error"]
    return EditReport(
        output_dir=output.given,
        operation=edit.operation,
        model_type=edit.config.model_type,
        num_experts=result["num_experts"],
        num_experts_per_tok=result["num_experts_per_tok"],
        exact=error is not None and error <= FLOAT32_BOUND,
        inexact_because=edit.inexact_because,
        max_relative_error=error,
        measured=measured,
        details=edit.details,
        num_parameters=result["num_parameters"],
        num_active_parameters=result["num_active_parameters"],
        bytes_written=writer.total_bytes,
        seconds=time.perf_counter() - started,
    )


def _draw_sample(moe: MoeCheckpoint) -> Sample:
    """What the two are compared on. Where domains or modalities have experts of their own, it comes once as each of them."""
    sample = sample_of(moe.checkpoint)
    return sample if moe.router_class is None else of_every_kind(sample, *kinds_of_tokens_of(moe.config))


def _describe(model: PreTrainedModel, config: PreTrainedConfig, top_k: int | None) -> dict[str, Any]:
    """What the card and the report say of a model; `top_k` is None if it is dense."""
    blocks = [] if top_k is None else list(find_blocks(model).values())
    idle = sum((block.num_experts - (top_k or 0)) * block.expert.numel for block in blocks)
    native = type(model).__module__.startswith("transformers.")
    return {
        "model_type": config.model_type,
        "architecture": type(model).__name__,
        "native": native,
        "misread_by": misreadings(config) if native and blocks else {},
        "num_experts": max((block.num_experts for block in blocks), default=None),
        "num_experts_per_tok": top_k,
        "router": describe_router(config) if blocks else None,
        "num_parameters": model.num_parameters(),
        "num_active_parameters": model.num_parameters() - idle,
        "num_sparse_layers": len(blocks),
        "num_layers": config.num_hidden_layers,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
