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


ROW_BYTES = 16  # grouped products want rows that start at multiples of this, as those do that they return


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


class FactorCache:
    """The layout that was built last, kept for as long as the factors stay what they were."""

    def __init__(self):
        self.key: tuple = ()
        self.layout: tuple[torch.Tensor, torch.Tensor] | None = None

    def get(self, adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`a_ERI` and `b_EOR` in `dtype`."""
        factors = [factor for adapter in adapters for factor in (adapter.lora_a, adapter.lora_b)]
        key = (dtype, *((factor.data_ptr(), factor._version) for factor in factors))
        if self.layout is None or key != self.key:
            self.key, self.layout = key, _lay_out(adapters, dtype)
        return self.layout


@torch.no_grad()
def _lay_out(adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, ranks = adapters[0].num_experts, [adapter.rank for adapter in adapters]
    a = [adapter.lora_a.to(dtype).view(num_experts, adapter.rank, -1) for adapter in adapters]
    # As a matrix of two dimensions, which is transposed several times faster than one of three.
    b = [adapter.lora_b.to(dtype).view(-1, num_experts).T.contiguous() for adapter in adapters]
    b = [factor.view(num_experts, -1, adapter.rank) for factor, adapter in zip(b, adapters, strict=True)]
    padding = -sum(ranks) % (ROW_BYTES // dtype.itemsize)
    if len(adapters) == 1 and not padding:
        return a[0], b[0]
    b_EOR = b[0].new_empty(num_experts, b[0].shape[1], sum(ranks) + padding)[..., : sum(ranks)]
    torch.cat(b, dim=-1, out=b_EOR)
    return a[0] if len(a) == 1 else torch.cat(a, dim=1), b_EOR


class LowRank:
    """
    The adapters of one projection in one forward pass.

    Args:
        adapters (`Sequence[Adapter]`): Those that are active, all with the same dropout.
        cache (`FactorCache`): Where the layout is kept.
        dtype (`torch.dtype`): Type of the activations.
        uses_SA (`torch.Tensor`, *optional*): Whether a pair uses an adapter, where a batch mixes them. All do if None.
    """

    def __init__(
        self, adapters: Sequence[Adapter], cache: FactorCache, dtype: torch.dtype, uses_SA: torch.Tensor | None = None
    ):
        self.adapters = adapters
        self.a_ERI, self.b_EOR = cache.get(adapters, dtype)
        self.dropout = adapters[0].dropout
        self.seed = int(torch.randint(2**62, ())) if self.dropout else 0
        self.scaling: float | torch.Tensor = adapters[0].scaling
        if len(adapters) > 1 or uses_SA is not None:
            device = self.b_EOR.device
            scaling_A = torch.tensor([adapter.scaling for adapter in adapters], dtype=dtype, device=device)
            ranks = torch.tensor([adapter.rank for adapter in adapters], device=device)
            self.scaling = (scaling_A if uses_SA is None else uses_SA * scaling_A).repeat_interleave(ranks, dim=-1)

    def add_to(self, output_SO: torch.Tensor, input_SI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """Add to a projection's output what the adapters make of its input; returns what lies between `(S, R)`, scaled."""
        inner_SR = grouped_mm(self._dropped(input_SI), self.a_ERI.transpose(1, 2), offsets_E).mul_(self.scaling)
        output_SO += grouped_mm(inner_SR, self.b_EOR.transpose(1, 2), offsets_E)
        return inner_SR

    def add_gradient_to(
        self, gradient_SI: torch.Tensor, gradient_SO: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        """Add to the gradient of the input what comes through the adapters; returns the gradient of what lies between."""
        inner_SR = grouped_mm(gradient_SO, self.b_EOR, offsets_E).mul_(self.scaling)
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
            b = b_EOR[:, :, ranks].flatten(1).T.contiguous().view(adapter.lora_b.shape)
            gradients += [a.to(adapter.lora_a.dtype), b.to(adapter.lora_b.dtype)]
            start = ranks.stop
        return gradients

    def _dropped(self, values_SI: torch.Tensor) -> torch.Tensor:
        """Dropout with the same mask every time, so that backward needs none of it kept."""
        if not self.dropout:
            return values_SI
        generator = torch.Generator(values_SI.device).manual_seed(self.seed)
        kept_SI = torch.empty_like(values_SI).bernoulli_(1 - self.dropout, generator=generator)
        return values_SI * kept_SI.div_(1 - self.dropout)
