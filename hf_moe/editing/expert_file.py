# SPDX-License-Identifier: Apache-2.0
"""
One expert as a small file that carries its rows of the router: `extract_expert` writes it, `insert_expert` puts it into a
mixture of experts, `ExpertFile` reads it.

The file is a safetensors file with, for every layer i, `layers.<i>.gate_proj`, `up_proj` and `down_proj` (biases:
`gate_bias`, ...) and the rows `layers.<i>.router.weight`, ... Its metadata say where the expert comes from and what it fits.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..upcycling.checkpoint import is_finite
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.output import OutputFolder
from ..upcycling.recipe import parse_layers
from ..version import __version__
from .edit import Edit, EditedLayer, EditReport, edit_steps, write_edit
from .moe_checkpoint import MoeCheckpoint
from .sparse_block import SparseBlock


METADATA = "hf_moe_expert"
# What an expert and the experts beside which it is put must have in common.
FITTING = ("hidden_size", "intermediate_size", "activation", "is_gated", "has_bias", "dtype", "router_type", "router")


class ExpertFile:
    """
    A file that [`extract_expert`] wrote.

    Args:
        path (`str` or `Path`): The file.

    Attributes:
        metadata (`dict`): `source` (name, revision and digests of the model it comes from), `model_type`, `expert` (its index
            there), `layers`, and what it fits: `hidden_size`, `intermediate_size`, `activation`, `is_gated`, `has_bias`,
            `dtype`, `router_type` and `router` (shapes of the rows by name).

    Raises:
        UpcycleError: if there is no such file, or if it holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UpcycleError(f"There is no file {path}.")
        try:
            with safe_open(self.path, framework="pt") as file:
                self.metadata: dict[str, Any] = json.loads(file.metadata()[METADATA])
                names = list(file.keys())
                self.tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UpcycleError(f"{path} is no expert that `extract_expert` wrote ({error!r}).") from error
        for name, tensor in self.tensors.items():
            if not is_finite(tensor):
                raise UpcycleError(f"{path}: tensor {name!r} holds NaN or infinite values.")

    @property
    def layers(self) -> list[int]:
        """Indices of the layers, ascending."""
        return self.metadata["layers"]

    def expert(self, layer_index: int) -> FeedForward:
        """The expert of a layer."""
        return FeedForward(
            **{field: self.tensors.get(f"layers.{layer_index}.{field}") for field in FeedForward._fields}
        )

    def row(self, layer_index: int, name: str) -> torch.Tensor:
        """The row of a tensor of the router."""
        return self.tensors[f"layers.{layer_index}.router.{name}"]

    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def extract_expert(
    source: str | Path,
    file: str | Path,
    *,
    expert: int,
    layers: list[int] | str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExpertFile:
    r"""
    Write one expert of a mixture of experts, with its rows of the router, into a file of its own.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        file (`str` or `Path`): The safetensors file to write.
        expert (`int`): Index of the expert, the same in all layers.
        layers (`list[int]` or `str`, *optional*): Sparse layers to take: indices, or a text of indices, ranges and slices
            such as `"4,6,8-11"` or `"-4:"`. All of them by default.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing file is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`ExpertFile`]: What was written.

    Raises:
        UpcycleError: if there is no such expert, or if the file exists.

    Example:

    ```python
    >>> from hf_moe import extract_expert

    >>> extract_expert("smollm2-moe", "law.safetensors", expert=2).layers
    [0, 1, 2, ...]
    ```
    """
    path = Path(file)
    if path.exists() and (path.is_dir() or not overwrite):
        raise UpcycleError(f"{path} exists. Choose another file, or pass overwrite=True (--overwrite) to replace it.")
    moe = MoeCheckpoint(source, revision)
    moe.refuse_router_residual()
    chosen = _choose_layers(moe, layers)
    if expert < 0 or (short := [index for index in chosen if expert >= moe.blocks[index].num_experts]):
        fewest = min(moe.blocks[index].num_experts for index in (chosen if expert < 0 else short))
        raise UpcycleError(
            f"There is no expert {expert} in every layer that was asked for: they have 0 to {fewest - 1}."
        )
    tensors: dict[str, torch.Tensor] = {}
    for index in chosen:
        block = moe.blocks[index]
        weights = moe.read_expert(block, expert)._asdict()
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in weights.items() if tensor is not None}
        tensors |= {f"layers.{index}.router.{name}": rows[expert] for name, rows in moe.read_rows(block).items()}
    checkpoint = moe.checkpoint
    metadata = {
        "hf_moe_version": __version__,
        "source": {"name": checkpoint.name, "revision": checkpoint.revision, "sha256": checkpoint.sha256(progress)},
        "model_type": moe.config.model_type,
        "expert": expert,
        "layers": chosen,
        **_fitting(moe, moe.blocks[chosen[0]]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f"{path.name}.incomplete")
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(contiguous, incomplete, metadata={"format": "pt", METADATA: json.dumps(metadata)})
    os.replace(incomplete, path)
    return ExpertFile(path)


def insert_expert(
    source: str | Path,
    file: str | Path,
    output_dir: str | Path,
    *,
    position: int | None = None,
    replace: bool = False,
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> EditReport:
    r"""
    Put an expert that [`extract_expert`] wrote into a mixture of experts, with its rows of the router.

    Taking an expert out, dropping it ([`prune_experts`]) and inserting it where it was gives the same model to the bit. A
    token takes as many experts as before. How far the outputs move is measured and reported.

    Args:
        source (`str` or `Path`): The mixture of experts, a folder or a Hub id.
        file (`str` or `Path`): The expert's file.
        output_dir (`str` or `Path`): The folder to write.
        position (`int`, *optional*): The index that the expert gets; those behind it move up. Behind the last by default.
        replace (`bool`, *optional*, defaults to `False`): Whether the expert at `position` goes, so that none moves.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        verify (`bool`, *optional*, defaults to `True`): Whether the outputs of source and result are compared.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EditReport`]: `details` has the layers that got the expert.

    Raises:
        UpcycleError: if the expert does not fit, naming what differs.

    Example:

    ```python
    >>> from hf_moe import insert_expert

    >>> report = insert_expert("smollm2-moe", "law.safetensors", "smollm2-moe-law")
    ```
    """
    if replace and position is None:
        raise UpcycleError("`replace` needs the `position` of the expert that goes.")
    output = OutputFolder(output_dir, [source, file], overwrite)
    added = ExpertFile(file)
    moe = MoeCheckpoint(source, revision)
    moe.refuse_router_residual()
    _check_fits(moe, added)
    counts = {index: block.num_experts for index, block in moe.blocks.items()}
    layers = {}
    for index in added.layers:
        last = counts[index] - 1 if replace else counts[index]
        if position is not None and not 0 <= position <= last:
            raise UpcycleError(f"`position` must lie between 0 and {last} in layer {index}, got {position}.")
        layers[index] = _with_expert(moe, index, added, last if position is None else position, replace)
    counts |= {index: layer.num_experts for index, layer in layers.items()}
    top_k = moe.top_k_among(counts)
    config = moe.with_experts(counts, top_k)
    edit = Edit(
        operation="insert",
        arguments={"file": added.path.name, "sha256": added.sha256(), "position": position, "replace": replace},
        details={"layers": added.layers, "expert": added.metadata["expert"], "from": added.metadata["source"]},
        config=config,
        model_class=moe.model_class,
        steps=edit_steps(moe, layers),
        inexact_because="tokens can take the expert that was added",
        top_k=top_k,
    )
    return write_edit(moe, output, edit, verify=verify, max_shard_size=max_shard_size, progress=progress)


def _choose_layers(moe: MoeCheckpoint, layers: list[int] | str | None) -> list[int]:
    if layers is None:
        return list(moe.blocks)
    named = parse_layers(layers, moe.config.num_hidden_layers) if isinstance(layers, str) else layers
    chosen = sorted(set(named))
    if not chosen or (outside := [index for index in chosen if index not in moe.blocks]):
        raise UpcycleError(
            f"`layers`={layers!r} must name sparse layers, which are {list(moe.blocks)}; got {outside if chosen else []}."
        )
    return chosen


def _fitting(moe: MoeCheckpoint, block: SparseBlock) -> dict[str, Any]:
    """What an expert must share with those beside which it is put."""
    return {
        "hidden_size": block.expert.hidden_size,
        "intermediate_size": block.expert.intermediate_size,
        "activation": type(moe.model.get_submodule(block.experts).act_fn).__name__,
        "is_gated": block.expert.is_gated,
        "has_bias": block.expert.down_bias is not None,
        "dtype": str(moe.dtype_of(block)).removeprefix("torch."),
        "router_type": moe.router_type,
        "router": {local: list(rows.shape[1:]) for local, rows in block.rows.items()},
    }


def _check_fits(moe: MoeCheckpoint, added: ExpertFile) -> None:
    for index in added.layers:
        if index not in moe.blocks:
            raise UpcycleError(
                f"{added.path} has an expert for layer {index}, but the sparse layers of {moe.checkpoint.source} are "
                f"{list(moe.blocks)}."
            )
        fitting = _fitting(moe, moe.blocks[index])
        for name in FITTING:
            if added.metadata.get(name) != fitting[name]:
                raise UpcycleError(
                    f"The expert in {added.path} does not fit: it has {name}={added.metadata.get(name)!r}, and those of "
                    f"{moe.checkpoint.source} have {name}={fitting[name]!r}."
                )
        _check_tensors(moe, added, index)


def _check_tensors(moe: MoeCheckpoint, added: ExpertFile, index: int) -> None:
    """What the metadata promise is there."""
    block, dtype = moe.blocks[index], moe.dtype_of(moe.blocks[index])
    expected = {
        f"layers.{index}.{name}": (dtype, tuple(tensor.shape))
        for name, tensor in block.expert._asdict().items()
        if tensor is not None
    }
    for local, rows in block.rows.items():
        expected[f"layers.{index}.router.{local}"] = (moe.info(rows.name)[0], rows.shape[1:])
    for name, info in expected.items():
        tensor = added.tensors.get(name)
        there = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        if there != info:
            raise UpcycleError(
                f"{added.path} is damaged or does not fit: {name!r} should be {info} and is {there}. Extract the expert again."
            )


def _with_expert(moe: MoeCheckpoint, index: int, added: ExpertFile, position: int, replace: bool) -> EditedLayer:
    block = moe.blocks[index]
    behind = position + replace  # the first expert of the source that stands behind the added one

    def expert(expert_index: int) -> FeedForward:
        if expert_index == position:
            return added.expert(index)
        return moe.read_expert(
            block, expert_index if expert_index < position else expert_index - position - 1 + behind
        )

    def rows(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:position], added.row(index, name)[None], value[behind:]])

    return EditedLayer(block.num_experts + 1 - replace, expert, rows)
