# SPDX-License-Identifier: Apache-2.0
"""`RoutingRecorder`: counts which experts the routers of any MoE in transformers choose."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .statistics import LayerRouting, RoutingStatistics


logger = logging.get_logger(__name__)


class RoutingRecorder:
    """
    Context manager that counts the experts chosen in every forward pass inside it.

    Routers are found through the declarations with which transformers records router logits, so it works on any MoE that
    can return them: hf_moe's classes, Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss and the others, also inside PEFT, DDP or
    another wrapper. Padding is left out where the model is called with a 2-dimensional `attention_mask`. The second
    forward of gradient checkpointing is not counted.

    Args:
        model (`torch.nn.Module`): The model, or a module around it.

    Raises:
        ValueError: if the model declares no router.

    Example:

    ```python
    >>> with RoutingRecorder(model) as recorder:
    ...     model(**batch)
    >>> recorder.statistics().summary()
    ```
    """

    def __init__(self, model: nn.Module):
        self.routers = find_routers(model)
        self.model = model
        self._handles: list[RemovableHandle] = []
        self._padding_masks: list[torch.Tensor | None] = []
        self.reset()

    def __enter__(self) -> "RoutingRecorder":
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and _router_specs(module):
                self._handles.append(module.register_forward_pre_hook(self._enter_model, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave_model, always_call=True))
        for name, (router, logits_index) in self.routers.items():
            self._handles.append(router.register_forward_hook(self._counting_hook(name, logits_index)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._padding_masks.clear()

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts: dict[str, torch.Tensor] = {}
        self._num_tokens: dict[str, torch.Tensor] = {}

    def statistics(self, reduce_over_ranks: bool = False) -> RoutingStatistics:
        """
        What was counted so far.

        Args:
            reduce_over_ranks (`bool`, *optional*, defaults to `False`): Whether to add the counts of all ranks of
                `torch.distributed`. Every rank must then make this call.

        Raises:
            ValueError: if no router has run yet.
        """
        if not self._counts:
            raise ValueError("No router has run inside the recorder: call the model inside its `with` block first.")
        layers = {}
        for name in self.routers:
            if name not in self._counts:
                continue
            packed = torch.cat([self._counts[name], self._num_tokens[name].reshape(1)])
            if reduce_over_ranks:
                torch.distributed.all_reduce(packed)
            *counts, num_tokens = packed.tolist()
            layers[name] = LayerRouting(torch.tensor(counts, dtype=torch.int64), num_tokens)
        return RoutingStatistics(layers)

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = _find_attention_mask(module, args, kwargs)
        # An inner model may be called with a prepared mask or none; then the mask of the model around it counts.
        if mask is None and self._padding_masks:
            mask = self._padding_masks[-1]
        self._padding_masks.append(mask)

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._padding_masks:
            self._padding_masks.pop()

    def _counting_hook(self, name: str, logits_index: int):
        @torch.no_grad()
        def count(router: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # inside a backward pass: gradient checkpointing runs the layer a second time
            logits_TE = output[logits_index]
            logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
            index_TK = _find_top_k_index(self.model, output, logits_TE)
            mask = self._padding_masks[-1] if self._padding_masks else None
            num_tokens = torch.tensor(len(index_TK), device=index_TK.device)
            if mask is not None:
                mask = mask[:, -(len(index_TK) // mask.shape[0]) :].reshape(-1).bool().to(index_TK.device)
                index_TK, num_tokens = index_TK[mask], mask.sum()
            num_experts = logits_TE.shape[-1]
            # One more bin takes the index `num_experts`, which stands for "no expert".
            counts = torch.bincount(index_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
            self._counts[name] = self._counts.get(name, 0) + counts
            self._num_tokens[name] = self._num_tokens.get(name, 0) + num_tokens

        return count


def find_routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """
    The routers of a model by name, each with the place of the logits in its output.

    Raises:
        ValueError: if there is none.
    """
    routers: dict[str, tuple[nn.Module, int]] = {}
    for prefix, owner in model.named_modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        for spec in _router_specs(owner):
            for name, module in owner.named_modules(prefix=prefix):
                matches_name = spec.layer_name is None or spec.layer_name.strip(".") in name.split(".")
                if spec.target_class is not None and isinstance(module, spec.target_class) and matches_name:
                    routers[name] = (module, spec.index)
    if not routers:
        raise ValueError(
            f"{type(model).__name__} declares no router: neither it nor a model inside it records `router_logits`. Is it a "
            "mixture of experts of transformers or hf_moe?"
        )
    return routers


def _router_specs(model: PreTrainedModel) -> list[OutputRecorder]:
    specs = (model._can_record_outputs or {}).get("router_logits", [])
    specs = specs if isinstance(specs, list) else [specs]
    return [spec if isinstance(spec, OutputRecorder) else OutputRecorder(spec, index=1) for spec in specs]


def _find_attention_mask(module: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None and args:
        mask = inspect.signature(module.forward).bind_partial(*args).arguments.get("attention_mask")
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask
    logger.warning_once(
        "RoutingRecorder: the attention mask is not of shape (batch, length), so padding cannot be told from text here."
    )
    return None


def _find_top_k_index(model: nn.Module, output: tuple[torch.Tensor, ...], logits_TE: torch.Tensor) -> torch.Tensor:
    """`(T, K)` chosen experts: the router's own choice, or for a router that hides it (Llama 4) the largest logits."""
    for tensor in output:
        if not tensor.is_floating_point():
            return tensor.reshape(len(logits_TE), -1)
    top_k = model.config.get_text_config().num_experts_per_tok
    return logits_TE.topk(top_k, dim=-1).indices
