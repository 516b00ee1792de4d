# SPDX-License-Identifier: Apache-2.0
"""
What other programs make of a native result: `misreadings` names those that load it and compute something else.

A program that refuses a file says so itself; one that leaves out what it does not know says nothing. The cases are those
that tests found with llama.cpp and vLLM on tiny models, see the table of native targets in `examples/guides/upcycling.md`,
and the classes for which these run the same code. There may be others.
"""

from transformers import PreTrainedConfig


NO_WINDOW = "ignores the sliding window"
NOT_NORMALISED = "does not divide the experts' weights by their sum"
NORMALISED = "divides the experts' weights by their sum"
NO_BIASES = "drops the attention's biases"
NO_LONGROPE = "ignores long-rope"
LONG_FACTORS_ONLY = "rotates short texts as long ones"
OTHER_TOKENS = "generates other tokens"


def misreadings(config: PreTrainedConfig) -> dict[str, list[str]]:
    """
    The programs that read a checkpoint of a native class and compute something else than transformers.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of a native class.

    Returns:
        `dict[str, list[str]]`: Per program, `"llama.cpp"` or `"vLLM"`, what it does otherwise; without those that are
        right or refuse the file.
    """
    model_type = config.model_type
    window = getattr(config, "sliding_window", None)
    has_window = window is not None and window < getattr(config, "max_position_embeddings", float("inf"))
    if (layer_types := getattr(config, "layer_types", None)) is not None:
        has_window = has_window and "sliding_attention" in layer_types
    has_longrope = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope"
    unnormalised = not getattr(config, "norm_topk_prob", True)
    cases = [
        ("llama.cpp", NORMALISED, model_type == "qwen3_moe" and unnormalised),
        ("llama.cpp", NOT_NORMALISED, model_type == "qwen2_moe" and not unnormalised),
        ("llama.cpp", NO_WINDOW, model_type in ("mixtral", "qwen2_moe", "qwen3_moe") and has_window),
        ("llama.cpp", NO_LONGROPE, model_type == "mixtral" and has_longrope),
        ("vLLM", NO_WINDOW, model_type == "qwen2_moe" and has_window),
        ("vLLM", NO_BIASES, model_type.startswith("granitemoe") and config.attention_bias),
        ("vLLM", LONG_FACTORS_ONLY, has_longrope),
        ("vLLM", OTHER_TOKENS, model_type == "cohere2_moe"),
    ]
    found: dict[str, list[str]] = {}
    for program, what, applies in cases:
        if applies:
            found.setdefault(program, []).append(what)
    return found
