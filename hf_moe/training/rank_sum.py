# SPDX-License-Identifier: Apache-2.0
"""`RankSum`: sums of per-router tensors over the processes of a training, in one reduction."""

import torch
from torch import distributed

from .router_hooks import RouterHooks


class RankSum:
    """
    Adds up what the processes have counted of each router.

    All processes make every call, also those in which some router has not run. The lengths of the tensors are agreed on once all
    routers have run; until then that is a second, small reduction.

    Args:
        hooks (`RouterHooks`): The hooks on the model, whose routers give the order.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the tensors.
        in_training (`bool`, *optional*, defaults to `True`): Whether to leave out the routers that PEFT has put others in the place
            of, which never run in training.
    """

    def __init__(self, hooks: RouterHooks, dtype: torch.dtype = torch.float32, in_training: bool = True):
        self._names = [name for name in hooks.routers if not in_training or "original_module" not in name.split(".")]
        self._dtype = dtype
        self._device = next(hooks.model.parameters()).device
        self._lengths = [0] * len(self._names)

    def __call__(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums over all processes, by router, of those that have run anywhere."""
        if not distributed.is_initialized():
            return {name: total.to(self._device) for name, total in sums.items()}
        mine = [len(sums[name]) if name in sums else 0 for name in self._names]
        if not all(self._lengths):
            lengths = torch.tensor(mine, device=self._device)
            distributed.all_reduce(lengths, distributed.ReduceOp.MAX)
            self._lengths = lengths.tolist()
        parts = [
            sums[name].to(self._device, self._dtype)
            if length
            else torch.zeros(agreed, dtype=self._dtype, device=self._device)
            for name, length, agreed in zip(self._names, mine, self._lengths, strict=True)
        ]
        flat = torch.cat(parts)
        distributed.all_reduce(flat)
        return {name: part for name, part in zip(self._names, flat.split(self._lengths), strict=True) if len(part)}

    def on_first(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums over all processes for the first of them, and zeros for the others."""
        total = self(sums)
        return total if is_first_process() else {name: torch.zeros_like(part) for name, part in total.items()}


def is_first_process() -> bool:
    """Whether this is the process of rank 0, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
