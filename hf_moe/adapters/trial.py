# SPDX-License-Identifier: Apache-2.0
"""`try_adapter`: run a model with an adapter, forward and backward, to see that it does something and that it learns."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..training.routers import plain_name
from .checks import OK, PROBLEM, WARNING, Check
from .errors import ExpertLoraError
from .grouped_lora import expert_wrappers
from .inventory import is_expert_wrapper
from .layers import is_experts, layer_index, name_in_layer, number_ranges


def try_adapter(model: PeftModel, input_ids: torch.Tensor) -> list[Check]:
    """
    Run a batch with and without the adapter, and backward with it.

    Args:
        model ([`~peft.PeftModel`]): The model with the adapter, loaded for training.
        input_ids (`torch.Tensor` of shape `(B, S)`): Tokens.

    Returns:
        `list[Check]`: whether the adapter changes the logits, and whether the factors of every expert that got a token, and
        those of every other target, get a gradient.

    Raises:
        ExpertLoraError: if the model does not take tokens.
    """
    if model.main_input_name != "input_ids":
        raise ExpertLoraError(
            f"{type(model.get_base_model()).__name__} takes {model.main_input_name}, and only models of text can be run here."
        )
    model.eval()
    input_ids = input_ids.to(model.device)
    model.zero_grad()
    with _count_tokens(model) as tokens:
        output = _output(model(input_ids=input_ids))
    output.float().square().mean().backward()
    gradients = [_check_experts(model, tokens), *_check_modules(model)]
    # Last, since PEFT makes everything trainable when it comes back from this.
    with torch.no_grad(), model.disable_adapter():
        without = _output(model(input_ids=input_ids))
        with _rounded_otherwise(model):
            rounded = _output(model(input_ids=input_ids))
    return [_check_effect(output.detach(), without, rounded), *gradients]


def _output(outputs: Any) -> torch.Tensor:
    """The logits, or of a model without a head what it gives."""
    return outputs["logits"] if "logits" in outputs else outputs[0]


@contextmanager
def _count_tokens(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Tokens per expert, by the id of the experts module."""
    layers = [module for module in model.modules() if is_experts(module)]
    tokens = {id(experts): torch.zeros(experts.num_experts, dtype=torch.long) for experts in layers}

    def count(experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, *rest: Any) -> None:
        tokens[id(experts)] += torch.bincount(top_k_index.flatten(), minlength=experts.num_experts).cpu()

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        count(module, *args, **kwargs)

    handles = [experts.register_forward_pre_hook(hook, with_kwargs=True) for experts in layers]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded_otherwise(model: PeftModel) -> Iterator[None]:
    """As much noise on the embeddings as rounding them makes, to see what that becomes on the way to the logits."""

    def add_noise(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(output.device).manual_seed(0)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1, generator=generator)
        return (output.float() * (1 + torch.finfo(output.dtype).eps * noise)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _check_effect(output: torch.Tensor, without: torch.Tensor, rounded: torch.Tensor) -> Check:
    if not torch.isfinite(output).all():
        details = "With the adapter the model gives NaN or infinite values. Run it in float32, or take an earlier checkpoint."
        return Check("logits", PROBLEM, "not finite", details)
    change, noise = _relative_change(output, without), _relative_change(rounded, without)
    found = f"changed by {change:.1e} of the largest, by rounding {noise:.1e}"
    if change <= noise:
        details = (
            f"The adapter changes the logits by {change:.1e} of the largest, and rounding in {output.dtype} by {noise:.1e}: it has no "
            "effect. Its factors are zero or hardly trained, or its scaling is tiny."
        )
        return Check("logits", PROBLEM, "no more than rounding changes them", details)
    return Check("logits", OK, found)


def _relative_change(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference divided by the largest value."""
    difference = (output.float() - reference.float()).abs().max()
    return (difference / reference.float().abs().max().clamp(min=1e-30)).item()


def _check_experts(model: PeftModel, tokens: dict[int, torch.Tensor]) -> Check:
    """Every expert that got a token and has a rank must get a gradient."""
    numbers: Counter[str] = Counter()
    unreached: dict[str, list[str]] = defaultdict(list)
    idle: dict[int | None, str] = {}
    for name, wrapper in expert_wrappers(model):
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        has_rank = _any_per_expert(a, b, wrapper.num_experts)
        has_gradient = _any_per_expert(_gradient(a), _gradient(b), wrapper.num_experts)
        got_token = tokens[id(wrapper.get_base_layer())] > 0
        missed = has_rank & got_token & ~has_gradient
        numbers["experts"] += int(has_rank.sum())
        numbers["gradient"] += int(has_gradient.sum())
        layer = layer_index(plain_name(name))
        if missed.any():
            which = number_ranges(missed.nonzero().flatten().tolist())
            unreached[name_in_layer(f"{plain_name(name)}.{wrapper.parameter_name}")].append(f"layer {layer}: {which}")
        if (has_rank & ~got_token).any():
            idle[layer] = number_ranges((has_rank & ~got_token).nonzero().flatten().tolist())
    if unreached:
        places = "; ".join(f"{name} in {', '.join(layers)}" for name, layers in unreached.items())
        details = (
            f"Experts that got tokens and no gradient, or one that is not finite: {places}. They would not train."
        )
        return Check("expert gradients", PROBLEM, "none for some experts", details)
    if not numbers["experts"]:
        if any(is_expert_wrapper(module) for module in model.modules()):
            details = "The class of these experts does not show which tokens they get."
            return Check("expert gradients", WARNING, "not seen expert by expert", details)
        return Check("expert gradients", OK, "no experts are adapted")
    found = f"in {numbers['gradient']} of {numbers['experts']} factor pairs of experts"
    if idle:
        places = "; ".join(f"layer {layer}: {which}" for layer, which in idle.items())
        details = f"No token came to some experts, whose gradients were not seen: {places}. More text shows more: `--text FILE`."
        return Check("expert gradients", WARNING, found, details)
    return Check("expert gradients", OK, found)


def _any_per_expert(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Per expert whether one of two factors, or of their gradients, is other than zero."""
    a_E = a.detach().reshape(num_experts, -1).ne(0).any(-1)
    b_E = b.detach().reshape(-1, num_experts).ne(0).any(0)
    return (a_E | b_E).cpu()


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Zero where there is none, or none that could be used."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)


def _check_modules(model: PeftModel) -> Iterator[Check]:
    """The other targets: one of their factors must get a gradient."""
    layers: dict[str, Any] = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not is_expert_wrapper(module)
    }
    if not layers:
        return
    without = [
        name
        for name, layer in layers.items()
        if not any(
            _gradient(parameter).any()
            for key, parameter in layer.named_parameters()
            if not key.startswith("base_layer.")
        )
    ]
    if without:
        details = f"No gradient came to {', '.join(without[:6])}{' and others' if len(without) > 6 else ''}. They would not train."
        yield Check("other gradients", PROBLEM, f"none for {len(without)} of {len(layers)} modules", details)
    else:
        yield Check("other gradients", OK, f"in {len(layers)} modules")
