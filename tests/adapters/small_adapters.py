# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts of every layout with adapters from PEFT, and how to compare two of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import MLA, TINY, moe_model, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file


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
FILES = ("adapter_config.json", "adapter_model.safetensors")


def small_moe(kind: str, **values) -> transformers.PreTrainedModel:
    """A tiny model in which nothing is left at a default value."""
    if kind in OURS:
        return moe_model(kind.split()[0].removeprefix("moe_"), **{**OURS[kind], **values})
    prefix, fields = LAYOUTS[kind]
    fields = {**TINY, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0, **fields, **values}
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields))
    randomize(model)
    return model


def targets(model: torch.nn.Module) -> list[str]:
    """The parameters of the experts, as `target_parameters` names them."""
    found = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.dim() == 3]
    return sorted({".".join(name.split(".")[-3:]) for name in found})


def with_adapter(model: transformers.PreTrainedModel, seed: int = 0, **values) -> PeftModel:
    """The model with an adapter of PEFT whose factors all have values."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_parameters": targets(model), **values})
    return fill(get_peft_model(model, config), seed)


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> Any:
    """Give the B factors, which start at zero, random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model: torch.nn.Module, **arguments) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss on a small batch, and the gradients of all that is trained."""
    model.zero_grad()
    loss = model(input_ids=ids(), labels=ids(), **arguments).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Dequantized(torch.nn.Module):
    """A weight that is computed from what is stored, as libraries keep experts in 4 bits."""

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        return stored / 64

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 64


def change(folder: Path, changed: Callable[[dict], Any] = lambda tensors: None, **fields) -> None:
    """Change the tensors of an adapter, and fields of its configuration."""
    tensors = load_file(folder / FILES[1])
    changed(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILES[1])
    config = json.loads((folder / FILES[0]).read_text()) | fields
    (folder / FILES[0]).write_text(json.dumps(config))
