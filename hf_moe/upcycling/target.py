# SPDX-License-Identifier: Apache-2.0
"""What a class that can hold the result is like: `Target`, `SharedExpert`, and how it says which layers stay dense."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from .feed_forward import FeedForwardNames, LayerSizes
from .layouts import FusedLayout, PerExpertLayout
from .routing import DEFAULT_ROUTER


# Width of a shared expert that the class insists on, where the recipe has none and the class lets it be of any size:
# small, and a multiple of what quantizers and tensor parallelism divide by.
INERT_SHARED_EXPERT_SIZE = 128


@dataclass(frozen=True)
class SharedExpert:
    """
    The shared expert of a class: a feed-forward that every token passes, whatever the router says.

    Args:
        names (`FeedForwardNames`): Where a layer keeps it, in memory and on disk.
        size_field (`str`, *optional*): Name of the configuration field that holds its size. None if it always is as large
            as a routed expert.
        counted (`bool`): Whether that field counts in routed experts, so that the size is a multiple of theirs.
        required (`bool`): Whether the class always has one.
        gate (`str`, *optional*): Name of the sigmoid gate in front of it, if there is one.
    """

    names: FeedForwardNames
    size_field: str | None
    counted: bool = False
    required: bool = False
    gate: str | None = None

    def size(self, sizes: LayerSizes) -> int | None:
        """The size it has; None if there is none. One that the recipe did not ask for will add nothing."""
        if sizes.shared_expert is not None or not self.required:
            return sizes.shared_expert
        if self.counted or self.size_field is None:
            return sizes.expert
        return min(INERT_SHARED_EXPERT_SIZE, sizes.expert)

    def config_values(self, sizes: LayerSizes) -> dict[str, int]:
        """What the configuration says of it."""
        size = self.size(sizes)
        if size is None or self.size_field is None:
            return {}
        return {self.size_field: size // sizes.expert if self.counted else size}

    def refusal(self, sizes: LayerSizes) -> str | None:
        """Why it cannot be the one that the recipe asks for; None if it can."""
        if sizes.shared_expert is None:
            return None
        if self.gate is not None:
            return (
                "its shared expert is scaled by a sigmoid gate, so a shared expert of the recipe would need a gate of "
                "exactly zero, which other runtimes turn into NaN"
            )
        if self.size_field is None and sizes.shared_expert != sizes.expert:
            return f"its shared expert is as large as a routed one, {sizes.expert}, and not {sizes.shared_expert}"
        if self.counted and sizes.shared_expert % sizes.expert:
            return (
                f"the size of its shared expert ({sizes.shared_expert}) must be a multiple of a routed one's "
                f"({sizes.expert})"
            )
        return None


def shared_expert_names(module: str) -> FeedForwardNames:
    """The feed-forward `module` of a layer, with the names that most classes give its matrices."""
    return FeedForwardNames(gate=f"{module}.gate_proj", up=f"{module}.up_proj", down=f"{module}.down_proj")


RowsOf = Sequence[tuple[str, slice | None]]  # names, and the rows that go there; None for all of them
SparseLayers = Sequence[bool]  # per layer, whether it is sparse


@dataclass(frozen=True)
class Target:
    """
    A class that can hold the result.

    Args:
        config_class (`type`): Its configuration.
        layout: Names and arrangement of a sparse layer's tensors on disk.
        prefix (`str`): What the names of its model classes start with, e.g. `"Mixtral"`.
        block (`str`): What a layer in memory calls its sparse block; on disk the layout says so.
        native (`bool`): Whether it belongs to transformers.
        heads (`dict[str, str]`): What the classes' names end in, where that is not what ours end in.
        neutral (`dict[str, Any]`): Dense fields for which the class has no place, with the value that changes nothing.
        ignored (`tuple[str, ...]`): Dense fields for which it has no place and needs none.
        extra_fields (`tuple[str, ...]`): Fields the class reads although its configuration does not declare them.
        refuses (`Callable`, *optional*): A further condition on the dense configuration; returns the reason or None.
        second_choice (`Callable`, *optional*): From the dense configuration to the reason why hf_moe's own class is to be
            preferred, although this one computes the same; None if it is not.
        config_values (`Callable`): From the dense configuration to the fields that it does not have or says otherwise.
        num_experts_field (`str`): Name of the field that holds the number of experts.
        expert_size_field (`str`): Name of the field that holds the intermediate size of one expert.
        dense_layers (`Callable`, *optional*): From which layers are sparse to the fields that say so, or None if the class
            cannot have exactly these. Without it all layers are sparse.
        router_type (`str`): What its router is, in the words of hf_moe's `ROUTERS`; ours can have any.
        normalizes (`bool`): Whether the weights of the chosen experts always sum to 1.
        shared_expert ([`SharedExpert`], *optional*): Its shared expert, if it can have one.
        mixed_layers (`bool`): Whether its layers can have different numbers of experts.
        biased_experts (`bool`): Whether its experts can have biases.
        rows_of (`Callable`): From the name of a dense tensor outside the feed-forward and the dense configuration to the
            tensors it becomes: their names and which of its rows they take.
        float32 (`tuple[str, ...]`): Tensors of a sparse layer, by their names on disk, that it keeps in float32.
        added (`Callable`, *optional*): From a layer's name with a dot at the end, the dense configuration and the number of
            experts to tensors of a sparse layer that the dense model has not, by their names on disk and in float32.
    """

    config_class: type[PreTrainedConfig]
    layout: FusedLayout | PerExpertLayout
    prefix: str
    block: str = "mlp"
    native: bool = False
    heads: Mapping[str, str] = field(default_factory=dict)
    neutral: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    extra_fields: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] | None = None
    second_choice: Callable[[Any], str | None] | None = None
    config_values: Callable[[Any], dict[str, Any]] = lambda dense_config: {}
    num_experts_field: str = "num_experts"
    expert_size_field: str = "moe_intermediate_size"
    dense_layers: Callable[[SparseLayers], dict[str, Any] | None] | None = None
    router_type: str = DEFAULT_ROUTER
    normalizes: bool = False
    shared_expert: SharedExpert | None = None
    mixed_layers: bool = False
    biased_experts: bool = False
    rows_of: Callable[[str, Any], RowsOf] = lambda name, dense_config: [(name, None)]
    float32: tuple[str, ...] = ()
    added: Callable[[str, Any, int], dict[str, torch.Tensor]] | None = None


def listed_by_type(sparse: SparseLayers) -> dict[str, Any]:
    """Any layers can be dense: `mlp_layer_types`."""
    return {"mlp_layer_types": ["sparse" if is_sparse else "dense" for is_sparse in sparse]}


def listed_dense_layers(sparse: SparseLayers) -> dict[str, Any]:
    """Any layers can be dense: `mlp_only_layers`."""
    return {"mlp_only_layers": [index for index, is_sparse in enumerate(sparse) if not is_sparse]}


def first_layers_dense(sparse: SparseLayers) -> dict[str, Any] | None:
    """The first layers can be dense: `first_k_dense_replace`."""
    first = list(sparse).index(True)
    return {"first_k_dense_replace": first} if all(sparse[first:]) else None
