# SPDX-License-Identifier: Apache-2.0
"""The sparse layers of a model class, found in a model without values: `SparseBlock` and `find_blocks`."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..models.configuration_moe import MoeConfigMixin
from ..training.routers import find_routers
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.layouts import FusedExpert


class Rows(NamedTuple):
    """A tensor with one row per expert: its name in memory, the dimension of the experts, and its shape with that first."""

    name: str
    dimension: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SparseBlock:
    """
    The routed experts and the router of one layer.

    Args:
        layer (`str`): Name of the layer with a dot at the end, e.g. `"model.layers.0."`.
        experts (`str`): Name of the experts' module in memory.
        num_experts (`int`): Their number.
        expert (`FeedForward`): One of them without values.
        router (`str`): Name of the router's module in memory.
        rows (`dict[str, Rows]`): The router's tensors with one row per expert, its weight and what stands beside it, by
            their names within the router.
    """

    layer: str
    experts: str
    num_experts: int
    expert: FeedForward
    router: str
    rows: dict[str, Rows]

    @property
    def weight(self) -> str:
        """Which of `rows` multiplies the hidden state."""
        hidden_size = self.expert.hidden_size
        return next(name for name, rows in self.rows.items() if rows.shape[1:] == (hidden_size,))


def find_blocks(model: PreTrainedModel) -> dict[int, SparseBlock]:
    """
    The sparse layers of a model by their index.

    Raises:
        UpcycleError: if there is none, or if the class computes its experts in a way that is not known here.
    """
    name_of_class = type(model).__name__
    modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    if not modules:
        raise UpcycleError(
            f"{name_of_class} is no mixture of experts, so there is nothing to edit. `upcycle` makes one from a dense model."
        )
    _refuse_routers_beyond_rows(model)
    try:
        routers = find_routers(model)
    except ValueError as error:
        raise UpcycleError(str(error)) from error
    state_dict = model.state_dict()
    blocks = {}
    for name, module in modules.items():
        match = re.fullmatch(r"((?:.+\.)?(\d+)\.)[^\d]+", name)
        if not (
            match
            and hasattr(module, "has_gate")
            and module.is_concatenated
            and not module.is_transposed
            and not module.has_post_expert_norm
        ):
            raise UpcycleError(
                f"{name_of_class} computes its experts ({type(module).__name__}) in a way that hf_moe cannot edit. Supported "
                "are hf_moe's classes and those of transformers whose experts are built as Mixtral's."
            )
        block, num_experts = name.removesuffix(".experts"), module.down_proj.shape[0]
        router = next((router for router in routers if router.startswith(f"{block}.")), None)
        if router is None:
            raise UpcycleError(f"{name_of_class} has no router in {block!r}.")
        rows = {}
        for tensor, value in state_dict.items():
            local = tensor.removeprefix(f"{router}.") if tensor.startswith(f"{router}.") else None
            found = _find_rows(tensor, tuple(value.shape), num_experts)
            if local is not None and found is None:
                raise UpcycleError(
                    f"The router of {name_of_class} holds a tensor that has no row for each expert: {tensor!r} has shape "
                    f"{tuple(value.shape)}, and there are {num_experts} experts. hf_moe cannot edit it."
                )
            if local is None and tensor.rpartition(".")[0] == block and found is not None:
                local = tensor.removeprefix(f"{block}.")
            if local is not None and found is not None:
                rows[local] = found
        blocks[int(match[2])] = SparseBlock(match[1], name, num_experts, _meta_expert(module), router, rows)
    return blocks


def _refuse_routers_beyond_rows(model: PreTrainedModel) -> None:
    config = model.config
    if not isinstance(config, MoeConfigMixin):
        return
    held, domains = config.router_class.holds_besides_rows, ""
    if config.num_zero_computation_experts:
        held = f"rows for {config.num_zero_computation_experts} zero-computation experts behind those of the feed-forwards"
    if config.router_class.count_domains(config) > 1:
        domains = " `hf_moe.extract_domain` cuts all experts of one domain out."
    if held is not None:
        raise UpcycleError(
            f"The router of {type(model).__name__} (router_type={config.router_type!r}) holds {held}, with which hf_moe can neither "
            "edit, collapse nor extract experts. Go on from the dense model that it was made of: take that in place of a collapsed one, or "
            f"upcycle it again for other experts.{domains}"
        )


def _find_rows(name: str, shape: tuple[int, ...], num_experts: int) -> Rows | None:
    for dimension in (0, len(shape) - 1):
        if shape and shape[dimension] == num_experts:
            return Rows(name, dimension, (num_experts, *shape[:dimension], *shape[dimension + 1 :]))
    return None


def _meta_expert(module: torch.nn.Module) -> FeedForward:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj", f"{up}_bias", "down_proj_bias"]
    tensors = [getattr(module, name)[0] if name in module._parameters else None for name in names]
    return feed_forward_of(FusedExpert(*tensors), module.has_gate)


def feed_forward_of(expert: FusedExpert, is_gated: bool) -> FeedForward:
    """Gate and up of a fused expert apart."""
    if not is_gated:
        return FeedForward(None, expert.up_proj, expert.down_proj, None, expert.up_bias, expert.down_bias)
    gate_bias, up_bias = (None, None) if expert.up_bias is None else expert.up_bias.chunk(2)
    gate, up = expert.up_proj.chunk(2)
    return FeedForward(gate, up, expert.down_proj, gate_bias, up_bias, expert.down_bias)


def has_equal_rows(weight: torch.Tensor) -> bool:
    """Whether a router prefers none of two experts, so that chance decides between them."""
    return len(weight.unique(dim=0)) < len(weight)
