# SPDX-License-Identifier: Apache-2.0
"""What `hf-moe bench routers` compares: our blocks, and those of transformers that route alike, on the same weights.

`make_cases` has a row for each router and option that a native block has too. The functions that make native blocks take our block, its
configuration and the modality of its tokens. A native block shares the storage of the weights where it keeps them in the same
layout, and copies them otherwise.

Dimension letters: T tokens, H hidden size, E experts, K experts per token.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from ..models.configuration_moe_llama import MoeLlamaConfig
from ..models.routers import ROUTERS
from ..models.routing_context import RoutingContext
from ..models.sparse_block import MoeSparseBlock
from .bench_routers import Size


TOLERANCE = 0.01  # by which two blocks may differ, as a part of the mean


Step = tuple[Callable[[torch.Tensor], list[torch.Tensor]], list[nn.Parameter]]


@dataclass
class Side:
    """
    A block, ours or a native one.

    Args:
        name (`str`): The model that it is of.
        block (`torch.nn.Module`): The block, or its router alone.
        route (`Callable`): From `(1, T, H)` hidden states to what the router returns.
        weights (`Callable`): From that to the tensors through which a gradient comes.
        dense (`Callable`): From that to the `(T, E)` routing weights.
        run (`Callable`, *optional*): From hidden states to the block's output; None if the block computes something else than ours.
    """

    name: str
    block: nn.Module
    route: Callable[[torch.Tensor], Any]
    weights: Callable[[Any], list[torch.Tensor]]
    dense: Callable[[Any], torch.Tensor]
    run: Callable[[torch.Tensor], torch.Tensor] | None

    def route_step(self) -> Step:
        """The router as something to measure."""
        return (lambda hidden: self.weights(self.route(hidden))), self._trained()

    def block_step(self) -> Step:
        """The block as something to measure."""
        run = self.run
        assert run is not None
        return (lambda hidden: [run(hidden)]), self._trained()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.block.parameters() if parameter.requires_grad]


def compare(ours: Side, native: Side, hidden: torch.Tensor) -> None:
    """Raise an error if the two do not compute the same, since their times would say nothing."""
    pairs = {"routing weights": [side.dense(side.route(hidden)) for side in (ours, native)]}
    if native.run is not None:
        outputs = [step(hidden)[0].view_as(hidden) for step, _ in (ours.block_step(), native.block_step())]
        pairs["outputs"] = outputs
        pairs["gradients"] = [torch.autograd.grad(output.float().square().sum(), hidden)[0] for output in outputs]
    for what, (one, other) in pairs.items():
        difference = ((one - other).abs().mean() / other.abs().mean()).item()
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"The {what} of our block and of {native.name}'s differ by {difference:.1%} in the mean."
            )


@torch.no_grad()
def computed_rows(side: Side, hidden: torch.Tensor) -> int | None:
    """How many pairs of a token and an expert the block computes."""
    if side.run is None:
        return None
    rows = []

    def count(experts: nn.Module, arguments: tuple) -> None:
        all_of_them = len(arguments) == 1  # Llama 4, which repeats the tokens for every expert
        rows.append(len(arguments[0]) if all_of_them else int((arguments[1] < len(experts.down_proj)).sum()))

    hooks = [
        module.register_forward_pre_hook(count)
        for module in side.block.modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]
    side.run(hidden)
    for hook in hooks:
        hook.remove()
    return sum(rows)


def dense_weights(weights_TK: torch.Tensor, index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`(T, E)`, of slots of which the empty ones have index E."""
    return weights_TK.new_zeros(len(index_TK), num_experts + 1).scatter_add(-1, index_TK, weights_TK)[:, :-1]


def hf_moe(config: Any, modality_T: torch.Tensor, input_ids_T: torch.Tensor, dtype: torch.dtype) -> Side:
    """Our block in training, with random weights that change the size of no input."""
    config._experts_implementation = "grouped_mm"
    with modality_T.device:
        block = MoeSparseBlock(config, config.num_experts)
    block.gate.init_weights(config.initializer_range)
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if block.gate.e_score_correction_bias is not None:
        nn.init.normal_(block.gate.e_score_correction_bias, std=0.01)

    def context() -> RoutingContext:
        return RoutingContext(input_ids=input_ids_T[None], mm_token_type_ids=modality_T[None])

    def route(hidden):
        block.routing = context() if block.needs else None
        return block.route(hidden)

    def run(hidden):
        block.routing = context() if block.needs else None
        return block(hidden)

    return Side(
        "hf_moe",
        block.train(),
        route,
        weights=lambda routed: [routed[0]],
        dense=lambda routed: dense_weights(routed[0], routed[1], block.gate.num_experts),
        run=run,
    )


def _build(name: str, config_name: str, values: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The class `name` of `transformers.models`, with a configuration of `values`, on `weights`."""
    module, class_name = name.split(".")
    block_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), class_name)
    config = getattr(transformers, config_name)(**values)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = block_class(config)
    block.load_state_dict(weights, assign=True)
    return block.train()


def _like_ours(name: str, block: nn.Module, num_experts: int) -> Side:
    """A peer whose router returns logits, weights and experts, and which has the same experts as we."""
    gate = block.router if hasattr(block, "router") else block.gate
    return Side(
        name,
        block,
        route=lambda hidden: gate(hidden.reshape(-1, hidden.shape[-1])),
        weights=lambda routed: [routed[1]],
        dense=lambda routed: dense_weights(routed[1], routed[2], num_experts),
        run=block,
    )


def _sizes(config: Any) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


def mixtral(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    values = _sizes(config) | {"num_local_experts": config.num_experts}
    values["intermediate_size"] = values.pop("moe_intermediate_size")
    block = _build("mixtral.MixtralSparseMoeBlock", "MixtralConfig", values, ours.state_dict())
    return _like_ours("Mixtral", block, config.num_experts)


def qwen3_moe(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    values = _sizes(config) | {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob}
    block = _build("qwen3_moe.Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", values, ours.state_dict())
    return _like_ours("Qwen3-MoE", block, config.num_experts)


def _deepseek(name: str, block_name: str, ours: MoeSparseBlock, config: Any, **values) -> Side:
    values |= _sizes(config) | {"n_routed_experts": config.num_experts, "n_shared_experts": 1}
    values |= {field: getattr(config, field) for field in ("n_group", "topk_group", "routed_scaling_factor")}
    weights = {key.replace("shared_expert.", "shared_experts."): value for key, value in ours.state_dict().items()}
    config_name = f"{block_name.split('.')[1].removesuffix('Moe').removesuffix('MoE')}Config"
    return _like_ours(name, _build(block_name, config_name, values, weights), config.num_experts)


def deepseek_v2(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    method = "group_limited_greedy"
    return _deepseek("DeepSeek-V2", "deepseek_v2.DeepseekV2Moe", ours, config, topk_method=method)


def deepseek_v3(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    return _deepseek("DeepSeek-V3", "deepseek_v3.DeepseekV3MoE", ours, config)


def longcat_flash(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    """Its experts are a loop, with a `gate_up_proj` also for those that compute nothing."""
    values = _sizes(config) | {"n_routed_experts": config.num_experts, "zero_expert_num": config.num_copy_experts}
    values["routed_scaling_factor"] = config.routed_scaling_factor
    gate_up_proj = ours.experts.gate_up_proj.data
    weights = {
        "router.classifier.weight": ours.state_dict()["gate.weight"],
        "router.e_score_correction_bias": ours.gate.e_score_correction_bias,
        "experts.gate_up_proj": torch.cat([gate_up_proj, torch.zeros_like(gate_up_proj[: config.num_copy_experts])]),
        "experts.down_proj": ours.experts.down_proj.data,
    }
    block = _build("longcat_flash.LongcatFlashMoE", "LongcatFlashConfig", values, weights)
    return _like_ours("LongCat-Flash", block, config.num_experts + config.num_copy_experts)


def llama4(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    """Its experts compute all tokens each, of which most were multiplied by 0."""
    values = _sizes(config) | {"num_local_experts": config.num_experts}
    values["intermediate_size"] = values.pop("moe_intermediate_size")
    weights = {
        key.replace("gate.weight", "router.weight"): value.transpose(-2, -1).contiguous()
        if value.dim() == 3
        else value
        for key, value in ours.state_dict().items()
    }
    block = _build("llama4.Llama4TextMoe", "Llama4TextConfig", values, weights)
    return Side(
        "Llama 4",
        block,
        route=lambda hidden: block.router(hidden.reshape(-1, hidden.shape[-1])),
        weights=lambda routed: [routed[0]],
        dense=lambda routed: routed[0],
        run=lambda hidden: block(hidden)[0],
    )


def ernie4_5_vl_moe(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    """It has a router and experts for each of two modalities, and picks out the tokens of each."""
    half = config.num_experts // 2
    values = _sizes(config) | {"moe_num_experts": half, "moe_num_shared_experts": 0}
    values["moe_intermediate_size"] = [config.moe_intermediate_size] * 2
    weights = {}
    for name, part in (("text_moe", slice(half)), ("vision_moe", slice(half, None))):
        for key, value in ours.state_dict().items():
            place = key.replace("gate.e_score", "gate.moe_statics.e_score")
            weights[f"{name}.{place}"] = value[None, part] if value.dim() == 1 else value[part]
    block = _build("ernie4_5_vl_moe.Ernie4_5_VLMoeMoeBlock", "Ernie4_5_VLMoeTextConfig", values, weights)
    is_vision_T = modality_T.bool()

    def route(hidden):
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        return block.text_moe.gate(hidden_TH[~is_vision_T]), block.vision_moe.gate(hidden_TH[is_vision_T])

    def dense(routed):
        dense_TE = routed[0][1].new_zeros(len(is_vision_T), config.num_experts)
        dense_TE[~is_vision_T, :half] = dense_weights(routed[0][1], routed[0][2], half)
        dense_TE[is_vision_T, half:] = dense_weights(routed[1][1], routed[1][2], half)
        return dense_TE

    return Side(
        "ERNIE 4.5 VL",
        block,
        route,
        weights=lambda routed: [routed[0][1], routed[1][1]],
        dense=dense,
        run=lambda hidden: block(hidden, modality_T[None])[0],
    )


def _sizes_with_capacity(config: Any, num_tokens: int) -> dict[str, Any]:
    capacity = math.ceil(config.capacity_factor * config.num_experts_per_tok * num_tokens / config.num_experts)
    return {
        "d_model": config.hidden_size,
        "num_experts": config.num_experts,
        "expert_capacity": max(capacity, config.min_capacity),
    }


def switch(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    """The router alone: its experts have no gate."""
    values = _sizes_with_capacity(config, len(modality_T)) | {"router_jitter_noise": 0.0}
    weights = {"classifier.weight": ours.state_dict()["gate.weight"]}
    name = "switch_transformers.SwitchTransformersTop1Router"
    router = _build(name, "SwitchTransformersConfig", values, weights)
    return Side(
        "Switch Transformers",
        router,
        route=router,
        weights=lambda routed: [routed[1]],
        dense=lambda routed: (routed[0] * routed[1])[0],
        run=None,
    )


def nllb_moe(ours: MoeSparseBlock, config: Any, modality_T: torch.Tensor) -> Side:
    """The router alone: its block gives the experts a mask where they expect their numbers."""
    weights = {"classifier.weight": ours.state_dict()["gate.weight"]}
    values = _sizes_with_capacity(config, len(modality_T))
    router = _build("nllb_moe.NllbMoeTop2Router", "NllbMoeConfig", values, weights)
    return Side(
        "NLLB-MoE",
        router,
        route=lambda hidden: router(hidden.reshape(-1, hidden.shape[-1])),
        weights=lambda routed: [routed[1]],
        dense=lambda routed: routed[1],
        run=None,
    )


@dataclass
class Case:
    """
    A router with options.

    Args:
        router_type (`str`): Its name in `ROUTERS`.
        values (`dict[str, Any]`): Fields of the configuration.
        peer (`Callable`, *optional*): What makes the native block that routes alike.
    """

    router_type: str
    values: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[MoeSparseBlock, Any, torch.Tensor], Side] | None = None


def make_cases(size: Size) -> dict[str, Case]:
    """What is measured, by name: every router at least once."""
    half = size.num_experts // 2
    groups = {"n_group": 4, "topk_group": 2}
    biased = {"use_expert_bias": True, "router_dtype": "float32"}
    shared = {"shared_expert_intermediate_size": size.intermediate}
    copies = {"num_copy_experts": half, "norm_topk_prob": False, "routed_scaling_factor": 6.0}
    v2 = {"norm_topk_prob": False, "router_dtype": "float32", "routed_scaling_factor": 16.0}
    v3 = {"use_expert_bias": True, "routed_scaling_factor": 2.5}
    named = {
        "soft": Case("soft", {"num_experts_per_tok": size.num_experts}),
        "hierarchical_noisy_topk": Case("hierarchical_noisy_topk", groups),
        "gshard": Case("gshard", {"num_experts_per_tok": 2, "capacity_factor": 1.0}, nllb_moe),
        "switch": Case("switch", {"num_experts_per_tok": 1}, switch),
        "softmax_topk": Case("softmax_topk", {}, mixtral),
        "softmax_topk, not normalised": Case("softmax_topk", {"norm_topk_prob": False}, qwen3_moe),
        "softmax_topk, groups": Case("softmax_topk", groups | v2 | shared, deepseek_v2),
        "softmax_topk, copy experts": Case("softmax_topk", biased | copies, longcat_flash),
        "sigmoid_topk": Case("sigmoid_topk", groups | v3 | shared, deepseek_v3),
        "llama4": Case("llama4", {"num_experts_per_tok": 1} | shared, llama4),
        "expert_choice": Case("expert_choice", {"allow_causal_expert_choice": True}),
        "grouped": Case("grouped", {"n_group": size.top_k}),
        "modality": Case(
            "modality", {"num_experts_per_modality": [half, size.num_experts - half]} | biased, ernie4_5_vl_moe
        ),
        "hierarchical": Case("hierarchical", groups),
    }
    # A router without options here is measured without any.
    others = {name: Case(name) for name in ROUTERS if name not in {case.router_type for case in named.values()}}
    return {name: case for router in ROUTERS for name, case in (named | others).items() if case.router_type == router}


def make_config(case: Case, size: Size) -> MoeLlamaConfig:
    """A Llama of one layer."""
    values = {
        "vocab_size": 8192,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": 1,
        "num_experts": size.num_experts,
        "num_experts_per_tok": size.top_k,
    }
    return MoeLlamaConfig(**values | case.values, router_type=case.router_type)
