# SPDX-License-Identifier: Apache-2.0
"""Which dense model a mixture of experts goes back to: `find_parent` reads `hf_moe.json`, or the table of families."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from ..models.configuration_moe import MoeConfigMixin
from ..upcycling.errors import UpcycleError
from ..upcycling.families import FAMILIES, Family
from ..upcycling.recipe import UpcycleConfig
from ..upcycling.target import Target
from ..upcycling.targets import dense_class, layer_prefix, meta_model
from .moe_checkpoint import MoeCheckpoint


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
        config.architectures = [f"{self.family.prefix}{self._head(moe)}"]
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

    def _head(self, moe: MoeCheckpoint) -> str:
        """What the name of the dense class ends in."""
        ending = moe.model_class.__name__.removeprefix(self.target.prefix)
        ours = {theirs: head for head, theirs in self.target.heads.items()}.get(ending, ending)
        return self.family.heads.get(ours, ours)


def find_parent(moe: MoeCheckpoint) -> DenseParent:
    """
    The dense model that `moe` goes back to.

    Raises:
        UpcycleError: if no dense class is known that computes what `moe` computes besides its experts.
    """
    if getattr(moe.config, "use_localized_filtering", False):
        raise UpcycleError(
            "No dense class of transformers filters queries and keys, as `use_localized_filtering` does, so there is no dense "
            "model to go back to."
        )
    upcycled = [position for position, entry in enumerate(moe.history) if "recipe" in entry]
    origin = moe.history[upcycled[-1]] if upcycled else {}
    edited = bool(upcycled) and upcycled[-1] < len(moe.history) - 1
    stored, reasons = origin.get("parent", {}), {}
    for model_type, family, target in _candidates(moe):
        if stored.get("model_type", model_type) != model_type:
            continue
        try:
            values = _values(moe, model_type, target, stored.get("config"))
            if not stored:
                _check_fields(moe, model_type, target, values)
            return DenseParent(model_type, family, target, _recipe(origin), edited, values)
        except UpcycleError as error:
            reasons[family.prefix] = str(error)
    if reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UpcycleError(f"No dense class can hold the result. {listed}")
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
    return (*([family.target] if family.target is not None else []), *family.native_targets)


def _candidates(moe: MoeCheckpoint) -> list[tuple[str, Family, Target]]:
    return [
        (model_type, family, target)
        for model_type, family in FAMILIES.items()
        for target in _targets(family)
        if target.config_class is type(moe.config)
    ]


def _values(moe: MoeCheckpoint, model_type: str, target: Target, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The dense fields: as they were, with what has changed since, such as a larger vocabulary."""
    dense = _fields(type(AutoConfig.for_model(model_type))) | set(target.extra_fields)
    shared = dense & (_fields(target.config_class) | set(target.extra_fields)) - {target.expert_size_field}
    if stored is not None:
        # What the mixture of experts says in another way than the dense model.
        shared -= set(target.config_values(_config(model_type, stored)))
    now = moe.config.to_dict()
    values = {**(stored or {}), **{name: now[name] for name in shared if name in now}}
    return {
        name: value
        for name, value in values.items()
        if name not in ("model_type", "architectures", "transformers_version")
    }


def _check_fields(moe: MoeCheckpoint, model_type: str, target: Target, values: dict[str, Any]) -> None:
    """See to it that the dense class holds all that the configuration says, without `hf_moe.json` to vouch for it."""
    config = _config(model_type, values)
    if target.refuses is not None and (reason := target.refuses(config)) is not None:
        raise UpcycleError(reason)
    expected = target.config_values(config)
    dense = _fields(type(config)) | set(target.extra_fields)
    sparse = _fields(MoeConfigMixin) | {target.num_experts_field, target.expert_size_field}
    if target.dense_layers is not None:
        sparse |= set(target.dense_layers([True] * config.num_hidden_layers) or {})
    if target.shared_expert is not None:
        sparse.add(target.shared_expert.size_field or "")
    for field in dataclasses.fields(moe.config):
        value = getattr(moe.config, field.name)
        if field.name in expected:
            held = value == expected[field.name]
        else:
            held = field.name in dense | sparse or value == field.default
        if not held:
            raise UpcycleError(f"it has no place for {field.name}={value!r}")


def _config(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(
            model_type, **{name: value for name, value in values.items() if name != "model_type"}
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpcycleError(f"the dense configuration cannot be restored: {error}") from error


def _fields(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _recipe(origin: dict[str, Any]) -> UpcycleConfig | None:
    if not origin:
        return None
    try:
        return UpcycleConfig(**origin["recipe"])
    except (StrictDataclassError, TypeError) as error:
        raise UpcycleError(
            f"the recipe in hf_moe.json is not one of this version of hf_moe ({error}). It was written by version "
            f"{origin.get('hf_moe_version')}; use that, or delete hf_moe.json to collapse the model without it."
        ) from error
