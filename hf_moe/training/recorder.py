# SPDX-License-Identifier: Apache-2.0
"""`RoutingRecorder`: counts which experts the routers of any MoE in transformers choose."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .statistics import LayerRouting, RoutingStatistics


logger = logging.get_logger(__name__)

TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_top_k", "moe_topk")


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
        if self._handles:
            raise RuntimeError("This recorder is recording already.")
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and _router_specs(module):
                self._handles.append(module.register_forward_pre_hook(self._enter_model, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave_model, always_call=True))
        for name, router in self.routers.items():
            self._handles.append(router.module.register_forward_hook(self._counting_hook(name, router)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._padding_masks.clear()

    def reset(self) -> None:
        """Forget what was counted."""
        # Per router `(num_experts + 1,)`: the counts, and behind them the number of tokens.
        self._counts: dict[str, torch.Tensor] = {}

    def statistics(self, reduce_over_ranks: bool = False) -> RoutingStatistics:
        """
        What was counted so far.

        Args:
            reduce_over_ranks (`bool`, *optional*, defaults to `False`): Whether to add the counts of all ranks of
                `torch.distributed`. Every rank must then make this call.

        Raises:
            ValueError: if no router has run yet.
        """
        if reduce_over_ranks:
            self._reduce_over_ranks()
        if not self._counts:
            raise ValueError("No router has run inside the recorder: call the model inside its `with` block first.")
        layers = {}
        for name, counts_and_tokens in self._counts.items():
            *counts, num_tokens = counts_and_tokens.tolist()
            layers[name] = LayerRouting(torch.tensor(counts, dtype=torch.int64), num_tokens)
        return RoutingStatistics({name: layers[name] for name in self.routers if name in layers})

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = _find_attention_mask(module, args, kwargs)
        # An inner model may be called with a prepared mask or none; then the mask of the model around it counts.
        if mask is None and self._padding_masks:
            mask = self._padding_masks[-1]
        self._padding_masks.append(mask)

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._padding_masks:
            self._padding_masks.pop()

    def _reduce_over_ranks(self) -> None:
        """Replace the counts by their sums over all ranks; a rank on which a router did not run takes part as well."""
        everywhere: list[dict[str, list[int]]] = [{} for _ in range(torch.distributed.get_world_size())]
        mine = {name: counts.tolist() for name, counts in self._counts.items()}
        torch.distributed.all_gather_object(everywhere, mine)
        self._counts = {
            name: torch.stack([torch.tensor(counts[name]) for counts in everywhere if name in counts]).sum(0)
            for name in self.routers
            if any(name in counts for counts in everywhere)
        }

    def _counting_hook(self, name: str, router: "Router"):
        @torch.no_grad()
        def count(module: nn.Module, args: tuple, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # inside a backward pass: gradient checkpointing runs the layer a second time
            logits_TE = output[router.logits_index] if isinstance(output, tuple) else output
            logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
            index_TK = _find_top_k_index(router, output, logits_TE)
            mask = self._padding_masks[-1] if self._padding_masks else None
            num_tokens = torch.tensor([len(index_TK)], device=index_TK.device)
            if mask is not None:
                mask = mask[:, -(len(index_TK) // mask.shape[0]) :].reshape(-1).bool().to(index_TK.device)
                index_TK, num_tokens = index_TK[mask], mask.sum().reshape(1)
            num_experts = logits_TE.shape[-1]
            # One more bin takes the index `num_experts`, which stands for "no expert".
            counts = torch.bincount(index_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
            self._counts[name] = self._counts.get(name, 0) + torch.cat([counts, num_tokens])

        return count


class Router(NamedTuple):
    """A router module, the place of the logits in its output, and the number of experts it chooses, if that is known."""

    module: nn.Module
    logits_index: int
    top_k: int | None


def find_routers(model: nn.Module) -> dict[str, Router]:
    """
    The routers of a model by name.

    Raises:
        ValueError: if there is none.
    """
    routers: dict[str, Router] = {}
    for prefix, owner in model.named_modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        for spec in _router_specs(owner):
            for name, module in owner.named_modules(prefix=prefix):
                matches_name = spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f".{name}."
                if spec.target_class is not None and isinstance(module, spec.target_class) and matches_name:
                    routers[name] = Router(module, spec.index, _find_top_k(owner))
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


def _find_top_k(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    for owner in (config, getattr(config, "ffn_config", None)):
        for field in TOP_K_FIELDS:
            if isinstance(top_k := getattr(owner, field, None), int):
                return top_k
    return None


def _find_top_k_index(router: Router, output: Any, logits_TE: torch.Tensor) -> torch.Tensor:
    """`(T, K)` chosen experts: the router's own choice if its output shows it, else the K largest logits."""
    for tensor in output if isinstance(output, tuple) else ():
        if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dim() < 2:
            continue
        # The width tells a choice from a mask over the experts, the number of rows from a permutation of tokens.
        width = tensor.shape[-1]
        is_choice = width < logits_TE.shape[-1] if router.top_k is None else width == router.top_k
        if is_choice and tensor.numel() == len(logits_TE) * width:
            return tensor.reshape(len(logits_TE), width)
    if router.top_k is None:
        raise ValueError(
            f"{type(router.module).__name__} does not say which experts it chose, and the configuration not how many (none of "
            f"{', '.join(TOP_K_FIELDS)}), so its routing cannot be recorded."
        )
    return logits_TE.topk(router.top_k, dim=-1).indices
