# SPDX-License-Identifier: Apache-2.0
"""
Granite's mixtures of experts, which hold Granite, and with neutral multipliers what Mixtral has no place for: biases in the
attention, a shared expert, layers without rotation.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import GraniteMoeConfig, GraniteMoeSharedConfig, GraniteMoeSWAConfig

from .feed_forward import FeedForwardNames
from .layouts import FusedLayout
from .native_targets import head_dim, listed_layer_types_refused, window_refused
from .target import SharedExpert, Target


NO_SINK = -1e4  # exp(NO_SINK) is 0 in every data type, and float16 can hold it


def _plain_multipliers(dense_config: Any) -> dict[str, float]:
    """What Granite's multipliers are in a model without them."""
    return {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": head_dim(dense_config) ** -0.5,
    }


GRANITE_MOE = Target(
    GraniteMoeConfig,
    FusedLayout("block_sparse_moe", "input_linear.weight", "output_linear.weight", "router.layer.weight"),
    "GraniteMoe",
    block="block_sparse_moe",
    native=True,
    neutral={"mlp_bias": False},
    extra_fields=("head_dim",),
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    normalizes=True,
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    config_class=GraniteMoeSharedConfig,
    prefix="GraniteMoeShared",
    shared_expert=SharedExpert(
        FeedForwardNames(up="shared_mlp.input_linear", down="shared_mlp.output_linear", fused=True),
        "shared_intermediate_size",
    ),
)
GRANITE_MOE_OF_LLAMA = replace(GRANITE_MOE, ignored=("pretraining_tp",), config_values=_plain_multipliers)
GRANITE_MOE_SHARED_OF_LLAMA = replace(
    GRANITE_MOE_SHARED, ignored=("pretraining_tp",), config_values=_plain_multipliers
)
GRANITE_MOE_SHARED_OF_MISTRAL = replace(
    GRANITE_MOE_SHARED,
    ignored=("sliding_window",),  # `refuses` looks at it
    refuses=lambda dense_config: listed_layer_types_refused(dense_config) or window_refused(dense_config),
    config_values=_plain_multipliers,
)


def _granite_swa_values(dense_config: Any) -> dict[str, Any]:
    theta = dense_config.rope_parameters["rope_theta"]
    return {
        **_plain_multipliers(dense_config),
        "layer_rope_theta": [theta if rotated else 0 for rotated in dense_config.no_rope_layers],
        # The class makes a mask for sliding layers even where it has none.
        "sliding_window": dense_config.sliding_window or dense_config.max_position_embeddings,
    }


def _no_sinks(layer: str, dense_config: Any, num_experts: int) -> dict[str, torch.Tensor]:
    return {f"{layer}self_attn.sinks": torch.full((dense_config.num_attention_heads,), NO_SINK)}


GRANITE_MOE_SWA_OF_SMOLLM3 = replace(
    GRANITE_MOE_SHARED,
    config_class=GraniteMoeSWAConfig,
    layout=FusedLayout("block_sparse_moe", router="router.weight"),
    prefix="GraniteMoeSWA",
    ignored=("no_rope_layers", "no_rope_layer_interval", "use_sliding_window"),
    second_choice=lambda dense_config: "it cannot use SDPA attention",
    config_values=_granite_swa_values,
    added=_no_sinks,
)
