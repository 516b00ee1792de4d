# SPDX-License-Identifier: Apache-2.0
"""
How the tensors of a sparse layer are named and arranged on disk.

`FusedLayout` is that of hf_moe's classes, and of every MoE in transformers once it is in memory. `PerExpertLayout` is
the one in which Mixtral and Qwen-MoE are published and which vLLM and the GGUF converters read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .methods import FeedForward


class Piece(NamedTuple):
    """`tensor`, flattened, fills the elements of the tensor `name` from `offset` on."""

    name: str
    offset: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class FusedLayout:
    """All experts in two tensors: `experts.gate_up_proj` `(E, 2 * I, H)`, gate first, and `experts.down_proj`."""

    block: str = "mlp"

    def shapes(self, layer: str, num_experts: int, expert: FeedForward) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the experts' tensors; `layer` ends in a dot."""
        intermediate_size, hidden_size = expert.gate_proj.shape
        return {
            f"{layer}{self.block}.experts.gate_up_proj": (num_experts, 2 * intermediate_size, hidden_size),
            f"{layer}{self.block}.experts.down_proj": (num_experts, hidden_size, intermediate_size),
        }

    def pieces(self, layer: str, expert_index: int, expert: FeedForward) -> Iterator[Piece]:
        """Where the weights of one expert go."""
        size = expert.gate_proj.numel()
        gate_up = f"{layer}{self.block}.experts.gate_up_proj"
        yield Piece(gate_up, 2 * expert_index * size, expert.gate_proj)
        yield Piece(gate_up, (2 * expert_index + 1) * size, expert.up_proj)
        yield Piece(f"{layer}{self.block}.experts.down_proj", expert_index * size, expert.down_proj)

    def read(
        self, read_rows: Callable[[str, int | None], torch.Tensor], layer: str, expert_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(gate_up (2 * I, H), down (H, I))` of one expert; `read_rows(name, i)` gives row i of a tensor, or all of it."""
        return (
            read_rows(f"{layer}{self.block}.experts.gate_up_proj", expert_index),
            read_rows(f"{layer}{self.block}.experts.down_proj", expert_index),
        )


@dataclass(frozen=True)
class PerExpertLayout:
    """Three tensors per expert: `<block>.experts.<e>.<gate>.weight` and so on."""

    block: str
    gate: str
    up: str
    down: str

    def shapes(self, layer: str, num_experts: int, expert: FeedForward) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the experts' tensors; `layer` ends in a dot."""
        return {
            piece.name: tuple(piece.tensor.shape)
            for expert_index in range(num_experts)
            for piece in self.pieces(layer, expert_index, expert)
        }

    def pieces(self, layer: str, expert_index: int, expert: FeedForward) -> Iterator[Piece]:
        """Where the weights of one expert go."""
        for projection, tensor in zip((self.gate, self.up, self.down), expert, strict=True):
            yield Piece(f"{layer}{self.block}.experts.{expert_index}.{projection}.weight", 0, tensor)

    def read(
        self, read_rows: Callable[[str, int | None], torch.Tensor], layer: str, expert_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(gate_up (2 * I, H), down (H, I))` of one expert; `read_rows(name, None)` gives a tensor."""
        gate, up, down = (
            read_rows(f"{layer}{self.block}.experts.{expert_index}.{projection}.weight", None)
            for projection in (self.gate, self.up, self.down)
        )
        return torch.cat([gate, up]), down
