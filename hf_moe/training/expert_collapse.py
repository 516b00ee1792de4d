# SPDX-License-Identifier: Apache-2.0
"""`ExpertCollapseCallback`: finds experts that get no token, and gives them the weights of one that gets many."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from .moe_callback import Attachment, MoeCallback
from .rank_sum import RankSum, is_first_process
from .router_hooks import RouterCall, RouterHooks
from .routers import find_selection_bias, without_wrappers
from .statistics import layer_number


logger = logging.get_logger(__name__)

ACTIONS = ("warn", "reseed")


class ExpertCollapseCallback(MoeCallback):
    """
    Watches for experts that no token of any process reaches.

    Args:
        patience (`int`, *optional*, defaults to 100): Number of optimizer steps without a token, and how often is looked.
        action (`str`, *optional*, defaults to `"warn"`): `"warn"`, or `"reseed"`: the expert becomes a copy of the one with most tokens
            in its layer, with its row of the router changed a little, so that they share these from then on, and the
            optimizer's state of both rows is emptied.
        noise (`float`, *optional*, defaults to 0.01): Standard deviation of the change of the router's row, by that of the row.

    Raises:
        ValueError: if a value is not allowed; when training begins, if experts or routers cannot be changed.
    """

    def __init__(self, patience: int = 100, action: str = "warn", noise: float = 0.01):
        if patience < 1:
            raise ValueError(f"patience is {patience!r}. Choose a number of steps of at least 1.")
        if action not in ACTIONS:
            raise ValueError(f"action is {action!r}. Choose from {', '.join(map(repr, ACTIONS))}.")
        if not noise > 0:
            raise ValueError(
                f"noise is {noise!r}. Choose a number above 0, or both experts go on to get the same tokens."
            )
        self.patience, self.action, self.noise = patience, action, noise
        self._hooks: RouterHooks | None = None
        super().__init__(patience=patience, action=action, noise=noise)

    def reset(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._num_reseeded = 0

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        hooks = attachment.hooks(model)
        self._sum = RankSum(hooks)
        if self.action == "reseed":
            if attachment.trainer.is_deepspeed_enabled:
                raise ValueError(
                    "DeepSpeed keeps weights of its own, which copies would not reach. Use action='warn'."
                )
            self._rows = {name: _rows_of_experts(model, name) for name in hooks.routers}
        hooks.add(self._count)
        self._hooks = hooks

    def end(self) -> None:
        if self._hooks is not None:
            self._hooks.remove(self._count)
            self._hooks = None

    def after_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.patience:
            return
        for place, (name, counts_E) in enumerate(self._sum(self._counts).items()):
            *counts, num_tokens = counts_E.tolist()
            if not num_tokens:  # a layer for other inputs than those that there were
                continue
            dead = [expert for expert, count in enumerate(counts) if not count]
            alive = sorted(
                (expert for expert, count in enumerate(counts) if count), key=lambda expert: -counts[expert]
            )
            if not dead:
                continue
            done = ""
            if self.action == "reseed" and alive:
                donors = [alive[number % len(alive)] for number in range(len(dead))]
                for expert, donor in zip(dead, donors, strict=True):
                    seed = (state.global_step * 1009 + place) * 10007 + expert  # the same on every process
                    self._reseed(name, expert, donor, seed, optimizer)
                self._num_reseeded += len(dead)
                done = f" They begin anew as copies of the experts {donors}."
            logger.warning(
                f"Step {state.global_step}: no token came to the experts {dead} of layer {layer_number(name)} ({name}) in {self.patience} "
                f"steps.{done}"
            )
        self._counts = {}

    def pool(self) -> None:
        self._counts = self._sum.on_first(self._counts)

    def metrics(self) -> dict[str, float]:
        return {"moe/reseeded_experts": float(self._num_reseeded)} if self.action == "reseed" else {}

    def save_state(self) -> dict[str, Any]:
        counts = {name: counts_E.tolist() for name, counts_E in self._counts.items()}
        return {"counts": counts, "num_reseeded": self._num_reseeded}

    def load_state(self, state: dict[str, Any]) -> None:
        if is_first_process():
            self._counts = {name: torch.tensor(counts) for name, counts in state["counts"].items()}
        self._num_reseeded = state["num_reseeded"]

    def _count(self, call: RouterCall) -> None:
        if call.is_training and not call.is_recomputation:
            counted = torch.cat([call.counts_E, call.num_tokens.reshape(1)])
            self._counts[call.name] = counted + self._counts.get(call.name, torch.zeros_like(counted)).to(
                counted.device
            )

    @torch.no_grad()
    def _reseed(self, router: str, expert: int, donor: int, seed: int, optimizer: Any) -> None:
        of_experts, of_router = self._rows[router]
        for tensor in (*of_experts, *of_router):
            tensor[expert] = tensor[donor].clone()
            state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
            for moment in state.values():
                if isinstance(moment, torch.Tensor) and moment.shape == tensor.shape:
                    moment[[expert, donor]] = 0
        row = of_router[0][expert]
        generator = torch.Generator().manual_seed(seed)
        change = torch.randn(row.shape, generator=generator).to(row.device, row.dtype)
        row += self.noise * row.std() * change


def _rows_of_experts(model: nn.Module, router: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters of a layer's experts and those of its router, its weight first; every expert has a row in each."""
    module = model.get_submodule(router)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"{router} ({type(module).__name__}) has no weight with a row for each expert, so that none can be copied."
        )
    block = model.get_submodule(without_wrappers(router).rpartition(".")[0])
    parameters = [
        parameter
        for name, parameter in block.named_parameters()
        if "experts." in name and "shared" not in name and len(parameter) == len(weight)
    ]
    bias = find_selection_bias(model, router)
    of_router = [
        weight,
        *(p for name, p in module.named_parameters() if name == "bias"),
        *([] if bias is None else [bias.data.view(-1)]),
    ]
    if not parameters:
        raise ValueError(
            f"The experts beside {router} are not stored as tensors with a row for each, so that none can be copied."
        )
    if any(isinstance(tensor, DTensor) or tensor.numel() == 0 for tensor in parameters):
        raise ValueError(
            "The experts are sharded over processes, so that none can be copied. Use action='warn', or DDP."
        )
    if not all(tensor.requires_grad for tensor in (*parameters, weight)):
        raise ValueError(
            "The experts or routers are frozen, for instance by PEFT, so that a copy would stay one. Use action='warn'."
        )
    return parameters, of_router
