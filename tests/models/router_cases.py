# SPDX-License-Identifier: Apache-2.0
"""The configurations in which the universal tests hold every router, and small routers and blocks of them."""

import copy
from collections.abc import Iterable

import torch
from conftest import moe_config, randomize
from transformers import PreTrainedConfig

from hf_moe import MoeLlamaForCausalLM
from hf_moe.models.routers import ROUTERS, MoeRouter
from hf_moe.models.sparse_block import MoeSparseBlock


NUM_EXPERTS = 8
# What each router needs besides 8 experts, 2 per token.
ROUTER_CASES = {
    "soft": {"num_experts_per_tok": 8},
    "noisy_topk": {},
    "hierarchical_noisy_topk": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "gshard": {},
    "switch": {"num_experts_per_tok": 1},
    "softmax_topk": {},
    "sigmoid_topk": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_expert_bias": True},
    "llama4": {},
    "attention": {},
    "normalized_logits": {"router_logit_scale": 2.0},
    "expert_choice": {"allow_causal_expert_choice": True, "capacity_group": "sequence"},
    "top_p": {},
    "relu": {},
    "prototypes": {},
    "grouped": {"n_group": 2},
    "hash": {"num_hash_domains": 2},
    "modality": {"num_experts_per_modality": [5, 3]},
    "hierarchical": {"n_group": 4, "norm_topk_prob": False},
}
# Options that change what a block does, each with a router that has it.
OPTION_CASES = {
    "zero-computation experts": {
        "router_type": "softmax_topk",
        "num_constant_experts": 2,
        "num_copy_experts": 1,
        "num_zero_experts": 1,
        "router_residual": True,
    },
    "a selection bias": {"router_type": "softmax_topk", "use_expert_bias": True},
    "groups of DeepSeek-V2": {"router_type": "softmax_topk", "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "capacity by position": {"router_type": "softmax_topk", "capacity_policy": "position"},
    "capacity by probability": {"router_type": "sigmoid_topk", "capacity_policy": "probability"},
    "capacity by batch priority": {"router_type": "softmax_topk", "capacity_policy": "batch_prioritized"},
    "capacity with zero-computation experts": {
        "router_type": "softmax_topk",
        "num_copy_experts": 2,
        "capacity_policy": "position",
    },
}
ALL_CASES = {name: {"router_type": name, **values} for name, values in ROUTER_CASES.items()} | {
    name: values | ({"capacity_factor": 1.0, "min_capacity": 1} if "capacity_policy" in values else {})
    for name, values in OPTION_CASES.items()
}


def router_config(case: str, **values) -> PreTrainedConfig:
    """The configuration of a tiny Llama with the routing of `ALL_CASES[case]`."""
    moe = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, **copy.deepcopy(ALL_CASES[case]), **values}
    return moe_config("llama", **moe)


def build_router(config: PreTrainedConfig, seed: int = 0) -> MoeRouter:
    """A router in which every parameter and buffer matters."""
    router = ROUTERS[config.router_type](config, config.num_experts)
    torch.manual_seed(seed)
    router.init_weights(0.2)
    randomize(router, seed)
    return router.eval()


def build_block(config: PreTrainedConfig, seed: int = 0) -> MoeSparseBlock:
    """A sparse block in which every parameter and buffer matters."""
    block = MoeSparseBlock(config, config.num_experts, layer_index=1)
    torch.manual_seed(seed)
    block.gate.init_weights(0.2)
    randomize(block, seed)
    return block.eval()


def loop_over_slots(block: MoeSparseBlock, hidden_TH: torch.Tensor, slots: Iterable) -> torch.Tensor:
    """What the experts of a block make of tokens, one slot of one token after the other; `slots` has `(expert, weight)` pairs."""
    zero = block.zero_experts
    num_constant, num_copy = (0, 0) if zero is None else (zero.num_constant, zero.num_copy)
    rows = []
    for x_H, of_token in zip(hidden_TH, slots, strict=True):
        y_H = torch.zeros_like(x_H)
        for expert, weight in of_token:
            if expert < NUM_EXPERTS:
                inner_H = weight * x_H if block.weighs_input else x_H
                gate_I, up_I = (block.experts.gate_up_proj[expert] @ inner_H).chunk(2)
                output_H = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate_I) * up_I)
                y_H = y_H + (output_H if block.weighs_input else weight * output_H)
            elif expert < NUM_EXPERTS + num_constant:
                place = expert - NUM_EXPERTS
                mix_2 = (zero.constant_gate[place] @ x_H).softmax(-1)
                y_H = y_H + weight * (mix_2[0] * x_H + mix_2[1] * zero.constant[place])
            elif expert < NUM_EXPERTS + num_constant + num_copy:
                y_H = y_H + weight * x_H
        rows.append(y_H)
    return torch.stack(rows)


def build_model(case: str, **values) -> MoeLlamaForCausalLM:
    torch.manual_seed(0)
    made = MoeLlamaForCausalLM(router_config(case, **values))
    randomize(made)
    return made.eval()


def with_routing_inputs(batch: dict[str, torch.Tensor], made: MoeLlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The batch, and what the model's routers ask for."""
    more = {}
    if made.config.num_experts_per_modality:
        more["mm_token_type_ids"] = (batch["input_ids"] % 2).long()
    if made.config.num_hash_domains > 1:
        more["domain_ids"] = torch.arange(len(batch["input_ids"])) % 2
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**batch, **more, "position_ids": positions}
