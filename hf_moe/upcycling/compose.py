# SPDX-License-Identifier: Apache-2.0
"""
Experts from several checkpoints, without their weights: the method `"compose"`, how a recipe names the checkpoints, and
which of them fit together.

[`hf_moe.upcycling.parents`] opens them and makes the tensors that are not experts.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from .checkpoint import read_config
from .errors import UpcycleError
from .families import FAMILIES
from .feed_forward import FeedForward, LayerContext, SparseLayer
from .methods import upcycling_method


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


BASE = "base"
# What has no part in what a dense model computes for given tokens, or only through another field that is compared.
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict", "use_cache"),
    *("chunk_size_feed_forward", "pretraining_tp", "initializer_range", "problem_type", "id2label", "label2id"),
    *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_sliding_window", "max_window_layers"),
}


@upcycling_method(
    "compose",
    paper="https://huggingface.co/papers/2403.07816",
    cost="E times the parameters and K times the operations of the feed-forward",
    inexact_because=lambda recipe, dtype, is_gated: (
        "the experts differ: each of them alone can only compute what its own checkpoint does"
    ),
)
def compose(dense: FeedForward, context: LayerContext) -> SparseLayer:
    """
    Branch-Train-MiX: expert e is the feed-forward of the e-th checkpoint in `experts`.

    Attention, norms and embeddings are those of the base, or the mean over the checkpoints, after `compose_rest`. An
    expert alone computes what its checkpoint does where these are equal: where they were frozen when it was trained.
    """
    if context.composed is None:
        raise ValueError("Method 'compose' needs the checkpoints' feed-forwards in `LayerContext.composed`.")
    return SparseLayer(expert=context.composed)


def parse_expert(entry: str) -> tuple[str, str | None]:
    """Folder or Hub id, and revision, of an entry of `experts`: `"owner/name@revision"` has one."""
    name, at, revision = entry.rpartition("@")
    return (entry, None) if not at or Path(entry).is_dir() else (name, revision)


def read_expert_configs(recipe: "UpcycleConfig") -> dict[str, PreTrainedConfig]:
    """The configurations of the recipe's checkpoints by entry, the base left out; none if the recipe has no `experts`."""
    configs = {}
    for entry in dict.fromkeys(recipe.experts or []):
        if entry != BASE:
            source, revision = parse_expert(entry)
            folder = Path(source)
            if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                raise UpcycleError(
                    f"Expert {entry!r} is an adapter. Load it onto its model, call `merge_and_unload()`, save the result with "
                    "`save_pretrained`, and name that folder."
                )
            configs[entry] = read_config(source, revision)
    return configs


def check_experts(base: PreTrainedConfig, experts: Mapping[str, PreTrainedConfig]) -> None:
    """
    See to it that the checkpoints compute the same, given the same weights.

    Raises:
        UpcycleError: if one differs from the base in a field that has a part in what it computes.
    """
    for entry, config in experts.items():
        if config.model_type != base.model_type:
            raise _differs(entry, "model_type", config.model_type, base.model_type)
        if getattr(config, "quantization_config", None):
            raise UpcycleError(
                f"Expert {entry!r} is quantized (quantization_config). Give its full-precision weights."
            )
        if config.architectures and base.architectures and config.architectures != base.architectures:
            raise _differs(entry, "architectures", config.architectures, base.architectures)
        for field in _fields_with_effect(base):
            given, expected = getattr(config, field, None), getattr(base, field, None)
            if given != expected:
                raise _differs(entry, field, given, expected)


def composed_config(
    base: PreTrainedConfig, experts: Mapping[str, PreTrainedConfig], recipe: "UpcycleConfig"
) -> PreTrainedConfig:
    """The dense configuration of what is not an expert: the base's, with room for every token if it is a mean."""
    config = copy.deepcopy(base)
    if recipe.compose_rest == "mean" and hasattr(base, "vocab_size"):
        config.vocab_size = max(other.vocab_size for other in (base, *experts.values()))
    return config


def _fields_with_effect(config: PreTrainedConfig) -> list[str]:
    declared = [field.name for field in dataclasses.fields(config)]
    family = FAMILIES[config.model_type]
    targets = [family.target] if family.target is not None else family.native_targets
    fields = [*declared, *(field for target in targets for field in target.extra_fields)]
    without_effect = {field for field in fields if "drop" in field} | WITHOUT_EFFECT
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # some have one per type of layer
    if all(kind.get("rope_type") == "default" for kind in kinds):
        without_effect.add("max_position_embeddings")  # a promise; other kinds of rope compute with it
    return [field for field in dict.fromkeys(fields) if field not in without_effect]


def _differs(entry: str, field: str, given: object, expected: object) -> UpcycleError:
    return UpcycleError(
        f"Expert {entry!r} does not fit: its {field} is {given!r}, the base's is {expected!r}. Experts must be dense models "
        "of one architecture, such as fine-tunes of the base."
    )
