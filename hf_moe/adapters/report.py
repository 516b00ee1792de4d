# SPDX-License-Identifier: Apache-2.0
"""`expert_lora_report`: what of a model with adapters will train and what will not, with ranks, scaling and backend."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel
from huggingface_hub.utils import tabulate
from peft import PeftConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import ExpertLoraError
from .grouped_forward import SLICES
from .inventory import (
    EXPERTS,
    LORA,
    NOT_ADAPTED,
    ROUTER,
    Target,
    inventory,
    is_expert_wrapper,
    is_of_adapter,
    site,
)
from .layers import find_experts, is_experts, layer_index, name_in_layer, number_ranges
from .param_wrapper import GroupedParamWrapper


WIDTH = 100  # of what is printed, in characters


@dataclass(frozen=True)
class ExpertLoraReport:
    """
    What of a model will train.

    Args:
        model (`str`): Class of the model.
        targets (`list[Target]`): Experts and routers, adapted or not, other modules that are adapted, and what is trained in
            full.
        frozen (`list[str]`): Linear maps and embeddings besides, which will not train.
        num_layers (`int`): Number of layers.
        num_parameters (`int`): Number of parameters of the model without adapters.
        warnings (`list[str]`): What may not have been meant, and what to do about it.
    """

    model: str
    targets: list[Target]
    frozen: list[str]
    num_layers: int
    num_parameters: int
    warnings: list[str]

    @property
    def num_trainable_parameters(self) -> int:
        """Number of parameters that will train."""
        return sum(target.num_parameters for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"num_trainable_parameters": self.num_trainable_parameters}

    def summary(self) -> str:
        """A table, and below it what else is frozen and what to look at."""
        share = self.num_trainable_parameters / max(self.num_parameters, 1)
        lines = [
            f"{self.model}: {self.num_trainable_parameters:,} parameters will train, {share:.2%} of {self.num_parameters:,}",
            "",
            _table(self.targets, self.num_layers),
        ]
        notes = [f"Frozen besides: {', '.join(self.frozen)}"] if self.frozen else []
        for note in [*notes, *(f"Warning: {warning}" for warning in self.warnings)]:
            lines += ["", textwrap.fill(note, WIDTH, break_long_words=False, break_on_hyphens=False)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def expert_lora_report(model: nn.Module) -> ExpertLoraReport:
    """
    What of a mixture of experts will train, with adapters or after [`apply_esft`]: which experts, routers and other modules, how.

    Args:
        model (`torch.nn.Module`): A model with adapters from PEFT or from transformers or with ESFT's experts, also compiled or
            inside DDP. Under FSDP2 every process has to make the call.

    Returns:
        [`ExpertLoraReport`], to print.

    Raises:
        ExpertLoraError: if the model has no experts, or neither adapters nor experts chosen by ESFT.

    Example:

    ```python
    >>> from hf_moe import expert_lora_report

    >>> print(expert_lora_report(model))
    ```
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not any(is_experts(module) for module in model.modules()) and not any(map(is_expert_wrapper, adapted)):
        find_experts(model)  # says what it found instead
    if not adapted and not any(hasattr(module, SLICES) for module in model.modules()):
        raise ExpertLoraError(
            f"{type(model).__name__} has no LoRA adapters, and no experts chosen with `apply_esft`. Add an adapter with "
            "`get_peft_model(model, ExpertLoraConfig(...).for_model(model))`, or load one with `PeftModel.from_pretrained`."
        )
    targets = inventory(model)
    layers = {layer_index(site(name)) for name, _ in model.named_modules()} - {None}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ExpertLoraReport(
        type(base).__name__,
        targets,
        _frozen(model, targets),
        len(layers),
        sum(parameter.numel() for name, parameter in model.named_parameters() if not is_of_adapter(name)),
        _warnings(getattr(model, "peft_config", {}), targets, adapted),
    )


def _frozen(model: nn.Module, targets: list[Target]) -> list[str]:
    named = {target.name for target in targets}
    names = {
        name_in_layer(site(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and not is_of_adapter(f"{name}.")
    }
    return sorted(name for name in names if not any(f"{other}.".startswith(f"{name}.") for other in named))


def _warnings(configs: dict[str, PeftConfig], targets: list[Target], adapted: list[LoraLayer]) -> list[str]:
    warnings = []
    experts = [target for target in targets if target.kind == EXPERTS]
    missing = [target for target in experts if target.training == NOT_ADAPTED]
    if missing and len(missing) == len(experts):
        warnings.append(
            "No expert is adapted, so most of the model stays as it is. Target the experts with an ExpertLoraConfig: names "
            "such as `gate_proj` and 'all-linear' miss experts that are stored as one parameter."
        )
    elif missing:
        left_out = "; ".join(f"{target.name} in {_layers(target)}" for target in missing)
        warnings.append(f"Experts without an adapter: {left_out}. `target_experts='all'` adapts all of them.")
    routers = sorted({target.name for target in targets if target.kind == ROUTER and LORA in target.training})
    if routers and not any(getattr(config, "train_router", False) for config in configs.values()):
        warnings.append(
            f"The routers ({', '.join(routers)}) have adapters. PEFT's 'all-linear' and `target_modules=['gate', ...]` do that on "
            "some models. If it was not meant, choose the targets with an ExpertLoraConfig, which leaves routers out."
        )
    slow = [layer for layer in adapted if is_expert_wrapper(layer) and not isinstance(layer, GroupedParamWrapper)]
    if slow:
        cannot = {type(layer.get_base_layer()).__name__ for layer in slow if not is_experts(layer.get_base_layer())}
        advice = (
            f"The class {', '.join(sorted(cannot))} leaves no other way."
            if cannot
            else "Call `enable_grouped_lora(model)`."
        )
        warnings.append(
            f"PEFT computes the experts' adapters, which builds the weights of all experts in every pass. {advice}"
        )
    active = sorted({target.adapter for target in targets if target.adapter and target.is_active})
    if len(active) > 1:
        warnings.append(f"Several adapters are active and add up: {', '.join(active)}. `set_adapter` chooses one.")
    if merged := sorted({name for layer in adapted for name in layer.merged_adapters}):
        warnings.append(f"Merged into the weights: {', '.join(merged)}. Call `unmerge_adapter()` before training.")
    if any(layer.disable_adapters for layer in adapted):
        warnings.append("Adapters are switched off. Leave `disable_adapter()`, or call `enable_adapters()`.")
    if not sum(target.num_parameters for target in targets):
        warnings.append(
            "Nothing will train. Load the adapter with `is_trainable=True`, or choose one with `set_adapter`."
        )
    return warnings


def _table(targets: list[Target], num_layers: int) -> str:
    rows = [_row(target, num_layers) for target in targets]
    if len({target.adapter for target in targets} - {None}) == 1:
        rows = [row | {"ADAPTER": ""} for row in rows]
    headers = [header for header in rows[0] if any(row[header] for row in rows)]
    table = tabulate(
        [[row[header] for header in headers] for row in rows],
        headers=headers,
        alignments=dict.fromkeys(["RANK", "SCALING", "DROPOUT", "PARAMETERS"], "right"),
    )
    return "\n".join(line.rstrip() for line in table.splitlines())


def _row(target: Target, num_layers: int) -> dict[str, str]:
    ranks = [rank for of_layer in target.ranks.values() for rank in of_layer if rank]
    return {
        "TARGET": target.name,
        "LAYERS": f"all {num_layers}" if len(target.layers) == num_layers else number_ranges(target.layers),
        "TRAINING": target.training,
        "EXPERTS": f"{_span(map(len, target.experts.values()))} of {target.num_experts}" if target.num_experts else "",
        "RANK": _span(ranks),
        "SCALING": _span(target.scaling),
        "DROPOUT": f"{target.dropout:g}" if target.dropout else "",
        "PARAMETERS": f"{target.num_parameters:,}",
        "BACKEND": target.backend or "",
        "ADAPTER": (target.adapter or "") + ("" if target.is_active else " (inactive)"),
    }


def _layers(target: Target) -> str:
    return f"layer{'s' if len(target.layers) > 1 else ''} {number_ranges(target.layers)}"


def _span(values: Iterable[float]) -> str:
    """`4`, or `1-4` if they differ."""
    values = list(values)
    return "-".join(dict.fromkeys(f"{value:g}" for value in (min(values), max(values)))) if values else ""
