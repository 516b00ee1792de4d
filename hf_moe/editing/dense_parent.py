# SPDX-License-Identifier: Apache-2.0
"""Which dense model a mixture of experts goes back to: `find_parent` reads `hf_moe.json`, or the table of families."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from ..upcycling.errors import UpcycleError
from ..upcycling.families import FAMILIES, Family, Target
from ..upcycling.recipe import UpcycleConfig
from ..upcycling.targets import dense_class, layer_prefix, meta_model
from .moe_checkpoint import MoeCheckpoint


# Fields of mixtures of experts that have no counterpart in a dense model.
SPARSE_FIELDS = {
    "num_experts",
    "num_local_experts",
    "num_experts_per_layer",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_type",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "output_router_logits",
    "shared_expert_intermediate_size",
    "use_shared_expert_gate",
    "mlp_layer_types",
    "mlp_only_layers",
    "decoder_sparse_step",
}


@dataclass(frozen=True)
class DenseParent:
    """
    The dense model that a mixture of experts goes back to.

    Args:
        model_type (`str`), family (`Family`), target (`Target`): The entry of the table of families, and the class of the
            mixture of experts in it.
        recipe (`UpcycleConfig`, *optional*): How it was made; None if that is not known.
        edited (`bool`): Whether experts were added or removed since.
        config (`dict`): Fields of the dense configuration, its intermediate size aside.
    """

    model_type: str
    family: Family
    target: Target
    recipe: UpcycleConfig | None
    edited: bool
    config: dict[str, Any]

    def model(self, moe: MoeCheckpoint, intermediate_size: int) -> tuple[PreTrainedModel, PreTrainedConfig]:
        """
        The dense model without values, and its configuration.

        Raises:
            UpcycleError: if the class cannot have feed-forwards of this size.
        """
        config = _config(self.model_type, self.config)
        if hasattr(config, "intermediate_size"):
            config.intermediate_size = intermediate_size
        head = moe.model_class.__name__.removeprefix(self.target.prefix)
        config.architectures = [self.family.prefix + self.family.heads.get(head, head)]
        config.dtype = moe.config.dtype
        model = meta_model(dense_class(config), config)
        layers = layer_prefix(self.family, model)
        feed_forward = self.family.feed_forward.read(f"{layers}{next(iter(moe.blocks))}.", model.state_dict())
        if feed_forward.intermediate_size != intermediate_size:
            raise UpcycleError(
                f"The feed-forwards of the result have {intermediate_size} neurons, but those of {type(model).__name__} have "
                f"{feed_forward.intermediate_size}."
            )
        return model, config


def find_parent(moe: MoeCheckpoint) -> DenseParent:
    """
    The dense model that `moe` goes back to.

    Raises:
        UpcycleError: if no dense class is known that computes what `moe` computes besides its experts.
    """
    upcycled = [position for position, entry in enumerate(moe.history) if "recipe" in entry]
    origin = moe.history[upcycled[-1]] if upcycled else {}
    edited = bool(upcycled) and upcycled[-1] < len(moe.history) - 1
    stored, reasons = origin.get("parent", {}), []
    for model_type, family, target in _candidates(moe):
        if stored.get("model_type", model_type) != model_type:
            continue
        values = _values(moe, model_type, target, stored.get("config", {}))
        reason = None if stored else _refusal(moe, model_type, target, values)
        if reason is None:
            return DenseParent(model_type, family, target, _recipe(origin), edited, values)
        reasons.append(f"{family.prefix}: {reason}")
    if reasons:
        raise UpcycleError(f"No dense class can hold the result. {'; '.join(reasons)}.")
    known = sorted({target.config_class.model_type for family in FAMILIES.values() for target in _targets(family)})
    raise UpcycleError(
        f"No dense class is known for model_type {moe.config.model_type!r}. Mixtures of experts of these types can be "
        f"collapsed: {known}."
    )


def names_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """What `save_pretrained` calls the tensors of a dense model, by their names in memory."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [
        step.reverse_transform()
        for step in reversed(conversions)
        if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange)
    ]
    return {name: apply_renamings(name, renamings) for name in model.state_dict()}


def _targets(family: Family) -> tuple[Target, ...]:
    return (family.target, *family.native_targets)


def _candidates(moe: MoeCheckpoint) -> list[tuple[str, Family, Target]]:
    return [
        (model_type, family, target)
        for model_type, family in FAMILIES.items()
        for target in _targets(family)
        if target.config_class is type(moe.config)
    ]


def _values(moe: MoeCheckpoint, model_type: str, target: Target, stored: dict[str, Any]) -> dict[str, Any]:
    """The dense fields: as they were, with what has changed since, such as a larger vocabulary."""
    dense = _fields(type(AutoConfig.for_model(model_type))) | set(target.extra_fields)
    shared = dense & (_fields(target.config_class) | set(target.extra_fields)) - {target.expert_size_field}
    now = moe.config.to_dict()
    return {
        name: value
        for name, value in {**stored, **{name: now[name] for name in shared if name in now}}.items()
        if name not in ("model_type", "architectures", "transformers_version")
    }


def _refusal(moe: MoeCheckpoint, model_type: str, target: Target, values: dict[str, Any]) -> str | None:
    """Why the dense class cannot hold what the configuration says; None if it can."""
    config = _config(model_type, values)
    dense = _fields(type(config)) | set(target.extra_fields)
    for field in dataclasses.fields(moe.config):
        value = getattr(moe.config, field.name)
        if field.name not in dense | SPARSE_FIELDS and value != field.default:
            return f"it has no place for {field.name}={value!r}"
    return None if target.refuses is None else target.refuses(config)


def _config(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UpcycleError(f"The dense configuration cannot be restored: {error}") from error


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _recipe(origin: dict[str, Any]) -> UpcycleConfig | None:
    if not origin:
        return None
    try:
        return UpcycleConfig(**origin["recipe"])
    except (StrictDataclassError, TypeError) as error:
        raise UpcycleError(
            f"The recipe in hf_moe.json is not one of this version of hf_moe ({error}). It was written by version "
            f"{origin.get('hf_moe_version')}; use that, or delete hf_moe.json to collapse the model without it."
        ) from error
