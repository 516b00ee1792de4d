# SPDX-License-Identifier: Apache-2.0
"""`RouterHooks`: one set of hooks on the routers of a model, for all that listens to them: counts, losses, replay."""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.losses import count_choices
from .routers import Router, find_routers, find_selection_bias, router_specs


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ModelCall:
    """
    A forward pass of the model.

    Args:
        mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding.
        batch_size (`int`, *optional*): Number of sequences, if it is known.
        length (`int`, *optional*): Their length in this pass, without what is in a cache.
        has_gradient (`bool`): Whether the model was called with gradients enabled. Its layers are not in the first pass of
            reentrant gradient checkpointing.
        is_packed (`bool`): Whether it was called with `position_ids` and no mask, as where a row holds several texts.
    """

    mask: torch.Tensor | None
    batch_size: int | None
    length: int | None
    has_gradient: bool
    is_packed: bool = False


@dataclass
class RouterCall:
    """
    One forward pass of one router, for listeners.

    Args:
        name (`str`): Name of the router.
        router (`Router`): The router.
        inputs (`tuple`): What it was called with.
        keyword_inputs (`dict`): What it was called with by name.
        output (`Any`): What it returns.
        model_call (`ModelCall`, *optional*): The pass of the model that it belongs to.
        is_recomputation (`bool`): Whether it is the second pass of gradient checkpointing.
    """

    name: str
    router: Router
    inputs: tuple
    keyword_inputs: dict[str, Any]
    output: Any
    model_call: ModelCall | None
    is_recomputation: bool

    @property  # not cached, which would keep the view of whoever asked first, with or without gradients
    def logits_TE(self) -> torch.Tensor:
        """`(T, E)`"""
        return self.router.logits(self.output)

    @cached_property
    def top_k_index_TK(self) -> torch.Tensor:
        """`(T, K)`; `num_experts` stands for none."""
        return self.router.top_k_index(self.output)

    @cached_property
    def mask_T(self) -> torch.Tensor | None:
        """`(T,)`: 1 for tokens, 0 for padding; None where nothing is padded."""
        mask = None if self.model_call is None else self.model_call.mask
        if mask is None:
            return None
        length, rest = divmod(len(self.logits_TE), mask.shape[0])
        if rest or length > mask.shape[1] or not self.sees_all_tokens:
            logger.warning_once(
                f"{self.name} sees {len(self.logits_TE)} tokens, and the attention mask is {tuple(mask.shape)}: padding cannot be told "
                "from text there, and is counted."
            )
            return None
        # With a cache the mask is longer than what the router sees.
        return mask[:, mask.shape[1] - length :].reshape(-1).to(self.logits_TE.device)

    @cached_property
    def counts_E(self) -> torch.Tensor:
        """`(E,)` in float32: slots that each expert serves."""
        with torch.no_grad():
            return count_choices(self.top_k_index_TK, self.logits_TE.shape[-1], self.mask_T)

    @cached_property
    def num_tokens(self) -> torch.Tensor:
        """Number of tokens without padding, a float32 scalar."""
        if self.mask_T is None:
            return torch.full((), float(len(self.logits_TE)), device=self.logits_TE.device)
        return self.mask_T.sum(dtype=torch.float32)

    @property
    def sees_all_tokens(self) -> bool:
        """Whether the router sees what the model was called with, and not the text or the images of it alone."""
        if self.model_call is None or self.model_call.batch_size is None or self.model_call.length is None:
            return True
        return len(self.logits_TE) == self.model_call.batch_size * self.model_call.length

    @property
    def batch_size(self) -> int | None:
        """Number of sequences, if it is known."""
        return None if self.model_call is None else self.model_call.batch_size

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several texts."""
        return self.model_call is not None and self.model_call.is_packed

    @property
    def is_training(self) -> bool:
        """Whether this pass belongs to a training step."""
        has_gradient = torch.is_grad_enabled() if self.model_call is None else self.model_call.has_gradient
        return self.router.module.training and has_gradient


class ModelCalls:
    """
    The forward passes that are running, of the model and of models inside it.

    Args:
        model (`torch.nn.Module`): The model, or a module around it.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._running: list[ModelCall] = []

    @property
    def current(self) -> ModelCall | None:
        """The innermost one; None outside of the model, as in recomputation."""
        return self._running[-1] if self._running else None

    def attach(self) -> list[RemovableHandle]:
        """Begin to watch."""
        self._running.clear()
        handles = []
        for module in self._model.modules():
            if isinstance(module, PreTrainedModel) and router_specs(module):
                handles.append(module.register_forward_pre_hook(self._enter_model, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave_model, always_call=True))
        return handles

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        around = self._running[-1] if self._running else ModelCall(None, None, None, torch.is_grad_enabled())
        arguments = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
        arguments = arguments | kwargs
        # An inner model may be called with a prepared mask or none; then the mask of the model around it counts.
        mask = _padding_mask(arguments.get("attention_mask"))
        inputs = [arguments.get("input_ids"), arguments.get("inputs_embeds")]
        batch_size, length = next(
            (tensor.shape[:2] for tensor in inputs if tensor is not None), (around.batch_size, around.length)
        )
        is_packed = arguments.get("position_ids") is not None and arguments.get("attention_mask") is None
        self._running.append(
            ModelCall(
                around.mask if mask is None else mask,
                batch_size,
                length,
                around.has_gradient and torch.is_grad_enabled(),
                is_packed if len(self._running) == 0 else around.is_packed,
            )
        )

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._running:
            self._running.pop()


Listener = Callable[[RouterCall], Any]


class RouterHooks:
    """
    Hooks on the routers of a model and on the models around them.

    Every listener is called after every pass of a router with a [`RouterCall`]; what it returns, if it is not None, is the
    router's output from then on.

    Args:
        model (`torch.nn.Module`): The model, or a module around it.

    Raises:
        ValueError: if the model declares no router.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.routers = find_routers(model)
        self._handles: list[RemovableHandle] = []
        self._listeners: list[Listener] = []
        self._calls = ModelCalls(model)
        self._scores: dict[str, str] = {}
        self._seen: dict[str, list[ModelCall | None]] | None = None

    def add(self, listener: Listener, sees_recomputation: bool = False) -> None:
        """
        Add a listener, and the hooks if there are none yet.

        Args:
            listener (`Callable[[RouterCall], Any]`): What to call.
            sees_recomputation (`bool`, *optional*, defaults to `False`): Whether anything is done in the second pass of gradient
                checkpointing. The padding of the first is then kept for it until [`~RouterHooks.forget`].
        """
        self._listeners.append(listener)
        if sees_recomputation and self._seen is None:
            self._seen = defaultdict(list)
        if self._handles:
            return
        _forget_compiled()
        self._handles = self._calls.attach()
        for name, router in self.routers.items():
            self._handles.append(
                router.module.register_forward_hook(self._router_hook(name, router), with_kwargs=True)
            )

    @property
    def has_gradient(self) -> bool:
        """Whether the model was called with gradients enabled in the pass that is running."""
        return torch.is_grad_enabled() if self._calls.current is None else self._calls.current.has_gradient

    def remove(self, listener: Listener) -> None:
        """Remove a listener if it is still there, and the hooks with the last one."""
        self._listeners = [other for other in self._listeners if other != listener]
        if not self._listeners:
            self.close()

    def close(self) -> None:
        """Remove all listeners and hooks."""
        if self._handles:
            _forget_compiled()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listeners.clear()
        self._seen = None

    def forget(self) -> None:
        """Forget the passes of an optimizer step, whose gradients are there."""
        if self._seen is not None:
            self._seen.clear()

    def find_score(self, call: RouterCall) -> str:
        """
        What a router makes of its logits, one of `SCORES`, found out from the weights of a pass.

        Raises:
            ValueError: if it is none of them.
        """
        if call.name in self._scores:
            return self._scores[call.name]
        hint = "softmax" if find_selection_bias(self.model, call.name) is None else "sigmoid"
        try:
            score, is_certain = call.router.find_score(call.output, hint)
        except ValueError as error:
            raise ValueError(f"{call.name}: {error}") from error
        if is_certain:
            self._scores[call.name] = score
        return score

    def _router_hook(self, name: str, router: Router):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            # A router that runs inside a backward pass is run for the second time, by gradient checkpointing.
            is_recomputation = torch._C._current_graph_task_id() != -1
            model_call = self._calls.current
            if self._seen is not None and is_recomputation and self._seen[name]:
                # Backward passes run the other way round, the last forward pass first.
                model_call = self._seen[name].pop()
            call = RouterCall(name, router, args, kwargs, output, model_call, is_recomputation)
            if self._seen is not None and not is_recomputation and call.is_training:
                self._seen[name].append(model_call)
            for listener in self._listeners:
                changed = listener(call)
                call.output = call.output if changed is None else changed
            return None if call.output is output else call.output

        return hook


def _forget_compiled() -> None:
    """What `torch.compile` has made of a model does not look whether hooks have come or gone since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _padding_mask(mask: Any) -> torch.Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask
    logger.warning_once(
        "The attention mask is not of shape (batch, length), so padding cannot be told from text in the routing."
    )
    return None
