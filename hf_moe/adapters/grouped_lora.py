# SPDX-License-Identifier: Apache-2.0
"""`enable_grouped_lora` and `disable_grouped_lora`: PEFT's expert LoRA, computed on activations or its own way."""

from collections.abc import Iterator

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .errors import ExpertLoraError
from .layers import find_experts, is_experts, layer_index
from .param_wrapper import GroupedParamWrapper, use_implementation


FUSED_IMPLEMENTATIONS = ("sonicmoe", "deepgemm")


def enable_grouped_lora(model: nn.Module) -> nn.Module:
    """
    Compute the LoRA of experts on their activations, for all adapters that the model has and will have.

    Args:
        model (`torch.nn.Module`): A model with adapters from PEFT (`get_peft_model`, `PeftModel.from_pretrained`) or from
            transformers (`load_adapter`), or a module around it. It is changed and returned.

    Raises:
        ExpertLoraError: if no adapter is on experts, or if something else has changed how they are computed.

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
        wrapper.__class__ = GroupedParamWrapper
        wrapper.layer = layer_index(name)
        use_implementation(wrapper.get_base_layer())
    return model


def disable_grouped_lora(model: nn.Module) -> nn.Module:
    """Go back to PEFT's own computation; the model is changed and returned."""
    for _, wrapper in expert_wrappers(model):
        config = wrapper.get_base_layer().config
        if "_hf_moe_replaced_implementation" in config.__dict__:
            config._experts_implementation = config.__dict__.pop("_hf_moe_replaced_implementation")
        if any(isinstance(dropout, nn.Dropout) for dropout in wrapper.lora_dropout.values()):
            raise ExpertLoraError(
                "PEFT has no dropout for experts. Set `expert_dropout` to 0 to compute their LoRA its way."
            )
        wrapper.__dict__.pop("_factor_cache", None)
        wrapper.__class__ = ParamWrapper
    return model


def expert_wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """PEFT's wrappers around parameters of experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and is_experts(module.get_base_layer()):
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
