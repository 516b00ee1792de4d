# SPDX-License-Identifier: Apache-2.0
"""`add_moe_callbacks`: gives a Trainer the callbacks of hf_moe, and these what a Trainer does not tell its callbacks."""

import functools
import weakref
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .gradient_injection import Factor, loss_scale_of
from .router_hooks import RouterHooks
from .routers import find_routers
from .zero3 import set_zero3_leaf_modules


logger = logging.get_logger(__name__)


class Attachment:
    """
    What the callbacks of one trainer share: the hooks on its model, and what its loss is scaled with.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, which keeps this alive.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = weakref.ref(trainer)
        self._hooks: RouterHooks | None = None
        self._given: list[MoeCallback] = []

    def remember(self, callbacks: list[TrainerCallback]) -> None:
        """Take down which callbacks the user gave: a trainer that resumes makes others, with the options of the checkpoint."""
        self._given = [callback for callback in callbacks if isinstance(callback, MoeCallback)]

    def given_options(self, callback: "MoeCallback") -> dict[str, Any]:
        """The options that the user gave for a callback or for the one that it was made instead of."""
        alike = [one for one in self.trainer.callback_handler.callbacks if type(one) is type(callback)]
        given = [one for one in self._given if type(one) is type(callback)]
        place = next(place for place, one in enumerate(alike) if one is callback)
        return given[place]._options if len(given) == len(alike) else callback._options

    @property
    def trainer(self) -> Any:
        """The trainer."""
        return self._trainer()

    def hooks(self, model: nn.Module) -> RouterHooks:
        """The hooks on a model, made when they are first asked for: a trainer may have wrapped or replaced it."""
        if self._hooks is None or self._hooks.model is not model:
            self._hooks = RouterHooks(model)
            _HOOKS.add(self._hooks)
        return self._hooks

    def close_others(self, model: nn.Module) -> None:
        """Take away what other trainers have left on the model: they do not tell of a training that an error ended."""
        for hooks in list(_HOOKS):
            if hooks.model is model and hooks is not self._hooks:
                hooks.close()

    @property
    def loss_scale(self) -> Factor:
        """What a micro-batch's loss has to be multiplied with; the last step of an epoch can have fewer of them."""
        return loss_scale_of(self.trainer.accelerator, lambda: self.trainer.current_gradient_accumulation_steps)


_ATTACHMENTS: weakref.WeakSet[Attachment] = weakref.WeakSet()
_HOOKS: weakref.WeakSet[RouterHooks] = weakref.WeakSet()


def _find_attachment(callback: TrainerCallback) -> Attachment | None:
    """That of the trainer whose callback it is: a trainer does not tell, and may have made a new one of what it resumed."""
    for attachment in _ATTACHMENTS:
        trainer = attachment.trainer
        if trainer is not None and any(callback is one for one in trainer.callback_handler.callbacks):
            return attachment
    return None


class MoeCallback(TrainerCallback, ExportableState):
    """
    Base class of the callbacks.

    A subclass does its work in `begin`, `after_step` and `end`, and in the events of [`~transformers.TrainerCallback`] that are not
    here. `reset` makes what a training begins with, `save_state` and `load_state` what it goes on with, `metrics` what is logged.

    Args:
        options: What `__init__` of the subclass takes, as plain values.
    """

    def __init__(self, **options: Any):
        self._options = options
        self._is_running = False
        self.attachment: Attachment | None = None
        self.reset()

    def reset(self) -> None:
        """What a training begins with."""

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        """Training begins, or goes on after `load_state`: the model and what belongs to its trainer."""

    def after_step(self, args, state, control, **kwargs) -> None:
        """An optimizer step is done; every process makes this call."""

    def end(self) -> None:
        """Training ends; also called before it begins."""

    def metrics(self) -> dict[str, float]:
        """What to log with the training loss; every process makes this call."""
        return {}

    def pool(self) -> None:
        """Let the first process have what all have, since it alone saves; every process makes this call."""

    def save_state(self) -> dict[str, Any]:
        """What a training goes on with, as plain values. Only the first process makes this call."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `save_state` gave; before `begin`."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        name = type(self).__name__
        self.end()
        if args.n_gpu > 1:
            raise ValueError(
                f"{name} does not work with nn.DataParallel on {args.n_gpu} GPUs. Start the script with `torchrun`."
            )
        self.attachment = _find_attachment(self)
        if self.attachment is None:
            raise ValueError(
                f"{name} does not know its trainer. Give it with `add_moe_callbacks(trainer, {name}(...))` instead of "
                "`callbacks=[...]`, or call `add_moe_callbacks(trainer)` as well."
            )
        plain_model = extract_model_from_parallel(model)
        self.attachment.close_others(plain_model)
        given = self.attachment.given_options(self)
        if given != self._options:
            changed = {key: value for key, value in given.items() if value != self._options.get(key)}
            logger.warning(f"{name} goes on with other options than the checkpoint was saved with: {changed}.")
            attachment = self.attachment
            self.__init__(**given)  # type: ignore[misc]
            self.attachment = attachment
        self.reset()
        if state.global_step:
            self._resume(args, state, self.attachment.trainer.callback_handler.callbacks)
        self.begin(plain_model, self.attachment)
        self._is_running = True

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step(args, state, control, **kwargs)
        if control.should_save:
            self.pool()
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            # With several of a class the Trainer adds to what it saved before.
            state.stateful_callbacks[type(self).__name__] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.pool()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._is_running:  # in a training, which may save what was best
            self.pool()

    def on_train_end(self, args, state, control, **kwargs):
        self.end()
        self._is_running = False

    def state(self) -> dict[str, Any]:
        return {"args": self._options, "attributes": {}, "state": self.save_state(), "world_size": _world_size()}

    def _resume(self, args: Any, state: Any, callbacks: list[TrainerCallback]) -> None:
        name = type(self).__name__
        if not args.restore_callback_states_from_checkpoint:
            logger.warning(
                f"{name} begins anew at step {state.global_step}: set `restore_callback_states_from_checkpoint=True` in "
                "TrainingArguments for it to go on where the checkpoint was saved."
            )
            return
        alike = [callback for callback in callbacks if type(callback) is type(self)]
        saved = state.stateful_callbacks.get(name)
        saved = saved if isinstance(saved, list) else [saved]
        mine = saved[-len(alike) :][alike.index(self)] if len(saved) >= len(alike) else None
        if not mine or "state" not in mine:
            logger.warning(f"The checkpoint was saved without {name}, which begins anew.")
            return
        if mine["world_size"] != _world_size():
            logger.warning(
                f"{name}: the checkpoint was saved by {mine['world_size']} processes, and {_world_size()} go on. An optimizer step may "
                "now have another number of tokens."
            )
        self.load_state(mine["state"])


def add_moe_callbacks(trainer: Trainer, *callbacks: MoeCallback) -> None:
    """
    Give a trainer callbacks of hf_moe.

    Their metrics are logged with the training loss, so that they are in `log_history` and in whatever reports to.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer that is built on transformers', such as TRL's.
        callbacks (`MoeCallback`): The callbacks, in addition to those that it was made with.

    Raises:
        ValueError: if the model has no routers, or something is no callback of hf_moe.

    Example:

    ```python
    >>> from hf_moe import LoadBalancingCallback, RouterStatisticsCallback, add_moe_callbacks

    >>> add_moe_callbacks(trainer, LoadBalancingCallback("global_batch"), RouterStatisticsCallback())
    >>> trainer.train()
    ```
    """
    for callback in callbacks:
        if not isinstance(callback, MoeCallback):
            raise ValueError(
                f"{callback!r} is no callback of hf_moe. Give instances, such as LoadBalancingCallback(); others go to "
                "`trainer.add_callback`."
            )
    find_routers(trainer.model)  # or an error, now rather than when training begins
    if is_deepspeed_zero3_enabled():
        set_zero3_leaf_modules(trainer.model)
    # Not with `add_callback`, which warns of two of a class.
    trainer.callback_handler.callbacks.extend(callbacks)
    if not hasattr(trainer, "_hf_moe_attachment"):
        trainer.log = _logging_metrics(trainer)
        trainer._hf_moe_attachment = Attachment(trainer)
        _ATTACHMENTS.add(trainer._hf_moe_attachment)
    trainer._hf_moe_attachment.remember(trainer.callback_handler.callbacks)


def _logging_metrics(trainer: Trainer):
    """`trainer.log`, before which the callbacks' metrics join the training loss: in `on_log` it would be too late."""
    log = trainer.log

    @functools.wraps(log)
    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, MoeCallback):
                    logs.update(callback.metrics())
        log(logs, *args, **kwargs)

    return log_with_metrics


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
