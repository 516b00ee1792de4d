# SPDX-License-Identifier: Apache-2.0
"""The checks of an adapter's configuration: what it says of dropout, the base model, ranks and the layout of the file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from .factors import Factors, Layout


OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "not run"
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.lora_")  # how transformers 4 named the experts of most models
EXAMPLES = 3  # so many names are given where there are more


@dataclass(frozen=True)
class Check:
    """
    The result of a check.

    Args:
        name (`str`): What was looked at.
        status (`str`): `"ok"`, `"warning"`, `"problem"` or `"not run"`.
        found (`str`): The result in a few words.
        details (`str`): Of warnings and problems, what it is and what to do.
    """

    name: str
    status: str
    found: str
    details: str = ""


def check_configuration(config: dict[str, Any]) -> Check:
    """What PEFT would refuse when it loads the adapter."""
    parameters = config.get("target_parameters") or []
    if parameters and config.get("lora_dropout"):
        return Check(
            "configuration",
            PROBLEM,
            f"lora_dropout {config['lora_dropout']} beside target_parameters",
            f"adapter_config.json has lora_dropout={config['lora_dropout']}, with which PEFT refuses to load an adapter of experts. "
            "Set it to 0.0 there: it only matters in training. To train on, use an ExpertLoraConfig, whose expert_dropout is free.",
        )
    version = config.get("peft_version")
    return Check(
        "configuration",
        OK,
        f"LoRA, r={config.get('r')}, lora_alpha={config.get('lora_alpha')}, "
        + (f"PEFT {version}" if version else "no peft_version"),
    )


def check_base(config: dict[str, Any], base: str, model_module: str) -> Check:
    """
    Whether the model is the one that the configuration names: another of the same sizes cannot be told from it.

    Args:
        config (`dict`): What `adapter_config.json` holds.
        base (`str`): Folder or Hub id of the model.
        model_module (`str`): The module of the model's class.
    """
    made_for = config.get("base_model_name_or_path")
    modeling = (config.get("auto_mapping") or {}).get("parent_library", "").split(".")[-1]
    if modeling.startswith("modeling_") and modeling != model_module.split(".")[-1]:
        name = config["auto_mapping"]["base_model_class"]
        return Check(
            "base model",
            # Attention may be the same where experts are not: that of a dense model and its mixture of experts.
            PROBLEM if config.get("target_parameters") else WARNING,
            f"made for a {name}",
            f"adapter_config.json says that the adapter was made for a {name}{f' ({made_for})' if made_for else ''}, and {base} is "
            f"of another architecture ({model_module.split('.')[-1]}). Give the model that it was made for.",
        )
    if not made_for:
        return Check("base model", OK, "adapter_config.json names none")
    if Path(made_for).name.lower() == Path(base).name.lower():
        return Check("base model", OK, made_for)
    return Check(
        "base model",
        WARNING,
        f"made for {made_for}",
        f"adapter_config.json says that the adapter was made for {made_for}, and it was compared with {base}. If that is another "
        "model of the same sizes, the adapter will load and be wrong.",
    )


def check_patterns(config: LoraConfig, factors: list[Factors]) -> Check:
    """Whether every rank and alpha of its own is that of a target."""
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    unused = [
        f"{field} {pattern!r}"
        for field, values in patterns.items()
        for pattern in values or {}
        if not any(get_pattern_key([pattern], one.name) == pattern for one in factors)
    ]
    if not unused:
        return Check("patterns", OK, "every rank_pattern and alpha_pattern is that of a target")
    return Check(
        "patterns",
        WARNING,
        f"{len(unused)} match no target",
        f"adapter_config.json has {some_of(unused)}, which match no target: PEFT takes `r` and `lora_alpha` instead. Correct or "
        "remove them.",
    )


def check_layout(layout: Layout | None, factors: list[Factors], names: Iterable[str]) -> Check:
    """Whether input and output are the right way round."""
    if layout is not None and layout.is_old:
        return Check(
            "layout",
            PROBLEM,
            "input and output of the experts are swapped",
            "The file is in the layout of PEFT 0.18 (before 0.19.1), which had input and output of experts the other way round: "
            f"today's PEFT refuses it or, where matrices are square, loads it transposed. That is known by {layout.because}. "
            "Convert it with `hf-moe doctor ADAPTER --base MODEL --fix OUTPUT`.",
        )
    if layout is not None:
        return Check("layout", OK, f"that of PEFT 0.19.1 and later, by {layout.because}")
    if any(SINGLE_EXPERT.search(name) for name in names):
        return Check("layout", OK, "single experts, as of transformers 4: PEFT joins them in loading")
    if any(one.num_experts > 1 for one in factors) or any(".experts." in name for name in names):
        return Check("layout", SKIPPED, "the factors of the experts have no place, or other sizes")
    return Check("layout", OK, "no experts are adapted")


def named(made_for: str | None) -> str:
    """Of which model the configuration says that it is for, to be added to a sentence."""
    return f" ({made_for}, says adapter_config.json)" if made_for else ""


def some_of(names: list[str]) -> str:
    """The first few names, and how many there are besides."""
    names = [name.removeprefix("base_model.model.") for name in names]
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
