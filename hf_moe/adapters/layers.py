# SPDX-License-Identifier: Apache-2.0
"""`find_experts`: the layers of experts of any model in transformers, what they are called and what they are made of."""

from collections.abc import Iterable

from torch import nn

from ..training.routers import plain_name
from .errors import ExpertLoraError
from .grouped_forward import IMPLEMENTATION


PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
REPLACEABLE = (None, "eager", "grouped_mm", "batched_mm", IMPLEMENTATION)
PATCHERS = ("unsloth", "axolotl")


def is_experts(module: nn.Module) -> bool:
    """Whether the class has `@use_experts_implementation`, so that its forward pass can be exchanged."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """
    The layers of experts by name, whether or not PEFT has wrapped them.

    Raises:
        ExpertLoraError: if there is none whose activations can be reached.
    """
    found = {plain_name(name): module for name, module in model.named_modules() if is_experts(module)}
    if found:
        for name, experts in found.items():
            check_weights(name, experts)
        return found
    others = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Experts")}
    if others:
        raise ExpertLoraError(
            f"{type(model).__name__} has experts of the class {', '.join(sorted(others))}, which is not written for "
            "transformers' `experts_implementation`: nothing can be put between its projections. Quantized experts can often "
            "be loaded dequantized (`dequantize=True` in the quantization's configuration); otherwise use PEFT's LoraConfig."
        )
    raise ExpertLoraError(
        f"{type(model).__name__} has no layer of experts. Is it a mixture of experts of transformers?"
    )


def experts_by_layer(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """
    Name and module of the experts by the number of their layer.

    Raises:
        ExpertLoraError: if there is none whose activations can be reached, or the numbers do not tell them apart.
    """
    layers: dict[int, tuple[str, nn.Module]] = {}
    for name, experts in find_experts(model).items():
        layer = layer_index(name)
        if layer is None or layer in layers:
            raise ExpertLoraError(f"{name!r} cannot be told from other experts by the number of its layer.")
        layers[layer] = (name, experts)
    return layers


def projections(experts: nn.Module) -> list[str]:
    """The names of the weights of the experts, in the order of the forward pass."""
    return [name for name in PROJECTIONS if hasattr(experts, name)]


def layer_index(name: str) -> int | None:
    """The number of the layer that a module or parameter belongs to, if its name says it."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return int(numbers[-1]) if numbers else None


def name_in_layer(name: str) -> str:
    """The part of a name that is the same in all layers: `mlp.experts` of `model.layers.3.mlp.experts`."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[first + 1 :])


def check_replaceable(name: str, experts: nn.Module) -> None:
    """
    Refuse experts whose forward pass is not one that hf_moe's can stand in for.

    Raises:
        ExpertLoraError: if they are computed by a fused kernel, by code of another library, or split over processes.
    """
    implementation = experts.config._experts_implementation
    if implementation not in REPLACEABLE:
        raise ExpertLoraError(
            f"{name} is computed by the experts implementation {implementation!r}, in which the projections have no place for "
            "anything between them that is known here. Load the model with `experts_implementation='grouped_mm'`."
        )
    for forward in (type(experts).forward, experts.__dict__.get("forward")):
        module = getattr(forward, "__module__", None) or ""
        if module.startswith(PATCHERS):
            raise ExpertLoraError(
                f"The forward pass of {name} was changed by {module!r}, with which this one cannot be stacked. Use hf_moe in a "
                "process that does not load it."
            )
    if experts._is_expert_parallel:
        raise ExpertLoraError(
            f"{name} holds {experts.num_experts} experts of those that are split over processes (expert parallelism). Parts of "
            "them cannot be adapted or trained alone. Load the model without `ep_size`; DDP and FSDP2 work."
        )


def number_ranges(numbers: Iterable[int | None]) -> str:
    """Numbers of layers or experts, as `0-3, 7`."""
    spans: list[list[int]] = []
    for number in sorted({number for number in numbers if number is not None}):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def check_weights(name: str, experts: nn.Module) -> None:
    """
    Refuse weights that are not one matrix per expert in at least 16 bits.

    Raises:
        ExpertLoraError: if that is so.
    """
    for projection in projections(experts):
        weight = getattr(experts, projection)
        if weight.dim() != 3 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ExpertLoraError(
                f"{name}.{projection} is of type {weight.dtype} and shape {tuple(weight.shape)}. Expert LoRA needs one matrix "
                "per expert in at least 16 bits, or weights that a parametrization unpacks to these (as bitsandbytes does "
                "with 4 bits). Load the model in bfloat16, or with `dequantize=True` in the quantization's configuration."
            )
