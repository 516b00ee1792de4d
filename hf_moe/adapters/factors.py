# SPDX-License-Identifier: Apache-2.0
"""
The factors of an adapter in a file: `Factors` says what PEFT expects of them, `read_layout` which way round they are.

PEFT before 0.19.1 took the dimensions of expert weights for one another. Weights are stored as (E, X, Y), and it let `lora_A`
be (r * E, X) and `lora_B` (Y, r * E) also where Y is the input; 0.19.0 did the reverse where X is. A product of the two is the
same either way, so that a file of theirs can be rewritten without loss: `swapped`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from packaging.version import InvalidVersion, Version
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ..training.routers import plain_name
from .errors import ExpertLoraError


SWAPPED_UNTIL = Version("0.19.1")  # the first PEFT with today's layout
ALSO_TRANSPOSED_FROM = Version("0.19.0")  # the one that had input and output of transposed experts the wrong way round


@dataclass(frozen=True)
class Factors:
    """
    What PEFT expects of the two factors of a parameter or module.

    Args:
        name (`str`): The parameter or module.
        key (`str`): What the names of the factors in the file start with.
        rank (`int`): The rank r, after the patterns in `adapter_config.json`.
        num_experts (`int`): Number of experts E; 1 for modules.
        in_features (`int`): Input size.
        out_features (`int`): Output size.
        is_transposed (`bool`): Whether the experts' weights are stored as (E, input, output).
    """

    name: str
    key: str
    rank: int
    num_experts: int
    in_features: int
    out_features: int
    is_transposed: bool = False

    @property
    def a(self) -> str:
        """Name of the first factor."""
        return f"{self.key}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the second factor."""
        return f"{self.key}.lora_B.weight"


def expected_factors(model: nn.Module, adapter: str = "default") -> list[Factors]:
    """The factors of an adapter in the order of the model."""
    found = []
    for key, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        name, num_experts = plain_name(key), 1
        if isinstance(layer, ParamWrapper):
            name, num_experts = f"{name}.{layer.parameter_name}", layer.num_experts
        is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
        in_features, out_features = cast(int, layer.in_features), cast(int, layer.out_features)
        found.append(Factors(name, key, layer.r[adapter], num_experts, in_features, out_features, is_transposed))
    return found


@dataclass(frozen=True)
class Layout:
    """
    Which way round the factors of experts are.

    Args:
        is_old (`bool`): Whether input and output are swapped.
        because (`str`): What that rests on.
    """

    is_old: bool
    because: str


def read_layout(
    factors: Iterable[Factors], tensors: dict[str, torch.Tensor], peft_version: str | None
) -> Layout | None:
    """
    The layout of a file, from the shapes of its tensors, or from the version where all matrices are square.

    Args:
        factors (`Iterable[Factors]`): What is expected.
        tensors (`dict[str, torch.Tensor]`): What is there.
        peft_version (`str`, *optional*): The field of that name in `adapter_config.json`.

    Returns:
        [`Layout`], or None if the file has no factors of experts, or they fit neither way.

    Raises:
        ExpertLoraError: if only the version could tell, and is none.
    """
    of_experts = [one for one in factors if one.num_experts > 1 and one.a in tensors and one.b in tensors]
    ranks_fit = all(
        size % one.num_experts == 0 for one in of_experts for size in (len(tensors[one.a]), tensors[one.b].shape[1])
    )
    if not of_experts or not ranks_fit:
        return None
    sizes = {
        (tensors[one.a].shape[-1], tensors[one.b].shape[0], one.in_features, one.out_features) for one in of_experts
    }
    if any(there_in != there_out for there_in, there_out, _, _ in sizes):
        if all((a, b) == (in_features, out_features) for a, b, in_features, out_features in sizes):
            return Layout(False, "the shapes of the factors")
        if all((a, b) == (out_features, in_features) for a, b, in_features, out_features in sizes):
            return Layout(True, "the shapes of the factors")
        return None
    return _layout_by_version(peft_version, of_experts[0].is_transposed)


def _layout_by_version(peft_version: str | None, is_transposed: bool) -> Layout:
    if peft_version is None:
        because = "adapter_config.json, which has no peft_version as before PEFT 0.18, since the matrices are square"
        return Layout(not is_transposed, f"{because} (add the version there if it is a later one)")
    try:
        version = Version(peft_version.split("@")[0])
    except InvalidVersion as error:
        raise ExpertLoraError(
            f"peft_version in adapter_config.json is {peft_version!r}, which is no version, and the matrices of the experts are "
            "square: it cannot be told which way round the factors are. Correct it there."
        ) from error
    is_old = version < SWAPPED_UNTIL and (not is_transposed or version >= ALSO_TRANSPOSED_FROM)
    return Layout(is_old, f"peft_version {peft_version} in adapter_config.json, since the matrices are square")


def swapped(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors whose product is the transpose of that of `a` and `b`, expert by expert.

    Args:
        a (`torch.Tensor`): `(r * E, X)`, expert by expert.
        b (`torch.Tensor`): `(Y, r * E)`, rank by rank.
        num_experts (`int`): E.

    Returns:
        `(torch.Tensor, torch.Tensor)` of the shapes `(r * E, Y)` and `(X, r * E)`.
    """
    new_a = b.reshape(len(b), -1, num_experts).permute(2, 1, 0).flatten(0, 1)
    new_b = a.reshape(num_experts, -1, a.shape[1]).permute(2, 1, 0).flatten(1)
    return new_a.contiguous(), new_b.contiguous()


def swap_all(factors: Iterable[Factors], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of a file, with the factors of experts the other way round."""
    result = dict(tensors)
    for one in factors:
        if one.num_experts > 1:
            result[one.a], result[one.b] = swapped(tensors[one.a], tensors[one.b], one.num_experts)
    return result
