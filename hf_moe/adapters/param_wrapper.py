# SPDX-License-Identifier: Apache-2.0
"""
`GroupedParamWrapper`: PEFT's wrapper around a parameter of experts, computing on activations.

PEFT wraps a module of experts in one `ParamWrapper` per projection, which adds the product of the factors to the weights of
all experts in every forward pass. This one hands the factors to the experts instead, for `grouped_forward.py`. Everything
else is PEFT's: parameters, files, adapters, merging.
"""

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import ExpertLoraError
from .grouped_forward import ACTIVE, IMPLEMENTATION, SLICES, Routing
from .layers import check_replaceable, is_experts, layer_index
from .low_rank import Adapter, LowRank


BASE_ADAPTER = "__base__"  # what PEFT calls a row of a batch that uses no adapter

# On an experts module; in its configuration it would get into config.json.
REPLACED = "_hf_moe_replaced_implementation"


@dataclass(frozen=True)
class ActiveAdapters:
    """
    The adapters of one projection in one forward pass.

    Args:
        adapters (`list[Adapter]`): Those that are active.
        names (`Sequence[str]`, *optional*): Per sequence of the batch, the adapter that it uses, where they differ.
        num_tokens (`int`): Number of tokens in the batch.
    """

    adapters: list[Adapter]
    names: Sequence[str] | None
    num_tokens: int

    def low_rank(self, routing: Routing, dtype: torch.dtype) -> LowRank:
        uses_SA = None
        if self.names is not None:
            device = routing.order_S.device
            uses_BA = torch.tensor([[name == of.name for of in self.adapters] for name in self.names], device=device)
            uses_SA = uses_BA.repeat_interleave(self.num_tokens // len(self.names), dim=0)[routing.token_S]
        return LowRank(self.adapters, dtype, uses_SA)


class GroupedParamWrapper(ParamWrapper):
    """A `ParamWrapper` around experts that leaves their weights as they are and works on their activations."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        name = kwargs.get("target_name", "")
        self.layer = layer_index(name)
        check_adaptable(name, base_layer.get_base_layer() if isinstance(base_layer, ParamWrapper) else base_layer)
        super().__init__(base_layer, adapter_name, parameter_name, _without_dropout(config), **kwargs)
        use_implementation(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; of an [`ExpertLoraConfig`] also its dropout and its ranks per expert."""
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        if dropout := getattr(config, "expert_dropout", 0.0):
            self.lora_dropout[adapter_name] = nn.Dropout(dropout)
        if ranks := getattr(config, "ranks_by_layer", None):
            if len(ranks.get(self.layer, ())) != self.num_experts:
                raise ExpertLoraError(
                    f"The ExpertLoraConfig was made for another model: it has no {self.num_experts} ranks for layer {self.layer}. "
                    "Call `for_model` with this one."
                )
            self._keep_ranks(adapter_name, r, torch.tensor(ranks[self.layer]))

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The experts without wrappers, computed as before."""
        restore_implementation(self.get_base_layer())
        return super().unload_and_optionally_merge_module(*args, **kwargs)

    @torch.no_grad()
    def _keep_ranks(self, adapter_name: str, rank: int, ranks_E: torch.Tensor) -> None:
        """
        Set the factors of an expert behind its own rank to zero. Where both are zero, so are their gradients: they stay so.
        """
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        unused_ER = (torch.arange(rank) >= ranks_E[:, None]).to(a.device)
        a.view(self.num_experts, rank, -1).masked_fill_(unused_ER[..., None], 0.0)
        b.view(-1, rank, self.num_experts).masked_fill_(unused_ER.T, 0.0)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str], names: Sequence[str] | None = None, num_tokens: int = 0):
        experts = self.get_base_layer()
        if experts.config._experts_implementation != IMPLEMENTATION:
            raise ExpertLoraError(
                f"The experts implementation was changed to {experts.config._experts_implementation!r}, which would compute "
                "the experts without their LoRA. Call `enable_grouped_lora(model)` again, or `disable_grouped_lora(model)` first."
            )
        adapters = [self.adapter(name) for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        active = experts.__dict__.setdefault(ACTIVE, {})
        active[self.parameter_name] = ActiveAdapters(adapters, names, num_tokens)
        try:
            yield
        finally:
            del active[self.parameter_name]

    def adapter(self, name: str) -> Adapter:
        """The factors of an adapter as they are used now."""
        dropout = self.lora_dropout[name]
        return Adapter(
            name,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.num_experts,
            self.scaling[name],
            dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0,
        )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return super().forward(x, *args, **kwargs)
        if self.merged:
            raise ExpertLoraError(
                f"A batch that mixes adapters ({sorted(set(names))}) cannot be run while {self.merged_adapters} are merged into "
                "the weights. Call `unmerge_adapter()` first."
            )
        if getattr(self.get_base_layer(), "gets_filled_slots", False):
            raise ExpertLoraError(
                f"A batch that mixes adapters ({sorted(set(names))}) cannot be run with this model's routing: where slots may be "
                "empty, experts get the others alone and do not know of which sequence they are. Run the sequences of each adapter "
                "as a batch of their own, with `set_adapter`."
            )
        if x.shape[0] % len(names):
            raise ExpertLoraError(
                f"`adapter_names` has {len(names)} names, which cannot be those of {x.shape[0]} tokens: give one per sequence."
            )
        used = [name for name in dict.fromkeys(names) if name != BASE_ADAPTER]
        with self._activate_lora([] if self.disable_adapters else used, names, x.shape[0]):
            return self.base_layer(x, *args, **kwargs)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """PEFT's wrappers refuse `lora_dropout`, which is for the other modules; that of experts is `expert_dropout`."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


# PEFT recognises its wrappers by this name, and refuses to wrap a second parameter of a module in another.
GroupedParamWrapper.__name__ = ParamWrapper.__name__


def wrap_experts(target: nn.Module, adapter_name: str, **kwargs: Any) -> GroupedParamWrapper | None:
    """What PEFT asks for every target of an [`ExpertLoraConfig`]: a wrapper for experts, None for everything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_experts(base) or kwargs.get("parameter_name") is None:
        return None
    return GroupedParamWrapper(target, adapter_name, **kwargs)


def check_adaptable(name: str, experts: nn.Module) -> None:
    """
    Refuse experts on which adapters would have no effect or another one.

    Raises:
        ExpertLoraError: if the forward pass cannot be replaced, PEFT's wrappers were changed, or the experts are fine-tuned.
    """
    check_replaceable(name, experts)
    for method in ("forward", "_activate_lora", "update_layer", "get_delta_weight", "merge", "unmerge"):
        module = getattr(ParamWrapper, method).__module__
        if not module.startswith(("peft.", "contextlib")):
            raise ExpertLoraError(
                f"PEFT's ParamWrapper.{method} was changed by {module!r}, whose expert LoRA cannot be stacked with this one. Use "
                "hf_moe in a process that does not load it."
            )
    if hasattr(experts, SLICES):
        raise ExpertLoraError(f"Experts of {name} are fine-tuned by `apply_esft`. Call `remove_esft(model)` first.")


def use_implementation(experts: nn.Module) -> None:
    """Let experts compute with the adapters that are handed to them, and remember how they did before."""
    if experts.config._experts_implementation != IMPLEMENTATION:
        experts.__dict__[REPLACED] = experts.config._experts_implementation
        experts.config._experts_implementation = IMPLEMENTATION


def restore_implementation(experts: nn.Module) -> None:
    """Let them compute as before."""
    if REPLACED in experts.__dict__:
        experts.config._experts_implementation = experts.__dict__.pop(REPLACED)
