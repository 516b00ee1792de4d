# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: `UpcycleReport`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.statistics import RoutingStatistics


@dataclass(frozen=True, kw_only=True)
class UpcycleReport:
    """
    What a conversion did.

    Args:
        output_dir (`Path`): The folder that was written.
        model_type (`str`): Model type of the result, e.g. `"mixtral"` or `"moe_llama"`.
        exact (`bool`): Whether the result was measured to compute what the dense model computes, within 1e-5 in float32.
            False as well if nothing was measured.
        inexact_because (`str`, *optional*): Why the method does not promise that; None if it does.
        max_relative_error (`float`, *optional*): Largest difference in float32, divided by the largest value: of the
            logits, or of the layers' outputs with `verify="layers"`. None if the dense model was not compared.
        expert_errors (`dict[str, float]`, *optional*): With method `"compose"`, the largest difference in float32 between
            each checkpoint in `experts` and its expert alone, by entry, divided by the largest value: of the logits, or of
            the layers' outputs with `verify="layers"`. None with other methods, or if nothing was measured.
        parity (`dict`, *optional*): Everything that was measured, per data type and per layer, see
            [`~hf_moe.upcycling.parity.measure_parity`], and as `"per_expert"`
            [`~hf_moe.upcycling.expert_parity.measure_expert_parity`].
        routing ([`~hf_moe.training.statistics.RoutingStatistics`], *optional*): Which experts the routers chose for the text
            that was compared, before any training. None if nothing was compared.
        expert_noise (`float`): The noise that was added to the experts, found if the recipe has `max_kl`.
        num_parameters (`int`): Parameters of the result.
        num_active_parameters (`int`): Parameters that one token uses.
        bytes_written (`int`): Bytes of the weight files.
        seconds (`float`): Wall time of the whole call, verification included.
    """

    output_dir: Path
    model_type: str
    exact: bool
    inexact_because: str | None
    max_relative_error: float | None
    expert_errors: dict[str, float] | None
    parity: dict[str, Any] | None
    routing: RoutingStatistics | None
    expert_noise: float
    num_parameters: int
    num_active_parameters: int
    bytes_written: int
    seconds: float
