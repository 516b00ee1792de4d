# SPDX-License-Identifier: Apache-2.0
"""`RoutingRecorder`: counts which experts the routers of any MoE in transformers choose, and keeps the choices if asked."""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from .dropped_slots import DroppedSlots
from .rank_sum import RankSum
from .router_hooks import RouterCall, RouterHooks
from .statistics import LayerRouting, RoutingStatistics


class RoutingRecorder:
    """
    Context manager that counts the experts chosen in every forward pass inside it.

    Routers are found through the declarations with which transformers records router logits, so it works on any MoE that
    can return them: hf_moe's classes, Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss and the others, also inside PEFT, DDP or
    another wrapper. Padding is left out where the model is called with a 2-dimensional `attention_mask`. The second
    forward of gradient checkpointing is not counted.

    Args:
        model (`torch.nn.Module`): The model, or a module around it.
        coactivation (`bool`, *optional*, defaults to `False`): Whether to count which experts are chosen together too.
        keep_choices (`bool`, *optional*, defaults to `False`): Whether to keep which experts every token chose, for
            [`~RoutingRecorder.choices`]. That takes 8 bytes of CPU memory for each layer, token and chosen expert, and waits
            for the device after every router.

    Raises:
        ValueError: if the model declares no router.

    Example:

    ```python
    >>> with RoutingRecorder(model) as recorder:
    ...     model(**batch)
    >>> recorder.statistics().summary()
    ```
    """

    def __init__(self, model: nn.Module, coactivation: bool = False, keep_choices: bool = False):
        self._counts_pairs = coactivation
        self._hooks = RouterHooks(model)
        self.routers = self._hooks.routers
        self._dropped_slots = DroppedSlots(model, self.routers)
        self._handles: list[RemovableHandle] = []
        self._keep_choices = keep_choices
        self._is_recording = False
        self.reset()

    def __enter__(self) -> "RoutingRecorder":
        if self._is_recording:
            raise RuntimeError("This recorder is recording already.")
        self._hooks.add(self._count)
        self._handles = self._dropped_slots.watch(self._count_dropped)
        self._is_recording = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.remove(self._count)
        for handle in self._handles:
            handle.remove()
        self._is_recording = False

    def reset(self) -> None:
        """Forget what was counted."""
        # Per router `(2 * num_experts + 1,)`: slots that each expert served, that it was given, and the number of tokens.
        self._counts: dict[str, torch.Tensor] = {}
        self._together: dict[str, torch.Tensor] = {}
        # Per router the `(T, K)` choices of every pass.
        self._choices: dict[str, list[torch.Tensor]] = defaultdict(list)

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
            self._counts = RankSum(self._hooks, torch.int64, in_training=False)(self._counts)
        self._check_has_run()
        layers = {}
        for name, counts_and_tokens in self._counts.items():
            *both, num_tokens = counts_and_tokens.tolist()
            counts_E, demand_E = torch.tensor(both, dtype=torch.int64).chunk(2)
            num_zero_computation_experts = self.routers[name].num_zero_computation_experts
            layers[name] = LayerRouting(counts_E, num_tokens, num_zero_computation_experts, demand_E)
        return RoutingStatistics({name: layers[name] for name in self.routers if name in layers})

    def coactivation(self) -> dict[str, torch.Tensor]:
        """
        For how many tokens of this process two experts were both chosen, `(E, E)` by router, with the experts' own counts on the
        diagonal.

        Raises:
            ValueError: if that was not asked for, or no router has run yet.
        """
        if not self._together:
            raise ValueError(
                "Nothing was counted: make it a RoutingRecorder(model, coactivation=True), and call the model inside."
            )
        return {name: together_EE.cpu() for name, together_EE in self._together.items()}

    def choices(self) -> dict[str, torch.Tensor]:
        """
        The experts that every token chose, of this rank alone.

        Returns:
            `dict[str, torch.Tensor]`: By the name of the router, in the order of the model, `(num_tokens, K)` in int64 on the
            CPU. Tokens are in the order in which they were run, padding is left out. The expert with the largest logit is
            the first; -1 stands for none, at the end.

        Raises:
            ValueError: if the recorder keeps no choices, or no router has run yet.
        """
        if not self._keep_choices:
            raise ValueError("This recorder only counts. Make it with `RoutingRecorder(model, keep_choices=True)`.")
        self._check_has_run()
        return {name: torch.cat(self._choices[name]) for name in self.routers if name in self._choices}

    def _check_has_run(self) -> None:
        if not self._counts:
            raise ValueError("No router has run inside the recorder: call the model inside its `with` block first.")

    @torch.no_grad()
    def _count(self, call: RouterCall) -> None:
        if call.is_recomputation:
            return
        counts_and_tokens = torch.cat([call.counts_E, call.counts_E, call.num_tokens.reshape(1)]).long()
        self._counts[call.name] = self._counts.get(call.name, 0) + counts_and_tokens
        if self._counts_pairs:
            index_TK, num_experts = call.top_k_index_TK, call.logits_TE.shape[-1]
            is_chosen_TE = torch.zeros(len(index_TK), num_experts + 1, device=index_TK.device).scatter_(
                -1, index_TK, 1.0
            )
            is_chosen_TE = is_chosen_TE[:, :-1] if call.mask_T is None else is_chosen_TE[:, :-1] * call.mask_T[:, None]
            self._together[call.name] = self._together.get(call.name, 0) + (is_chosen_TE.T @ is_chosen_TE).long()
        if self._keep_choices:
            self._choices[call.name].append(_sorted_choices(call).cpu())

    def _count_dropped(self, name: str, change: torch.Tensor, is_training: bool) -> None:
        self._counts[name][: len(change) - 1] += change[:-1].long()


def _sorted_choices(call: RouterCall) -> torch.Tensor:
    """`(tokens, K)` chosen experts without padding, those with the largest logits first; -1 stands for none."""
    num_experts = call.logits_TE.shape[-1]
    logits_TE = F.pad(call.logits_TE.float(), (0, 1), value=-torch.inf)
    order_TK = logits_TE.gather(-1, call.top_k_index_TK).argsort(dim=-1, descending=True, stable=True)
    index_TK = call.top_k_index_TK.gather(-1, order_TK).long()
    index_TK = index_TK.masked_fill(index_TK == num_experts, -1)
    return index_TK if call.mask_T is None else index_TK[call.mask_T.bool()]
