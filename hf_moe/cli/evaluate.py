# SPDX-License-Identifier: Apache-2.0
"""`hf-moe eval`: perplexity and routing per domain, how far experts specialise in domains, benchmarks of lm-eval."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from huggingface_hub.cli import out

from .display import count
from .harness import find_tasks, run_tasks
from .loading import DomainOpt, check_folder, load_model, read_text


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..training.statistics import RoutingStatistics


def evaluate(
    model: Annotated[str, typer.Argument(help="Language model, dense or a mixture of experts: a folder or a Hub id.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=FILE, a text of a domain; can be given several times, also for one domain."),
    ] = None,
    length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens of a window. Windows do not overlap, and the first token of each is not predicted: compare equal "
            "lengths only.",
        ),
    ] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each domain (default: all).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or requests of lm-eval, to run at once.")] = 1,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks to run with lm-eval, separated by commas: arc_easy,hellaswag.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each lm-eval task (default: all).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything, with the counts of the experts.")
    ] = None,
    domain: DomainOpt = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repo.")
    ] = False,
) -> None:
    """
    Measure a model: perplexity per domain, the routing of each, benchmarks.

    PERPLEXITY is exp of the mean loss of a token; BITS_PER_BYTE can be compared between models with other tokenizers. For
    mixtures of experts the table shows means over layers, and with two domains or more how far experts specialise.
    """
    domains = _read_domains(text or [])
    if not domains and tasks is None:
        raise ValueError("There is nothing to measure: give --text DOMAIN=FILE, --tasks NAMES, or both.")
    if tasks is None and (include_path is not None or limit is not None):
        raise ValueError("--include-path and --limit are for --tasks, which is not given.")
    check_folder(model)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    chosen = None if tasks is None else find_tasks(tasks, include_path)

    network, tokenizer = load_model(model, trust_remote_code, domain)
    report: dict[str, Any] = {"model": model}
    if domains:
        report |= {"length": length, **_measure_domains(network, tokenizer, domains, length, max_tokens, batch_size)}
        if out.mode != "json":
            _show_domains(report)
    if chosen is not None:
        report["tasks"] = run_tasks(network, tokenizer, *chosen, batch_size, limit)
        if out.mode != "json":
            _show_tasks(report["tasks"])
    if out.mode == "json":
        out.dict(report)
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.log(f"Wrote {output}")


def _read_domains(options: list[str]) -> dict[str, list[str]]:
    """The texts of each domain."""
    domains: dict[str, list[str]] = {}
    for option in options:
        domain, separator, path = option.partition("=")
        if not (domain and separator and path):
            raise ValueError(f"--text takes DOMAIN=FILE, such as code=code.txt, got {option!r}.")
        if not Path(path).is_file():
            raise ValueError(f"--text {option}: there is no file {path}.")
        domains.setdefault(domain, []).append(read_text(Path(path)))
    return domains


def _measure_domains(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    domains: dict[str, list[str]],
    length: int,
    max_tokens: int | None,
    batch_size: int,
) -> dict[str, Any]:
    from ..training.perplexity import perplexity
    from ..training.recorder import RoutingRecorder
    from ..training.routers import has_routers
    from ..training.specialization import ExpertSpecialization

    is_sparse = has_routers(network)
    statistics: dict[str, RoutingStatistics] = {}
    rows: dict[str, dict[str, Any]] = {}
    for domain, texts in domains.items():
        recorder = RoutingRecorder(network) if is_sparse else None
        try:
            with recorder or nullcontext():
                measured = perplexity(
                    network,
                    tokenizer,
                    texts,
                    length,
                    max_tokens=max_tokens,
                    batch_size=batch_size,
                    progress=not out.is_quiet(),
                )
        except ValueError as error:
            raise ValueError(f"{domain}: {error}") from error
        rows[domain] = measured.to_dict()
        if recorder is not None:
            statistics[domain] = recorder.statistics()
            rows[domain]["routing"] = statistics[domain].to_dict()
    report: dict[str, Any] = {"domains": rows}
    if len(statistics) > 1:
        report["specialization"] = ExpertSpecialization(statistics).to_dict()
    return report


def _show_domains(report: dict[str, Any]) -> None:
    from ..training.statistics import layer_number

    rows = [_domain_row(domain, values) for domain, values in report["domains"].items()]
    out.table(rows, id_key="perplexity", alignments=dict.fromkeys(list(rows[0])[1:], "right"))
    if "specialization" not in report or out.is_quiet():
        return
    found = report["specialization"]
    out.text("\nExperts that stand out\n")
    out.table(
        [
            {
                "domain": domain,
                "layer": layer_number(expert["layer"]),
                "expert": expert["expert"],
                "load": _number(expert["load"]),
                "load_elsewhere": _number(expert["load_elsewhere"]),
            }
            for domain, experts in found["top_experts"].items()
            for expert in experts
        ],
        alignments=dict.fromkeys(("layer", "expert", "load", "load_elsewhere"), "right"),
    )
    out.log(
        f"Specialisation {found['specialization']:.3f} of 1, mean over layers: an expert tells "
        f"{found['mutual_information']:.3f} nats about the domain ({found['bias']:.1g} by chance)."
    )


def _domain_row(domain: str, values: dict[str, Any]) -> dict[str, Any]:
    row = {
        "domain": domain,
        "tokens": count(values["num_tokens"]),
        "perplexity": _number(values["perplexity"]),
        "bits_per_byte": _number(values["bits_per_byte"]),
    }
    if "routing" in values:
        summary = values["routing"]["summary"]
        names = {"entropy": "entropy", "max_violation": "max_violation", "coefficient_of_variation": "cv"}
        row |= {column: _number(summary[name]) for name, column in names.items()}
        dead = summary["dead_fraction"]
        row["dead"] = f"{dead:.1%}" if out.mode == "human" else dead
    return row


def _show_tasks(tasks: dict[str, dict[str, Any]]) -> None:
    rows = []
    for task, values in tasks.items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not variant:
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if variant == "none" else f"{metric} ({variant})",
                    "value": _number(value),
                    "stderr": _number(stderr) if isinstance(stderr, int | float) else None,
                }
            )
    out.table(rows, id_key="value", alignments={"value": "right", "stderr": "right"})


def _number(value: float | None) -> str | float | None:
    """With three decimals for people, in full for programs."""
    return f"{value:.3f}" if out.mode == "human" and value is not None else value
