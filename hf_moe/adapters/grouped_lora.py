# SPDX-License-Identifier: Apache-2.0
"""`enable_grouped_lora` and `disable_grouped_lora`: PEFT's expert LoRA, computed on activations or its own way."""

from collections.abc import Iterator

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .errors import ExpertLoraError
from .layers import check_weights, find_experts, is_experts, layer_index
from .param_wrapper import GroupedParamWrapper, check_adaptable, restore_implementation, use_implementation


def enable_grouped_lora(model: nn.Module) -> nn.Module:
    """
    Compute the LoRA of experts on their activations, for all adapters that the model has and will have.

    Args:
        model (`torch.nn.Module`): A model with adapters from PEFT (`get_peft_model`, `PeftModel.from_pretrained`) or from
            transformers (`load_adapter`), or a module around it, before or after DDP or FSDP2 (`fully_shard`). It is
            changed and returned.

    Raises:
        ExpertLoraError: if no adapter is on experts, if something else has changed how they are computed, if they are split
            over processes (expert parallelism), or if an adapter of theirs is an FSDP2 unit by itself already.

    Example:

    ```python
    >>> from hf_moe import enable_grouped_lora
    >>> from peft import PeftModel

    >>> model = enable_grouped_lora(PeftModel.from_pretrained(model, "user/expert-lora"))
    ```
    """
    wrappers = list(expert_wrappers(model))
    if not wrappers:
        find_experts(model)  # says so if there are no experts that could be adapted
        raise ExpertLoraError(
            "No adapter of this model is on the parameters of experts. Target them with an ExpertLoraConfig, or with "
            "`target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']`."
        )
    for name, wrapper in wrappers:
        _check(name, wrapper)
    for name, wrapper in wrappers:
        if type(wrapper) is ParamWrapper:
            wrapper.__class__ = GroupedParamWrapper
        wrapper.layer = layer_index(name)
        use_implementation(wrapper.get_base_layer())
    return model


def disable_grouped_lora(model: nn.Module) -> nn.Module:
    """
    Go back to PEFT's own computation.

    Args:
        model (`torch.nn.Module`): A model that was given to [`enable_grouped_lora`]. It is changed and returned.

    Raises:
        ExpertLoraError: if PEFT cannot compute its adapters, or if one was sharded by itself since then.
    """
    wrappers = list(expert_wrappers(model))
    for name, wrapper in wrappers:
        _check_class(name, wrapper)
        if any(isinstance(dropout, nn.Dropout) for dropout in wrapper.lora_dropout.values()):
            raise ExpertLoraError(
                f"{name} has dropout, which PEFT does not have for experts. Make the adapter with expert_dropout=0."
            )
    for _, wrapper in wrappers:
        restore_implementation(wrapper.get_base_layer())
        wrapper.__class__ = ParamWrapper
    return model


def expert_wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """PEFT's wrappers around parameters of experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and is_experts(module.get_base_layer()):
            yield name, module


def _check_class(name: str, wrapper: ParamWrapper) -> None:
    if type(wrapper) not in (ParamWrapper, GroupedParamWrapper):
        raise ExpertLoraError(
            f"{name} has been made a {type(wrapper).__name__}, which cannot be changed any more. Enable or disable grouped LoRA "
            "before adapters of experts are sharded by themselves."
        )


def _check(name: str, wrapper: ParamWrapper) -> None:
    if not isinstance(wrapper, GroupedParamWrapper):
        _check_class(name, wrapper)
    experts = wrapper.get_base_layer()
    check_adaptable(name, experts)
    check_weights(name, experts)
