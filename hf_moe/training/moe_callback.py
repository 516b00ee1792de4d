# SPDX-License-Identifier: Apache-2.0
"""`MoeCallback`, the base class of the callbacks of hf_moe, and what a Trainer does not tell its callbacks."""

import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .gradient_injection import Factor, loss_scale_of
from .router_hooks import RouterHooks


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

    @property
    def trainer(self) -> Any:
        """The trainer."""
        return self._trainer()

    def hooks(self, model: nn.Module) -> RouterHooks:
        """The hooks on a model, made when they are first asked for: a trainer may have wrapped or replaced it."""
        if self._hooks is None or self._hooks.model is not model:
            self._hooks = RouterHooks(model)
        return self._hooks

    @property
    def loss_scale(self) -> Factor:
        """What a micro-batch's loss has to be multiplied with; the last step of an epoch can have fewer of them."""
        return loss_scale_of(self.trainer.accelerator, lambda: self.trainer.current_gradient_accumulation_steps)


ATTACHMENTS: weakref.WeakSet[Attachment] = weakref.WeakSet()


def _find_attachment(callback: TrainerCallback) -> Attachment | None:
    """That of the trainer whose callback it is: a trainer does not tell."""
    for attachment in ATTACHMENTS:
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

    begins_anew = ""  # what to say besides where a training goes on without its state

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
        """Training ends, also by an error, and also one in `begin`."""

    def metrics(self) -> dict[str, float]:
        """What to log with the training loss; every process makes this call."""
        return {}

    def pool(self) -> None:
        """Let the first process have what all have, since it alone saves; every process makes this call."""

    def save_state(self) -> dict[str, Any]:
        """What a training goes on with, as plain values. Only the first process makes this call."""
        return {}

    def save(self, folder: Path) -> None:
        """Save what belongs beside a model that is saved. Only the first process makes this call."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `save_state` gave; before `begin`."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        name = type(self).__name__
        self.stop()
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
        self.reset()
        if state.global_step:
            self._resume(args, state)
        self._is_running = True
        self.begin(plain_model, self.attachment)

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
        self.stop()

    def stop(self) -> None:
        """End, if training has begun."""
        if self._is_running:
            self._is_running = False
            self.end()

    def state(self) -> dict[str, Any]:
        return {"args": self._options, "attributes": {}, "state": self.save_state(), "world_size": _world_size()}

    def _resume(self, args: Any, state: Any) -> None:
        name = type(self).__name__
        if not args.restore_callback_states_from_checkpoint:
            logger.warning(
                f"{name} begins anew at step {state.global_step}: set `restore_callback_states_from_checkpoint=True` in "
                f"TrainingArguments for it to go on where the checkpoint was saved.{self.begins_anew}"
            )
            return
        kind = self._options.get("kind")
        saved = state.stateful_callbacks.get(name) or []
        saved = [one for one in (saved if isinstance(saved, list) else [saved]) if one["args"].get("kind") == kind]
        if not saved:
            logger.warning(
                f"The checkpoint was saved without {name}{f' of kind {kind!r}' if kind else ''}, which begins anew."
            )
            return
        mine = saved[-1]
        changed = {key: value for key, value in self._options.items() if value != mine["args"].get(key)}
        if changed:
            logger.warning(f"{name} goes on with other options than the checkpoint was saved with: {changed}.")
        if mine["world_size"] != _world_size():
            logger.warning(
                f"{name}: the checkpoint was saved by {mine['world_size']} processes, and {_world_size()} go on. An optimizer step may "
                "now have another number of tokens."
            )
        self.load_state(mine["state"])


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
