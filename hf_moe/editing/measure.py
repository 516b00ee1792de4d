# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints on one text: `measure` runs both with weights that are read when they are needed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..upcycling.checkpoint import Checkpoint
from ..upcycling.families import Target
from ..upcycling.parity import compare_outputs
from ..upcycling.sample import Sample
from ..upcycling.streaming import Side, output_of, streamed_model


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the class that computes it, its configuration, and how its experts are stored; None if it is dense."""

    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint
    config: PreTrainedConfig
    target: Target | None


def measure(before: Subject, after: Subject, sample: Sample, progress: bool = True) -> dict[str, Any]:
    """
    Compare what two checkpoints compute, in float32 and in the type of the weights.

    Returns:
        `dict`: `num_tokens`, `text` (False where random tokens or images had to serve) and per data type
        `max_relative_error` (largest difference of the outputs divided by the largest value of `before`),
        `top1_agreement` and `kl_divergence` (mean over tokens, in nats).
    """
    measured: dict[str, Any] = {"num_tokens": sample.num_tokens, "text": sample.is_text}
    for dtype in dict.fromkeys((torch.float32, before.config.dtype)):
        name = str(dtype).removeprefix("torch.")
        with tqdm(total=2, desc=f"Comparing in {name}", unit=" models", disable=None if progress else True) as bar:
            outputs = []
            for subject in (before, after):
                outputs.append(_run(subject, sample, dtype))
                bar.update()
        measured[name] = compare_outputs(outputs[1], outputs[0])
    return measured


@torch.no_grad()
def _run(subject: Subject, sample: Sample, dtype: torch.dtype) -> torch.Tensor:
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.inputs.items()}
    side = Side(subject.model_class, subject.checkpoint)
    model = streamed_model(side, copy.deepcopy(subject.config), dtype, subject.target)
    return output_of(model(**inputs))
