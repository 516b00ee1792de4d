# SPDX-License-Identifier: Apache-2.0
"""`RoutingRecorder`: counts which experts the routers of any MoE in transformers choose."""

from typing import Any

import torch
from torch import nn

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

    Raises:
        ValueError: if the model declares no router.

    Example:

    ```python
    >>> with RoutingRecorder(model) as recorder:
    ...     model(**batch)
    >>> recorder.statistics().summary()
    ```
    """

    def __init__(self, model: nn.Module, coactivation: bool = False):
        self.keeps_coactivation = coactivation
        self._hooks = RouterHooks(model)
        self.routers = self._hooks.routers
        self._is_recording = False
        self.reset()

    def __enter__(self) -> "RoutingRecorder":
        if self._is_recording:
            raise RuntimeError("This recorder is recording already.")
        self._hooks.add(self._count)
        self._is_recording = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.remove(self._count)
        self._is_recording = False

    def reset(self) -> None:
        """Forget what was counted."""
        # Per router `(num_experts + 1,)`: the counts, and behind them the number of tokens.
        self._counts: dict[str, torch.Tensor] = {}
        self._together: dict[str, torch.Tensor] = {}

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

    @torch.no_grad()
    def _count(self, call: RouterCall) -> None:
        if call.is_recomputation:
            return
        counts_and_tokens = torch.cat([call.counts_E, call.num_tokens.reshape(1)]).long()
        self._counts[call.name] = self._counts.get(call.name, 0) + counts_and_tokens
        if self.keeps_coactivation:
            index_TK, num_experts = call.top_k_index_TK, call.logits_TE.shape[-1]
            is_chosen_TE = torch.zeros(len(index_TK), num_experts + 1, device=index_TK.device).scatter_(
                -1, index_TK, 1.0
            )
            is_chosen_TE = is_chosen_TE[:, :-1] if call.mask_T is None else is_chosen_TE[:, :-1] * call.mask_T[:, None]
            self._together[call.name] = self._together.get(call.name, 0) + (is_chosen_TE.T @ is_chosen_TE).long()
