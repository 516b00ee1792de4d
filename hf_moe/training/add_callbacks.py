# SPDX-License-Identifier: Apache-2.0
"""`add_moe_callbacks`: gives a Trainer the callbacks of hf_moe, and lets it do with them what it does not do for callbacks."""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .moe_callback import ATTACHMENTS, Attachment, MoeCallback
from .routers import find_routers
from .zero3 import set_zero3_leaf_modules


logger = logging.get_logger(__name__)


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
    there = _ours(trainer)
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
        ATTACHMENTS.add(trainer._hf_moe_attachment)


def _logging_metrics(trainer: Trainer):
    """`trainer.log`, before which the callbacks' metrics join the training loss: in `on_log` it would be too late."""
    log = trainer.log

    @functools.wraps(log)
    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for callback in _ours(trainer):
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
            for callback in _ours(trainer):
                callback.stop()

    return train_and_end


def _saving_more(trainer: Trainer):
    """`trainer.save_model`, which also saves what callbacks have for the folder, in checkpoints too."""
    save_model = trainer.save_model

    @functools.wraps(save_model)
    def save_with_callbacks(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        if trainer.is_world_process_zero():
            for callback in _ours(trainer):
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
        handler, saved, ours = trainer.callback_handler, trainer.state.stateful_callbacks, _ours(trainer)
        names = {type(callback).__name__ for callback in ours}
        handler.callbacks = [callback for callback in handler.callbacks if callback not in ours]
        trainer.state.stateful_callbacks = {name: state for name, state in saved.items() if name not in names}
        try:
            load()
        finally:
            handler.callbacks.extend(ours)
            trainer.state.stateful_callbacks = saved

    return load_others


def _ours(trainer: Trainer) -> list[MoeCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MoeCallback)]
