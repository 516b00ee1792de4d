# SPDX-License-Identifier: Apache-2.0
"""
The dense models that a composition is made of: opening them, and making what is not an expert.

`compose_parents` serves the streaming writer and the in-memory conversion alike, which makes their results equal.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .checkpoint import Checkpoint, load_tokenizer
from .compose import BASE, composed_config, parse_expert
from .convert import DenseTensors, TensorInfo, check_names, names_to_convert
from .errors import UpcycleError
from .recipe import UpcycleConfig
from .targets import dense_class, find_family, find_sparse_layers, layer_prefix, meta_model


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Parent:
    """
    A dense model that takes part in a composition.

    Args:
        entry (`str`): What the recipe calls it.
        config (`PreTrainedConfig`), tensors (`DenseTensors`): The model.
        checkpoint (`Checkpoint`, *optional*): Where it lies; None for a model in memory.
    """

    entry: str
    config: PreTrainedConfig
    tensors: DenseTensors
    checkpoint: Checkpoint | None = None

    def read_tokens(self) -> dict[int, str]:
        """The tokenizer's tokens by id; empty for a model in memory, or without a tokenizer that loads."""
        tokenizer = None if self.checkpoint is None else load_tokenizer(self.checkpoint)
        return {} if tokenizer is None else {index: token for token, index in tokenizer.get_vocab().items()}


@dataclass(frozen=True)
class Composition:
    """
    What a composed model is made of.

    Args:
        config (`PreTrainedConfig`), dense (`DenseTensors`): Everything but the experts, as a dense model.
        experts (`list[DenseTensors]`): The dense model of each expert, in the data type of `dense`.
        rounded_from (`dict[str, torch.dtype]`): Data types that the type of the base cannot hold, by entry.
        tokenizer (`str`): The entry whose tokenizer knows all tokens of the result.
    """

    config: PreTrainedConfig
    dense: DenseTensors
    experts: list[DenseTensors]
    rounded_from: dict[str, torch.dtype]
    tokenizer: str


def open_parent(entry: str, checkpoint: Checkpoint) -> Parent:
    """A checkpoint with the names that its tensors have in memory."""
    model = meta_model(dense_class(checkpoint.config), checkpoint.config)
    checkpoint.rename(names_to_convert(list(checkpoint), model))
    info = {name: checkpoint.dtype_and_shape(name) for name in checkpoint}

    def read(name: str) -> torch.Tensor:
        with about_expert(entry):
            return checkpoint.read(name)

    return Parent(entry, checkpoint.config, DenseTensors(info, read), checkpoint)


def open_experts(recipe: UpcycleConfig) -> dict[str, Checkpoint]:
    """The recipe's checkpoints by entry, the base left out."""
    checkpoints = {}
    for entry in dict.fromkeys(recipe.experts or []):
        if entry != BASE:
            with about_expert(entry):
                checkpoints[entry] = Checkpoint(*parse_expert(entry))
    return checkpoints


def compose_parents(parents: Mapping[str, Parent], recipe: UpcycleConfig) -> Composition:
    """
    Make one model out of several. Without experts, the base is all of it.

    Args:
        parents (`Mapping[str, Parent]`): The source as `"base"`, and the recipe's checkpoints by entry; their configurations
            fit the source's.

    Raises:
        UpcycleError: if a checkpoint is not complete; with `compose_rest="mean"`, if tensors or tokenizers do not fit.
    """
    base, entries = parents[BASE], recipe.experts or []
    others = [parent for entry, parent in parents.items() if entry != BASE]
    for parent in others:
        with about_expert(parent.entry):
            check_names(parent.tensors, parent.config, meta_model(dense_class(parent.config), parent.config))
    config = composed_config(base.config, {parent.entry: parent.config for parent in others}, recipe)
    as_experts = _names_of_experts(base, recipe) if entries else []
    if recipe.compose_rest == "mean":
        dense = _mean_tensors(base, [parents[entry] for entry in dict.fromkeys(entries)], as_experts)
        tokenizer = _largest_tokenizer(list(parents.values()))
    else:
        dense, tokenizer = base.tensors, BASE
        known = base.read_tokens() if others else {}
        for parent in others:
            _say_what_base_lacks(base, known, parent)
    rounded_from = {}
    for parent in others:
        for name in as_experts:
            given, kept = parent.tensors.info[name][0], base.tensors.info[name][0]
            if torch.promote_types(given, kept) != kept:
                rounded_from[parent.entry] = given
    for entry, dtype in rounded_from.items():
        logger.warning(
            f"Expert {entry!r} is of type {dtype}; its weights are rounded to the base's. Save the base in {dtype} first to "
            "keep them as they are."
        )
    experts = {parent.entry: _in_types_of(base, parent) for parent in others} | {BASE: base.tensors}
    return Composition(config, dense, [experts[entry] for entry in entries], rounded_from, tokenizer)


@contextlib.contextmanager
def about_expert(entry: str) -> Iterator[None]:
    """Say in errors which expert they are about; the base needs no name."""
    try:
        yield
    except UpcycleError as error:
        if entry == BASE or str(error).startswith("Expert "):
            raise
        raise UpcycleError(f"Expert {entry!r}: {error}") from error


def _largest_tokenizer(parents: Sequence[Parent]) -> str:
    """Whose tokenizer has most tokens; it must have all tokens of the others, by the same ids."""
    largest, known = parents[0].entry, parents[0].read_tokens()
    for parent in parents[1:]:
        smaller, tokens = parent.entry, parent.read_tokens()
        if len(tokens) > len(known):
            largest, known, smaller, tokens = smaller, tokens, largest, known
        for index, token in sorted(tokens.items()):
            if known.get(index) != token:
                raise UpcycleError(
                    f"compose_rest='mean' needs a tokenizer that has all tokens of the others, but token {index} is {token!r} "
                    f"in {smaller!r} and {known.get(index)!r} in {largest!r}, which has no fewer tokens. Use "
                    "compose_rest='base', which keeps the embeddings and the tokenizer of the base."
                )
    return largest


def _say_what_base_lacks(base: Parent, known: Mapping[int, str], parent: Parent) -> None:
    given, kept = (getattr(config, "vocab_size", 0) for config in (parent.config, base.config))
    if given != kept:
        lost = (
            f"{given - kept} rows of its embeddings are ignored"
            if given > kept
            else "it was trained without some of them"
        )
        logger.warning(
            f"Expert {parent.entry!r} has {given} tokens, the base {kept}: compose_rest='base' keeps the base's embeddings and "
            f"tokenizer; {lost}."
        )
    tokens = parent.read_tokens()
    other = [index for index, token in sorted(known.items()) if tokens.get(index, token) != token]
    if other:
        logger.warning(
            f"Expert {parent.entry!r} was trained with other tokens than the base for {len(other)} ids, e.g. {other[0]}: "
            f"{tokens[other[0]]!r} instead of {known[other[0]]!r}. The base's tokenizer is kept."
        )


def _in_types_of(base: Parent, parent: Parent) -> DenseTensors:
    """The parent's tensors in the data types of the base."""

    def read(name: str) -> torch.Tensor:
        with about_expert(parent.entry):
            return _in_type(name, parent.tensors.read(name), base.tensors.info[name][0])

    return DenseTensors(parent.tensors.info, read)


def _in_type(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    tensor = tensor.to(dtype)
    if not torch.isfinite(tensor).all():
        raise UpcycleError(
            f"Tensor {name!r} holds values beyond the range of {dtype}, the type of the base. Save the base in a wider type "
            "first."
        )
    return tensor


def _names_of_experts(base: Parent, recipe: UpcycleConfig) -> list[str]:
    """The tensors that experts take the place of."""
    family = find_family(base.config)
    layers = layer_prefix(family, meta_model(dense_class(base.config), base.config))
    return [
        name
        for index in find_sparse_layers(base.config, recipe)
        for name in family.feed_forward.tensors(f"{layers}{index}.", base.tensors.info)
    ]


def _mean_tensors(base: Parent, parents: Sequence[Parent], as_experts: Collection[str]) -> DenseTensors:
    """The mean over the parents of everything but the feed-forwards that become experts."""
    info = {name: base.tensors.info[name] for name in as_experts}
    for name, (dtype, _) in base.tensors.info.items():
        if name not in info and all(name in parent.tensors.info for parent in parents):
            info[name] = (dtype, _common_shape(name, [base, *parents]))

    def read(name: str) -> torch.Tensor:
        return base.tensors.read(name) if name in as_experts else _mean(name, info[name], base, parents)

    return DenseTensors(info, read)


def _common_shape(name: str, parents: Sequence[Parent]) -> tuple[int, ...]:
    """The largest shape; the parents' may differ in the number of rows if there is one per token."""
    shapes = {parent.entry: parent.tensors.info[name][1] for parent in parents}
    has_row_per_token = all(
        shapes[parent.entry][:1] == (getattr(parent.config, "vocab_size", None),) for parent in parents
    )
    if len({shape[1:] if has_row_per_token else shape for shape in shapes.values()}) > 1:
        raise UpcycleError(
            f"compose_rest='mean' cannot average {name!r}, whose shapes are {shapes}. Use compose_rest='base'."
        )
    return max(shapes.values())


def _mean(name: str, info: TensorInfo, base: Parent, parents: Sequence[Parent]) -> torch.Tensor:
    """
    The mean of a tensor, rounded once. A row is the mean over the parents that have it, or the base's if none has.

    It is added up in a type in which the mean of equal values is that value.
    """
    dtype, shape = info
    dtypes = {parent.tensors.info[name][0] for parent in parents}
    total = torch.zeros(shape, dtype=torch.float32 if dtypes <= {torch.float16, torch.bfloat16} else torch.float64)
    rows = [parent.tensors.info[name][1][0] for parent in parents]
    for parent, count in zip(parents, rows, strict=True):
        total[:count] += parent.tensors.read(name).cpu()
    for start, end in zip([0, *sorted(rows)], sorted(rows), strict=False):
        total[start:end] /= sum(count >= end for count in rows)
    if max(rows) < shape[0]:
        total[max(rows) :] = base.tensors.read(name)[max(rows) :]
    return _in_type(name, total, dtype)
