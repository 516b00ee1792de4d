# SPDX-License-Identifier: Apache-2.0
"""The sparse layers of a model class, found in a model without values: `SparseBlock` and `find_blocks`."""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..training.recorder import find_routers
from ..upcycling.errors import UpcycleError
from ..upcycling.feed_forward import FeedForward
from ..upcycling.layouts import FusedExpert


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
        rows (`dict[str, str]`): Tensors with one row per expert, the router's weight and what stands beside it, by their
            names within the router: their names in memory.
    """

    layer: str
    experts: str
    num_experts: int
    expert: FeedForward
    router: str
    rows: dict[str, str]


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
        rows = {tensor.removeprefix(f"{router}."): tensor for tensor in state_dict if tensor.startswith(f"{router}.")}
        if wrong := {
            tensor: tuple(state_dict[tensor].shape)
            for tensor in rows.values()
            if state_dict[tensor].shape[:1] != (num_experts,)
        }:
            raise UpcycleError(
                f"The router of {name_of_class} holds more than one row per expert: {wrong}. hf_moe cannot edit it."
            )
        beside = {tensor.removeprefix(f"{block}."): tensor for tensor in state_dict if tensor.startswith(f"{block}.")}
        rows |= {
            local: tensor
            for local, tensor in beside.items()
            if "." not in local and state_dict[tensor].shape[:1] == (num_experts,)
        }
        blocks[int(match[2])] = SparseBlock(match[1], name, num_experts, _meta_expert(module), router, rows)
    return blocks


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
