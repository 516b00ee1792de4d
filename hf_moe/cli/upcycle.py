# SPDX-License-Identifier: Apache-2.0
"""`hf-moe plan` and `hf-moe upcycle`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from huggingface_hub.cli import out

from .display import count as _count
from .display import error as _error


if TYPE_CHECKING:
    from ..upcycling.advice import Advice
    from ..upcycling.recipe import UpcycleConfig
    from ..upcycling.report import UpcycleReport

Source = Annotated[str, typer.Argument(help="Dense model: a folder or a Hub id.")]
RecipeOpt = Annotated[Path | None, typer.Option(help="YAML file with fields of UpcycleConfig; options override it.")]
MethodOpt = Annotated[
    str | None,
    typer.Option(help="How experts are made: copy (default), residual, granular, drop, qwen, split or compose."),
]
NumExpertsOpt = Annotated[int | None, typer.Option(help="Routed experts per layer (default 8).")]
ExpertOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", help="Checkpoint of one expert, for compose: folder, Hub id[@revision] or 'base'. Repeat it."
    ),
]
ComposeRestOpt = Annotated[
    str | None, typer.Option(help="For compose, where the rest comes from: base (default) or mean of the experts.")
]
TopKOpt = Annotated[int | None, typer.Option("--top-k", help="Routed experts per token (default 2).")]
TargetOpt = Annotated[str | None, typer.Option(help="Class of the result: auto (default), native or hf_moe.")]
LayersOpt = Annotated[str | None, typer.Option(help="Layers to convert: 4,6,8-11, ::2 or -4: (default all).")]
NormTopKOpt = Annotated[bool | None, typer.Option(help="Divide the experts' weights by their sum (default yes).")]
RouterTypeOpt = Annotated[
    str | None,
    typer.Option(
        help="Router of the result, e.g. sigmoid_topk, switch or top_p (default softmax_topk, or what a native class has); its options "
        "are --set router_options='{router_top_p: 0.3}'."
    ),
]
LogitStdOpt = Annotated[float | None, typer.Option(help="Standard deviation of the router logits (default 1.0).")]
SeedOpt = Annotated[int | None, typer.Option(help="Seed of everything random (default 0).")]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other field of UpcycleConfig, e.g. --set granularity=4 or --set router_init=zero. Can be given several times.",
    ),
]
VerifyOpt = Annotated[
    str | None, typer.Option(help="What to compare: full (default), layers, per_expert (compose) or none.")
]


def plan(
    source: Source,
    recipe: RecipeOpt = None,
    method: MethodOpt = None,
    num_experts: NumExpertsOpt = None,
    expert: ExpertOpt = None,
    compose_rest: ComposeRestOpt = None,
    top_k: TopKOpt = None,
    target: TargetOpt = None,
    layers: LayersOpt = None,
    norm_topk_prob: NormTopKOpt = None,
    router_type: RouterTypeOpt = None,
    set_: SetOpt = None,
    revision: RevisionOpt = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens to train on, e.g. 50B: which method does the published evidence support?"),
    ] = None,
    dense_tokens: Annotated[
        str | None, typer.Option(help="Tokens that the dense model was trained on, e.g. 2T.")
    ] = None,
) -> None:
    """Say what a conversion would give: class, exactness, parameters, memory, FLOPs. Reads no weights."""
    from ..upcycling.advice import advise, estimate_memory, parse_tokens
    from ..upcycling.plan import plan_upcycle

    result = plan_upcycle(source, _recipe(recipe, locals()), revision=revision)
    memory = estimate_memory(result)
    if dense_tokens is not None and tokens is None:
        raise ValueError("--dense-tokens needs --tokens: advice weighs the one against the other.")
    advice = None
    if tokens is not None:
        advice = advise(parse_tokens(tokens), None if dense_tokens is None else parse_tokens(dense_tokens))
    out.result(
        f"{source} can become {result.architecture}",
        **{
            "architecture": result.architecture,
            "model_type": result.model_type,
            "native": result.native,
            "exact": result.exact,
            "inexact_because": result.inexact_because,
            **({"warnings": result.warnings, "misread_by": result.misread_by} if out.mode != "human" else {}),
            "sparse_layers": f"{len(result.sparse_layers)} of {result.config.num_hidden_layers}",
            "num_parameters": _count(result.num_parameters),
            "num_active_parameters": _count(result.num_active_parameters),
            "num_dense_parameters": _count(result.num_dense_parameters),
            "bytes": _count(result.bytes),
            "flops_per_token": _count(result.flops_per_token),
            "flops_relative_to_dense": round(result.flops_per_token / result.dense_flops_per_token, 3),
            "bytes_to_train": _count(memory.train),
            "bytes_to_train_lora": _count(memory.train_lora),
            "bytes_to_serve": _count(memory.serve),
            **(_advice(advice) if advice is not None else {}),
        },
    )
    for warning in result.warnings:
        out.warning(warning)
    if advice is not None:
        for statement in advice.evidence:
            out.text(f"\n{statement.text}.\n  {statement.source}")


def upcycle(
    source: Source,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: RecipeOpt = None,
    method: MethodOpt = None,
    num_experts: NumExpertsOpt = None,
    expert: ExpertOpt = None,
    compose_rest: ComposeRestOpt = None,
    top_k: TopKOpt = None,
    target: TargetOpt = None,
    layers: LayersOpt = None,
    norm_topk_prob: NormTopKOpt = None,
    router_type: RouterTypeOpt = None,
    router_logit_std: LogitStdOpt = None,
    seed: SeedOpt = None,
    verify: VerifyOpt = None,
    set_: SetOpt = None,
    revision: RevisionOpt = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Convert a dense model into a mixture of experts, and prove what was preserved."""
    from ..upcycling.expert_parity import largest_error
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
        exact=None if report.parity is None else report.exact,
        **({"inexact_because": report.inexact_because} if report.inexact_because else {}),
        max_relative_error=_error(report.max_relative_error),
        **(
            {f"max_relative_error_{low_precision}": _error(largest_error(parity[low_precision]))}
            if low_precision
            else {}
        ),
        **_routing(report),
        **({"expert_noise": round(report.expert_noise, 6)} if report.expert_noise else {}),
        expert_errors=_errors(report.expert_errors),
        num_parameters=_count(report.num_parameters),
        num_active_parameters=_count(report.num_active_parameters),
        bytes_written=_count(report.bytes_written),
        seconds=round(report.seconds, 1 if out.mode == "human" else 3),
    )


def _advice(advice: "Advice") -> dict[str, Any]:
    """The advice as fields; programs get the evidence among them, people as text below."""
    fields: dict[str, Any] = {"advised_method": advice.method, "advised_because": advice.because}
    if out.mode != "human":
        fields["evidence"] = [dataclasses.asdict(statement) for statement in advice.evidence]
    return fields


def _routing(report: "UpcycleReport") -> dict[str, Any]:
    """How the untrained routers spread the tokens, if it was measured."""
    if report.routing is None:
        return {}
    summary = report.routing.summary()
    dead = sum(len(layer.dead_experts) for layer in report.routing.layers.values())
    return {"routing_entropy": round(summary["entropy"], 3), "experts_without_token": dead}


def _errors(values: dict[str, float] | None) -> str | dict[str, float] | None:
    if out.mode != "human" or values is None:
        return values
    return ", ".join(f"{_error(error)} ({entry})" for entry, error in values.items())


def _recipe(path: Path | None, options: dict[str, Any]) -> "UpcycleConfig":
    """The recipe file, if there is one, with the options that were given in place of its fields."""
    from ..upcycling.recipe import UpcycleConfig
    from ..upcycling.typos import did_you_mean

    values = UpcycleConfig.from_yaml(path).to_dict() if path is not None else {}
    fields = {field.name for field in dataclasses.fields(UpcycleConfig)}
    values.update({name: value for name, value in options.items() if name in fields and value is not None})
    if options["top_k"] is not None:
        values["num_experts_per_tok"] = options["top_k"]
    if options["expert"]:
        values["experts"] = options["expert"]
        values["num_experts"] = options["num_experts"]  # as many as were given, whatever the file had
    for assignment in options["set_"] or []:
        name, separator, value = assignment.partition("=")
        if not separator or name not in fields:
            hint = did_you_mean([name], sorted(fields)) if name not in fields else ""
            raise ValueError(f"--set takes field=value with a field of {sorted(fields)}, got {assignment!r}.{hint}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name}: {value!r} is no value in YAML.") from error
    return UpcycleConfig(**values)
