# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts of every layout in transformers, and hf_moe's own."""

from typing import Any

import transformers
from conftest import MLA, TINY, moe_model, randomize


DEEPSEEK = {
    **MLA,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
# Class, fields of the configuration, and what is special about the layout.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "norm_topk_prob": True}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8}),  # transposed, interleaved, biased
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
    "aria_text": (
        "AriaText",
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),  # transposed, as Llama 4
    "nemotron_h": (
        "NemotronH",  # without a gate
        {
            "layers_block_type": ["attention", "moe", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
        },
    ),
}
OURS = {"moe_llama": {}, "moe_llama biased": {"mlp_bias": True}, "moe_gpt2": {}}
ALL = [*LAYOUTS, *OURS]


def small_moe(kind: str, **values) -> transformers.PreTrainedModel:
    """A tiny model in which nothing is left at a default value."""
    if kind in OURS:
        return moe_model(kind.split()[0].removeprefix("moe_"), **{**OURS[kind], **values})
    prefix, fields = LAYOUTS[kind]
    fields = {**TINY, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0, **fields, **values}
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields))
    randomize(model)
    return model
