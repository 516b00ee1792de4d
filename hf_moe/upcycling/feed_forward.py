# SPDX-License-Identifier: Apache-2.0
"""
One feed-forward as tensors: `FeedForward`, where a family keeps it (`FeedForwardNames`), and what takes its place
(`SparseLayer`, `LayerSizes`).

Shapes: H hidden size, I intermediate size, the number of neurons; gate and up are `(I, H)`, down is `(H, I)`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


class FeedForward(NamedTuple):
    """
    The weights of one feed-forward: gate `(I, H)`, up `(I, H)`, down `(H, I)` and the biases of the three.

    A feed-forward without a gate, `down(act(up(x)))`, has `gate_proj=None`; one without biases has None for each.
    """

    gate_proj: torch.Tensor | None
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def intermediate_size(self) -> int:
        return self.up_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.up_proj.shape[1]

    @property
    def is_gated(self) -> bool:
        return self.gate_proj is not None

    @property
    def numel(self) -> int:
        """Number of weights and biases."""
        return sum(tensor.numel() for tensor in self if tensor is not None)

    def map(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> "FeedForward":
        """`function(name, tensor)` of every tensor that is there."""
        return FeedForward(
            **{
                name: None if tensor is None else function(name, tensor)
                for name, tensor in zip(self._fields, self, strict=True)
            }
        )

    def take(self, neurons: torch.Tensor | slice) -> "FeedForward":
        """The feed-forward that has these neurons alone; it keeps the whole output bias."""

        def take(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "down_bias":
                return tensor
            return tensor[:, neurons] if name == "down_proj" else tensor[neurons]

        return self.map(take)

    def silent(self) -> "FeedForward":
        """With an output that is zero whatever the input."""
        return self.map(lambda name, tensor: torch.zeros_like(tensor) if name.startswith("down") else tensor)

    def forward(
        self, hidden_states: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., H)` to the neurons `(..., I)` and the output `(..., H)`."""
        up = torch.nn.functional.linear(hidden_states, self.up_proj, self.up_bias)
        if self.gate_proj is None:
            neurons = activation(up)
        else:
            neurons = activation(torch.nn.functional.linear(hidden_states, self.gate_proj, self.gate_bias)) * up
        return neurons, torch.nn.functional.linear(neurons, self.down_proj, self.down_bias)


class SparseLayer(NamedTuple):
    """
    What takes the place of a dense feed-forward.

    `expert(e)` makes the weights of expert e when they are asked for, so that memory does not grow with their number; it
    gives the same values each time.
    """

    expert: Callable[[int], FeedForward]
    shared_expert: FeedForward | None = None


class LayerSizes(NamedTuple):
    """
    How large the parts of a [`SparseLayer`] are.

    Args:
        expert (`int`): Intermediate size of each routed expert.
        shared_expert (`int`, *optional*): Intermediate size of the shared expert; None without one.
        experts_per_copy (`int`): So many experts in a row are the parts of one copy of the dense feed-forward. They share
            a row of the router, so that a token gets all of them or none.
    """

    expert: int
    shared_expert: int | None = None
    experts_per_copy: int = 1


@dataclass(frozen=True)
class LayerContext:
    """
    What a method and a router initialiser may look at besides weights.

    Args:
        recipe (`UpcycleConfig`): What the user asked for.
        layer_index (`int`): Index of the layer in the model.
        num_experts (`int`): Routed experts of this layer.
        observations (`Mapping[str, torch.Tensor]`): What was observed in this layer when calibration text passed through
            the dense model. Empty if the recipe needs no text.
        composed (`Callable[[int], FeedForward]`, *optional*): From the index of an expert to this layer's feed-forward in
            the checkpoint that the expert comes from. None if the experts come from one dense model.
    """

    recipe: "UpcycleConfig"
    layer_index: int
    num_experts: int
    observations: Mapping[str, torch.Tensor] = field(default_factory=dict)
    composed: Callable[[int], FeedForward] | None = None

    def generator(self, expert_index: int, purpose: str) -> torch.Generator:
        """The source of what is random here: it depends on seed, layer, expert and purpose alone."""
        digest = hashlib.sha256(f"{self.recipe.seed}/{self.layer_index}/{expert_index}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass(frozen=True)
class FeedForwardNames:
    """
    Where a family keeps its feed-forward within a layer.

    Args:
        up (`str`), down (`str`): Names of the modules.
        gate (`str`, *optional*): Name of the gate's module; None if there is no gate.
        fused (`bool`): Whether `up` holds the rows of the gate, then those of up.
        transposed (`bool`): Whether the weights are `(in, out)`, as in GPT-2.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    transposed: bool = False

    def tensors(self, layer: str, info: Mapping[str, Any]) -> list[str]:
        """Full names of the tensors that are in `info`; `layer` ends in a dot."""
        modules = [module for module in (self.gate, self.up, self.down) if module is not None]
        names = [f"{layer}{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        return [name for name in names if name in info]

    def read(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> FeedForward:
        """The feed-forward of a layer; `layer` ends in a dot and `tensors` has the names of [`tensors`]."""

        def weight(module: str) -> torch.Tensor:
            tensor = tensors[f"{layer}{module}.weight"]
            return tensor.T.contiguous() if self.transposed else tensor

        up, up_bias = weight(self.up), tensors.get(f"{layer}{self.up}.bias")
        gate, gate_bias = None, None
        if self.fused:
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        elif self.gate is not None:
            gate, gate_bias = weight(self.gate), tensors.get(f"{layer}{self.gate}.bias")
        return FeedForward(gate, up, weight(self.down), gate_bias, up_bias, tensors.get(f"{layer}{self.down}.bias"))

    def write(self, layer: str, feed_forward: FeedForward) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The reverse of [`read`]: every tensor's full name, and the parts whose rows it holds one after the other."""
        for suffix, gate, up, down in (("weight", *feed_forward[:3]), ("bias", *feed_forward[3:])):
            fused = [(self.up, [gate, up])] if self.fused else [(self.gate, [gate]), (self.up, [up])]
            for module, tensors in [*fused, (self.down, [down])]:
                parts = [tensor for tensor in tensors if tensor is not None]
                if self.transposed and suffix == "weight":
                    parts = [part.T.contiguous() for part in parts]
                if parts:
                    yield f"{layer}{module}.{suffix}", parts
