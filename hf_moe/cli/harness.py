# SPDX-License-Identifier: Apache-2.0
"""Hands a loaded model over to lm-eval (`pip install lm-eval`), for the benchmarks of `hf-moe eval --tasks`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_tasks(names: str, include_path: Path | None) -> "tuple[list[str], TaskManager]":
    """
    The tasks of lm-eval with these names.

    Args:
        names (`str`): Names or patterns, separated by commas.
        include_path (`Path`, *optional*): Folder with tasks of one's own, as YAML files.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: if there is no such task or folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "--tasks runs the benchmarks of lm-eval, which is not installed: `pip install lm-eval`, or "
            f"`pip install hf-moe[eval]`. ({error})"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path: there is no folder {include_path}.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    tasks: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
        found = manager.match_tasks([name])
        if not found:
            raise ValueError(
                f"--tasks: lm-eval has no task {name}. `lm-eval ls tasks` lists them; the folder of your own ones is given "
                "with --include-path."
            )
        tasks += found
    if not tasks:
        raise ValueError("--tasks: give the names of tasks, such as arc_easy,hellaswag.")
    return tasks, manager


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[str],
    manager: "TaskManager",
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """
    The results of lm-eval.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        tasks (`list[str]`): What [`find_tasks`] found.
        manager (`lm_eval.tasks.TaskManager`): What knows them.
        batch_size (`int`): Requests to run at once.
        limit (`int`, *optional*): Examples of a task (default: all).

    Returns:
        `dict[str, dict]`: By task, values by `"metric,filter"`, as lm-eval names them.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # `backend`, because lm-eval does not look for registered classes.
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=harness_model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False
    )
    return found["results"]
