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
from .families import Target
from .methods import METHODS, FeedForward
from .recipe import UpcycleConfig
from .targets import (
    build_config,
    build_sparse_layer,
    choose_target,
    dense_class,
    find_family,
    find_head,
    find_sparse_layers,
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
        sparse_layers (`list[int]`): Indices of the converted layers.
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
    sparse_layers: list[int]
    target: Target
    config: PreTrainedConfig

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, without the configuration itself."""
        return {name: value for name, value in vars(self).items() if name not in ("target", "config")}


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
    find_family(dense_config)
    head = find_head(dense_config)
    hidden_size, intermediate_size = dense_config.hidden_size, dense_config.intermediate_size
    layer = build_sparse_layer(meta_feed_forward(hidden_size, intermediate_size), recipe, 0)
    target = choose_target(dense_config, recipe, layer)
    target_config = build_config(target, dense_config, recipe, layer)
    sparse_layers = find_sparse_layers(dense_config, recipe)

    dense_model = meta_model(dense_class(dense_config), dense_config)
    model = meta_model(target_class(target, head), target_config)
    num_parameters = model.num_parameters()
    expert_size = sum(tensor.numel() for tensor in layer.expert(0))
    idle = len(sparse_layers) * (recipe.num_experts - recipe.num_experts_per_tok) * expert_size
    inexact_because = METHODS[recipe.method].inexact_because(recipe)
    return UpcyclePlan(
        model_type=target_config.model_type,
        architecture=type(model).__name__,
        native=target.native,
        exact=inexact_because is None,
        inexact_because=inexact_because,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - idle,
        num_dense_parameters=dense_model.num_parameters(),
        bytes=num_parameters * (dense_config.dtype or torch.float32).itemsize,
        flops_per_token=_matrix_flops(model) - 2 * idle,
        dense_flops_per_token=_matrix_flops(dense_model),
        sparse_layers=sparse_layers,
        target=target,
        config=target_config,
    )


def meta_feed_forward(hidden_size: int, intermediate_size: int) -> FeedForward:
    """A feed-forward without values, to ask a method for shapes."""
    up = torch.empty(intermediate_size, hidden_size, device="meta")
    return FeedForward(up, up, up.T)


def meta_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values, to ask for names, shapes and counts."""
    with torch.device("meta"):
        return cls(config)


def _matrix_flops(model: PreTrainedModel) -> int:
    """Two operations per weight of every matrix that multiplies a token, each expert once."""
    matrices = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    embedding = model.get_input_embeddings().weight
    looked_up = [name for name, parameter in model.named_parameters() if parameter is embedding]
    output = model.get_output_embeddings()
    if output is None or output.weight is not embedding:
        for name in looked_up:
            del matrices[name]
    return 2 * sum(matrices.values())
