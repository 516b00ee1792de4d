# SPDX-License-Identifier: Apache-2.0
"""
Classes of transformers that compute exactly what a dense model computes: one [`Target`] per pair of families that differ
in what has to be said of the dense model.

Whatever a class has no place for is named in the refusal. What it has besides the fields of the dense configuration is
written out, since the defaults of two classes often differ. Those of Granite are in `granite_targets.py`; `families.py`
says which family tries which targets.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    Cohere2MoeConfig,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    MellumConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from .layouts import PerExpertLayout
from .target import (
    RowsOf,
    SharedExpert,
    SparseLayers,
    Target,
    first_layers_dense,
    listed_by_type,
    listed_dense_layers,
    shared_expert_names,
)


QWEN_LAYOUT = PerExpertLayout("mlp", "gate_proj", "up_proj", "down_proj")


def head_dim(dense_config: Any) -> int:
    """The size of an attention head, which many configurations leave to be worked out."""
    return getattr(dense_config, "head_dim", None) or dense_config.hidden_size // dense_config.num_attention_heads


def window_refused(dense_config: Any) -> str | None:
    """A window as long as the longest text is none."""
    window = dense_config.sliding_window
    if window is None or window >= dense_config.max_position_embeddings:
        return None
    return f"it has no place for sliding_window={window}"


def _sliding_layers_refused(dense_config: Any) -> str | None:
    if "sliding_attention" not in dense_config.layer_types:
        return None
    return (
        f"it has no sliding window (sliding_window={dense_config.sliding_window}, layer_types has 'sliding_attention')"
    )


# --- Mixtral: no shared expert, all layers sparse ----------------------------------------------------------------------


def listed_layer_types_refused(dense_config: Any) -> str | None:
    """A Mistral with `layer_types` is a Ministral."""
    layer_types = getattr(dense_config, "layer_types", None)
    return None if not layer_types else f"layer_types={layer_types} (it has one attention type for all layers)"


MIXTRAL = Target(
    MixtralConfig,
    PerExpertLayout("block_sparse_moe", "w1", "w3", "w2"),
    "Mixtral",
    native=True,
    neutral={"attention_bias": False, "mlp_bias": False},
    ignored=("pretraining_tp",),
    refuses=listed_layer_types_refused,
    config_values=lambda dense_config: {"router_jitter_noise": 0.0},
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    normalizes=True,
)


def _split_fused(name: str, dense_config: Any) -> RowsOf:
    """Phi-3 keeps query, key and value in one tensor, and gate and up in another."""
    module, projection, kind = name.rsplit(".", 2) if name.endswith("_proj.weight") else (name, "", "")
    query = dense_config.num_attention_heads * head_dim(dense_config)
    key = query + dense_config.num_key_value_heads * head_dim(dense_config)
    size = dense_config.intermediate_size
    rows = {
        "qkv_proj": {"q_proj": slice(0, query), "k_proj": slice(query, key), "v_proj": slice(key, None)},
        "gate_up_proj": {"gate_proj": slice(0, size), "up_proj": slice(size, None)},
    }.get(projection)
    if rows is None:
        return [(name, None)]
    return [(f"{module}.{part}.{kind}", taken) for part, taken in rows.items()]


def _longrope_restarts(dense_config: Any) -> str | None:
    if dense_config.rope_parameters["rope_type"] != "longrope":
        return None
    return (
        "generation that grows past original_max_position_embeddings keeps the keys rotated for short texts, where Phi-3 "
        "computes them anew"
    )


def _whole_heads_rotated(dense_config: Any) -> dict[str, Any]:
    rope = {name: value for name, value in dense_config.rope_parameters.items() if name != "partial_rotary_factor"}
    return {"rope_parameters": rope, "head_dim": head_dim(dense_config), "router_jitter_noise": 0.0}


def _partial_rotary_refused(dense_config: Any) -> str | None:
    factor = dense_config.rope_parameters.get("partial_rotary_factor", 1.0)
    return None if factor == 1.0 else f"it rotates whole heads (rope_parameters has partial_rotary_factor={factor})"


PHI3_NEUTRAL = {"resid_pdrop": 0.0}
PHI3_IGNORED = ("embd_pdrop", "original_max_position_embeddings")  # not used; said in `rope_parameters` too
MIXTRAL_OF_PHI3 = replace(
    MIXTRAL,
    neutral=PHI3_NEUTRAL,
    ignored=PHI3_IGNORED,
    refuses=_partial_rotary_refused,
    second_choice=_longrope_restarts,
    config_values=_whole_heads_rotated,
    rows_of=_split_fused,
)


# --- Qwen-MoE and what was built like it -------------------------------------------------------------------------------


def _mixed_layer_types_refused(dense_config: Any) -> str | None:
    if dense_config.sliding_window is None or set(dense_config.layer_types) == {"sliding_attention"}:
        return None
    return "layer_types mixes full and sliding attention (it has one attention type for all layers)"


def _one_rope_per_layer_type(dense_config: Any) -> dict[str, Any]:
    rope = dense_config.rope_parameters
    return {
        "rope_parameters": {name: copy.deepcopy(rope) for name in sorted(set(dense_config.layer_types))},
        "num_mtp_layers": 0,
    }


QWEN2_MOE = Target(
    Qwen2MoeConfig,
    QWEN_LAYOUT,
    "Qwen2Moe",
    native=True,
    extra_fields=("head_dim",),
    config_values=lambda dense_config: {"qkv_bias": True, "decoder_sparse_step": 1},
    dense_layers=listed_dense_layers,
    shared_expert=SharedExpert(
        shared_expert_names("mlp.shared_expert"),
        "shared_expert_intermediate_size",
        required=True,
        gate="mlp.shared_expert_gate",
    ),
)
QWEN3_MOE = Target(
    Qwen3MoeConfig,
    QWEN_LAYOUT,
    "Qwen3Moe",
    native=True,
    ignored=("max_window_layers", "layer_types"),  # `refuses` sees to it that all layers have one attention type
    extra_fields=("head_dim",),
    refuses=_mixed_layer_types_refused,
    config_values=lambda dense_config: {"decoder_sparse_step": 1},
    dense_layers=listed_dense_layers,
)
MELLUM = Target(
    MellumConfig,
    QWEN_LAYOUT,
    "Mellum",
    native=True,
    ignored=("use_sliding_window", "max_window_layers"),  # `layer_types` says what the two lead to
    config_values=_one_rope_per_layer_type,
    dense_layers=listed_by_type,
)
QWEN3_5_MOE = Target(
    Qwen3_5MoeTextConfig,
    QWEN_LAYOUT,
    "Qwen3_5Moe",
    native=True,
    heads={"Model": "TextModel"},
    ignored=("intermediate_size",),
    normalizes=True,
    shared_expert=QWEN2_MOE.shared_expert,
)
FLEX_OLMO = Target(
    FlexOlmoConfig,
    QWEN_LAYOUT,
    "FlexOlmo",
    native=True,
    extra_fields=("head_dim",),
    expert_size_field="intermediate_size",
)


# --- GLM-4-MoE: sigmoid router, shared experts, partial rotation -------------------------------------------------------


def _glm4_moe_values(dense_config: Any) -> dict[str, Any]:
    # One group and a factor of 1 leave of the sigmoid router: choose the highest scores, divide them by their sum.
    rope = {"partial_rotary_factor": 1.0, **dense_config.rope_parameters}
    return {
        "rope_parameters": rope,
        "head_dim": head_dim(dense_config),
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_mtp_layers": 0,
    }


def _no_correction(layer: str, dense_config: Any, num_experts: int) -> dict[str, torch.Tensor]:
    return {f"{layer}mlp.gate.e_score_correction_bias": torch.zeros(num_experts)}


GLM4_MOE = Target(
    Glm4MoeConfig,
    QWEN_LAYOUT,
    "Glm4Moe",
    native=True,
    extra_fields=("head_dim",),
    config_values=_glm4_moe_values,
    num_experts_field="n_routed_experts",
    dense_layers=first_layers_dense,
    router_type="sigmoid_topk",
    normalizes=True,
    shared_expert=SharedExpert(
        shared_expert_names("mlp.shared_experts"), "n_shared_experts", counted=True, required=True
    ),
    float32=("mlp.gate.e_score_correction_bias",),
    added=_no_correction,
)
QWEN_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
GLM4_MOE_OF_QWEN2 = replace(
    GLM4_MOE,
    ignored=QWEN_WINDOW,  # `refuses` sees to it that no layer has a window
    refuses=_sliding_layers_refused,
    config_values=lambda dense_config: {
        **_glm4_moe_values(dense_config),
        "attention_bias": True,
        "use_qk_norm": False,
    },
)
GLM4_MOE_OF_QWEN3 = replace(
    GLM4_MOE_OF_QWEN2,
    refuses=lambda dense_config: (
        "its output projection has no bias (attention_bias=True)"
        if dense_config.attention_bias
        else _sliding_layers_refused(dense_config)
    ),
    config_values=lambda dense_config: {**_glm4_moe_values(dense_config), "use_qk_norm": True},
)
GLM4_MOE_OF_PHI3 = replace(
    GLM4_MOE,
    neutral=PHI3_NEUTRAL,
    ignored=(*PHI3_IGNORED, "sliding_window"),  # `refuses` looks at it
    refuses=window_refused,
    second_choice=_longrope_restarts,
    config_values=lambda dense_config: {
        **_glm4_moe_values(dense_config),
        "attention_bias": False,
        "use_qk_norm": False,
    },
    rows_of=_split_fused,
)


# --- Cohere, HunYuan, Ernie -----------------------------------------------------------------------------------------------


def _cohere2_moe_values(dense_config: Any) -> dict[str, Any]:
    return {
        "rope_parameters": dense_config.rope_parameters,
        "rope_theta": dense_config.rope_parameters["rope_theta"],
        "rms_norm_eps": None,  # a LayerNorm
        "expert_selection_fn": "softmax",
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "sum",
        "prefix_dense_intermediate_size": dense_config.intermediate_size,
        # Of 1 it would rotate the dense layers, windowed or not; nothing else reads it where `layer_types` is given.
        "prefix_dense_sliding_window_pattern": 4,
    }


COHERE2_MOE = Target(
    Cohere2MoeConfig,
    QWEN_LAYOUT,
    "Cohere2Moe",
    native=True,
    ignored=("rope_parameters",),  # it takes them, though it does not declare them
    extra_fields=("head_dim",),
    config_values=_cohere2_moe_values,
    expert_size_field="intermediate_size",
    dense_layers=listed_by_type,
    normalizes=True,
    shared_expert=SharedExpert(shared_expert_names("mlp.shared_experts"), "num_shared_experts", counted=True),
)
HUNYUAN_V1_MOE = Target(
    HunYuanMoEV1Config,
    PerExpertLayout("mlp", "gate_proj", "up_proj", "down_proj", router="gate.wg.weight"),
    "HunYuanMoEV1",
    native=True,
    expert_size_field="intermediate_size",
    normalizes=True,
    shared_expert=SharedExpert(shared_expert_names("mlp.shared_mlp"), None, required=True),
    float32=("mlp.gate.wg.weight",),
)


def _sparse_range(sparse: SparseLayers) -> dict[str, Any] | None:
    """The first and the last layers can be dense."""
    first, last = list(sparse).index(True), len(sparse) - 1 - list(reversed(sparse)).index(True)
    values = {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}
    return values if all(sparse[first : last + 1]) else None


def _no_statics(layer: str, dense_config: Any, num_experts: int) -> dict[str, torch.Tensor]:
    return {f"{layer}mlp.moe_statics.e_score_correction_bias": torch.zeros(1, num_experts)}


ERNIE4_5_MOE = Target(
    Ernie4_5_MoeConfig,
    QWEN_LAYOUT,
    "Ernie4_5_Moe",
    native=True,
    extra_fields=("head_dim",),
    config_values=lambda dense_config: {"moe_num_shared_experts": 0, "moe_norm_min": 1e-12},
    num_experts_field="moe_num_experts",
    dense_layers=_sparse_range,
    normalizes=True,
    shared_expert=SharedExpert(shared_expert_names("mlp.shared_experts"), "moe_num_shared_experts", counted=True),
    float32=("mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"),
    added=_no_statics,
)
