# SPDX-License-Identifier: Apache-2.0
"""`BiasBalancer`: balance without a loss, by the bias with which DeepSeek-V3's routers choose."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..models.routers import ROUTERS, MoeRouter
from .rank_sum import RankSum
from .router_hooks import RouterCall, RouterHooks
from .routers import find_routers, find_selection_bias, plain_name


FILE_NAME = "router_bias.safetensors"


@dataclass
class BiasBalancer:
    """
    Moves the selection bias of every router towards experts that got too few tokens
    (https://huggingface.co/papers/2408.15664).

    After each optimizer step an expert's bias goes up by `update_rate` if it was chosen less often than it should in all
    micro-batches and ranks of the step, and down if more often; the mean of this change is taken off it. It should be chosen
    as often as the others of its layer with which it competes, those of a modality or of a group where each has experts of its
    own; a feed-forward `zero_expert_tau` times as often as a zero-computation expert. The bias is kept in float32 here: half
    of a bfloat16 number plus 0.001 is that half.

    Args:
        update_rate (`float`, *optional*, defaults to 0.001): The change of a step.

    Raises:
        ValueError: if `update_rate` is not above 0.

    Example:

    ```python
    >>> balancer = BiasBalancer().attach(model)
    >>> for batch in dataloader:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     balancer.step()
    >>> balancer.detach()
    ```
    """

    update_rate: float = 1e-3

    def __post_init__(self):
        if not 0 < self.update_rate < math.inf:
            raise ValueError(f"update_rate is {self.update_rate!r}. Choose a number above 0; 0.001 is DeepSeek-V3's.")
        self._hooks: RouterHooks | None = None
        self._biases: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module | RouterHooks) -> "BiasBalancer":
        """
        Begin to count.

        Raises:
            ValueError: if the model has no routers, or these no bias to choose with.
        """
        self.detach()
        hooks = model if isinstance(model, RouterHooks) else RouterHooks(model)
        self._of_model = selection_biases(hooks.model)
        if unknown := [name for name in self._biases if name not in self._of_model]:
            raise ValueError(
                f"The biases that were loaded are those of another model: it has no router {unknown[0]!r} with a bias, but "
                f"{', '.join(self._of_model)}."
            )
        self._hooks, self._sum = hooks, RankSum(hooks)
        self._counts: dict[str, torch.Tensor] = {}
        for name, bias in self._of_model.items():
            float32 = self._biases.get(name, bias.detach().float().flatten().clone()).to(bias.device)
            self._biases[name] = float32
            bias.data.copy_(float32.view_as(bias))
        self._hooks.add(self._count)
        return self

    def detach(self) -> None:
        """Count no more."""
        if self._hooks is not None:
            self._hooks.remove(self._count)
            self._hooks = None

    @torch.no_grad()
    def step(self) -> None:
        """To be called after every optimizer step; with several processes, by each."""
        if self._hooks is None:
            raise ValueError("This BiasBalancer is attached to no model: call `attach(model)` first.")
        for name, counts_E in self._sum(self._counts).items():
            bias, float32_E = self._of_model[name], self._biases[name]
            # Where it is not what was put there, something else has changed it.
            changed_E = bias.view(-1) != float32_E.to(bias.dtype)
            float32_E = torch.where(changed_E, bias.view(-1).float(), float32_E)
            router = self._hooks.routers[name]
            change_E = self.update_rate * (router.even_counts(counts_E) - counts_E).sign()
            change_E = torch.cat([change - change.mean() for change in router.split_into_parts(change_E)])
            self._biases[name] = float32_E + change_E
            bias.data.copy_(self._biases[name].view_as(bias))
        self._counts = {}

    def state_dict(self) -> dict[str, Any]:
        """The biases in float32, as plain numbers."""
        return {name: bias.tolist() for name, bias in self._biases.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where [`~BiasBalancer.state_dict`] was taken; before [`~BiasBalancer.attach`]."""
        self._biases = {name: torch.tensor(bias) for name, bias in state.items()}

    def save(self, folder: str | Path) -> None:
        """Write the biases to `router_bias.safetensors`, for adapters, whose files hold none; [`load_router_bias`] reads it."""
        save_file({plain_name(name): bias.cpu() for name, bias in self._biases.items()}, Path(folder, FILE_NAME))

    def load(self, folder: str | Path) -> None:
        """Go on with the biases that [`~BiasBalancer.save`] wrote, which are not put into the model."""
        saved = load_file(Path(folder, FILE_NAME))
        self._biases = {name: saved[plain_name(name)].to(bias.device) for name, bias in self._biases.items()}

    def _count(self, call: RouterCall) -> None:
        if call.is_training and not call.is_recomputation and call.name in self._of_model:
            self._counts[call.name] = self._counts.get(call.name, 0) + call.counts_E


def selection_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The biases with which routers choose experts, by the names of the routers.

    Raises:
        ValueError: if there is none, or one is sharded.
    """
    routers = find_routers(model)
    found = {name: bias for name in routers if (bias := find_selection_bias(model, name)) is not None}
    if sharded := [name for name, bias in found.items() if isinstance(bias, DTensor)]:
        raise ValueError(
            f"The bias of {sharded[0]} is sharded over processes, so that it cannot be moved. Train with DDP."
        )
    if not found:
        kinds = ", ".join(sorted({type(router.module).__name__ for router in routers.values()}))
        raise ValueError(
            f"The routers of {type(model).__name__} ({kinds}) have no bias to choose experts with, as DeepSeek-V3's have in "
            "`e_score_correction_bias`. Load one of hf_moe's classes with `use_expert_bias=True` and a `router_type` of "
            f"{', '.join(map(repr, _readers_of_biases()))}, or balance with a LoadBalancingCallback."
        )
    return found


def load_router_bias(model: nn.Module, folder: str | Path) -> None:
    """
    Put biases that a [`BiasBalancingCallback`] saved beside an adapter into the model. Routers of hf_moe without a bias get one.

    Args:
        model (`torch.nn.Module`): The model that was trained, with or without its adapter.
        folder (`str` or `Path`): Folder with `router_bias.safetensors`.

    Raises:
        ValueError: if there is no such file, or its routers are not those of the model. The model is then as it was.
    """
    path = Path(folder, FILE_NAME)
    if not path.is_file():
        raise ValueError(
            f"There is no {path}. A BiasBalancingCallback writes it into checkpoints of an adapter, into `output_dir` at the end, and "
            "where `trainer.save_model` saves; `save_pretrained` does not, and `balancer.save(folder)` does."
        )
    routers = {plain_name(name): router.module for name, router in find_routers(model).items()}
    without = [
        name
        for name, router in routers.items()
        if isinstance(router, MoeRouter) and router.e_score_correction_bias is None
    ]
    biases = {} if len(without) == len(routers) else selection_biases(model)
    sizes = {plain_name(name): bias.numel() for name, bias in biases.items()}
    sizes |= {name: routers[name].num_experts for name in without}
    saved = load_file(path)
    if sizes != {name: bias.numel() for name, bias in saved.items()}:
        raise ValueError(
            f"The routers of {path} are not those of this {type(model).__name__}. Load the model it was trained on."
        )
    if deaf := [type(routers[name]).__name__ for name in without if "use_expert_bias" not in routers[name].options]:
        raise ValueError(
            f"{deaf[0]} chooses without a bias, so that those of {path} would have no effect. With one choose the routers of the types "
            f"{', '.join(map(repr, _readers_of_biases()))}."
        )
    for name in without:
        routers[name].e_score_correction_bias = torch.zeros(sizes[name], device=routers[name].weight.device)
        cast(PreTrainedModel, model).config.use_expert_bias = True
    for name, bias in selection_biases(model).items():
        bias.data.copy_(saved[plain_name(name)].view_as(bias))


def _readers_of_biases() -> list[str]:
    return sorted(name for name, router in ROUTERS.items() if "use_expert_bias" in router.options)
