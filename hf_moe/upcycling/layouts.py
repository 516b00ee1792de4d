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

from .feed_forward import FeedForward


class Piece(NamedTuple):
    """`tensor`, flattened, fills the elements of the tensor `name` from `offset` on."""

    name: str
    offset: int
    tensor: torch.Tensor


class FusedExpert(NamedTuple):
    """
    One expert as transformers' MoE classes compute with it, and the biases, if it has any.

    `up_proj` is `(2 * I, H)` with the gate's rows first, or `(I, H)` without a gate; `down_proj` is `(H, I)`.
    """

    up_proj: torch.Tensor
    down_proj: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


ReadRows = Callable[[str, int | None], torch.Tensor]


@dataclass(frozen=True)
class FusedLayout:
    """
    All experts in two tensors: `experts.gate_up_proj` `(E, 2 * I, H)`, gate first, and `experts.down_proj`.

    Without a gate the first is `experts.up_proj` `(E, I, H)`; biases have the names of their weights and `_bias`.

    Args:
        block (`str`): Name of the sparse block in a layer.
        gate_up (`str`), down (`str`), router (`str`): Names of the tensors in the block.
    """

    block: str = "mlp"
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    router: str = "gate.weight"

    def shapes(self, layer: str, num_experts: int, expert: FeedForward) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the experts' tensors; `layer` ends in a dot."""
        rows = (2 if expert.is_gated else 1) * expert.intermediate_size
        up, down = self._names(layer, expert.is_gated)
        shapes: dict[str, tuple[int, ...]] = {up: (num_experts, rows, expert.hidden_size)}
        if expert.up_bias is not None:
            shapes[f"{up}_bias"] = (num_experts, rows)
        shapes[down] = (num_experts, expert.hidden_size, expert.intermediate_size)
        if expert.down_bias is not None:
            shapes[f"{down}_bias"] = (num_experts, expert.hidden_size)
        return shapes

    def pieces(self, layer: str, expert_index: int, expert: FeedForward) -> Iterator[Piece]:
        """Where the weights of one expert go."""
        up, down = self._names(layer, expert.is_gated)
        groups = {
            up: (expert.gate_proj, expert.up_proj),
            f"{up}_bias": (expert.gate_bias, expert.up_bias),
            down: (expert.down_proj,),
            f"{down}_bias": (expert.down_bias,),
        }
        for name, parts in groups.items():
            tensors = [tensor for tensor in parts if tensor is not None]
            offset = expert_index * sum(tensor.numel() for tensor in tensors)
            for tensor in tensors:
                yield Piece(name, offset, tensor)
                offset += tensor.numel()

    def read(self, read_rows: ReadRows, layer: str, expert_index: int, is_gated: bool, has_bias: bool) -> FusedExpert:
        """One expert; `read_rows(name, i)` gives row i of a tensor, or all of it."""
        names = self._names(layer, is_gated)
        weights = [read_rows(name, expert_index) for name in names]
        biases = [read_rows(f"{name}_bias", expert_index) if has_bias else None for name in names]
        return FusedExpert(*weights, *biases)

    def _names(self, layer: str, is_gated: bool) -> tuple[str, str]:
        up = self.gate_up if is_gated else self.gate_up.replace("gate_up", "up")
        return f"{layer}{self.block}.{up}", f"{layer}{self.block}.{self.down}"


@dataclass(frozen=True)
class PerExpertLayout:
    """
    Three tensors per expert: `<block>.experts.<e>.<gate>.weight` and so on; gated experts without biases only.

    Args:
        block (`str`): Name of the sparse block in a layer.
        gate (`str`), up (`str`), down (`str`): Names of an expert's matrices.
        router (`str`): Name of the router's weight in the block.
    """

    block: str
    gate: str
    up: str
    down: str
    router: str = "gate.weight"

    def shapes(self, layer: str, num_experts: int, expert: FeedForward) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the experts' tensors; `layer` ends in a dot."""
        return {
            piece.name: tuple(piece.tensor.shape)
            for expert_index in range(num_experts)
            for piece in self.pieces(layer, expert_index, expert)
        }

    def pieces(self, layer: str, expert_index: int, expert: FeedForward) -> Iterator[Piece]:
        """Where the weights of one expert go."""
        for projection, tensor in zip((self.gate, self.up, self.down), expert[:3], strict=True):
            yield Piece(f"{layer}{self.block}.experts.{expert_index}.{projection}.weight", 0, tensor)

    def read(self, read_rows: ReadRows, layer: str, expert_index: int, is_gated: bool, has_bias: bool) -> FusedExpert:
        """One expert; `read_rows(name, None)` gives a tensor."""
        gate, up, down = (
            read_rows(f"{layer}{self.block}.experts.{expert_index}.{projection}.weight", None)
            for projection in (self.gate, self.up, self.down)
        )
        return FusedExpert(torch.cat([gate, up]), down)
