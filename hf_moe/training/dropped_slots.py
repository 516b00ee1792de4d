# SPDX-License-Identifier: Apache-2.0
"""`DroppedSlots`: what the capacities of a model change about what its routers chose."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..models.capacity import ExpertCapacity
from ..models.losses import count_choices
from .routers import without_wrappers


class DroppedSlots:
    """
    Watches the [`~hf_moe.models.capacity.ExpertCapacity`] beside each router, where there is one.

    Args:
        model (`torch.nn.Module`): The model.
        routers (`Iterable[str]`): Names of its routers.
    """

    def __init__(self, model: nn.Module, routers: Iterable[str]):
        modules = {without_wrappers(name): module for name, module in model.named_modules()}
        beside = {name: modules.get(_capacity_of(name)) for name in routers}
        self._capacities = {name: module for name, module in beside.items() if isinstance(module, ExpertCapacity)}

    def watch(self, listener: Callable[[str, torch.Tensor, bool], Any]) -> list[RemovableHandle]:
        """
        Call the listener after every pass of a capacity but those of recomputation.

        Args:
            listener (`Callable`): Gets the name of the router, `(E + 1,)` in float32 - what to add to the slots of the experts, and
                behind that the number of dropped slots -, and whether it was a pass of training.
        """
        return [
            capacity.register_forward_hook(self._hook(name, capacity, listener))
            for name, capacity in self._capacities.items()
        ]

    def _hook(self, name: str, capacity: ExpertCapacity, listener: Callable[[str, torch.Tensor, bool], Any]):
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs it again inside a backward pass
                return
            _, _, wanted_TK, tokens = args
            wanted_E = count_choices(wanted_TK, capacity.num_experts, tokens.mask_T)
            served_E = count_choices(output[1], capacity.num_experts, tokens.mask_T)
            change_E = served_E - wanted_E
            listener(name, torch.cat([change_E, -change_E.sum().reshape(1)]), module.training)

        return hook


def _capacity_of(router: str) -> str:
    """The name that a router's capacity would have."""
    return f"{without_wrappers(router).rpartition('.')[0]}.capacity"
