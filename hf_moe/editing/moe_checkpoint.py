# SPDX-License-Identifier: Apache-2.0
"""
A mixture of experts on disk, seen as layers of experts: `MoeCheckpoint`.

No table says where its parts are: the class of the checkpoint is built without values, its experts and routers are found in
it, and the names on disk say in which of the two layouts they are stored; what does not fit is refused by name.
"""

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_moe import MoeConfigMixin
from ..models.router_base import MoeRouter
from ..training.routers import TOP_K_FIELDS
from ..upcycling.checkpoint import Checkpoint, is_finite
from ..upcycling.convert import TensorInfo, in_memory_names
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.layouts import FusedLayout, PerExpertLayout
from ..upcycling.routing import weight_sum_of
from ..upcycling.target import Target
from ..upcycling.targets import NUM_EXPERTS_FIELDS, meta_model
from .sparse_block import SparseBlock, feed_forward_of, find_blocks


PROJECTIONS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
# Classes whose weights are a softmax over all experts, divided by the sum of the chosen ones or not. A softmax over the
# logits of the chosen, as in Granite, is the same as the former.
SOFTMAX_MODEL_TYPES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "granitemoe",
    "granitemoeshared",
    "granitemoe_swa",
)


class MoeCheckpoint:
    """
    A mixture of experts of hf_moe or transformers on disk or on the Hub.

    Args:
        source (`str` or `Path`): A folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Attributes:
        blocks (`dict[int, SparseBlock]`): By the index of the layer.
        layout (`FusedLayout` or `PerExpertLayout`): How the experts are stored.
        provenance (`dict`, *optional*): What the `hf_moe.json` beside the weights says.

    Raises:
        UpcycleError: if it is no mixture of experts, or one whose experts cannot be told apart.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.checkpoint = Checkpoint(source, revision)
        self.config = self.checkpoint.config
        self.config.dtype = self.checkpoint.main_dtype()
        if getattr(self.config, "quantization_config", None):
            raise UpcycleError(
                "The source is quantized (quantization_config). Change the full-precision model and quantize the result."
            )
        self.model_class = _model_class(self.config)
        self.model = meta_model(self.model_class, self.config)
        self.blocks = find_blocks(self.model)
        in_memory = in_memory_names(list(self.checkpoint), self.model)
        self.name_on_disk = {new: old for old, new in in_memory.items()}
        first = next(iter(self.blocks.values()))
        self.layout = self._find_layout(first)
        self._check_names()
        self.provenance = _read_provenance(self.checkpoint)

    def refuse_router_residual(self) -> None:
        """
        Raises:
            UpcycleError: if the routers have matrices of experts by experts, of which an edit would have to change the columns too.
        """
        if getattr(self.config, "router_residual", False):
            raise UpcycleError(
                f"{self.checkpoint.source} has `router_residual`: a matrix with a row and a column for every expert leads from each router to the "
                "next, and hf_moe edits rows alone. `collapse` works; for other experts, upcycle the dense model again."
            )

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was done to the model before, oldest first."""
        if self.provenance is None:
            return []
        latest = {name: value for name, value in self.provenance.items() if name != "history"}
        return [*self.provenance.get("history", []), latest]

    @property
    def target(self) -> Target:
        """The class and the layout, in the form in which the proof reads a result."""
        block = next(iter(self.blocks.values()))
        path = block.experts.removeprefix(block.layer).removesuffix(".experts")
        return Target(type(self.config), self.layout, self.model_class.__name__, block=path)

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return getattr(self.config, self._top_k_field)

    @property
    def _top_k_field(self) -> str:
        field = next((field for field in TOP_K_FIELDS if isinstance(getattr(self.config, field, None), int)), None)
        if field is None:
            raise UpcycleError(
                f"The configuration of {self.model_class.__name__} does not say how many experts serve a token: it has none of "
                f"{list(TOP_K_FIELDS)}."
            )
        return field

    @property
    def router_class(self) -> type[MoeRouter] | None:
        """The class of the router if it is one of hf_moe's."""
        return self.config.router_class if isinstance(self.config, MoeConfigMixin) else None

    @property
    def router_type(self) -> str:
        """What kind of router it is: a name in hf_moe's `ROUTERS`, or a class of transformers that is none of them."""
        if isinstance(self.config, MoeConfigMixin):
            return self.config.router_type
        if self.config.model_type in SOFTMAX_MODEL_TYPES:
            return "softmax_topk"
        return type(self.model.get_submodule(next(iter(self.blocks.values())).router)).__name__

    @property
    def weight_sum(self) -> float | None:
        """What the weights of the chosen experts sum to; None if that depends on the token."""
        if isinstance(self.config, MoeConfigMixin):
            return weight_sum_of(self.config, self.config.num_experts)
        scale = getattr(self.config, "routed_scaling_factor", None) or 1.0
        return scale if getattr(self.config, "norm_topk_prob", True) else None

    def copies_differ_because(self) -> str | None:
        """Why an expert that is there n times, in a router that chooses n times as many, need not do what it does alone."""
        if self.router_class is None:
            is_known = self.config.model_type in SOFTMAX_MODEL_TYPES
            return (
                None
                if is_known
                else f"the router ({self.router_type}) is not known to share a weight out among copies"
            )
        if self.config.eval_capacity_factor is not None:
            return f"tokens beyond the capacity are left out (eval_capacity_factor={self.config.eval_capacity_factor})"
        if not self.router_class.shares_weight_among_copies(self.config):
            because = " with use_expert_bias" if self.config.use_expert_bias else ""
            return f"router_type={self.router_type!r}{because} does not share a weight out among copies"
        return None

    def top_k_among(self, counts: dict[int, int]) -> int:
        """Routed experts per token where layers have these numbers of experts, unless somebody wants another number."""
        takes_all = self.router_class is not None and self.router_class.chooses_all
        return min(counts.values()) if takes_all else self.top_k

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor by its name in memory."""
        return self.checkpoint.dtype_and_shape(self.name_on_disk[name])

    def read_rows(self, block: SparseBlock) -> dict[str, torch.Tensor]:
        """The tensors with one row per expert, by their names within the router, the experts in the first dimension."""
        return {
            local: self.checkpoint.read(self.name_on_disk[rows.name]).movedim(rows.dimension, 0)
            for local, rows in block.rows.items()
        }

    def router_weight(self, block: SparseBlock) -> torch.Tensor:
        """What the router multiplies the hidden state with, `(E, H)`."""
        return self.read_rows(block)[block.weight]

    def read_expert(self, block: SparseBlock, index: int) -> FeedForward:
        """
        One expert.

        Raises:
            UpcycleError: if it holds a value that is not finite.
        """
        gated, biased = block.expert.is_gated, block.expert.down_bias is not None
        return feed_forward_of(self.layout.read(self._read, block.layer, index, gated, biased), gated)

    def read_expert_rows(self, block: SparseBlock, index: int, rows: slice) -> torch.Tensor:
        """The values of one expert in these rows of each of its tensors, flattened."""

        def read(name: str, row: int | None) -> torch.Tensor:
            return self._read(name, rows if row is None else (row, rows))

        gated, biased = block.expert.is_gated, block.expert.down_bias is not None
        parts = self.layout.read(read, block.layer, index, gated, biased)
        return torch.cat([tensor.flatten() for tensor in parts if tensor is not None])

    def _read(self, name: str, index: int | slice | tuple[int | slice, ...] | None) -> torch.Tensor:
        tensor = self.checkpoint.read(name) if index is None else self.checkpoint.read_row(name, index)
        if index is not None and not is_finite(tensor):
            raise UpcycleError(f"Tensor {name!r} holds NaN or infinite values. Repair the checkpoint first.")
        return tensor

    def expert_tensors(self, block: SparseBlock) -> dict[str, tuple[int, ...]]:
        """Names on disk and shapes of the tensors that hold the routed experts of a layer."""
        return self.layout.shapes(block.layer, block.num_experts, block.expert)

    def dtype_of(self, block: SparseBlock) -> torch.dtype:
        """The data type of a layer's routed experts."""
        dtypes = {self.checkpoint.dtype_and_shape(name)[0] for name in self.expert_tensors(block)}
        if len(dtypes) > 1:
            raise UpcycleError(
                f"The experts in {block.experts} are not of one data type: {sorted(map(str, dtypes))}. Save the model in one "
                "type first."
            )
        return dtypes.pop()

    def with_experts(self, counts: dict[int, int], top_k: int) -> PreTrainedConfig:
        """
        The configuration with other numbers of experts.

        Args:
            counts (`dict[int, int]`): Experts of every sparse layer.
            top_k (`int`): Routed experts per token.

        Raises:
            UpcycleError: if the class cannot have them.
        """
        name = self.model_class.__name__
        if (getattr(self.config, "n_group", None) or 1) > 1:
            raise UpcycleError(
                f"{name} chooses among n_group={self.config.n_group} groups of neighbouring experts, which other numbers of "
                "experts would shift. Such models can be collapsed, and experts extracted, only."
            )
        if self.router_class is not None and self.router_class.divides_by_top_k:
            raise UpcycleError(
                f"{name} with router_type={self.router_type!r} divides its experts into as many groups as a token takes, which other "
                "numbers of experts would shift. Such models can be collapsed, and experts extracted, only."
            )
        if (parts := getattr(self.config, "num_experts_per_modality", None)) is not None:
            raise UpcycleError(
                f"{name} divides its experts among modalities (num_experts_per_modality={parts}), which other numbers of experts would "
                "shift. Such models can be collapsed, and experts extracted, only."
            )
        fixed = None if self.router_class is None else self.router_class.fixed_top_k
        if fixed not in (None, top_k):
            raise UpcycleError(
                f"router_type={self.router_type!r} gives a token {fixed} of the experts, whatever their number, and cannot give it {top_k}: "
                f"leave it at {fixed} (`keep_top_k`, `--keep-top-k` of expand)."
            )
        if self.router_class is not None and self.router_class.chooses_all and top_k != min(counts.values()):
            raise UpcycleError(
                f"router_type={self.router_type!r} gives a token all of the experts, {min(counts.values())} here, and cannot give it {top_k}: "
                "leave out `keep_top_k` (`--keep-top-k` of expand) or `num_experts_per_tok` (`--top-k` of merge)."
            )
        if top_k > min(counts.values()):
            raise UpcycleError(
                f"A token takes {top_k} experts ({self._top_k_field}), but only {min(counts.values())} would be left in a "
                f"layer. Leave at least {top_k}, or let a token take fewer."
            )
        config = copy.deepcopy(self.config)
        if len(set(counts.values())) > 1 or getattr(config, "num_experts_per_layer", None) is not None:
            if not hasattr(config, "num_experts_per_layer"):
                raise UpcycleError(
                    f"All layers of {name} have one number of experts, but {sorted(set(counts.values()))} were asked for. "
                    "Only hf_moe's classes can have layers that differ."
                )
            layers = [counts.get(index, 0) for index in range(config.num_hidden_layers)]
            config.num_experts_per_layer = layers if len(set(counts.values())) > 1 else None
        field = next((field for field in NUM_EXPERTS_FIELDS if isinstance(getattr(config, field, None), int)), None)
        if field is None:
            raise UpcycleError(
                f"The configuration of {name} does not say how many experts there are: it has none of "
                f"{list(NUM_EXPERTS_FIELDS)}."
            )
        setattr(config, field, max(counts.values()))
        setattr(config, self._top_k_field, top_k)
        return self._checked(config, counts)

    def _checked(self, config: PreTrainedConfig, counts: dict[int, int]) -> PreTrainedConfig:
        """The configuration, if the model that it describes has these experts and differs in nothing else."""
        try:
            config = type(config).from_dict(config.to_dict())
            config.dtype = self.config.dtype
            model = meta_model(self.model_class, config)
        except (StrictDataclassError, ValueError) as error:
            raise UpcycleError(f"{type(config).__name__} cannot hold the result: {error}") from error
        blocks = find_blocks(model)
        rows = {rows.name for block in self.blocks.values() for rows in block.rows.values()}
        before, after = self.model.state_dict(), model.state_dict()
        changed = [
            name
            for name in before.keys() | after.keys()
            if name not in rows
            and not any(name.startswith(f"{block.experts}.") for block in self.blocks.values())
            and (name not in before or name not in after or before[name].shape != after[name].shape)
        ]
        if changed or {index: block.num_experts for index, block in blocks.items()} != counts:
            raise UpcycleError(
                f"{self.model_class.__name__} cannot have other numbers of experts: they change {changed[:3]} too."
            )
        return config

    def _find_layout(self, block: SparseBlock) -> FusedLayout | PerExpertLayout:
        up = "gate_up_proj" if block.expert.is_gated else "up_proj"
        if f"{block.experts}.{up}" in self.name_on_disk:
            path, _, gate_up = self._below(block, f"{block.experts}.{up}").partition(".")
            down = self._below(block, f"{block.experts}.down_proj").removeprefix(f"{path}.")
            return FusedLayout(path, gate_up, down)
        for gate, up, down in PROJECTIONS:
            name = f"{block.experts}.0.{down}.weight"
            if name in self.name_on_disk and block.expert.is_gated and block.expert.down_bias is None:
                path = self._below(block, name).partition(".experts.")[0]
                return PerExpertLayout(path, gate, up, down)
        stored = sorted(
            {re.sub(r"\.\d+\.", ".N.", name) for name in self.name_on_disk if name.startswith(block.experts)}
        )
        raise UpcycleError(
            f"{self.model_class.__name__} keeps its experts as {stored[:4]}. hf_moe edits experts that are fused "
            "(experts.gate_up_proj), or named as Mixtral's (w1, w2, w3) or Qwen2-MoE's (gate_proj, up_proj, down_proj)."
        )

    def _below(self, block: SparseBlock, name: str) -> str:
        """The name on disk of a tensor, within its layer."""
        on_disk = self.name_on_disk.get(name)
        if on_disk is None or not on_disk.startswith(block.layer):
            raise UpcycleError(
                f"The checkpoint stores {name!r} of {self.model_class.__name__} as {on_disk!r}, which is not below "
                f"{block.layer!r}. Load the model and save it with `save_pretrained` first."
            )
        return on_disk.removeprefix(block.layer)

    def _check_names(self) -> None:
        """Every tensor of the class is on disk in its shape, and nothing else is."""
        experts = tuple(f"{block.experts}." for block in self.blocks.values())
        tied = self.model.all_tied_weights_keys
        expected: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.model.state_dict().items():
            if name not in tied and not name.startswith(experts):
                expected[self.name_on_disk.get(name, name)] = tuple(tensor.shape)
        for block in self.blocks.values():
            expected |= self.expert_tensors(block)
        there = set(self.checkpoint)
        if missing := [name for name in expected if name not in there]:
            raise UpcycleError(
                f"The checkpoint lacks {len(missing)} of the tensors that {self.model_class.__name__} has: {missing[:3]}. Is "
                "it complete, and does config.json belong to it?"
            )
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
        known = {self.name_on_disk.get(name, name) for name in tied} | set(expected)
        if unexpected := [name for name in there - known if not any(re.search(pattern, name) for pattern in ignored)]:
            raise UpcycleError(
                f"{self.model_class.__name__} has no place for {len(unexpected)} tensors of the checkpoint, which would be "
                f"lost: {sorted(unexpected)[:3]}. Does config.json belong to it?"
            )
        for name, shape in expected.items():
            if self.checkpoint.dtype_and_shape(name)[1] != shape:
                raise UpcycleError(
                    f"Tensor {name!r} has shape {self.checkpoint.dtype_and_shape(name)[1]}, but config.json asks for {shape}. "
                    "Does config.json belong to the checkpoint?"
                )


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `config.architectures` names, of transformers or hf_moe."""
    architectures = config.architectures or []
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    if len(architectures) != 1 or not hasattr(modeling, architectures[0]):
        raise UpcycleError(
            f"architectures={config.architectures} names no class of {modeling.__name__.rpartition('.')[2]}. Save the model "
            "with `save_pretrained` first."
        )
    return getattr(modeling, architectures[0])


def _read_provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.folder / "hf_moe.json"
    if not path.is_file():
        return None
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        return dict(provenance)
    except (ValueError, TypeError) as error:
        raise UpcycleError(
            f"{path} cannot be read ({error}). It says where the model comes from; delete it to do without."
        ) from error
