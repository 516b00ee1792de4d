# SPDX-License-Identifier: Apache-2.0
"""`inventory`: every place of a model that an adapter is on, that is trained in full, or where experts and routers stay."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ..training.routers import find_routers, plain_name
from .grouped_forward import SLICES
from .layers import PROJECTIONS, is_experts, layer_index, name_in_layer, projections
from .param_wrapper import GroupedParamWrapper


EXPERTS, ROUTER, MODULE = "experts", "router", "module"
LORA, FULL, FROZEN, NOT_ADAPTED = "LoRA", "in full", "frozen", "NOT ADAPTED"
ZERO = "LoRA, all zero"


@dataclass(frozen=True)
class Target:
    """
    A parameter or module of a model, over all layers that have it.

    Args:
        name (`str`): Its name within a layer, such as `mlp.experts.gate_up_proj`.
        kind (`str`): `"experts"`, `"router"` or `"module"`.
        training (`str`): `"LoRA"`, `"in full"`, `"frozen"`, or one of the first two, frozen; of experts also `"NOT ADAPTED"`
            and, where no factor has a value, so that none can train, `"LoRA, all zero"`.
        layers (`list[int]`): The layers; empty if it is in none.
        num_parameters (`int`, *optional*, defaults to 0): Number of parameters that will train; of experts up to their rank.
        adapter (`str`, *optional*): Name of the adapter.
        is_active (`bool`, *optional*, defaults to `True`): Whether the adapter is active.
        ranks (`dict[int, list[int]]`, *optional*): Per layer the rank that can train, of experts one each. It is 0 of experts
            whose factors are zero.
        experts (`dict[int, list[int]]`, *optional*): Per layer the experts that will train, where some may not.
        num_experts (`int`, *optional*): Number of experts.
        scaling (`list[float]`, *optional*): What the product of the factors is multiplied with, smallest and largest.
        dropout (`float`, *optional*): Dropout on what enters the adapter.
        backend (`str`, *optional*): `"hf_moe"` computes on activations, `"PEFT"` as PEFT does.
    """

    name: str
    kind: str
    training: str
    layers: list[int]
    num_parameters: int = 0
    adapter: str | None = None
    is_active: bool = True
    ranks: dict[int, list[int]] = field(default_factory=dict)
    experts: dict[int, list[int]] = field(default_factory=dict)
    num_experts: int | None = None
    scaling: list[float] = field(default_factory=list)
    dropout: float | None = None
    backend: str | None = None


def inventory(model: nn.Module) -> list[Target]:
    """Experts, routers, adapted modules, and what is trained in full, in this order."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    experts = {plain_name(name): module for name, module in model.named_modules() if is_experts(module)}
    routers = _router_names(model)
    found = [target for name, layer in adapted.items() for target in _adapters_of(name, layer, routers)]
    found += _in_full(model, list(experts), routers)
    touched = {target.name for target in found}
    is_esft = any(hasattr(layer, SLICES) for layer in experts.values())
    for name, layer in experts.items():
        for projection in projections(layer):
            if (full_name := f"{name}.{projection}") not in touched:
                training = FROZEN if is_esft else NOT_ADAPTED
                found.append(
                    Target(
                        full_name,
                        EXPERTS,
                        training,
                        _layers(name),
                        experts=dict.fromkeys(_layers(name), []),
                        num_experts=layer.num_experts,
                    )
                )
    for name in routers:
        if not any(f"{other}.".startswith(f"{name}.") for other in touched):
            found.append(Target(name, ROUTER, FROZEN, _layers(name)))
    return _over_layers(found)


def is_expert_wrapper(layer: nn.Module) -> bool:
    """Whether an adapter is on the weights of several experts, of any class."""
    return isinstance(layer, ParamWrapper) and layer.num_experts > 1


def site(name: str) -> str:
    """The name of a module or parameter in the model as it is without PEFT."""
    parts = [part for part in plain_name(name).split(".") if part != SLICES]
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join(part for part in parts if part != "original_module")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter was added by PEFT, or by `apply_esft`."""
    return ".lora_" in name or ".modules_to_save." in name or f".{SLICES}." in name


def _adapters_of(name: str, layer: Any, routers: list[str]) -> Iterator[Target]:
    module = plain_name(name)
    is_expert = is_expert_wrapper(layer)
    for adapter, rank in layer.r.items():
        own = [
            parameter
            for key, parameter in layer.named_parameters()
            if not key.startswith("base_layer.") and adapter in key.split(".") and parameter.requires_grad
        ]
        ranks = _expert_ranks(layer, adapter) if is_expert else [rank]
        dropout = layer.lora_dropout[adapter]
        training = LORA if own else f"{LORA}, {FROZEN}"
        yield Target(
            f"{module}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else module,
            EXPERTS if is_expert else ROUTER if module in routers else MODULE,
            training if any(ranks) else ZERO,
            _layers(module),
            sum(parameter.numel() for parameter in own) * sum(ranks) // (len(ranks) * rank),
            adapter,
            adapter in layer.active_adapters and not layer.disable_adapters,
            dict.fromkeys(_layers(module), ranks),
            dict.fromkeys(_layers(module), [one for one, of_expert in enumerate(ranks) if of_expert])
            if is_expert
            else {},
            layer.num_experts if is_expert else None,
            [layer.scaling[adapter]],
            dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            "hf_moe" if isinstance(layer, GroupedParamWrapper) else "PEFT",
        )


@torch.no_grad()
def _expert_ranks(wrapper: ParamWrapper, adapter: str) -> list[int]:
    """Per expert, how many ranks have a value in one of their factors: where both are zero, so are their gradients."""
    rank, num_experts = wrapper.r[adapter], wrapper.num_experts
    a, b = (_whole(factors[adapter].weight) for factors in (wrapper.lora_A, wrapper.lora_B))
    if a.is_meta or b.is_meta:
        return [rank] * num_experts
    a_ER = a.reshape(num_experts, rank, -1).ne(0).any(-1)
    b_ER = b.reshape(-1, rank, num_experts).ne(0).any(0).T
    return (a_ER | b_ER).sum(-1).tolist()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, also where FSDP2 has sharded it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _in_full(model: nn.Module, experts: list[str], routers: list[str]) -> Iterator[Target]:
    """Parameters that are trained themselves: copies for `modules_to_save`, experts chosen by ESFT, what else was not frozen."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or not (parameter.requires_grad or ".modules_to_save." in name):
            continue
        place = site(name)
        kind = MODULE
        for other, modules in ((EXPERTS, experts), (ROUTER, routers)):
            if place.startswith(tuple(f"{module}." for module in modules)):
                kind = other
        target = Target(
            place,
            kind,
            FULL if parameter.requires_grad else f"{FULL}, {FROZEN}",
            _layers(place),
            parameter.numel() if parameter.requires_grad else 0,
        )
        if f".{SLICES}." in name:
            slices: Any = model.get_submodule(name.rpartition(".")[0])
            ids = dict.fromkeys(target.layers, slices.ids_N.tolist())
            target = replace(target, experts=ids, num_experts=len(slices.local_E))
        yield target


def _router_names(model: nn.Module) -> list[str]:
    try:
        return list(dict.fromkeys(site(name) for name in find_routers(model) if not is_of_adapter(name)))
    except ValueError:
        return []  # a model that does not declare its routers


def _layers(name: str) -> list[int]:
    index = layer_index(name)
    return [] if index is None else [index]


def _over_layers(targets: Iterable[Target]) -> list[Target]:
    """Targets that differ in the layer alone, as one."""
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        alike = (target.kind, target.training, target.adapter, target.is_active, target.dropout, target.backend)
        groups[name_in_layer(target.name), target.num_experts, *alike].append(target)
    order = (*PROJECTIONS, EXPERTS, ROUTER, MODULE)

    def place(target: Target) -> tuple[int, str]:
        projection = target.name.rsplit(".", 1)[-1]
        name = projection if target.kind == EXPERTS and projection in PROJECTIONS else target.kind
        return order.index(name), target.adapter or ""

    return sorted((_joined(group) for group in groups.values()), key=place)


def _joined(group: list[Target]) -> Target:
    scaling = [value for target in group for value in target.scaling]
    return replace(
        group[0],
        name=name_in_layer(group[0].name),
        layers=sorted({layer for target in group for layer in target.layers}),
        num_parameters=sum(target.num_parameters for target in group),
        ranks={layer: ranks for target in group for layer, ranks in target.ranks.items()},
        experts={layer: experts for target in group for layer, experts in target.experts.items()},
        scaling=[min(scaling), max(scaling)] if scaling else [],
    )
