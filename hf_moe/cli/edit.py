# SPDX-License-Identifier: Apache-2.0
"""`hf-moe expand`, `prune`, `merge`, `collapse`, `extract` and `insert`: changing mixtures of experts that exist."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from huggingface_hub.cli import out

from .display import count, error


if TYPE_CHECKING:
    from ..editing.edit import EditReport

Source = Annotated[str, typer.Argument(help="Mixture of experts: a folder or a Hub id.")]
Output = Annotated[Path, typer.Argument(help="Folder to write.")]
StatisticsOpt = Annotated[Path | None, typer.Option(help="Routing statistics, from `hf-moe inspect --output`.")]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
VerifyOpt = Annotated[bool, typer.Option(help="Compare the outputs with those of the source.")]
ShardOpt = Annotated[str, typer.Option(help="Largest weight file.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def expand(
    source: Source,
    output_dir: Output,
    factor: Annotated[int, typer.Option(help="By how much the number of experts grows.")] = 2,
    keep_top_k: Annotated[bool, typer.Option("--keep-top-k", help="A token takes as many experts as before.")] = False,
    noise: Annotated[float, typer.Option(help="Noise on the copies, relative to each tensor's std.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    statistics: StatisticsOpt = None,
    revision: RevisionOpt = None,
    verify: VerifyOpt = True,
    max_shard_size: ShardOpt = "5GB",
    overwrite: OverwriteOpt = False,
) -> None:
    """Duplicate experts. Exact if a token takes proportionally more of them, as by default."""
    options = locals()
    from ..editing.expand import expand_experts

    _run(expand_experts, options)


def prune(
    source: Source,
    output_dir: Output,
    keep: Annotated[int | None, typer.Option(help="Experts that stay in every layer; needs --statistics.")] = None,
    statistics: StatisticsOpt = None,
    drop: Annotated[list[int] | None, typer.Option(help="Expert to remove; can be given several times.")] = None,
    revision: RevisionOpt = None,
    verify: VerifyOpt = True,
    max_shard_size: ShardOpt = "5GB",
    overwrite: OverwriteOpt = False,
) -> None:
    """Remove the least used experts, or chosen ones."""
    options = locals()
    from ..editing.prune import prune_experts

    _run(prune_experts, options)


def merge(
    source: Source,
    output_dir: Output,
    num_experts: Annotated[int, typer.Option(help="Experts that are left in every layer.")],
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts per token (default: as before).")] = None,
    similarity: Annotated[str, typer.Option(help="What must be alike: weights or router.")] = "weights",
    statistics: StatisticsOpt = None,
    revision: RevisionOpt = None,
    verify: VerifyOpt = True,
    max_shard_size: ShardOpt = "5GB",
    overwrite: OverwriteOpt = False,
) -> None:
    """Merge the most similar experts into their means."""
    options = locals()
    from ..editing.merge import merge_experts

    options["num_experts_per_tok"] = options.pop("top_k")
    _run(merge_experts, options)


def collapse(
    source: Source,
    output_dir: Output,
    expert: Annotated[str, typer.Option(help="mean, or the index of one expert.")] = "mean",
    revision: RevisionOpt = None,
    verify: VerifyOpt = True,
    max_shard_size: ShardOpt = "5GB",
    overwrite: OverwriteOpt = False,
) -> None:
    """Make a dense model again. Gives the parent back to the bit as long as nothing was trained."""
    options = locals()
    from ..editing.collapse import collapse

    options["expert"] = int(expert) if expert.isdecimal() else expert
    _run(collapse, options)


def extract(
    source: Source,
    file: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    expert: Annotated[int, typer.Option(help="Index of the expert, the same in all layers.")],
    layers: Annotated[str | None, typer.Option(help="Layers to take: 4,6,8-11, ::2 or -4: (default all).")] = None,
    revision: RevisionOpt = None,
    overwrite: OverwriteOpt = False,
) -> None:
    """Write one expert and its rows of the router into a file of its own."""
    from ..editing.expert_file import extract_expert

    written = extract_expert(
        source,
        file,
        expert=expert,
        layers=layers,
        revision=revision,
        overwrite=overwrite,
        progress=not out.is_quiet(),
    )
    sizes = {name: written.metadata[name] for name in ("hidden_size", "intermediate_size", "dtype")}
    out.result(
        f"Wrote {file}",
        file=str(file),
        expert=expert,
        layers=len(written.layers),
        **sizes,
        bytes_written=count(file.stat().st_size),
    )


def insert(
    source: Source,
    file: Annotated[Path, typer.Argument(help="Expert that `hf-moe extract` wrote.")],
    output_dir: Output,
    position: Annotated[int | None, typer.Option(help="Index that it gets (default: behind the last).")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the expert there.")] = False,
    revision: RevisionOpt = None,
    verify: VerifyOpt = True,
    max_shard_size: ShardOpt = "5GB",
    overwrite: OverwriteOpt = False,
) -> None:
    """Put an expert that was extracted into a mixture of experts."""
    options = locals()
    from ..editing.expert_file import insert_expert

    _run(insert_expert, options)


def _run(operation: Callable[..., "EditReport"], options: dict[str, Any]) -> None:
    try:
        report = operation(options.pop("source"), **options, progress=not out.is_quiet())
    except KeyboardInterrupt:
        out.error("Interrupted. Run the same command again: it goes on where it stopped.")
        raise SystemExit(130) from None
    experts = {}
    if report.num_experts is not None:
        experts = {"num_experts": report.num_experts, "num_experts_per_tok": report.num_experts_per_tok}
    out.result(
        f"Wrote {report.output_dir}",
        output_dir=str(report.output_dir),
        model_type=report.model_type,
        **experts,
        exact=None if report.measured is None else report.exact,
        **({"inexact_because": report.inexact_because} if report.inexact_because and not report.exact else {}),
        max_relative_error=error(report.max_relative_error),
        top1_agreement=None if report.measured is None else round(report.measured["float32"]["top1_agreement"], 4),
        num_parameters=count(report.num_parameters),
        num_active_parameters=count(report.num_active_parameters),
        bytes_written=count(report.bytes_written),
        seconds=round(report.seconds, 1),
    )
