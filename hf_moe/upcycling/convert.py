# SPDX-License-Identifier: Apache-2.0
"""
The conversion itself, free of files: which tensors the result has, and how each is made from the dense ones.

`plan_tensors` lists names, types and shapes; `Step.pieces` then makes the values, one expert at a time. Both the
streaming writer and the in-memory conversion run these steps, which is why their results are equal to the bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .families import Family
from .layouts import FusedLayout, PerExpertLayout, Piece
from .methods import FeedForward, SparseLayer
from .plan import UpcyclePlan, meta_model
from .recipe import UpcycleConfig, UpcycleError
from .router_init import ROUTER_INITIALIZERS, seeded_generator
from .targets import build_sparse_layer, dense_class, find_family, find_head


TensorInfo = tuple[torch.dtype, tuple[int, ...]]


def num_bytes(info: TensorInfo) -> int:
    """Size of a tensor."""
    dtype, shape = info
    return dtype.itemsize * torch.Size(shape).numel()


SHARED_EXPERT = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Step:
    """A part of the conversion that is done or not done as a whole: one layer's sparse block, or one copied tensor."""

    name: str
    tensors: dict[str, TensorInfo]
    pieces: Callable[[], Iterator[Piece]]

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.tensors.values()))


@dataclass(frozen=True)
class DenseTensors:
    """The dense model's tensors: `info` by name, `read(name)` for the values."""

    info: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor]


def plan_steps(
    dense: DenseTensors,
    dense_config: PreTrainedConfig,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    layout: FusedLayout | PerExpertLayout,
) -> list[Step]:
    """
    The steps of a conversion, in the order of the dense model's tensors.

    Raises:
        UpcycleError: if the dense model lacks a tensor that its class has, has one that its class would drop, or one of
            another shape.
    """
    names = _check_names(dense, dense_config)
    family = find_family(dense_config)
    base = "" if find_head(dense_config) == "Model" else "model."
    layer_of = {
        f"{base}layers.{index}.{projection}": index
        for index in plan.sparse_layers
        for projection in family.feed_forward
    }
    steps, seen = [], set()
    for name in names:
        if name not in layer_of:
            steps.append(_copy_step(name, dense))
        elif (index := layer_of[name]) not in seen:
            seen.add(index)
            steps.append(_sparse_step(f"{base}layers.{index}.", index, dense, family, plan, recipe, layout))
    return steps


def _copy_step(name: str, dense: DenseTensors) -> Step:
    return Step(name, {name: dense.info[name]}, lambda: iter([Piece(name, 0, dense.read(name))]))


def _sparse_step(
    layer: str,
    index: int,
    dense: DenseTensors,
    family: Family,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    layout: FusedLayout | PerExpertLayout,
) -> Step:
    """Router, experts and shared expert of one layer; `layer` is its name with a dot at the end."""
    gate_name, up_name, down_name = (layer + projection for projection in family.feed_forward)
    norm_name = layer + family.router_input_norm
    dtype = dense.info[gate_name][0]
    if {dense.info[name][0] for name in (up_name, down_name)} != {dtype}:
        raise UpcycleError(
            f"{gate_name!r}, {up_name!r} and {down_name!r} are not of one data type. Save the dense model in one type first."
        )
    block = layer + layout.block

    def build(feed_forward: FeedForward) -> SparseLayer:
        sparse = build_sparse_layer(feed_forward, recipe, index)
        if plan.target.shared_expert == "gated":
            sparse = sparse._replace(shared_expert=_inert(feed_forward, plan.config.shared_expert_intermediate_size))
        return sparse

    def shapes() -> dict[str, tuple[int, ...]]:
        meta = FeedForward(
            *(torch.empty(dense.info[name][1], device="meta") for name in (gate_name, up_name, down_name))
        )
        sparse = build(meta)
        hidden_size = meta.gate_proj.shape[1]
        table: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (recipe.num_experts, hidden_size)}
        table.update(layout.shapes(layer, recipe.num_experts, sparse.expert(0)))
        if sparse.shared_expert is not None:
            for projection, tensor in zip(SHARED_EXPERT, sparse.shared_expert, strict=True):
                table[f"{block}.shared_expert.{projection}.weight"] = tuple(tensor.shape)
        if plan.target.shared_expert == "gated":
            table[f"{block}.shared_expert_gate.weight"] = (1, hidden_size)
        return table

    def pieces() -> Iterator[Piece]:
        sparse = build(FeedForward(dense.read(gate_name), dense.read(up_name), dense.read(down_name)))
        router = ROUTER_INITIALIZERS[recipe.router_init](dense.read(norm_name), recipe, index)
        yield Piece(f"{block}.gate.weight", 0, router.to(dtype))
        for expert_index in range(recipe.num_experts):
            yield from layout.pieces(layer, expert_index, sparse.expert(expert_index))
        if sparse.shared_expert is not None:
            for projection, tensor in zip(SHARED_EXPERT, sparse.shared_expert, strict=True):
                yield Piece(f"{block}.shared_expert.{projection}.weight", 0, tensor)
        if plan.target.shared_expert == "gated":
            # Never exactly zero: llama.cpp computes the sigmoid as silu(x) / x.
            generator = seeded_generator(recipe.seed, index, 0, "shared_expert_gate")
            gate = torch.randn(1, router.shape[1], generator=generator) * plan.config.initializer_range
            yield Piece(f"{block}.shared_expert_gate.weight", 0, gate.to(dtype))

    return Step(f"{layer}{layout.block}", {name: (dtype, shape) for name, shape in shapes().items()}, pieces)


def _inert(dense: FeedForward, size: int) -> FeedForward:
    """A shared expert that adds nothing, for a class that insists on having one: its down-projection is zero."""
    return FeedForward(dense.gate_proj[:size], dense.up_proj[:size], torch.zeros_like(dense.down_proj[:, :size]))


def _check_names(dense: DenseTensors, dense_config: PreTrainedConfig) -> list[str]:
    """Names to convert, in the order of the dense class."""
    model = meta_model(dense_class(dense_config), dense_config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys if dense_config.tie_word_embeddings else {}
    for name, other in tied.items():
        del expected[name]
        if name in dense.info and not torch.equal(dense.read(name), dense.read(other)):
            raise UpcycleError(
                f"The configuration ties {name!r} to {other!r}, but the checkpoint holds different values for the two. Set "
                "tie_word_embeddings to what the model was trained with."
            )
    unexpected = [
        name
        for name in dense.info
        if name not in expected and name not in tied and not name.endswith("rotary_emb.inv_freq")
    ]
    if missing := [name for name in expected if name not in dense.info]:
        raise UpcycleError(
            f"The checkpoint lacks {len(missing)} of the tensors that {type(model).__name__} has: {missing[:3]}. Is it "
            "complete, and does config.json belong to it?"
        )
    if unexpected:
        raise UpcycleError(
            f"{type(model).__name__} has no place for {len(unexpected)} tensors of the checkpoint, which would be lost: "
            f"{unexpected[:3]}. Does config.json belong to it?"
        )
    for name, shape in expected.items():
        if dense.info[name][1] != shape:
            raise UpcycleError(
                f"Tensor {name!r} has shape {dense.info[name][1]}, but config.json asks for {shape}. Does config.json "
                "belong to the checkpoint?"
            )
    return list(expected)
