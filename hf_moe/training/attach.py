# SPDX-License-Identifier: Apache-2.0
"""`add_moe_callbacks`: gives a Trainer the callbacks of hf_moe, and these what a Trainer does not tell its callbacks."""

import functools
import weakref
from pathlib import Path
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


_ATTACHMENTS: weakref.WeakSet[Attachment] = weakref.WeakSet()


def _find_attachment(callback: TrainerCallback) -> Attachment | None:
    """That of the trainer whose callback it is: a trainer does not tell."""
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
            self._resume(args, state, self.attachment.trainer.callback_handler.callbacks)
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

    def _resume(self, args: Any, state: Any, callbacks: list[TrainerCallback]) -> None:
        name = type(self).__name__
        if not args.restore_callback_states_from_checkpoint:
            logger.warning(
                f"{name} begins anew at step {state.global_step}: set `restore_callback_states_from_checkpoint=True` in "
                f"TrainingArguments for it to go on where the checkpoint was saved.{self.begins_anew}"
            )
            return
        # Of several of a class each takes what one of its kind has saved, in their order.
        kind = self._options.get("kind")
        alike = [one for one in callbacks if type(one) is type(self) and one._options.get("kind") == kind]
        saved = state.stateful_callbacks.get(name) or []
        saved = [one for one in (saved if isinstance(saved, list) else [saved]) if one["args"].get("kind") == kind]
        if len(saved) < len(alike):
            of_kind = f" of kind {kind!r}" if kind else ""
            logger.warning(
                f"The checkpoint has {len(saved)} {name}{of_kind}, and now there are {len(alike)}, so that they begin anew."
            )
            return
        mine = saved[-len(alike) :][next(place for place, one in enumerate(alike) if one is self)]
        changed = {key: value for key, value in self._options.items() if value != mine["args"].get(key)}
        if changed:
            logger.warning(f"{name} goes on with other options than the checkpoint was saved with: {changed}.")
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
        ValueError: if the model has no routers, something is no callback of hf_moe, or the trainer has one like it.

    Example:

    ```python
    >>> from hf_moe import LoadBalancingCallback, RouterStatisticsCallback, add_moe_callbacks

    >>> add_moe_callbacks(trainer, LoadBalancingCallback("global_batch"), RouterStatisticsCallback())
    >>> trainer.train()
    ```
    """
    if not isinstance(trainer, Trainer):
        raise ValueError(f"The first argument is the trainer, and {type(trainer).__name__} is none.")
    there = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MoeCallback)]
    for callback in callbacks:
        if not isinstance(callback, MoeCallback):
            raise ValueError(
                f"{callback!r} is no callback of hf_moe. Give instances, such as LoadBalancingCallback(); others go to "
                "`trainer.add_callback`."
            )
        kind = callback._options.get("kind")
        if any(type(one) is type(callback) and one._options.get("kind") == kind for one in there):
            of_kind = f" of kind {kind!r}" if kind else ""
            raise ValueError(
                f"The trainer has a {type(callback).__name__}{of_kind} already, and with two of them everything would be done twice. Take "
                "that away with `trainer.remove_callback(...)`, or make a new trainer."
            )
        there.append(callback)
    find_routers(trainer.model)  # or an error, now rather than when training begins
    if is_deepspeed_zero3_enabled():
        set_zero3_leaf_modules(trainer.model)
    # Not with `add_callback`, which warns of two of a class.
    trainer.callback_handler.callbacks.extend(callbacks)
    if not hasattr(trainer, "_hf_moe_attachment"):
        trainer.log = _logging_metrics(trainer)
        trainer.train = _ending_on_errors(trainer)
        trainer.save_model = _saving_more(trainer)
        trainer._load_callback_state = _keeping_callbacks(trainer)
        trainer._issue_warnings_after_load = _warning_of_lost_weights(trainer)
        trainer._hf_moe_attachment = Attachment(trainer)
        _ATTACHMENTS.add(trainer._hf_moe_attachment)


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


def _ending_on_errors(trainer: Trainer):
    """`trainer.train`, after which nothing is left on the model also if it is interrupted, of which callbacks are not told."""
    train = trainer.train

    @functools.wraps(train)
    def train_and_end(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, MoeCallback):
                    callback.stop()

    return train_and_end


def _saving_more(trainer: Trainer):
    """`trainer.save_model`, which also saves what callbacks have for the folder, in checkpoints too."""
    save_model = trainer.save_model

    @functools.wraps(save_model)
    def save_with_callbacks(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        if trainer.is_world_process_zero():
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, MoeCallback):
                    callback.save(Path(output_dir or trainer.args.output_dir))

    return save_with_callbacks


def _warning_of_lost_weights(trainer: Trainer):
    """
    What a Trainer that resumes says of weights that it did not find in the checkpoint; for classes whose experts have other names
    there it finds none of them.
    """
    warn = trainer._issue_warnings_after_load

    @functools.wraps(warn)
    def warn_of_experts(load_result: Any) -> None:
        warn(load_result)
        blocks = {f"{name.rpartition('.')[0]}." for name in find_routers(trainer.model)}
        lost = [name for name in load_result.missing_keys if any(name.startswith(block) for block in blocks)]
        if lost:
            logger.warning(
                f"THE TRAINED EXPERTS AND ROUTERS ARE NOT LOADED: {len(lost)} weights of {type(trainer.model).__name__}, such as {lost[0]}, "
                "have other names in the checkpoint, which the Trainer of this transformers does not translate, so that they begin "
                "anew. Train an adapter, or a class of hf_moe (`hf-moe upcycle --target hf_moe`), which do resume; or load the "
                "checkpoint with `from_pretrained` and begin a training with it."
            )

    return warn_of_experts


def _keeping_callbacks(trainer: Trainer):
    """
    `trainer._load_callback_state` for the others' callbacks alone: it makes new ones with the options of the checkpoint, and
    mixes up several of a class. hf_moe's keep theirs and take their state themselves.
    """
    load = trainer._load_callback_state

    @functools.wraps(load)
    def load_others() -> None:
        handler, saved = trainer.callback_handler, trainer.state.stateful_callbacks
        ours = [callback for callback in handler.callbacks if isinstance(callback, MoeCallback)]
        names = {type(callback).__name__ for callback in ours}
        handler.callbacks = [callback for callback in handler.callbacks if callback not in ours]
        trainer.state.stateful_callbacks = {name: state for name, state in saved.items() if name not in names}
        try:
            load()
        finally:
            handler.callbacks.extend(ours)
            trainer.state.stateful_callbacks = saved

    return load_others


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
