# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench`: measurements, each beside its limit and a peer, in turns on the same machine."""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub import typer_factory
from huggingface_hub.cli import out
from huggingface_hub.utils import tqdm


bench = typer_factory(help="Measure hf_moe beside its limits and its peers.")


def upcycle(
    source: Annotated[
        str | None, typer.Argument(help="Dense model: a folder. Without it a random Llama of 1.0B parameters is made.")
    ] = None,
    num_experts: Annotated[
        list[int] | None, typer.Option(help="Can be given several times (default 4 and 32).")
    ] = None,
    mergekit: Annotated[
        Path | None, typer.Option(help="The program mergekit-moe, in an environment of its own, to do the same job.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
) -> None:
    """
    Time and peak memory of a conversion beside `cp` of the same bytes and mergekit-moe, in turns.

    "conversion" is the time of the call itself in the runs without proof, "process start" that of the imports.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="hf-moe-bench-") as folder:
        if source is None:
            source = str(Path(folder) / "dense")
            # In a process of its own, since the memory of this one is on the account of every child.
            make = "import sys; from hf_moe.cli.bench import make_llama; make_llama(sys.argv[1])"
            _run([sys.executable, "-c", make, source])
        for number in num_experts or [4, 32]:
            rows += _measure_in_turns(
                _upcycle_commands(source, number, Path(folder), mergekit), Path(folder), number, runs
            )
    out.table(rows)


def make_llama(folder: str) -> None:
    """A Llama of 1.0B parameters in the proportions of Llama-3.2-1B, in bfloat16 and with a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


bench.command(
    "upcycle",
    examples=[
        "hf-moe bench upcycle ./model --num-experts 4 --num-experts 32",
        "hf-moe bench upcycle --num-experts 2 --num-experts 8",
        "hf-moe bench upcycle ./model --num-experts 4 --mergekit mergekit/bin/mergekit-moe",
    ],
)(upcycle)


def _upcycle_commands(source: str, num_experts: int, folder: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """Command lines by name; each writes to `folder / name`, but `cp` copies the result of the first."""
    program = [sys.executable, "-c", "from hf_moe.cli.main import main; main()"]
    convert = [*program, "upcycle", source, "--num-experts", str(num_experts), "--json"]
    commands: dict[str, list[str]] = {}
    if mergekit is not None:  # first, so that one that does not work is found out at once
        recipe = folder / f"mergekit-{num_experts}.yml"
        recipe.write_text(yaml.safe_dump(_mergekit_recipe(source, num_experts)), encoding="utf-8")
        options = ["--device", "cpu", "--i-understand-this-is-not-useful-without-training"]
        commands["mergekit-moe"] = [str(mergekit), str(recipe), str(folder / "mergekit-moe"), *options]
    commands |= {
        "upcycle": [*convert, str(folder / "upcycle")],
        "upcycle, no proof": [*convert, "--verify", "none", str(folder / "upcycle, no proof")],
        "process start": [sys.executable, "-c", "import hf_moe.cli.main, hf_moe.upcycling.upcycle"],
        "cp": ["cp", "-r", str(folder / "upcycle"), str(folder / "cp")],
    }
    return commands


def _mergekit_recipe(source: str, num_experts: int) -> dict[str, Any]:
    """Copies of a model's feed-forwards with a random router, in the words of mergekit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(f"mergekit-moe makes no Mixtral of a {config.model_type}. Leave --mergekit out.")
    return {
        "base_model": source,
        "architecture": "mixtral",
        "gate_mode": "random",
        "dtype": str(config.dtype).removeprefix("torch."),
        "experts_per_token": 2,
        "experts": [{"source_model": source} for _ in range(num_experts)],
    }


def _measure_in_turns(commands: dict[str, list[str]], folder: Path, num_experts: int, runs: int) -> list[dict]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    seconds["conversion"] = []
    memory: dict[str, int] = dict.fromkeys(seconds, 0)
    written: dict[str, int] = dict.fromkeys(seconds, 0)
    for _ in tqdm(
        range(runs), desc=f"{num_experts} experts", unit=" rounds", disable=True if out.is_quiet() else None
    ):
        for name, command in commands.items():
            wall, peak, printed = _run(command)
            seconds[name].append(wall)
            memory[name] = max(memory[name], peak)
            written[name] = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
            if name == "upcycle, no proof":
                seconds["conversion"].append(json.loads(printed)["seconds"])
        for name in commands:
            shutil.rmtree(folder / name, ignore_errors=True)
    copy = statistics.median(seconds["cp"])
    return [
        {
            "experts": num_experts,
            "command": name,
            "median_s": round(statistics.median(values), 3),
            "min_s": round(min(values), 3),
            "max_s": round(max(values), 3),
            "times_cp": round(statistics.median(values) / copy, 2),
            # A child starts with the memory of its parent on its account, which is more than `cp` ever needs.
            "peak_mib": memory[name] // 1024 if name not in ("cp", "conversion") else None,
            "written_mb": written[name] // 10**6 or None,
        }
        for name, values in seconds.items()
    ]


def _run(command: list[str]) -> tuple[float, int, str]:
    """Wall time in seconds and peak resident memory in KiB of one process, and what it printed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=printed, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            message = errors.read().decode(errors="replace")[-2000:]
            raise ValueError(f"`{shlex.join(command)}` ended with {process.returncode}:\n{message}")
        seconds = time.perf_counter() - started
        printed.seek(0)
        return seconds, usage.ru_maxrss, printed.read().decode(errors="replace")
