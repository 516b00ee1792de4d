# SPDX-License-Identifier: Apache-2.0
"""
`enable_grouped_lora` and `disable_grouped_lora`: PEFT's expert LoRA, computed on activations.

PEFT wraps a module of experts in one `ParamWrapper` per projection, which adds the product of the factors to the weights of
all experts in every forward pass. A [`GroupedParamWrapper`] hands the factors to the experts instead, for
`grouped_forward.py`. Everything else is PEFT's: parameters, files, adapters, merging.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .errors import ExpertLoraError
from .grouped_forward import ACTIVE, IMPLEMENTATION, Routing
from .low_rank import Adapter, FactorCache, LowRank


FUSED_IMPLEMENTATIONS = ("sonicmoe", "deepgemm")
BASE_ADAPTER = "__base__"  # what PEFT calls a row of a batch that uses no adapter


@dataclass(frozen=True)
class ActiveAdapters:
    """
    The adapters of one projection in one forward pass.

    Args:
        adapters (`list[Adapter]`): Those that are active.
        cache (`FactorCache`): Where their layout is kept.
        names (`Sequence[str]`, *optional*): Per sequence of the batch, the adapter that it uses, where they differ.
        num_tokens (`int`): Number of tokens in the batch.
    """

    adapters: list[Adapter]
    cache: FactorCache
    names: Sequence[str] | None
    num_tokens: int

    def low_rank(self, routing: Routing, dtype: torch.dtype) -> LowRank:
        uses_SA = None
        if self.names is not None:
            device = routing.order_S.device
            uses_BA = torch.tensor([[name == of.name for of in self.adapters] for name in self.names], device=device)
            uses_SA = uses_BA.repeat_interleave(self.num_tokens // len(self.names), dim=0)[routing.token_S]
        return LowRank(self.adapters, self.cache, dtype, uses_SA)


class GroupedParamWrapper(ParamWrapper):
    """A `ParamWrapper` around experts that leaves their weights as they are and works on their activations."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str], names: Sequence[str] | None = None, num_tokens: int = 0):
        experts = self.get_base_layer()
        adapters = [self.adapter(name) for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        active = experts.__dict__.setdefault(ACTIVE, {})
        cache = self.__dict__.setdefault("_factor_cache", FactorCache())
        active[self.parameter_name] = ActiveAdapters(adapters, cache, names, num_tokens)
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
        used = [name for name in dict.fromkeys(names) if name != BASE_ADAPTER]
        with self._activate_lora([] if self.disable_adapters else used, names, x.shape[0]):
            return self.base_layer(x, *args, **kwargs)


# PEFT recognises its wrappers by this name, and refuses to wrap a second parameter of a module in another.
GroupedParamWrapper.__name__ = ParamWrapper.__name__


def enable_grouped_lora(model: nn.Module) -> nn.Module:
    """
    Compute the LoRA of experts on their activations, for all adapters that the model has and will have.

    Args:
        model (`torch.nn.Module`): A model with adapters from PEFT (`get_peft_model`, `PeftModel.from_pretrained`) or from
            transformers (`load_adapter`), or a module around it. It is changed and returned.

    Raises:
        ExpertLoraError: if no adapter is on experts, or if something else has changed how they are computed.
    """
    wrappers = list(expert_wrappers(model))
    if not wrappers:
        raise ExpertLoraError(
            "No adapter of this model is on the parameters of experts. Target them with "
            "`target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']` or an ExpertLoraConfig."
        )
    for name, wrapper in wrappers:
        _check(name, wrapper)
    for _, wrapper in wrappers:
        if type(wrapper) is GroupedParamWrapper:
            continue
        config = wrapper.get_base_layer().config
        if config._experts_implementation != IMPLEMENTATION:
            config.__dict__.setdefault("_hf_moe_replaced_implementation", config._experts_implementation)
            config._experts_implementation = IMPLEMENTATION
        wrapper.__class__ = GroupedParamWrapper
    return model


def disable_grouped_lora(model: nn.Module) -> nn.Module:
    """Go back to PEFT's own computation; the model is changed and returned."""
    for _, wrapper in expert_wrappers(model):
        config = wrapper.get_base_layer().config
        if "_hf_moe_replaced_implementation" in config.__dict__:
            config._experts_implementation = config.__dict__.pop("_hf_moe_replaced_implementation")
        wrapper.__dict__.pop("_factor_cache", None)
        wrapper.__class__ = ParamWrapper
    return model


def expert_wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """PEFT's wrappers around parameters of experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and hasattr(module.get_base_layer(), "_is_expert_parallel"):
            yield name, module


def _check(name: str, wrapper: ParamWrapper) -> None:
    experts = wrapper.get_base_layer()
    implementation = experts.config._experts_implementation
    if implementation in FUSED_IMPLEMENTATIONS:
        raise ExpertLoraError(
            f"The experts implementation {implementation!r} computes both projections in one kernel, between which LoRA has no "
            "place. Load the model with `experts_implementation='grouped_mm'`."
        )
    for function, of in (
        (ParamWrapper.forward, "PEFT's ParamWrapper"),
        (type(experts).forward, type(experts).__name__),
    ):
        module = getattr(function, "__module__", "")
        if not module.startswith(("peft.", "transformers", "hf_moe")):
            raise ExpertLoraError(
                f"{of} was changed by {module!r}, whose expert LoRA cannot be stacked with this one. Import hf_moe in a process "
                "that does not load it."
            )
    if wrapper.get_param().ndim != 3:
        raise ExpertLoraError(f"{name}: the parameter {wrapper.parameter_name!r} is not one matrix per expert.")
