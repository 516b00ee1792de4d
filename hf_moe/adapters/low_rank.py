# SPDX-License-Identifier: Apache-2.0
"""
The low-rank products of expert LoRA: `Adapter`, `LowRank`, and the layouts in which grouped products take their factors.

PEFT keeps the factors of all experts in two matrices: `lora_A` (r * E, I), expert by expert, and `lora_B` (O, r * E), rank by
rank. A `LowRank` has those of all adapters that are active on one projection side by side, as `a_ERI` and `b_EOR`, and
multiplies them with activations that are sorted by expert. Their product with each other, as large as the weights of all
experts, is never built.

Shape suffixes: E experts, R ranks side by side, I inputs and O outputs of a projection, T tokens, S pairs of a token and one
of its experts, sorted by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.integrations.moe import _grouped_mm


ROW_BYTES = 16  # grouped products want rows that start at multiples of this


def grouped_mm(input_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Every row times the matrix of its expert `(S, O)`; rows behind the last offset are left undefined."""
    return _grouped_mm(input_SI, weight_EIO, offsets_E)


def grouped_outer(left_SA: torch.Tensor, right_SB: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Per expert, the sum of the outer products of its rows `(E, A, B)`: the gradient of a weight."""
    return torch.nn.functional.grouped_mm(left_SA.T, right_SB.to(left_SA.dtype), offs=offsets_E)


@dataclass(frozen=True)
class Adapter:
    """
    The factors of one adapter for one projection.

    Args:
        name (`str`): The adapter's name, by which a batch says which of its rows use it.
        lora_a (`torch.Tensor`): `(r * E, I)`, the rows of an expert next to each other.
        lora_b (`torch.Tensor`): `(O, r * E)`, the columns of a rank next to each other.
        num_experts (`int`): E.
        scaling (`float`): What the product of the two is multiplied with.
        dropout (`float`): Share of the inputs that it does not see; 0 but in training.
    """

    name: str
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    num_experts: int
    scaling: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_a.shape[0] // self.num_experts


@torch.no_grad()
def _lay_out(adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`a_ERI` and `b_EOR` in `dtype`, the scaling multiplied into the latter, R filled up with zeros."""
    num_experts, step = adapters[0].num_experts, ROW_BYTES // dtype.itemsize
    total = sum(adapter.rank for adapter in adapters)
    padding = -total % step
    a = [adapter.lora_a.to(dtype).view(num_experts, adapter.rank, -1) for adapter in adapters]
    b = [adapter.lora_b.to(dtype).view(-1, adapter.rank, num_experts).permute(2, 0, 1) for adapter in adapters]
    if padding:
        a.append(a[0].new_zeros(num_experts, padding, a[0].shape[-1]))
        b.append(b[0].new_zeros(num_experts, b[0].shape[1], padding))
    a_ERI = a[0] if len(a) == 1 else torch.cat(a, dim=1)
    b_EOR = b[0].new_empty(num_experts, b[0].shape[1], total + padding)
    start = 0
    for factor, scaling in zip(b, [*(adapter.scaling for adapter in adapters), 1.0], strict=False):
        torch.mul(factor, scaling, out=b_EOR[:, :, start : start + factor.shape[-1]])
        start += factor.shape[-1]
    return a_ERI, b_EOR


class LowRank:
    """
    The adapters of one projection in one forward pass and its backward pass.

    The layout of their factors is not kept for the next pass, since nothing tells whether they are the same by then: neither
    address nor version of a parameter changes when FSDP2 gathers it anew, or when an optimizer or PEFT's `hotswap_adapter`
    writes to its `data`.

    Args:
        adapters (`Sequence[Adapter]`): Those that are active, all with the same dropout.
        dtype (`torch.dtype`): Type of the activations.
        uses_SA (`torch.Tensor`, *optional*): Whether a pair uses an adapter, where a batch mixes them. All do if None.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, uses_SA: torch.Tensor | None = None):
        self.adapters = adapters
        self.a_ERI, self.b_EOR = _lay_out(adapters, dtype)
        self.dropout = adapters[0].dropout
        self.seed = int(torch.randint(2**62, ())) if self.dropout else 0
        self.uses_SR = None
        if uses_SA is not None:
            ranks = torch.tensor([adapter.rank for adapter in adapters], device=uses_SA.device)
            uses_SR = uses_SA.to(dtype).repeat_interleave(ranks, dim=1)
            self.uses_SR = torch.nn.functional.pad(uses_SR, (0, self.a_ERI.shape[1] - uses_SR.shape[1]))

    def add_to(self, output_SO: torch.Tensor, input_SI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """Add to a projection's output what the adapters make of its input; returns what lies between `(S, R)`."""
        inner_SR = self._masked(grouped_mm(self._dropped(input_SI), self.a_ERI.transpose(1, 2), offsets_E))
        output_SO += grouped_mm(inner_SR, self.b_EOR.transpose(1, 2), offsets_E)
        return inner_SR

    def add_gradient_to(
        self, gradient_SI: torch.Tensor, gradient_SO: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """Add to the gradient of the input what comes through the adapters; returns the gradient of what lies between."""
        inner_SR = self._masked(grouped_mm(gradient_SO, self.b_EOR, offsets_E))
        gradient_SI += self._dropped(grouped_mm(inner_SR, self.a_ERI, offsets_E))
        return inner_SR

    def factor_gradients(
        self,
        input_SI: torch.Tensor,
        inner_SR: torch.Tensor,
        gradient_SO: torch.Tensor,
        gradient_SR: torch.Tensor,
        offsets_E: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The gradients of `lora_a` and `lora_b` of every adapter, in PEFT's layout."""
        a_ERI = grouped_outer(gradient_SR, self._dropped(input_SI), offsets_E)
        b_EOR = grouped_outer(gradient_SO, inner_SR, offsets_E)
        gradients, start = [], 0
        for adapter in self.adapters:
            ranks = slice(start, start + adapter.rank)
            a = a_ERI[:, ranks].reshape(adapter.lora_a.shape)
            b = b_EOR[:, :, ranks].permute(1, 2, 0).reshape(adapter.lora_b.shape) * adapter.scaling
            gradients += [a.to(adapter.lora_a.dtype), b.to(adapter.lora_b.dtype)]
            start = ranks.stop
        return gradients

    def _masked(self, inner_SR: torch.Tensor) -> torch.Tensor:
        return inner_SR if self.uses_SR is None else inner_SR * self.uses_SR

    def _dropped(self, values_SI: torch.Tensor) -> torch.Tensor:
        """Dropout with the same mask every time, so that backward needs none of it kept."""
        if not self.dropout:
            return values_SI
        generator = torch.Generator(values_SI.device).manual_seed(self.seed)
        kept_SI = torch.empty_like(values_SI).bernoulli_(1 - self.dropout, generator=generator)
        return values_SI * kept_SI.div_(1 - self.dropout)
