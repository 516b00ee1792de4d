# SPDX-License-Identifier: Apache-2.0
"""`ExpertCollapseCallback`: finds experts that get no token, and gives them the weights of one that gets many."""

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..models.routers import MoeRouter
from .moe_callback import Attachment, MoeCallback
from .rank_sum import RankSum, is_first_process
from .router_hooks import RouterCall, RouterHooks
from .routers import Router, find_selection_bias, without_wrappers
from .statistics import layer_number


logger = logging.get_logger(__name__)

ACTIONS = ("warn", "reseed")


class ExpertCollapseCallback(MoeCallback):
    """
    Watches for feed-forwards that no token of any process reaches. A layer, or the experts of a modality or domain, for which there
    were no inputs is left out, and so are zero-computation experts.

    Args:
        patience (`int`, *optional*, defaults to 100): Number of optimizer steps without a token, and how often is looked.
        action (`str`, *optional*, defaults to `"warn"`): `"warn"`, or `"reseed"`: the expert becomes a copy of the one with most tokens
            among those it competes with, with its rows of the router changed a little, so that they share these from then on, and
            the optimizer's state of both is emptied. An expert of a group that no token chooses stays as it is.
        noise (`float`, *optional*, defaults to 0.01): Standard deviation of the change of the router's rows, by that of the row.

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
            self._rows = {name: _rows_of_experts(model, name, router) for name, router in hooks.routers.items()}
        hooks.add(self._count)
        self._hooks = hooks

    def end(self) -> None:
        if self._hooks is not None:
            self._hooks.remove(self._count)
            self._hooks = None

    def after_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.patience:
            return
        routers = cast(RouterHooks, self._hooks).routers
        for place, (name, counted) in enumerate(self._sum(self._counts).items()):
            counted = counted.cpu()
            if not counted[-1]:  # a layer for other inputs than those that there were
                continue
            donor_of = _find_dead(routers[name], counted[:-1])
            if not donor_of:
                continue
            done = ""
            revived = {expert: donor for expert, donor in donor_of.items() if donor is not None}
            if self.action == "reseed":
                for expert, donor in revived.items():
                    seed = (state.global_step * 1009 + place) * 10007 + expert  # the same on every process
                    self._reseed(name, expert, donor, seed, optimizer)
                self._num_reseeded += len(revived)
                done = _tell(donor_of)
            logger.warning(
                f"Step {state.global_step}: no token came to the experts {list(donor_of)} of layer {layer_number(name)} ({name}) in "
                f"{self.patience} steps.{done}"
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
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*of_experts, *of_router):
            tensor[expert] = tensor[donor].clone()
            state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
            for moment in state.values():
                if isinstance(moment, torch.Tensor) and moment.shape == tensor.shape:
                    moment[[expert, donor]] = 0
        for tensor in of_router:
            row = tensor[expert]
            if row.dim():
                change = torch.randn(row.shape, generator=generator).to(row.device, row.dtype)
                row += self.noise * row.std() * change


def _find_dead(router: Router, counts_E: torch.Tensor) -> dict[int, int | None]:
    """The feed-forwards without a token, and for each the one that it can become a copy of, if there is any."""
    parts = [part.tolist() for part in router.split_into_parts(counts_E)]
    is_for_inputs = len(parts) > 1 and not (isinstance(router.module, MoeRouter) and router.module.chooses_parts)
    num_feed_forwards = len(counts_E) - router.num_zero_computation_experts
    found: dict[int, int | None] = {}
    first = 0
    for part in parts:
        counts = {first + place: count for place, count in enumerate(part) if first + place < num_feed_forwards}
        first += len(part)
        if is_for_inputs and not any(part):
            continue
        alive = sorted((expert for expert, count in counts.items() if count), key=lambda expert: -counts[expert])
        dead = [expert for expert, count in counts.items() if not count]
        found |= {expert: alive[place % len(alive)] if alive else None for place, expert in enumerate(dead)}
    return found


def _tell(donor_of: dict[int, int | None]) -> str:
    """What became of the dead experts."""
    revived = {expert: donor for expert, donor in donor_of.items() if donor is not None}
    others = [expert for expert, donor in donor_of.items() if donor is None]
    if not others:
        return f" They begin anew as copies of the experts {list(revived.values())}."
    said = f" The experts {list(revived)} begin anew as copies of {list(revived.values())}." if revived else ""
    return f"{said} The experts {others} stay, since none that they compete with got a token: look at the router, or at its balance."


def _rows_of_experts(model: nn.Module, name: str, router: Router) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters of a layer's feed-forwards and the tensors of its router, with a row in each for every expert."""
    module = router.module
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"{name} ({type(module).__name__}) has no weight with a row for each expert, so that none can be copied. Use action='warn'."
        )
    block = model.get_submodule(without_wrappers(name).rpartition(".")[0])
    num_feed_forwards = len(weight) - router.num_zero_computation_experts
    parameters = [
        parameter
        for path, parameter in block.named_parameters()
        if "experts." in path
        and not any(other in path for other in ("shared", "zero_experts"))
        and parameter.shape[:1] == (num_feed_forwards,)
    ]
    bias = find_selection_bias(model, name)
    of_router = [of for of in module.parameters() if of.shape[:1] == weight.shape[:1] and of is not bias]
    if not parameters:
        raise ValueError(
            f"The experts beside {name} are not stored as tensors with a row for each, so that none can be copied."
        )
    if any(isinstance(tensor, DTensor) or tensor.numel() == 0 for tensor in parameters):
        raise ValueError(
            "The experts are sharded over processes, so that none can be copied. Use action='warn', or DDP."
        )
    if not all(tensor.requires_grad for tensor in (*parameters, *of_router)):
        raise ValueError(
            "The experts or routers are frozen, for instance by PEFT, so that a copy would stay one. Use action='warn'."
        )
    return parameters, of_router if bias is None else [*of_router, bias.data.view(-1)]
