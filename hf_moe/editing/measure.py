# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints on one text: `measure` runs both with weights that are read when they are needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..upcycling.checkpoint import Checkpoint
from ..upcycling.parity import compare_outputs
from ..upcycling.sample import Sample
from ..upcycling.streaming import Side, output_of, streamed_model
from ..upcycling.target import Target


@dataclass(frozen=True)
class Subject:
    """
    A model on disk.

    Args:
        model_class (`type`), checkpoint (`Checkpoint`), config (`PreTrainedConfig`): The class that computes it, its weights
            and its configuration.
        target (`Target`, *optional*): How its experts are stored; None if it is dense.
        layers (`Sequence[str]`): Names of layers that the progress bar counts.
    """

    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint
    config: PreTrainedConfig
    target: Target | None
    layers: Sequence[str] = ()


def measure(before: Subject, after: Subject, sample: Sample, progress: bool = True) -> dict[str, Any]:
    """
    Compare what two checkpoints compute, in float32 and in the type of the weights.

    Returns:
        `dict`: `num_tokens`, `text` (False where random tokens or images had to serve), `in_each_of` (`"2 domains"` where the
        tokens come once for each of them) and per data type `max_relative_error` (largest difference of the outputs divided by the largest value of `before`),
        `top1_agreement` and `kl_divergence` (mean over tokens, in nats).
    """
    measured: dict[str, Any] = {
        "num_tokens": sample.num_tokens,
        "text": sample.is_text,
        "in_each_of": sample.in_each_of,
    }
    for dtype in dict.fromkeys((torch.float32, before.config.dtype)):
        name = str(dtype).removeprefix("torch.")
        with tqdm(
            total=len(before.layers) + len(after.layers),
            desc=f"Comparing in {name}",
            unit=" layers",
            disable=None if progress else True,
        ) as bar:
            expected, actual = _run(before, sample, dtype, bar), _run(after, sample, dtype, bar)
        measured[name] = compare_outputs(actual, expected)
    return measured


@torch.no_grad()
def _run(subject: Subject, sample: Sample, dtype: torch.dtype, bar: tqdm) -> torch.Tensor:
    def advance(module, args, output) -> None:
        bar.update()  # must not be returned: it would take the place of the layer's output

    side = Side(subject.model_class, subject.checkpoint)
    model = streamed_model(side, subject.config, dtype, subject.target)
    for name in subject.layers:
        model.get_submodule(name).register_forward_hook(advance)
    routing = {} if subject.target is None else sample.routing
    return output_of(model(**sample.as_type(dtype), **routing))
