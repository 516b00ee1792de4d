# SPDX-License-Identifier: Apache-2.0
"""
The exactness matrix as data: what each method promises under each normalisation of the router's weights.

`test_exactness.py` holds every family and data type against it; `tests/guide_tables.py` prints it into the guide.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """
    One row: a recipe, and the error that it promises.

    `error` is the root mean square of a block's error relative to its output, 0 if exact: from a formula where `because`
    gives one, else measured once. `is_exact_in_16_bits` says whether weights in 16 bits keep an error of 0.
    """

    name: str
    recipe: dict[str, Any]
    error: float
    because: str = ""
    is_exact_in_16_bits: bool = True
    gated_only: bool = False

    @property
    def normalised(self) -> bool:
        return self.recipe.get("norm_topk_prob", True)


def _drop(ratio: float, index_sets: str) -> Case:
    replaced = ratio if index_sets == "shared" else 1 - (1 - ratio) ** 3
    recipe = {"method": "drop", "reinit_ratio": ratio, "index_sets": index_sets, "num_experts_per_tok": 1}
    return Case(
        f"`drop`, {ratio:g} of the neurons, {index_sets} index sets",
        recipe,
        math.sqrt(2 * replaced),
        "√(2p), p the share of neurons not intact",
        gated_only=index_sets == "independent",
    )


def _megatron(granularity: int, error: float) -> Case:
    recipe = {"method": "granular", "granularity": granularity, "scale_on": "megatron"}
    recipe |= {"num_experts": 2 * granularity, "num_experts_per_tok": granularity}
    return Case(
        f"`granular`, G = {granularity}, `scale_on: megatron`",
        recipe,
        error,
        "the activation is not homogeneous",
        gated_only=True,
    )


def _split(num_experts: int, top_k: int) -> Case:
    recipe = {"method": "split", "num_experts": num_experts, "num_experts_per_tok": top_k, "router_init": "zero"}
    return Case(
        f"`split`, E = {num_experts}, K = {top_k}, router of zeros",
        recipe,
        math.sqrt(1 - top_k / num_experts),
        "√(1 - K / E), the share of neurons left out",
    )


# The routers whose weights sum to 1, and the family whose native class has them in the test: all rows hold for each.
ROUTERS = {
    "softmax over all experts, divided by the sum of the chosen": ("llama", "Mixtral"),
    "softmax over the logits of the chosen": ("granite", "GraniteMoe"),
    "sigmoid, divided by the sum of the chosen": ("phi3", "Glm4Moe"),
}
UNNORMALISED = {"norm_topk_prob": False, "target": "hf_moe"}
CASES = [
    Case("`copy`, any router", {"method": "copy"}, 0.0),
    Case("`copy`, router of zeros", {"method": "copy", "router_init": "zero"}, 0.0),
    Case("`copy`, router of zeros", {"method": "copy", "router_init": "zero", **UNNORMALISED}, 0.0),
    Case(
        "`copy`, logits of std 0.1",
        {"method": "copy", "router_logit_std": 0.1, **UNNORMALISED},
        0.12,
        "the K weights sum to more than K / E",
    ),
    Case(
        "`copy`, logits of std 1.28",
        {"method": "copy", "router_logit_std": 1.28, **UNNORMALISED},
        1.5,
        "the K weights sum to 2.5 K / E",
    ),
    Case("`residual`, any router", {"method": "residual"}, 0.0),
    Case("`residual`, any router", {"method": "residual", **UNNORMALISED}, 0.0),
    Case(
        "`residual`, G = 4, with noise",
        {"method": "residual", "granularity": 4, "expert_noise": 0.1},
        0.0,
    ),
    Case(
        "`granular`, G = 4, K = 4",
        {"method": "granular", "granularity": 4, "num_experts_per_tok": 4},
        0.0,
    ),
    Case(
        "`granular`, G = 4, K = 8",
        {"method": "granular", "granularity": 4, "num_experts": 16, "num_experts_per_tok": 8},
        0.0,
    ),
    Case(
        "`granular`, G = 2, `scale_on: down`",
        {"method": "granular", "granularity": 2, "scale_on": "down"},
        0.0,
    ),
    Case(
        "`granular`, G = 3 (no power of two)",
        {"method": "granular", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 3},
        0.0,
        "in 16 bits the scaled weights are rounded",
        is_exact_in_16_bits=False,
    ),
    Case(
        "`granular`, G = 2",
        {"method": "granular", "granularity": 2, **UNNORMALISED},
        1.3,
        "the K weights sum to more than K / E; measured",
    ),
    Case(
        "`granular`, G = 2, logits of std 0.1",
        {"method": "granular", "granularity": 2, "router_logit_std": 0.1, **UNNORMALISED},
        0.13,
        "the K weights sum to more than K / E; measured",
    ),
    *(_megatron(granularity, error) for granularity, error in ((2, 0.07), (4, 0.14), (8, 0.21), (16, 0.28))),
    *(_drop(ratio, "shared") for ratio in (0.1, 0.25, 0.5, 0.75)),
    *(_drop(ratio, "independent") for ratio in (0.1, 0.25, 0.5)),
    Case("`qwen`, G = 2", {"method": "qwen", "granularity": 2}, 1.07, "half of the weights are drawn anew; measured"),
    Case("`qwen`, G = 2, all drawn anew", {"method": "qwen", "granularity": 2, "reinit_ratio": 1.0}, 1.13, "measured"),
    *(_split(num_experts, top_k) for num_experts, top_k in ((8, 2), (4, 1), (4, 2), (4, 3))),
    Case(
        "`split`, K = E, router of zeros",
        {"method": "split", "num_experts": 4, "num_experts_per_tok": 4, "router_init": "zero"},
        0.0,
    ),
    Case(
        "`split`, K = E, router of zeros",
        {"method": "split", "num_experts": 4, "num_experts_per_tok": 4, "router_init": "zero", **UNNORMALISED},
        0.0,
    ),
    Case(
        "`copy`, E = 6, K = 2, router of zeros",
        {"method": "copy", "num_experts": 6, "router_init": "zero", **UNNORMALISED},
        0.0,
        "in 16 bits the scaled weights are rounded",
        is_exact_in_16_bits=False,
    ),
    Case(
        "`drop`, none of the neurons, logits of std 0.1",
        {"method": "drop", "reinit_ratio": 0.0, "router_logit_std": 0.1, **UNNORMALISED},
        0.12,
        "as `copy`",
    ),
    Case(
        "`drop`, none of the neurons, router of zeros",
        {"method": "drop", "reinit_ratio": 0.0, "router_init": "zero", **UNNORMALISED},
        0.0,
    ),
    Case(
        "`copy`, `expert_noise: 0.01`",
        {"method": "copy", "expert_noise": 0.01, "num_experts_per_tok": 1},
        0.01 * math.sqrt(3),
        "the noise times √3: every matrix adds its own",
        gated_only=True,
    ),
]


def render() -> str:
    """The matrix as a table in Markdown."""
    lines = [
        "| method | weights sum to 1 | error, weights in float32 | weights in bfloat16 | why |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        promised = f"{case.error:.2g}" if case.error else "exact"
        rounded = promised if case.is_exact_in_16_bits else "below 0.01"
        norm = "yes" if case.normalised else "no"
        lines.append(f"| {case.name} | {norm} | {promised} | {rounded} | {case.because} |")
    routers = "; ".join(f"{router} (`{prefix}`)" for router, (_, prefix) in ROUTERS.items())
    return "\n".join([*lines, "", f"Weights that sum to 1 are held with three routers: {routers}."])
