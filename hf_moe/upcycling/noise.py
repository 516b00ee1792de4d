# SPDX-License-Identifier: Apache-2.0
"""
Finding the noise that a bound on the divergence from the dense model allows: `find_expert_noise`.

`VirtualCheckpoint` is a result that was not written: it makes its tensors when they are read, so that many a noise can be
tried in the memory of one expert.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig

from .convert import OpenStep, Step
from .errors import UpcycleError
from .parity import compare_outputs
from .plan import UpcyclePlan
from .recipe import UpcycleConfig
from .sample import Sample
from .streaming import Side, run_sample


SMALLEST_NOISE, LARGEST_NOISE = 1e-5, 1.0
BISECTIONS = 12


class VirtualCheckpoint:
    """
    Reads like a [`~hf_moe.upcycling.checkpoint.Checkpoint`] of the result, from the steps that would write it.

    The dense tensors of one layer and the tensors of one expert are kept until others are asked for.
    """

    def __init__(self, steps: list[Step], config: PreTrainedConfig):
        self.config = config
        self._step_of = {name: step for step in steps for name in step.tensors}
        self._opened: tuple[Step, OpenStep] | None = None
        self._made: tuple[tuple[Step | None, int | None], dict[str, torch.Tensor]] = ((None, None), {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._step_of)

    def read(self, name: str, check_finite: bool = True) -> torch.Tensor:
        """One tensor; it is finite as far as the dense ones are."""
        expert = re.search(r"\.experts\.(\d+)\.", name)
        tensor = self._make(self._step_of[name], None if expert is None else int(expert[1]))[name]
        return tensor.view(self._step_of[name].tensors[name][1])

    def read_row(self, name: str, index: int) -> torch.Tensor:
        """What expert `index` has of a tensor that holds all experts."""
        return self._make(self._step_of[name], index)[name].view(self._step_of[name].tensors[name][1][1:])

    def _make(self, step: Step, expert_index: int | None) -> dict[str, torch.Tensor]:
        if self._opened is None or self._opened[0] is not step:
            self._opened = (step, step.open())
        if self._made[0] != (step, expert_index):
            opened = self._opened[1]
            parts: dict[str, list[torch.Tensor]] = {}
            for piece in opened.others() if expert_index is None else opened.expert(expert_index):
                parts.setdefault(piece.name, []).append(piece.tensor.reshape(-1))
            self._made = ((step, expert_index), {name: torch.cat(tensors) for name, tensors in parts.items()})
        return self._made[1]


def find_expert_noise(
    dense: Side,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    sample: Sample,
    steps_for: Callable[[UpcycleConfig], list[Step]],
    *,
    progress: bool = True,
) -> float:
    """
    The largest `expert_noise` for which the mean KL divergence from the dense model stays within `recipe.max_kl`.

    Found by bisection of its logarithm, to within 1 % or so, on the tokens of `sample` and in float32.

    Args:
        steps_for (`Callable`): From a recipe to the steps of its conversion.

    Raises:
        UpcycleError: if the method is farther from the dense model without any noise.
    """
    max_kl = recipe.max_kl or 0.0
    expected = run_sample(dense, dense.checkpoint.config, sample, torch.float32)

    def divergence(noise: float) -> float:
        steps = steps_for(dataclasses.replace(recipe, expert_noise=noise, max_kl=None))
        result = Side(plan.model_class, VirtualCheckpoint(steps, plan.config), dense.layers)
        return compare_outputs(run_sample(result, plan.config, sample, torch.float32, plan.target), expected)[
            "kl_divergence"
        ]

    for noise in (0.0, SMALLEST_NOISE):
        if (least := divergence(noise)) > max_kl:
            raise UpcycleError(
                f"With expert_noise={noise:g} method {recipe.method!r} is {least:.2g} nats from the dense model already, more than "
                f"max_kl={max_kl}. Allow more, or use a method that is exact."
            )
    if divergence(LARGEST_NOISE) <= max_kl:
        return LARGEST_NOISE
    low, high = SMALLEST_NOISE, LARGEST_NOISE
    for _ in tqdm(range(BISECTIONS), desc="Looking for noise", unit=" tries", disable=None if progress else True):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(middle) <= max_kl else (low, middle)
    return low
