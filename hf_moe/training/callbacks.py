# SPDX-License-Identifier: Apache-2.0
"""Callbacks that steer routers: balance losses, DeepSeek-V3's bias, schedules of freezing, experts that collapse."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from .bias_balancing import FILE_NAME, BiasBalancer, load_router_bias
from .load_balancing import LoadBalancer
from .moe_callback import Attachment, MoeCallback
from .routers import parameters_around


logger = logging.get_logger(__name__)

RL_TRAINERS = ("GRPO", "RLOO", "PPO", "OnlineDPO", "NashMD", "XPO")


class LoadBalancingCallback(MoeCallback):
    """
    A [`LoadBalancer`] for [`~transformers.Trainer`] and all that are built on it.

    The loss holds with gradient accumulation, label smoothing, `compute_loss_func`, both kinds of gradient checkpointing (with
    several passes before one backward pass, too), DDP and FSDP2, and for models that have no balance loss. Switch the model's own off:
    `output_router_logits=False`, or `router_aux_loss_coef=0.0` in TRL.

    Args:
        kind (`str`, *optional*, defaults to `"switch"`): Which loss; see [`LoadBalancer`] for this and all other arguments.
        coef (`float`, *optional*): Its coefficient. The default is the paper's; 0 with TRL's trainers for reinforcement learning,
            where a balance loss spoils the gradient of rewards unless it is chosen with care.
        options: What [`LoadBalancer`] takes besides.

    Raises:
        ValueError: if a value is not allowed.

    Example:

    ```python
    >>> from hf_moe import LoadBalancingCallback, add_moe_callbacks

    >>> add_moe_callbacks(trainer, LoadBalancingCallback("global_batch"), LoadBalancingCallback("z"))
    ```
    """

    def __init__(self, kind: str = "switch", coef: float | None = None, **options: Any):
        super().__init__(kind=kind, coef=coef, **options)

    def reset(self) -> None:
        self.balancer = LoadBalancer(**self._options)

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        trainer = type(attachment.trainer)
        if self._options["coef"] is None and any(
            name in base.__name__ for base in trainer.__mro__ for name in RL_TRAINERS
        ):
            logger.warning(
                f"LoadBalancingCallback: no balance loss with {trainer.__name__}, where it is known to spoil the gradient of rewards. "
                "Give `coef` to have one."
            )
            self.balancer.base_coef = 0.0
        own_loss = True if getattr(attachment.trainer, "aux_loss_enabled", False) else None  # TRL's
        self.balancer.attach(attachment.hooks(model), loss_scale=attachment.loss_scale, own_loss=own_loss)

    def end(self) -> None:
        self.balancer.detach()

    def after_step(self, args, state, control, **kwargs):
        self.balancer.step()

    def pool(self) -> None:
        self.balancer.pool()

    def metrics(self) -> dict[str, float]:
        values = self.balancer.values()
        if not values:
            return {}
        return {f"moe/balance/{self.balancer.kind}": float(torch.stack(list(values.values())).mean())}

    def save_state(self) -> dict[str, Any]:
        return self.balancer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.balancer.load_state_dict(state)


class BiasBalancingCallback(MoeCallback):
    """
    A [`BiasBalancer`] for [`~transformers.Trainer`]: balance without a loss, for routers with a selection bias
    (https://huggingface.co/papers/2408.15664).

    Checkpoints hold the bias where the whole model is saved. Files of adapters do not, so that it is written beside them: into
    checkpoints, at the end into `output_dir`, and wherever `trainer.save_model` saves, but not by `model.save_pretrained`.
    [`load_router_bias`] reads it.

    Args:
        update_rate (`float`, *optional*, defaults to 0.001): The change of a step.

    Raises:
        ValueError: if `update_rate` is not above 0.
    """

    begins_anew = (
        " The biases begin as they are in the model; for an adapter, put them there first: "
        "`load_router_bias(model, checkpoint)`."
    )

    def __init__(self, update_rate: float = 1e-3):
        self._is_adapter = False
        super().__init__(update_rate=update_rate)

    def reset(self) -> None:
        self.balancer = BiasBalancer(**self._options)

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        self.balancer.attach(attachment.hooks(model))
        self._is_adapter = hasattr(model, "peft_config")

    def end(self) -> None:
        self.balancer.detach()

    def after_step(self, args, state, control, **kwargs):
        self.balancer.step()

    def save(self, folder: Path) -> None:
        if self._is_adapter:
            self.balancer.save(folder)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        best = Path(state.best_model_checkpoint or "", FILE_NAME)
        if self._is_adapter and args.load_best_model_at_end and best.is_file():
            load_router_bias(model, best.parent)  # whose adapter the model has again
            self.balancer.load(best.parent)
        if self._is_adapter and state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.balancer.save(args.output_dir)
        super().on_train_end(args, state, control, **kwargs)

    def save_state(self) -> dict[str, Any]:
        return self.balancer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.balancer.load_state_dict(state)


class RouterFreezeCallback(MoeCallback):
    """
    Freezes the routers, or everything but them, for a part of the training.

    Args:
        freeze_from (`int`, *optional*): Optimizer step from which on the routers are frozen. The default is 0, and never with
            `only_routers_until` alone.
        freeze_until (`int`, *optional*): Optimizer step at which they train again; never if None.
        only_routers_until (`int`, *optional*, defaults to 0): Before this step only the routers train, as a start for new ones.

    Raises:
        ValueError: if the steps contradict each other; when training begins, with DeepSpeed, with DDP without
            `ddp_find_unused_parameters=True`, or if the routers are frozen already.
    """

    def __init__(self, freeze_from: int | None = None, freeze_until: int | None = None, only_routers_until: int = 0):
        super().__init__(freeze_from=freeze_from, freeze_until=freeze_until, only_routers_until=only_routers_until)
        if freeze_from is None:
            freeze_from = sys.maxsize if only_routers_until and freeze_until is None else 0
        if freeze_until is not None and freeze_until <= freeze_from:
            raise ValueError(f"freeze_until is {freeze_until} and freeze_from {freeze_from}. Choose a later step.")
        if only_routers_until > freeze_from:
            raise ValueError(
                f"only_routers_until is {only_routers_until}, but the routers are frozen from step {freeze_from} on. Give a `freeze_from` "
                "that is not before it."
            )
        self.freeze_from, self.freeze_until, self.only_routers_until = freeze_from, freeze_until, only_routers_until

    def reset(self) -> None:
        self._routers: list[nn.Parameter] = []
        self._others: list[nn.Parameter] = []

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        wrapped = attachment.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise ValueError(
                "DDP waits for the gradients of parameters that a RouterFreezeCallback freezes. Set `ddp_find_unused_parameters=True` in "
                "TrainingArguments."
            )
        if attachment.trainer.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed does not let parameters be frozen in a training. Freeze them before: `requires_grad_(False)`."
            )
        in_routers = parameters_around(model, attachment.hooks(model).routers)
        self._routers = [of for group in in_routers.values() for of in group if of.requires_grad]
        if not self._routers:
            raise ValueError(
                "The routers have no parameter that trains, so that there is nothing to freeze: PEFT or `requires_grad_(False)` froze "
                "them, or they choose by a table (router_type='hash'). Leave the callback out."
            )
        ids = {id(parameter) for parameter in self._routers}
        self._others = [of for of in model.parameters() if of.requires_grad and id(of) not in ids]

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step
        is_frozen = self.freeze_from <= step and (self.freeze_until is None or step < self.freeze_until)
        self._set(self._routers, not is_frozen)
        self._set(self._others, step >= self.only_routers_until)

    def end(self) -> None:
        self._set([*self._routers, *self._others], True)

    def _set(self, parameters: list[nn.Parameter], is_trained: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(is_trained)
