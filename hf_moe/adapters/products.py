# SPDX-License-Identifier: Apache-2.0
"""
Products of rows that are sorted by expert with the matrices of their experts, and `Rows`, which are gathered as late as can be.

Shape suffixes: E experts, T tokens, S pairs of a token and one of its experts, sorted by expert, I inputs and O outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.integrations.moe import _grouped_mm


# From this size on, malloc gets memory from the system every time, which takes longer on a CPU than to fill it.
LARGE_BYTES = 32 * 2**20
ROW_BYTES = 16  # grouped products want rows that start at multiples of this, as those do that they return


@dataclass(frozen=True)
class Rows:
    """
    The rows of tokens, for every pair.

    Where they would be large on a CPU, they are gathered expert by expert instead of all at once.

    Args:
        values (`torch.Tensor`): `(T, I)`, or `(S, I)` without an index.
        index_S (`torch.Tensor`, *optional*): Which rows these are.
    """

    values: torch.Tensor
    index_S: torch.Tensor | None

    @classmethod
    def of(cls, values_TI: torch.Tensor, index_S: torch.Tensor) -> "Rows":
        """Gathered at once, unless that takes too much."""
        if is_large_on_cpu(values_TI, len(index_S)):
            return cls(values_TI, index_S)
        return cls(values_TI.index_select(0, index_S), None)

    def all(self) -> torch.Tensor:
        """`(S, I)`."""
        return self.values if self.index_S is None else self.values.index_select(0, self.index_S)

    def part(self, start: int, end: int) -> torch.Tensor:
        """The rows of one expert."""
        if self.index_S is None:
            return self.values[start:end]
        return self.values.index_select(0, self.index_S[start:end])


def grouped_mm(rows: Rows, weight_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Every row times the matrix of its expert `(S, O)`; rows behind the last offset are left undefined."""
    if rows.index_S is None:
        return _grouped_mm(rows.values, weight_EIO, offsets_E)
    output_SO = empty_aligned(rows.values, len(rows.index_S), weight_EIO.shape[2])
    for expert, start, end in _spans(offsets_E):
        torch.mm(rows.part(start, end), weight_EIO[expert], out=output_SO[start:end])
    return output_SO


def add_grouped_mm(
    output_SO: torch.Tensor, input_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor
) -> None:
    """Add the same to `output_SO`."""
    if not is_large_on_cpu(output_SO, len(output_SO)):
        output_SO += _grouped_mm(input_SI, weight_EIO, offsets_E)
        return
    for expert, start, end in _spans(offsets_E):
        output_SO[start:end].addmm_(input_SI[start:end], weight_EIO[expert])


def grouped_outer(left: Rows, right: Rows, offsets_E: torch.Tensor) -> torch.Tensor:
    """Per expert, the sum of the outer products of its rows `(E, A, B)`: the gradient of a weight."""
    if left.index_S is None and right.index_S is None:
        left_SA, right_SB = left.values, right.values.to(left.values.dtype)
        return torch.nn.functional.grouped_mm(left_SA.T, right_SB, offs=offsets_E)
    output_EAB = left.values.new_zeros(len(offsets_E), left.values.shape[1], right.values.shape[1])
    for expert, start, end in _spans(offsets_E):
        torch.mm(left.part(start, end).T, right.part(start, end), out=output_EAB[expert])
    return output_EAB


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same in rows that start where grouped products want it: hooks that copy what autograd saves lose that."""
    if tensor.stride(-2) * tensor.itemsize % ROW_BYTES == 0:
        return tensor
    return empty_aligned(tensor, *tensor.shape).copy_(tensor)


def empty_aligned(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor with such rows, of the type of another."""
    padding = -shape[-1] % (ROW_BYTES // like.itemsize)
    return like.new_empty(*shape[:-1], shape[-1] + padding)[..., : shape[-1]]


def is_large_on_cpu(like: torch.Tensor, num_rows: int) -> bool:
    """Whether so many rows like those of a matrix are better not asked for at once."""
    return like.device.type == "cpu" and num_rows * like.shape[1] * like.itemsize >= LARGE_BYTES


def _spans(offsets_E: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Of experts with rows: which, and where these start and end."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end
