# SPDX-License-Identifier: Apache-2.0
"""
Choosing the class of the result, and writing its configuration.

`choose_target` decides between the native classes and ours; `build_config` carries every field of the dense
configuration over, or refuses with the name of the one it cannot carry.
"""

import copy
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
from transformers.utils import logging

from .errors import UpcycleError
from .families import FAMILIES, Family
from .feed_forward import FeedForward, LayerSizes
from .recipe import UpcycleConfig, parse_layers
from .routing import router_fields
from .target import Target


logger = logging.get_logger(__name__)
# What the mixtures of transformers call their number of experts.
NUM_EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def find_family(config: PreTrainedConfig) -> Family:
    """
    The family of a dense configuration.

    Raises:
        UpcycleError: if the model is a mixture of experts already, is quantized, or is of a family that is not supported.
    """
    for field in NUM_EXPERTS_FIELDS:
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
    targets = family.target.config_class.auto_classes.values() if family.target else ("Model", "ForCausalLM")
    heads = {family.prefix + family.heads.get(head, head): head for head in targets}
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
    """
    The model class of the result.

    Raises:
        UpcycleError: if there is none for this head.
    """
    modeling = importlib.import_module(target.config_class.__module__.replace(".configuration_", ".modeling_"))
    name = target.prefix + target.heads.get(head, head)
    if not hasattr(modeling, name):
        raise UpcycleError(f"there is no class {name}")
    return getattr(modeling, name)


def choose_target(
    dense_config: PreTrainedConfig, recipe: UpcycleConfig, dense: FeedForward, sizes: LayerSizes
) -> Target:
    """
    The class that holds the result.

    Args:
        dense (`FeedForward`): The feed-forward of one layer; what it has and its shapes matter here.
        sizes (`LayerSizes`): What the method makes of it.

    Raises:
        UpcycleError: if no class that `recipe.target` allows represents the result exactly.
    """
    family = find_family(dense_config)
    if recipe.target == "hf_moe":
        if family.target is None:
            raise UpcycleError(
                f"hf_moe has no class of its own for model_type {dense_config.model_type!r} (target='hf_moe'). Use "
                "target='native' or target='auto'."
            )
        return family.target
    reasons = {}
    for target in family.native_targets:
        reason = _refusal(target, dense_config, recipe, dense, sizes)
        drawback = target.second_choice(dense_config) if reason is None and target.second_choice is not None else None
        if reason is None and (drawback is None or recipe.target == "native" or family.target is None):
            if drawback is not None:
                logger.warning_once(f"{target.prefix} represents the result exactly, but {drawback}.")
            return target
        reasons[target.prefix] = reason or drawback
    if recipe.target == "auto" and family.target is not None:
        return family.target
    advice = (
        "Use target='hf_moe' or target='auto'." if family.target else "Change what is named, or add a class to hf_moe."
    )
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    listed = listed or f"transformers has no mixture of experts that computes what {family.prefix} does"
    raise UpcycleError(f"No native class can hold the result. {listed}. {advice}")


def build_config(
    target: Target, dense_config: PreTrainedConfig, recipe: UpcycleConfig, sizes: LayerSizes
) -> PreTrainedConfig:
    """
    The configuration of the result: the dense one, field by field, and the fields of the sparse layers.

    Raises:
        UpcycleError: if the class of the result does not accept it.
    """
    experts_in = find_sparse_layers(dense_config, recipe)
    # A config.json may hold keys that its class does not declare and so ignores; the class of the result might not.
    read = {field.name for field in dataclasses.fields(dense_config)} | set(target.extra_fields)
    declared = {field.name for field in dataclasses.fields(target.config_class)} | set(target.extra_fields)
    values = {
        name: value
        for name, value in dense_config.to_dict().items()
        if name in read and name in declared and name not in ("architectures", "transformers_version")
    }
    values |= copy.deepcopy(target.config_values(dense_config))
    values |= {
        target.num_experts_field: max(experts_in.values()),
        target.expert_size_field: sizes.expert,
        "num_experts_per_tok": recipe.num_experts_per_tok,
    }
    if not target.native:
        values |= copy.deepcopy(router_fields(recipe))
    for name, value in (
        ("norm_topk_prob", recipe.norm_topk_prob),
        ("router_aux_loss_coef", float(recipe.router_aux_loss_coef)),
    ):
        if name in declared:
            values[name] = value
    sparse = [index in experts_in for index in range(dense_config.num_hidden_layers)]
    if target.dense_layers is not None:
        values |= target.dense_layers(sparse) or {}
    if len(set(experts_in.values())) > 1:
        values["num_experts_per_layer"] = [experts_in.get(index, 0) for index in range(len(sparse))]
    if target.shared_expert is not None:
        values |= target.shared_expert.config_values(sizes)
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
    if twice := sorted({index for index in layers if layers.count(index) > 1}):
        raise UpcycleError(f"`layers` must name each layer once, but {recipe.layers!r} names {twice} more often.")
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
    if sizes.shared_expert is not None:
        if target.shared_expert is None:
            return f"it has no shared expert, which method {recipe.method!r} needs"
        if (reason := target.shared_expert.refusal(sizes)) is not None:
            return reason
    if recipe.router_type not in (None, target.router_type):
        return f"its router is {target.router_type!r} (router_type={recipe.router_type!r} was asked for)"
    if recipe.router_options:
        return f"it has no router_options ({recipe.router_options} was asked for)"
    if not recipe.norm_topk_prob and target.normalizes:
        return "it always divides the weights of the chosen experts by their sum (norm_topk_prob=False was asked for)"
    sparse = [index in experts_in for index in range(dense_config.num_hidden_layers)]
    if not all(sparse) and (target.dense_layers is None or target.dense_layers(sparse) is None):
        return f"it cannot keep just these layers dense (`layers`={recipe.layers!r} was given)"
    try:
        target_class(target, find_head(dense_config))
        build_config(target, dense_config, recipe, sizes)
    except UpcycleError as error:
        return str(error)
    return None
