# SPDX-License-Identifier: Apache-2.0
"""
Choosing the class of the result, and writing its configuration.

`choose_target` decides between the native classes and ours; `build_config` carries every field of the dense
configuration over, or refuses with the name of the one it cannot carry.
"""

import dataclasses
import importlib
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from .families import FAMILIES, Family, Target
from .methods import METHODS, FeedForward, SparseLayer
from .recipe import UpcycleConfig, UpcycleError


HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
# Width of the shared expert that Qwen2-MoE insists on, where the recipe has none: small, and a multiple of what
# quantizers and tensor parallelism divide by.
INERT_SHARED_EXPERT_SIZE = 128


def find_family(config: PreTrainedConfig) -> Family:
    """
    The family of a dense configuration.

    Raises:
        UpcycleError: if the model is a mixture of experts already, is quantized, or is of a family that is not supported.
    """
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, field, None):
            raise UpcycleError(
                f"The source is a mixture of experts already (model_type {config.model_type!r}, {field}="
                f"{getattr(config, field)}). Upcycling starts from a dense model."
            )
    if config.model_type not in FAMILIES:
        raise UpcycleError(
            f"model_type {config.model_type!r} cannot be upcycled yet. Supported are {sorted(FAMILIES)}; CONTRIBUTING.md "
            "shows how to add a family."
        )
    if getattr(config, "quantization_config", None):
        raise UpcycleError(
            "The source is quantized (quantization_config). Upcycle the full-precision model and quantize the result."
        )
    return FAMILIES[config.model_type]


def find_head(config: PreTrainedConfig) -> str:
    """`"ForCausalLM"` or another of `HEADS`, from `config.architectures`."""
    prefix = FAMILIES[config.model_type].prefix
    architectures = config.architectures or [f"{prefix}ForCausalLM"]
    head = architectures[0].removeprefix(prefix)
    if len(architectures) != 1 or head not in HEADS:
        raise UpcycleError(
            f"architectures={architectures} cannot be upcycled; supported are {[prefix + head for head in HEADS]}."
        )
    return head


def dense_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of the dense model."""
    return getattr(transformers, FAMILIES[config.model_type].prefix + find_head(config))


def target_class(target: Target, head: str) -> type[PreTrainedModel]:
    """The model class of the result."""
    modeling = importlib.import_module(target.config_class.__module__.replace(".configuration_", ".modeling_"))
    return getattr(modeling, target.prefix + head)


def choose_target(dense_config: PreTrainedConfig, recipe: UpcycleConfig, layer: SparseLayer) -> Target:
    """
    The class that holds the result.

    Args:
        layer (`SparseLayer`): What the method makes of one layer; its shapes and its shared expert matter here.

    Raises:
        UpcycleError: if `recipe.target` is `"native"` and no native class represents the result exactly.
    """
    family = find_family(dense_config)
    if recipe.target == "hf_moe":
        return family.target
    reasons = []
    for target in family.native_targets:
        reason = _refusal(target, dense_config, recipe, layer)
        if reason is None:
            try:
                build_config(target, dense_config, recipe, layer)
                return target
            except UpcycleError as error:
                reason = str(error)
        reasons.append(f"{target.prefix}: {reason}")
    if recipe.target == "native":
        raise UpcycleError(
            f"No native class can hold the result. {'; '.join(reasons)}. Use target='hf_moe' or target='auto'."
        )
    return family.target


def build_config(
    target: Target, dense_config: PreTrainedConfig, recipe: UpcycleConfig, layer: SparseLayer
) -> PreTrainedConfig:
    """
    The configuration of the result: the dense one, field by field, and the fields of the sparse layers.

    Raises:
        UpcycleError: if the class of the result does not accept it.
    """
    sparse_layers = find_sparse_layers(dense_config, recipe)
    # A config.json may hold keys that its class does not declare and so ignores; the class of the result might not.
    read = {field.name for field in dataclasses.fields(dense_config)} | set(target.extra_fields)
    declared = {field.name for field in dataclasses.fields(target.config_class)} | set(target.extra_fields)
    values = {
        name: value
        for name, value in dense_config.to_dict().items()
        if name in read and name in declared and name not in ("architectures", "transformers_version")
    }
    expert_size = layer.expert(0).gate_proj.shape[0]
    values.update(
        {
            target.num_experts_field: recipe.num_experts,
            target.expert_size_field: expert_size,
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "router_aux_loss_coef": float(recipe.router_aux_loss_coef),
        }
    )
    shared_expert_size = layer.shared_expert.gate_proj.shape[0] if layer.shared_expert else None
    if not target.native:
        values["norm_topk_prob"] = recipe.norm_topk_prob
        values["shared_expert_intermediate_size"] = shared_expert_size
        values["mlp_layer_types"] = [
            "sparse" if index in sparse_layers else "dense" for index in range(dense_config.num_hidden_layers)
        ]
    elif target.dense_layers:
        values["norm_topk_prob"] = recipe.norm_topk_prob
        values["mlp_only_layers"] = [i for i in range(dense_config.num_hidden_layers) if i not in sparse_layers]
    if target.shared_expert == "gated":
        values["shared_expert_intermediate_size"] = min(INERT_SHARED_EXPERT_SIZE, expert_size)
    try:
        return target.config_class(**values)
    except StrictDataclassError as error:
        raise UpcycleError(f"{target.config_class.__name__} cannot hold the result: {error}") from error


def build_sparse_layer(dense: FeedForward, recipe: UpcycleConfig, layer_index: int) -> SparseLayer:
    """What the recipe's method makes of one dense feed-forward."""
    return METHODS[recipe.method].build(dense, recipe, layer_index)


def find_sparse_layers(dense_config: PreTrainedConfig, recipe: UpcycleConfig) -> list[int]:
    """Indices of the layers to convert."""
    count = dense_config.num_hidden_layers
    layers = list(range(count)) if recipe.layers is None else sorted(recipe.layers)
    if outside := [index for index in layers if not 0 <= index < count]:
        raise UpcycleError(f"`layers` names {outside}, but the model has layers 0 to {count - 1}.")
    return layers


def _refusal(target: Target, dense_config: Any, recipe: UpcycleConfig, layer: SparseLayer) -> str | None:
    """Why a native class cannot hold the result exactly, None if it can."""
    declared = {field.name for field in dataclasses.fields(target.config_class)}
    for field in dataclasses.fields(dense_config):
        value = getattr(dense_config, field.name)
        if field.name in declared or field.name in target.extra_fields or field.name in target.ignored:
            continue
        if field.name not in target.neutral or value != target.neutral[field.name]:
            return f"it has no place for {field.name}={value!r}"
    if target.refuses is not None and (reason := target.refuses(dense_config)) is not None:
        return reason
    if layer.shared_expert is not None and target.shared_expert == "none":
        return f"it has no shared expert, which method {recipe.method!r} needs"
    if layer.shared_expert is not None and target.shared_expert == "gated":
        return (
            f"its shared expert is scaled by a sigmoid gate, so method {recipe.method!r} would need a gate of exactly "
            "zero, which other runtimes turn into NaN"
        )
    if not recipe.norm_topk_prob and not target.dense_layers:
        return "it always divides the weights of the chosen experts by their sum (norm_topk_prob=False was asked for)"
    if not target.dense_layers and len(find_sparse_layers(dense_config, recipe)) != dense_config.num_hidden_layers:
        return "it cannot keep some layers dense (`layers` was given)"
    return None
