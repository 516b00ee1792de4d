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

from .errors import ExpertLoraError


ROW_BYTES = 16  # grouped products want rows that start at multiples of this, as those do that they return
EXPERTS_PER_ROW = 4  # a row for every so many experts, or fewer, are few


def grouped_mm(input_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Every row times the matrix of its expert `(S, O)`; rows behind the last offset are left undefined."""
    return _grouped_mm(input_SI, weight_EIO, offsets_E)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same in rows that start where grouped products want it: hooks that copy what autograd saves lose that."""
    if tensor.stride(-2) * tensor.itemsize % ROW_BYTES == 0:
        return tensor
    padding = -tensor.shape[-1] % (ROW_BYTES // tensor.itemsize)
    return tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + padding)[..., : tensor.shape[-1]].copy_(tensor)


def add_grouped_mm(
    output_SO: torch.Tensor, input_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor
) -> None:
    """Add the same to `output_SO`."""
    if output_SO.device.type != "cpu":
        output_SO += grouped_mm(input_SI, weight_EIO, offsets_E)
        return
    # Expert by expert no second output is needed, whose memory takes longer to get than the product to compute.
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            output_SO[start:end].addmm_(input_SI[start:end], weight_EIO[expert])
        start = end


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


class LowRank:
    """
    The adapters of one projection in one forward pass and its backward pass.

    The factors are laid out in every forward pass: a layout that was kept from one to the next could not be trusted, since
    FSDP2 and whatever writes to `.data` change factors without a trace. The backward pass takes factors and layout from
    what autograd saved.

    Args:
        adapters (`Sequence[Adapter]`): Those that are active.
        dtype (`torch.dtype`): Type of the activations.
        uses_SA (`torch.Tensor`, *optional*): Whether a pair uses an adapter, where a batch mixes them. All do if None.

    Raises:
        ExpertLoraError: if the adapters have different dropout.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, uses_SA: torch.Tensor | None = None):
        self.num_experts, self.dtype = adapters[0].num_experts, dtype
        self.ranks = [adapter.rank for adapter in adapters]
        self.factors = [factor for adapter in adapters for factor in (adapter.lora_a, adapter.lora_b)]
        self.dropout = adapters[0].dropout
        if any(adapter.dropout != self.dropout for adapter in adapters):
            dropouts = {adapter.name: adapter.dropout for adapter in adapters}
            raise ExpertLoraError(
                f"The active adapters have different dropout on experts: {dropouts}. Give them the same `expert_dropout`, or 0."
            )
        self.seed = int(torch.randint(2**62, ())) if self.dropout else 0
        self.scaling: float | torch.Tensor = adapters[0].scaling
        if len(adapters) > 1 or uses_SA is not None:
            device = self.factors[0].device
            scaling_A = torch.tensor([adapter.scaling for adapter in adapters], device=device)
            scaling_A = scaling_A if uses_SA is None else uses_SA * scaling_A
            self.scaling = scaling_A.repeat_interleave(torch.tensor(self.ranks, device=device), dim=-1)

    def add_to(
        self, output_SO: torch.Tensor, input_SI: torch.Tensor, expert_S: torch.Tensor, offsets_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Add to a projection's output what the adapters make of its input.

        Returns:
            `(torch.Tensor, torch.Tensor)`: what lies between the factors `(S, R)`, scaled, and `b_EOR`, if it was needed.
        """
        a_ERI = self._a(self.factors)
        inner_SR = grouped_mm(self._dropped(input_SI), a_ERI.transpose(1, 2), offsets_E).mul_(self.scaling)
        if len(inner_SR) * EXPERTS_PER_ROW > self.num_experts:
            b_EOR = self._b(self.factors)
            add_grouped_mm(output_SO, inner_SR, b_EOR.transpose(1, 2), offsets_E)
            return inner_SR, b_EOR
        # For a few rows, laying out the factors of all experts would take longer than all the rest.
        for part_SR, lora_b in zip(inner_SR.split(self.ranks, dim=1), self.factors[1::2], strict=True):
            wide_SRE = inner_SR.new_zeros(len(part_SR), part_SR.shape[1], self.num_experts)
            wide_SRE.scatter_(2, expert_S[:, None, None].expand(*part_SR.shape, 1), part_SR[..., None])
            output_SO.addmm_(wide_SRE.flatten(1), lora_b.to(self.dtype).T)  # in place, which autocast leaves alone
        return inner_SR, None

    def add_gradient_to(
        self,
        gradient_SI: torch.Tensor,
        gradient_SO: torch.Tensor,
        factors: Sequence[torch.Tensor],
        b_EOR: torch.Tensor | None,
        offsets_E: torch.Tensor,
    ) -> torch.Tensor:
        """Add to the gradient of the input what comes through the adapters; returns the gradient of what lies between."""
        b_EOR = self._b(factors) if b_EOR is None else aligned(b_EOR)
        inner_SR = grouped_mm(gradient_SO, b_EOR, offsets_E).mul_(self.scaling)
        if self.dropout:
            gradient_SI += self._dropped(grouped_mm(inner_SR, self._a(factors), offsets_E))
        else:
            add_grouped_mm(gradient_SI, inner_SR, self._a(factors), offsets_E)
        return inner_SR

    def factor_gradients(
        self,
        input_SI: torch.Tensor,
        inner_SR: torch.Tensor,
        gradient_SO: torch.Tensor,
        gradient_SR: torch.Tensor,
        factors: Sequence[torch.Tensor],
        offsets_E: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The gradients of `lora_a` and `lora_b` of every adapter, in PEFT's layout."""
        a_ERI = grouped_outer(gradient_SR, self._dropped(input_SI), offsets_E)
        b_EOR = grouped_outer(gradient_SO, aligned(inner_SR), offsets_E)
        gradients = []
        for number, (a, b) in enumerate(
            zip(a_ERI.split(self.ranks, dim=1), b_EOR.split(self.ranks, dim=2), strict=True)
        ):
            lora_a, lora_b = factors[2 * number : 2 * number + 2]
            gradients.append(a.reshape(lora_a.shape).to(lora_a.dtype))
            gradients.append(b.flatten(1).T.contiguous().view(lora_b.shape).to(lora_b.dtype))
        return gradients

    def _a(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`a_ERI`; of one adapter the parameter itself."""
        parts = [
            factor.to(self.dtype).view(self.num_experts, rank, -1)
            for factor, rank in zip(factors[::2], self.ranks, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _b(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`b_EOR`, in rows that are a little longer where grouped products want it."""
        # Transposed as a matrix of two dimensions, which is several times faster than with three.
        parts = [
            factor.to(self.dtype).view(-1, self.num_experts).T.contiguous().view(self.num_experts, -1, rank)
            for factor, rank in zip(factors[1::2], self.ranks, strict=True)
        ]
        return aligned(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))

    def _dropped(self, values_SI: torch.Tensor) -> torch.Tensor:
        """Dropout with the same mask every time, so that backward needs none of it kept."""
        if not self.dropout:
            return values_SI
        generator = torch.Generator(values_SI.device).manual_seed(self.seed)
        kept_SI = torch.empty_like(values_SI).bernoulli_(1 - self.dropout, generator=generator)
        return values_SI * kept_SI.div_(1 - self.dropout)
