# SPDX-License-Identifier: Apache-2.0
"""
Turn dense Hugging Face checkpoints into mixtures of experts, and work with any mixture of experts in transformers.

`import hf_moe` registers the MoE classes (`MoeLlamaForCausalLM`, ...) with transformers' auto classes. Everything else
is imported when it is first used.
"""

import importlib

from .registration import register as _register
from .version import __version__


_MODEL_CLASSES = _register()
globals().update(_MODEL_CLASSES)

_LAZY = {
    "UpcycleConfig": "upcycling.recipe",
    "UpcyclePlan": "upcycling.plan",
    "UpcycleReport": "upcycling.report",
    "plan_upcycle": "upcycling.plan",
    "upcycle": "upcycling.upcycle",
    "upcycle_model": "upcycling.in_memory",
    "EditReport": "editing.edit",
    "collapse": "editing.collapse",
    "expand_experts": "editing.expand",
    "extract_domain": "editing.extract_domain",
    "extract_expert": "editing.expert_file",
    "insert_expert": "editing.expert_file",
    "merge_experts": "editing.merge",
    "prune_experts": "editing.prune",
    "ExpertLoraConfig": "adapters.config",
    "ExpertScores": "adapters.expert_scores",
    "ExpertSelection": "adapters.expert_scores",
    "apply_esft": "adapters.esft",
    "load_esft": "adapters.esft",
    "remove_esft": "adapters.esft",
    "save_esft": "adapters.esft",
    "score_experts": "adapters.expert_scores",
    "select_experts": "adapters.expert_scores",
    "check_adapter": "adapters.doctor",
    "disable_grouped_lora": "adapters.grouped_lora",
    "enable_grouped_lora": "adapters.grouped_lora",
    "expert_lora_report": "adapters.report",
    "metric_path": "metrics",
    "BiasBalancer": "training.bias_balancing",
    "BiasBalancingCallback": "training.callbacks",
    "ExpertCollapseCallback": "training.expert_collapse",
    "LoadBalancer": "training.load_balancing",
    "LoadBalancingCallback": "training.callbacks",
    "RouterFreezeCallback": "training.callbacks",
    "RouterReplay": "training.router_replay",
    "RouterReplayCallback": "training.router_replay",
    "RouterStatisticsCallback": "training.statistics_callback",
    "RoutingHistory": "training.history",
    "RoutingRecorder": "training.recorder",
    "RoutingStatistics": "training.statistics",
    "add_moe_callbacks": "training.add_callbacks",
    "add_routing_section": "hub.routing_section",
    "load_router_bias": "training.bias_balancing",
    "routing_page": "token_page",
    "set_zero3_leaf_modules": "training.zero3",
    "perplexity": "training.perplexity",
}

__all__ = ["__version__", *_MODEL_CLASSES, *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
