# SPDX-License-Identifier: Apache-2.0
"""`watch_served_slots`: which experts serve every token, and with what weight, whatever the router and the capacity."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..models.sparse_block import MoeSparseBlock


Listener = Callable[[int, torch.Tensor, torch.Tensor], None]


def watch_served_slots(model: nn.Module, experts: dict[int, Any], listener: Listener) -> list[RemovableHandle]:
    """
    Call the listener after every routing, with the number of the layer, `(T, K)` weights and `(T, K)` experts.

    Numbers beyond those of the feed-forwards stand for experts without computation and for empty slots. A layer of
    transformers hands every token to its experts with the weights, so it is watched there. One of hf_moe may hand over filled
    slots alone, or inputs that are weighted already, so its router and its capacity are watched.

    Args:
        model (`torch.nn.Module`): The model.
        experts (`dict[int, torch.nn.Module]`): The layers of experts by number.
        listener (`Callable`): What to call.
    """
    block_of = {
        module: block
        for block in model.modules()
        if isinstance(block, MoeSparseBlock)
        for module in block.experts.modules()
    }
    handles: list[RemovableHandle] = []
    for layer, module in experts.items():
        if (block := block_of.get(module)) is not None:
            handles += _watch_block(block, layer, listener)
        else:
            handles.append(module.register_forward_pre_hook(_at_experts(layer, listener), with_kwargs=True))
    return handles


def _at_experts(layer: int, listener: Listener):
    def call(hidden_states: Any, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        listener(layer, top_k_weights, top_k_index)

    return lambda experts, args, kwargs: call(*args, **kwargs)


def _watch_block(block: MoeSparseBlock, layer: int, listener: Listener) -> list[RemovableHandle]:
    last: list[tuple[torch.Tensor, torch.Tensor]] = []

    def after_router(module: nn.Module, args: tuple, output: tuple) -> None:
        last[:] = [output[1:]]

    def after_capacity(module: nn.Module, args: tuple, output: tuple) -> None:
        last[:] = [output]

    def after_block(module: MoeSparseBlock, args: tuple, output: torch.Tensor) -> None:
        top_k_weights_TK, top_k_index_TK = last.pop()
        listener(layer, module.after_dropping(top_k_weights_TK), top_k_index_TK)

    handles = [block.gate.register_forward_hook(after_router), block.register_forward_hook(after_block)]
    return handles if block.capacity is None else [*handles, block.capacity.register_forward_hook(after_capacity)]
