# SPDX-License-Identifier: Apache-2.0
"""`hf-moe plan` and `hf-moe upcycle`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from huggingface_hub.cli import out

from .display import count as _count
from .display import error as _error


if TYPE_CHECKING:
    from ..upcycling.recipe import UpcycleConfig

Source = Annotated[str, typer.Argument(help="Dense model: a folder or a Hub id.")]
RecipeOpt = Annotated[Path | None, typer.Option(help="YAML file with fields of UpcycleConfig; options override it.")]
MethodOpt = Annotated[str | None, typer.Option(help="How experts are made: copy (default) or residual.")]
NumExpertsOpt = Annotated[int | None, typer.Option(help="Routed experts per layer (default 8).")]
TopKOpt = Annotated[int | None, typer.Option("--top-k", help="Routed experts per token (default 2).")]
TargetOpt = Annotated[str | None, typer.Option(help="Class of the result: auto (default), native or hf_moe.")]
LayersOpt = Annotated[str | None, typer.Option(help="Layers to convert: 4,6,8-11, ::2 or -4: (default all).")]
NormTopKOpt = Annotated[bool | None, typer.Option(help="Divide the experts' weights by their sum (default yes).")]
LogitStdOpt = Annotated[float | None, typer.Option(help="Standard deviation of the router logits (default 1.0).")]
SeedOpt = Annotated[int | None, typer.Option(help="Seed of everything random (default 0).")]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
VerifyOpt = Annotated[str | None, typer.Option(help="What to compare: full (default), layers or none.")]


def plan(
    source: Source,
    recipe: RecipeOpt = None,
    method: MethodOpt = None,
    num_experts: NumExpertsOpt = None,
    top_k: TopKOpt = None,
    target: TargetOpt = None,
    layers: LayersOpt = None,
    norm_topk_prob: NormTopKOpt = None,
    revision: RevisionOpt = None,
) -> None:
    """Say what a conversion would give: class, exactness, parameters, bytes, FLOPs. Reads no weights."""
    from ..upcycling.plan import plan_upcycle

    result = plan_upcycle(source, _recipe(recipe, locals()), revision=revision)
    out.result(
        f"{source} can become {result.architecture}",
        **{
            "architecture": result.architecture,
            "model_type": result.model_type,
            "native": result.native,
            "exact": result.exact,
            "inexact_because": result.inexact_because,
            "sparse_layers": f"{len(result.sparse_layers)} of {result.config.num_hidden_layers}",
            "num_parameters": _count(result.num_parameters),
            "num_active_parameters": _count(result.num_active_parameters),
            "num_dense_parameters": _count(result.num_dense_parameters),
            "bytes": _count(result.bytes),
            "flops_per_token": _count(result.flops_per_token),
            "flops_relative_to_dense": round(result.flops_per_token / result.dense_flops_per_token, 3),
        },
    )


def upcycle(
    source: Source,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: RecipeOpt = None,
    method: MethodOpt = None,
    num_experts: NumExpertsOpt = None,
    top_k: TopKOpt = None,
    target: TargetOpt = None,
    layers: LayersOpt = None,
    norm_topk_prob: NormTopKOpt = None,
    router_logit_std: LogitStdOpt = None,
    seed: SeedOpt = None,
    verify: VerifyOpt = None,
    revision: RevisionOpt = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Convert a dense model into a mixture of experts, and prove what was preserved."""
    from ..upcycling.upcycle import upcycle as run

    try:
        report = run(
            source,
            output_dir,
            _recipe(recipe, locals()),
            revision=revision,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=not out.is_quiet(),
        )
    except KeyboardInterrupt:
        out.error("Interrupted. Run the same command again: it goes on where it stopped.")
        raise SystemExit(130) from None
    parity = report.parity or {}
    low_precision = next((name for name in parity if name.endswith("float16")), None)
    out.result(
        f"Wrote {report.output_dir}",
        output_dir=str(report.output_dir),
        model_type=report.model_type,
        exact=report.exact,
        max_relative_error=_error(report.max_relative_error),
        **(
            {f"max_relative_error_{low_precision}": _error(parity[low_precision].get("max_relative_error"))}
            if low_precision
            else {}
        ),
        num_parameters=_count(report.num_parameters),
        num_active_parameters=_count(report.num_active_parameters),
        bytes_written=_count(report.bytes_written),
        seconds=round(report.seconds, 1),
    )


def _recipe(path: Path | None, options: dict[str, Any]) -> "UpcycleConfig":
    """The recipe file, if there is one, with the options that were given in place of its fields."""
    from ..upcycling.recipe import UpcycleConfig

    values = UpcycleConfig.from_yaml(path).to_dict() if path is not None else {}
    fields = {field.name for field in dataclasses.fields(UpcycleConfig)}
    values.update({name: value for name, value in options.items() if name in fields and value is not None})
    if options["top_k"] is not None:
        values["num_experts_per_tok"] = options["top_k"]
    return UpcycleConfig(**values)
