# SPDX-License-Identifier: Apache-2.0
"""
What a conversion will give, from the configuration alone: `plan_upcycle` and `UpcyclePlan`.

The plan also is what the writer and the in-memory conversion follow, so that both make the same model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint import read_config
from .errors import UpcycleError
from .families import Family
from .feed_forward import FeedForward, LayerSizes
from .methods import METHODS, inexact_because
from .recipe import UpcycleConfig
from .target import Target
from .targets import (
    build_config,
    choose_target,
    dense_class,
    find_family,
    find_head,
    find_sparse_layers,
    layer_prefix,
    meta_model,
    target_class,
)


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """
    What a conversion will give.

    Args:
        model_type (`str`): Model type of the result.
        architecture (`str`): Its model class.
        native (`bool`): Whether that class belongs to transformers.
        exact (`bool`): Whether the result computes what the dense model computes.
        inexact_because (`str`, *optional*): Why not.
        num_parameters (`int`): Parameters of the result.
        num_active_parameters (`int`): Parameters that one token uses, embeddings included.
        num_dense_parameters (`int`): Parameters of the dense model.
        bytes (`int`): Bytes of the result's weights, in the data type of the dense configuration.
        flops_per_token (`int`): Floating-point operations of one token's forward pass in matrix products with weights:
            attention scores, which depend on the length of the context, are left out.
        dense_flops_per_token (`int`): The same for the dense model.
        experts_in_layer (`dict[int, int]`): Number of routed experts by the index of every converted layer.
        sizes (`LayerSizes`): Sizes of the experts.
        target (`Target`): Entry of the family table that was chosen.
        config (`PreTrainedConfig`): Configuration of the result.
    """

    model_type: str
    architecture: str
    native: bool
    exact: bool
    inexact_because: str | None
    num_parameters: int
    num_active_parameters: int
    num_dense_parameters: int
    bytes: int
    flops_per_token: int
    dense_flops_per_token: int
    experts_in_layer: dict[int, int]
    sizes: LayerSizes
    target: Target
    config: PreTrainedConfig

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the converted layers."""
        return list(self.experts_in_layer)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, without the configuration itself."""
        values = {name: value for name, value in vars(self).items() if name not in ("target", "config")}
        return {**values, "sizes": self.sizes._asdict(), "sparse_layers": self.sparse_layers}


def plan_upcycle(
    source: str | Path | PreTrainedConfig, config: UpcycleConfig | None = None, *, revision: str | None = None
) -> UpcyclePlan:
    """
    Say what [`upcycle`] would do; reads the configuration of the source and no weights.

    Args:
        source (`str`, `Path` or `PreTrainedConfig`): The dense model: a folder, a Hub id, or its configuration.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.

    Raises:
        UpcycleError: if the conversion cannot be done.
    """
    recipe = config or UpcycleConfig()
    dense_config = source if isinstance(source, PreTrainedConfig) else read_config(source, revision)
    family = find_family(dense_config)
    head = find_head(dense_config)
    dense_model = meta_model(dense_class(dense_config), dense_config)
    dense = _meta_feed_forward(dense_model, layer_prefix(family, dense_model), family)
    experts_in = find_sparse_layers(dense_config, recipe)
    sizes = _sizes(recipe, list(experts_in.values()), dense.intermediate_size)
    target = choose_target(dense_config, recipe, dense, sizes)
    target_config = build_config(target, dense_config, recipe, sizes)

    model = meta_model(target_class(target, head), target_config)
    num_parameters = model.num_parameters()
    idle_experts = sum(count - recipe.num_experts_per_tok for count in experts_in.values())
    expert = dense.take(slice(0, sizes.expert))
    idle = idle_experts * expert.numel
    idle_weights = idle_experts * sum(tensor.numel() for tensor in expert[:3] if tensor is not None)
    reason = inexact_because(recipe, dense_config.dtype or torch.float32, dense.is_gated)
    return UpcyclePlan(
        model_type=target_config.model_type,
        architecture=type(model).__name__,
        native=target.native,
        exact=reason is None,
        inexact_because=reason,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - idle,
        num_dense_parameters=dense_model.num_parameters(),
        bytes=num_parameters * (dense_config.dtype or torch.float32).itemsize,
        flops_per_token=_matrix_flops(model) - 2 * idle_weights,
        dense_flops_per_token=_matrix_flops(dense_model),
        experts_in_layer=experts_in,
        sizes=sizes,
        target=target,
        config=target_config,
    )


def _meta_feed_forward(model: PreTrainedModel, layers: str, family: Family) -> FeedForward:
    """The feed-forward of the first layer without values."""
    tensors = model.state_dict()
    return family.feed_forward.read(f"{layers}0.", tensors)


def _sizes(recipe: UpcycleConfig, expert_counts: list[int], intermediate_size: int) -> LayerSizes:
    """What the method makes of every layer; a model has one size of experts."""
    sizes = {METHODS[recipe.method].sizes(recipe, count, intermediate_size) for count in expert_counts}
    if len(sizes) > 1:
        raise UpcycleError(
            f"Method {recipe.method!r} makes experts of different sizes when the layers have different numbers of them "
            f"(num_experts={recipe.num_experts}). All experts of a model have one size: give one number."
        )
    return sizes.pop()


def _matrix_flops(model: PreTrainedModel) -> int:
    """Two operations per weight of every matrix that multiplies a token, each expert once."""
    output = model.get_output_embeddings()
    looked_up = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if output is not None:
        looked_up.discard(output.weight)
    return 2 * sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not name.endswith("bias") and parameter not in looked_up
    )
