# SPDX-License-Identifier: Apache-2.0
"""
The conversion itself, free of files: which tensors the result has, and how each is made from the dense ones.

`plan_steps` lists names, types and shapes; `Step.pieces` then makes the values, one expert at a time. Both the
streaming writer and the in-memory conversion run these steps, which is why their results are equal to the bit.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from .errors import UpcycleError
from .families import Family
from .feed_forward import FeedForward, LayerContext, SparseLayer
from .layouts import FusedLayout, PerExpertLayout, Piece
from .methods import build_sparse_layer
from .plan import UpcyclePlan
from .recipe import UpcycleConfig
from .router_init import build_router
from .routing import router_shapes, router_tensors
from .target import RowsOf, SharedExpert
from .targets import backbone_prefix, dense_class, find_family, layer_prefix, meta_model


logger = logging.get_logger(__name__)

TensorInfo = tuple[torch.dtype, tuple[int, ...]]
# Constants that earlier releases of transformers saved with the weights.
SAVED_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.masked_bias$")
# Modules beside or behind the layers that one class of a family has and another has not.
# Of hf_moe's classes: a small step would vanish in 16 bits.
KEPT_IN_FLOAT32 = "e_score_correction_bias"
HEADS = r"^(\w+\.)?(classifier|cls|embed_out|lm_head|multiple_choice_head|pooler|qa_outputs|score)\."


def num_bytes(info: TensorInfo) -> int:
    """Size of a tensor."""
    dtype, shape = info
    return dtype.itemsize * torch.Size(shape).numel()


@dataclass(frozen=True)
class Step:
    """A part of the conversion that is done or not done as a whole: one layer's sparse block, or one copied tensor."""

    name: str
    tensors: dict[str, TensorInfo]
    open: Callable[[], "OpenStep"]

    @classmethod
    def of(cls, name: str, tensors: dict[str, TensorInfo], pieces: Callable[[], Iterator[Piece]]) -> "Step":
        """A step whose values all come from one place."""
        return cls(name, tensors, lambda: OpenStep(pieces))

    def pieces(self) -> Iterator[Piece]:
        """All values, those of one expert after the other."""
        opened = self.open()
        yield from opened.others()
        for expert_index in range(opened.num_experts):
            yield from opened.expert(expert_index)

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.tensors.values()))


@dataclass(frozen=True)
class OpenStep:
    """A step with its dense tensors at hand: the values that belong to no expert, and those of one expert."""

    others: Callable[[], Iterator[Piece]]
    expert: Callable[[int], Iterator[Piece]] = lambda expert_index: iter([])
    num_experts: int = 0


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
    observations: Mapping[int, Mapping[str, torch.Tensor]],
    experts: Sequence[DenseTensors] = (),
) -> list[Step]:
    """
    The steps of a conversion, in the order of the dense model's tensors.

    Args:
        observations (`Mapping`): By layer, what [`~hf_moe.upcycling.calibration.calibrate`] found out. It is looked at
            when a step runs, so it may be filled until then.
        experts (`Sequence[DenseTensors]`, *optional*): For method `"compose"`, the dense model that each expert comes from;
            `dense` has what is not an expert.

    Raises:
        UpcycleError: if the dense model lacks a tensor that its class has, has one that its class would drop, or one of
            another shape.
    """
    model = meta_model(dense_class(dense_config), dense_config)
    names = check_names(dense, dense_config, model)
    family = find_family(dense_config)
    layers = layer_prefix(family, model)
    layer_of = {
        name: index
        for index in plan.experts_in_layer
        for name in family.feed_forward.tensors(f"{layers}{index}.", dense.info)
    }
    steps, seen = [], set()
    for name in names:
        if name not in layer_of:
            steps.append(_copy_step(name, dense, plan.target.rows_of(name, dense_config)))
        elif (index := layer_of[name]) not in seen:
            seen.add(index)
            layer, backbone = f"{layers}{index}.", backbone_prefix(model)
            composed = _composed(layer, family, experts) if experts else None
            context = LayerContext(
                recipe, index, plan.experts_in_layer[index], observations.get(index, {}), composed=composed
            )
            steps.append(_SparseStep(layer, dense, dense_config, family, plan, context, layout, backbone).step())
    return steps


def _composed(layer: str, family: Family, experts: Sequence[DenseTensors]) -> Callable[[int], FeedForward]:
    def read(expert_index: int) -> FeedForward:
        dense = experts[expert_index]
        names = family.feed_forward.tensors(layer, dense.info)
        return family.feed_forward.read(layer, {name: dense.read(name) for name in names})

    return read


def _copy_step(name: str, dense: DenseTensors, rows_of: RowsOf) -> Step:
    dtype, shape = dense.info[name]
    tensors = {
        new_name: (dtype, shape if rows is None else (len(range(shape[0])[rows]), *shape[1:]))
        for new_name, rows in rows_of
    }

    def pieces() -> Iterator[Piece]:
        tensor = dense.read(name)
        for new_name, rows in rows_of:
            yield Piece(new_name, 0, tensor if rows is None else tensor[rows])

    return Step.of(name, tensors, pieces)


@dataclass(frozen=True)
class _SparseStep:
    """Router, experts and shared expert of one layer; `layer` is its name with a dot at the end."""

    layer: str
    dense: DenseTensors
    dense_config: PreTrainedConfig
    family: Family
    plan: UpcyclePlan
    context: LayerContext
    layout: FusedLayout | PerExpertLayout
    backbone: str

    def step(self) -> Step:
        names = self.family.feed_forward.tensors(self.layer, self.dense.info)
        dtypes = {self.dense.info[name][0] for name in names}
        if len(dtypes) > 1:
            raise UpcycleError(
                f"{names} are not of one data type: {sorted(map(str, dtypes))}. Save the dense model in one type first."
            )
        dtype = dtypes.pop()
        shapes = self._shapes({name: torch.empty(self.dense.info[name][1], device="meta") for name in names})
        return Step(
            f"{self.layer}{self.layout.block}",
            {name: (self._dtype(name, dtype), shape) for name, shape in shapes.items()},
            lambda: self._open({name: self.dense.read(name) for name in names}, dtype),
        )

    @property
    def _router(self) -> str:
        return f"{self.layer}{self.layout.block}.{self.layout.router}"

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        local = name.removeprefix(self.layer)
        if (own := self._own_router.get(name)) is not None and not own[0].is_floating_point:
            return own[0]
        is_float32 = local in self.plan.target.float32 or local.endswith(KEPT_IN_FLOAT32)
        return torch.float32 if is_float32 else dtype

    @cached_property
    def _own_router(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Types and shapes of what routes in a block of hf_moe's; empty for a native class."""
        if self.plan.target.native:
            return {}
        block = f"{self.layer}{self.layout.block}."
        shapes = router_shapes(self.plan.config, self.context.num_experts, self.context.layer_index)
        return {f"{block}{name}": (dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()}

    def _added(self) -> dict[str, torch.Tensor]:
        if self.plan.target.added is None:
            return {}
        return self.plan.target.added(self.layer, self.dense_config, self.context.num_experts)

    def _shapes(self, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        dense, num_experts = self.family.feed_forward.read(self.layer, tensors), self.context.num_experts
        table: dict[str, tuple[int, ...]] = {name: shape for name, (_, shape) in self._own_router.items()}
        if self.plan.target.native:
            table[self._router] = (num_experts, dense.hidden_size)
        table.update(self.layout.shapes(self.layer, num_experts, dense.take(slice(0, self.plan.sizes.expert))))
        shared = self.plan.target.shared_expert
        if shared is not None and (size := shared.size(self.plan.sizes)) is not None:
            for name, parts in shared.names.write(self.layer, dense.take(slice(0, size))):
                table[name] = (sum(len(part) for part in parts), *parts[0].shape[1:])
            if shared.gate is not None:
                table[f"{self.layer}{shared.gate}.weight"] = (1, dense.hidden_size)
        return table | {name: tuple(tensor.shape) for name, tensor in self._added().items()}

    def _open(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> OpenStep:
        dense = self.family.feed_forward.read(self.layer, tensors)
        sparse = build_sparse_layer(dense, self.context)
        return OpenStep(
            lambda: self._other_pieces(dense, sparse, dtype),
            lambda expert_index: self.layout.pieces(self.layer, expert_index, sparse.expert(expert_index)),
            self.context.num_experts,
        )

    def _other_pieces(self, dense: FeedForward, sparse: SparseLayer, dtype: torch.dtype) -> Iterator[Piece]:
        router_input = self.family.router_input(self._read_backbone, self._layer_in_backbone, self.context.layer_index)
        router = build_router(router_input, self.plan.sizes.experts_per_copy, self.context)
        block, routing = f"{self.layer}{self.layout.block}.", {self.layout.router: router}
        if not self.plan.target.native:
            routing = router_tensors(
                self.plan.config, router, router_input, self.context, self.plan.sizes.experts_per_copy
            )
        for name, tensor in routing.items():
            yield Piece(f"{block}{name}", 0, tensor.to(self._dtype(f"{block}{name}", dtype)))
        if self.plan.target.shared_expert is not None:
            yield from self._shared_expert_pieces(dense, sparse.shared_expert, self.plan.target.shared_expert)
        for name, tensor in self._added().items():
            yield Piece(name, 0, tensor.to(self._dtype(name, dtype)))

    def _shared_expert_pieces(
        self, dense: FeedForward, tensors: FeedForward | None, shared: SharedExpert
    ) -> Iterator[Piece]:
        size = shared.size(self.plan.sizes)
        if size is None:
            return
        if tensors is None:
            # The class insists on a shared expert: one that adds nothing.
            tensors = dense.take(slice(0, size)).silent()
        for name, parts in shared.names.write(self.layer, tensors):
            offset = 0
            for part in parts:
                yield Piece(name, offset, part)
                offset += part.numel()
        if shared.gate is not None:
            # Never exactly zero: llama.cpp computes the sigmoid as silu(x) / x.
            gate = torch.randn(1, dense.hidden_size, generator=self.context.generator(0, "shared_expert_gate"))
            gate = gate * self.plan.config.initializer_range
            yield Piece(f"{self.layer}{shared.gate}.weight", 0, gate.to(dense.up_proj.dtype))

    @property
    def _layer_in_backbone(self) -> str:
        return self.layer.removeprefix(self.backbone)

    def _read_backbone(self, name: str) -> torch.Tensor | None:
        name = self.backbone + name
        return self.dense.read(name) if name in self.dense.info else None


def in_memory_names(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """
    What transformers calls the tensors of a checkpoint once they are loaded into `model`, by their names on disk.

    Checkpoints may have been saved by another release, or by a class with another head: GPT-2's have no
    `transformer.`, ViT's layers had other names.
    """
    state_dict = model.state_dict()
    if all(name in state_dict for name in names):
        return {name: name for name in names}  # the mapping takes a while to be made
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, state_dict)[0] for name in names}


def names_to_convert(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """
    As [`in_memory_names`], without the tensors of a dense checkpoint that its class drops when it loads them.

    Those are constants that other releases saved and, with a warning, heads of other classes.

    Raises:
        UpcycleError: if transformers would compute a tensor from those on disk, or load two of them into one.
    """
    in_memory, expected = in_memory_names(names, model), model.state_dict()
    converters = []
    if any(name not in expected for name in names):
        converters = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightConverter)]
    constants = [*SAVED_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or [])]
    # Of two tied tensors a checkpoint may hold either.
    found = set(in_memory.values())
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if other not in found}
    kept, heads, seen = {}, [], set()
    for on_disk, name in in_memory.items():
        if rename_source_key(name, [], converters)[1] is not None:
            raise UpcycleError(
                f"transformers computes the weights of {type(model).__name__} from {on_disk!r} when it loads the checkpoint. "
                "Load the model and save it with `save_pretrained(..., save_original_format=False)` first."
            )
        if name in seen:
            raise UpcycleError(
                f"The checkpoint holds {name!r} of {type(model).__name__} twice, under {on_disk!r} too. Load the model and "
                "save it with `save_pretrained` first, so that each is there once."
            )
        seen.add(name)
        if name in expected or not any(re.search(pattern, name) for pattern in [*constants, HEADS]):
            kept[on_disk] = tied.get(name, name)
        elif re.search(HEADS, name):
            heads.append(on_disk)
    if heads:
        logger.warning(f"{type(model).__name__} has no place for {heads}: they are left out, as transformers does.")
    return kept


def check_names(dense: DenseTensors, dense_config: PreTrainedConfig, model: PreTrainedModel) -> list[str]:
    """
    Names to convert, in the order of the dense class.

    Raises:
        UpcycleError: if a tensor is missing, has no place in the class, or has another shape than there.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    for name, other in tied.items():
        del expected[name]
        if name in dense.info and not torch.equal(dense.read(name), dense.read(other)):
            raise UpcycleError(
                f"The configuration ties {name!r} to {other!r}, but the checkpoint holds different values for the two. Set "
                "tie_word_embeddings to what the model was trained with."
            )
    unexpected = [name for name in dense.info if name not in expected and name not in tied]
    if missing := [name for name in expected if name not in dense.info]:
        raise UpcycleError(
            f"The checkpoint lacks {len(missing)} of the tensors that {type(model).__name__} has: {missing[:3]}. Is it "
            "complete, and does config.json belong to it? To start from random values there, load the model and save it "
            "with `save_pretrained` first."
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
