# SPDX-License-Identifier: Apache-2.0
"""`hf-moe doctor`: whether an adapter on disk is what it will be on a model, and what of the model would train."""

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from huggingface_hub.cli import out

from .loading import read_text


if TYPE_CHECKING:
    import torch

    from ..adapters.checks import Check
    from ..adapters.doctor import Diagnosis


LENGTH = 128  # of a sequence of --run


def doctor(
    adapter: Annotated[str, typer.Argument(help="LoRA adapter: a folder or a Hub id.")],
    base: Annotated[
        str | None,
        typer.Option(help="Mixture of experts: a folder or a Hub id (default: the one that the adapter names)."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Load the model: does the adapter change logits, do gradients reach experts?")
    ] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Folder for a copy in today's layout, of a file of PEFT before 0.19.1.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file for --run (default: random tokens).")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens for --run.")] = 512,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repo.")
    ] = False,
) -> None:
    """
    Compare an adapter with a model: names, shapes, values, layout, effect; say what would train.

    Ends with status 1 if something is wrong.
    """
    import dataclasses

    from ..adapters.doctor import convert_adapter, diagnose

    if fix is not None and fix.exists():
        raise ValueError(f"--fix: {fix} is there already. Choose a folder that is not.")
    if text is not None and not (run and text.is_file()):
        raise ValueError(f"--text: there is no file {text}." if run else "--text is for --run.")
    progress = not out.is_quiet()
    diagnosis = diagnose(adapter, base, trust_remote_code, progress)
    if fix is not None:
        convert_adapter(diagnosis, fix, progress)
        out.log(f"Wrote {fix}, in which every expert's factors have the same product as before. What it is like now:")
        diagnosis = diagnose(fix, base, trust_remote_code, progress)
    if run:
        diagnosis = dataclasses.replace(
            diagnosis, checks=[*diagnosis.checks, *_run(diagnosis, text, max_tokens, trust_remote_code)]
        )
    _show(diagnosis)
    if diagnosis.problems:
        raise SystemExit(1)


def _show(diagnosis: "Diagnosis") -> None:
    from ..adapters.checks import PROBLEM, WARNING

    if out.mode == "json":
        out.dict(diagnosis.to_dict())
    elif not out.is_quiet():
        out.text(f"{diagnosis.adapter} on {diagnosis.base}\n")
        out.table([{"check": check.name, "result": check.status, "found": check.found} for check in diagnosis.checks])
        if diagnosis.report is not None:
            out.text(f"\n{diagnosis.report.summary()}")
    for check in diagnosis.checks:
        if check.status == PROBLEM:
            out.error(_wrapped(f"{check.name}: {check.details}"))
        elif check.status == WARNING:
            out.warning(_wrapped(f"{check.name}: {check.details}"))


def _wrapped(text: str) -> str:
    """In lines of the terminal, and in one where it is none."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns - len("Warning: ")
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _run(diagnosis: "Diagnosis", text: Path | None, max_tokens: int, trust_remote_code: bool) -> "list[Check]":
    import warnings

    from peft import PeftModel

    from ..adapters.base_model import with_weights
    from ..adapters.checks import SKIPPED, Check
    from ..adapters.grouped_lora import enable_grouped_lora, expert_wrappers
    from ..adapters.trial import try_adapter

    if any(check.name != "effect" for check in diagnosis.problems):
        return [Check("run", SKIPPED, "the problems above come first")]
    network = with_weights(diagnosis.base, diagnosis.file.config.get("task_type"), trust_remote_code)
    input_ids = _tokens(diagnosis.base, network.config, text, max_tokens, trust_remote_code)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, for PEFT
        model = PeftModel.from_pretrained(network, str(diagnosis.file.folder), is_trainable=True)
    if any(True for _ in expert_wrappers(model)):
        enable_grouped_lora(model)
    status = out.status(f"Running {input_ids.numel()} tokens, forward and backward ...")
    checks = try_adapter(model, input_ids)
    status.done(f"Ran {input_ids.numel()} tokens, forward and backward.")
    return checks


def _tokens(base: str, config, text: Path | None, max_tokens: int, trust_remote_code: bool) -> "torch.Tensor":
    """`(B, S)` token ids."""
    import torch
    from transformers import AutoTokenizer

    if text is None:
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (max_tokens,), generator=torch.Generator().manual_seed(0))
    else:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
        ids = tokenizer(read_text(text), return_tensors="pt", verbose=False)["input_ids"][0]
        if not len(ids):
            raise ValueError(f"--text: there is no text in {text}.")
        ids = ids[:max_tokens]
    length = min(len(ids), LENGTH, getattr(config.get_text_config(), "max_position_embeddings", LENGTH))
    return ids[: len(ids) // length * length].view(-1, length)
