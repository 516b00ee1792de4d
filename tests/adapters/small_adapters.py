# SPDX-License-Identifier: Apache-2.0
"""Adapters from PEFT on tiny mixtures of experts, and how to compare two of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file


FILES = ("adapter_config.json", "adapter_model.safetensors")


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
