# SPDX-License-Identifier: Apache-2.0
"""
Choosing the class of the result, and writing its configuration.

`choose_target` decides between the native classes and ours; `build_config` carries every field of the dense
configuration over, or refuses with the name of the one it cannot carry.
"""

import dataclasses
import functools
import importlib
import json
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .errors import UpcycleError
from .families import FAMILIES, Family, Target
from .feed_forward import FeedForward, LayerSizes
from .recipe import UpcycleConfig, parse_layers


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
    text_config = config.get_text_config()
    if text_config is not config and text_config.model_type in FAMILIES:
        raise UpcycleError(
            f"The source (model_type {config.model_type!r}) understands more than text, and only its text model "
            f"({text_config.model_type!r}) can be upcycled. Put that into a model of its own, made with "
            "`config.text_config`, and save it first."
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
    """What the name of our model class ends in, e.g. `"ForCausalLM"`, from `config.architectures`."""
    family = FAMILIES[config.model_type]
    heads = {
        family.prefix + family.heads.get(head, head): head for head in family.target.config_class.auto_classes.values()
    }
    default = family.prefix + family.heads.get("ForCausalLM", "ForCausalLM")
    architectures = config.architectures or [default if default in heads else next(iter(heads))]
    if len(architectures) != 1 or architectures[0] not in heads:
        raise UpcycleError(f"architectures={architectures} cannot be upcycled; supported are {sorted(heads)}.")
    return heads[architectures[0]]


def dense_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of the dense model."""
    family, head = FAMILIES[config.model_type], find_head(config)
    return getattr(transformers, family.prefix + family.heads.get(head, head))


def meta_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values, to ask for names, shapes and counts; the same one whatever the data type."""
    classes: Any = (cls, type(config))
    values = {name: value for name, value in config.to_dict().items() if name != "dtype"}
    return _meta_model(classes, json.dumps(values, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _meta_model(classes: tuple[Any, Any], config: str) -> PreTrainedModel:
    model_class, config_class = classes
    with torch.device("meta"), no_init_weights():
        model = model_class(config_class.from_dict(json.loads(config)))
        model.tie_weights()
        return model


def layer_prefix(family: Family, model: PreTrainedModel) -> str:
    """What the names of the layers in a dense model start with, e.g. `"model.layers."`."""
    return f"{backbone_prefix(model)}{family.layers}."


def backbone_prefix(model: PreTrainedModel) -> str:
    """`"model."` or the like in front of the backbone's tensors; empty if the model is the backbone."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def target_class(target: Target, head: str) -> type[PreTrainedModel]:
    """The model class of the result."""
    modeling = importlib.import_module(target.config_class.__module__.replace(".configuration_", ".modeling_"))
    return getattr(modeling, target.prefix + head)


def choose_target(
    dense_config: PreTrainedConfig, recipe: UpcycleConfig, dense: FeedForward, sizes: LayerSizes
) -> Target:
    """
    The class that holds the result.

    Args:
        dense (`FeedForward`): The feed-forward of one layer; what it has and its shapes matter here.
        sizes (`LayerSizes`): What the method makes of it.

    Raises:
        UpcycleError: if `recipe.target` is `"native"` and no native class represents the result exactly.
    """
    family = find_family(dense_config)
    if recipe.target == "hf_moe":
        return family.target
    reasons = []
    for target in family.native_targets:
        reason = _refusal(target, dense_config, recipe, dense, sizes)
        if reason is None:
            try:
                build_config(target, dense_config, recipe, sizes)
                return target
            except UpcycleError as error:
                reason = str(error)
        reasons.append(f"{target.prefix}: {reason}")
    if recipe.target == "native":
        reasons = reasons or [f"transformers has no mixture of experts that computes what {family.prefix} does"]
        raise UpcycleError(
            f"No native class can hold the result. {'; '.join(reasons)}. Use target='hf_moe' or target='auto'."
        )
    return family.target


def build_config(
    target: Target, dense_config: PreTrainedConfig, recipe: UpcycleConfig, sizes: LayerSizes
) -> PreTrainedConfig:
    """
    The configuration of the result: the dense one, field by field, and the fields of the sparse layers.

    Raises:
        UpcycleError: if the class of the result does not accept it.
    """
    experts_in = find_sparse_layers(dense_config, recipe)
    num_layers = dense_config.num_hidden_layers
    # A config.json may hold keys that its class does not declare and so ignores; the class of the result might not.
    read = {field.name for field in dataclasses.fields(dense_config)} | set(target.extra_fields)
    declared = {field.name for field in dataclasses.fields(target.config_class)} | set(target.extra_fields)
    values = {
        name: value
        for name, value in dense_config.to_dict().items()
        if name in read and name in declared and name not in ("architectures", "transformers_version")
    }
    values.update(
        {
            target.num_experts_field: max(experts_in.values()),
            target.expert_size_field: sizes.expert,
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "router_aux_loss_coef": float(recipe.router_aux_loss_coef),
        }
    )
    if not target.native:
        values["norm_topk_prob"] = recipe.norm_topk_prob
        values["shared_expert_intermediate_size"] = sizes.shared_expert
        values["mlp_layer_types"] = ["sparse" if index in experts_in else "dense" for index in range(num_layers)]
        if len(set(experts_in.values())) > 1:
            values["num_experts_per_layer"] = [experts_in.get(index, 0) for index in range(num_layers)]
    elif target.dense_layers:
        values["norm_topk_prob"] = recipe.norm_topk_prob
        values["mlp_only_layers"] = [index for index in range(num_layers) if index not in experts_in]
    if target.shared_expert == "gated":
        values["shared_expert_intermediate_size"] = min(INERT_SHARED_EXPERT_SIZE, sizes.expert)
    try:
        return target.config_class(**values)
    except StrictDataclassError as error:
        raise UpcycleError(f"{target.config_class.__name__} cannot hold the result: {error}") from error


def find_sparse_layers(dense_config: PreTrainedConfig, recipe: UpcycleConfig) -> dict[int, int]:
    """The number of routed experts of every layer to convert, by the layer's index in ascending order."""
    count = dense_config.num_hidden_layers
    if isinstance(recipe.layers, str):
        layers = parse_layers(recipe.layers, count)
    else:
        layers = list(range(count)) if recipe.layers is None else sorted(recipe.layers)
    if not layers:
        raise UpcycleError(f"`layers`={recipe.layers!r} names none of the model's layers 0 to {count - 1}.")
    if outside := [index for index in layers if not 0 <= index < count]:
        raise UpcycleError(f"`layers` names {outside}, but the model has layers 0 to {count - 1}.")
    if not isinstance(recipe.num_experts, list):
        return dict.fromkeys(layers, recipe.expert_counts[0])
    if len(recipe.num_experts) != len(layers):
        raise UpcycleError(
            f"`num_experts` must have one number per converted layer ({len(layers)}), got {len(recipe.num_experts)}."
        )
    return dict(zip(layers, recipe.num_experts, strict=True))


def _refusal(
    target: Target, dense_config: Any, recipe: UpcycleConfig, dense: FeedForward, sizes: LayerSizes
) -> str | None:
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
    if dense.down_bias is not None and not target.biased_experts:
        return "its experts have no biases, which the feed-forward has"
    experts_in = find_sparse_layers(dense_config, recipe)
    if len(set(experts_in.values())) > 1 and not target.mixed_layers:
        return f"all its layers have one number of experts (num_experts={recipe.num_experts} was asked for)"
    if sizes.shared_expert is not None and target.shared_expert == "none":
        return f"it has no shared expert, which method {recipe.method!r} needs"
    if sizes.shared_expert is not None and target.shared_expert == "gated":
        return (
            f"its shared expert is scaled by a sigmoid gate, so method {recipe.method!r} would need a gate of exactly "
            "zero, which other runtimes turn into NaN"
        )
    if not recipe.norm_topk_prob and not target.dense_layers:
        return "it always divides the weights of the chosen experts by their sum (norm_topk_prob=False was asked for)"
    if not target.dense_layers and len(experts_in) != dense_config.num_hidden_layers:
        return "it cannot keep some layers dense (`layers` was given)"
    return None
