# SPDX-License-Identifier: Apache-2.0
"""Metrics for `evaluate.load`: expert load, expert specialisation, router agreement; `metric_path` says where they are."""

from pathlib import Path


METRICS = ("expert_load", "expert_specialization", "router_agreement")


def metric_path(name: str) -> str:
    """
    The folder of a metric, for `evaluate.load`.

    Args:
        name (`str`): `"expert_load"`, `"expert_specialization"` or `"router_agreement"`.

    Returns:
        `str`

    Raises:
        ValueError: if there is no such metric.

    Example:

    ```python
    >>> import evaluate, hf_moe

    >>> expert_load = evaluate.load(hf_moe.metric_path("expert_load"))
    >>> expert_load.compute(predictions=recorder.statistics())["entropy"]
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}. Metrics are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
