# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench`: measurements, each beside its limit and a peer, in turns on the same machine."""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import typer_factory
from huggingface_hub.cli import out
from huggingface_hub.utils import tqdm


bench = typer_factory(help="Measure hf_moe beside its limits and its peers.")


def upcycle(
    source: Annotated[str, typer.Argument(help="Dense model: a folder.")],
    num_experts: Annotated[
        list[int] | None, typer.Option(help="Can be given several times (default 4 and 32).")
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(help="Command of a peer; {source}, {output} and {num_experts} are filled in."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
) -> None:
    """Time and peak memory of a conversion, with and without proof, beside `cp` of the same bytes and a peer."""
    rows = []
    for number in num_experts or [4, 32]:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="hf-moe-bench-") as folder:
            commands = _upcycle_commands(source, number, Path(folder), peer)
            rows += _measure_in_turns(commands, Path(folder), number, runs)
    out.table(rows)


bench.command(
    "upcycle",
    examples=[
        "hf-moe bench upcycle ./model --num-experts 4 --num-experts 32",
        "hf-moe bench upcycle ./model --num-experts 4 --peer 'mergekit-moe recipe.yml {output} --device cpu'",
    ],
)(upcycle)


def _upcycle_commands(source: str, num_experts: int, folder: Path, peer: str | None) -> dict[str, list[str]]:
    """Command lines by name; each writes to `folder / name`, but `cp` copies the result of the first."""
    program = [sys.executable, "-c", "from hf_moe.cli.main import main; main()"]
    convert = [*program, "upcycle", source, "--num-experts", str(num_experts), "--quiet"]
    commands = {
        "upcycle": [*convert, str(folder / "upcycle")],
        "upcycle, no proof": [*convert, "--verify", "none", str(folder / "upcycle, no proof")],
        "cp": ["cp", "-r", str(folder / "upcycle"), str(folder / "cp")],
    }
    if peer is not None:
        filled = peer.format(
            source=shlex.quote(source), output=shlex.quote(str(folder / "peer")), num_experts=num_experts
        )
        commands["peer"] = shlex.split(filled)
    return commands


def _measure_in_turns(commands: dict[str, list[str]], folder: Path, num_experts: int, runs: int) -> list[dict]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, int] = dict.fromkeys(commands, 0)
    written: dict[str, int] = {}
    for _ in tqdm(
        range(runs), desc=f"{num_experts} experts", unit=" rounds", disable=True if out.is_quiet() else None
    ):
        for name, command in commands.items():
            wall, peak = _run(command)
            seconds[name].append(wall)
            memory[name] = max(memory[name], peak)
            written[name] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        for name in commands:
            shutil.rmtree(folder / name)
    first = statistics.median(seconds["upcycle"])
    return [
        {
            "experts": num_experts,
            "command": name,
            "median_s": round(statistics.median(values), 3),
            "min_s": round(min(values), 3),
            "max_s": round(max(values), 3),
            "relative": round(statistics.median(values) / first, 2),
            # A child starts with the memory of its parent on its account, which is more than `cp` ever needs.
            "peak_mib": memory[name] // 1024 if name != "cp" else None,
            "written_mb": written[name] // 10**6,
        }
        for name, values in seconds.items()
    ]


def _run(command: list[str]) -> tuple[float, int]:
    """Wall time in seconds and peak resident memory in KiB of one process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            message = errors.read().decode(errors="replace")[-2000:]
            raise ValueError(f"`{shlex.join(command)}` ended with {process.returncode}:\n{message}")
    return time.perf_counter() - started, usage.ru_maxrss
