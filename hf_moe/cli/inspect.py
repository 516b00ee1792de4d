# SPDX-License-Identifier: Apache-2.0
"""`hf-moe inspect`: which experts serve a text, as a table, JSON or a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from huggingface_hub.cli import out

from .loading import DomainOpt, check_folder, load_model, read_text, taken_as


if TYPE_CHECKING:
    import torch

    from ..training.history import RoutingHistory
    from ..training.statistics import LayerRouting


def inspect(
    model: Annotated[str, typer.Argument(help="Mixture of experts: a folder or a Hub id.")],
    text: Annotated[list[Path], typer.Option(help="Text file to run through the model; can be given several times.")],
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: heat map layer x expert with entropy.")] = None,
    plot_domains: Annotated[
        Path | None, typer.Option(help="PNG to draw: which experts serve which text, if there are several.")
    ] = None,
    plot_pairs: Annotated[Path | None, typer.Option(help="PNG to draw: which experts are chosen together.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="HTML page to write: the first sequence, coloured by expert, layer by layer.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write figures and pictures into the README.md of the model's folder.")
    ] = False,
    history: Annotated[
        Path | None,
        typer.Option(help="With --card: folder that RouterStatisticsCallback(folder=...) wrote in training."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the full statistics.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to run in all.")] = 8192,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 512,
    domain: DomainOpt = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repo.")
    ] = False,
) -> None:
    """Run text through a model and show the load of every layer's experts."""
    import torch
    from huggingface_hub.utils import tqdm

    from ..hub.routing_section import add_routing_section
    from ..plots import plot_coactivation, plot_load, plot_specialization
    from ..training.recorder import RoutingRecorder
    from ..training.statistics import RoutingStatistics

    _check_paths(model, text)
    of_training = _check_card(model, card, history)
    if plot_domains is not None and len(set(text)) < 2:
        raise ValueError("--plot-domains compares texts. Give --text at least twice, with different files.")
    if max_tokens < len(text):
        raise ValueError(f"--max-tokens is {max_tokens}, which is less than a token for each of {len(text)} texts.")
    pictures = (plot, plot_domains, plot_pairs)
    for path in (*pictures, html, output):
        if path is not None:
            _check_output(path, path in pictures)
            path.parent.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load_model(model, trust_remote_code, domain)
    sequences = [
        (path, sequence) for path in text for sequence in _sequences(tokenizer, path, max_tokens // len(text), length)
    ]
    recorders = {path: RoutingRecorder(network, coactivation=plot_pairs is not None) for path in text}
    quiet = True if out.is_quiet() else None
    for path, sequence in tqdm(sequences, desc="Routing", unit=" sequences", disable=quiet):
        with recorders[path], torch.no_grad():
            network(sequence.to(network.device), logits_to_keep=1)
    by_text = {path: recorder.statistics() for path, recorder in recorders.items()}
    stems = [path.stem for path in by_text]
    by_name = {str(path) if stems.count(path.stem) > 1 else path.stem: of for path, of in by_text.items()}
    statistics = RoutingStatistics.sum(by_text.values())
    if out.mode == "json":
        out.dict(statistics.to_dict())
    else:
        # What is the same in all layers is said once, below.
        shows_slots = len({layer.experts_per_token for layer in statistics.layers.values()}) > 1
        out.table([_row(name, layer, shows_slots) for name, layer in statistics.layers.items()])
    mean = "  ".join(f"{name} {value:.3f}" for name, value in statistics.summary().items())
    out.log(f"{sum(sequence.numel() for _, sequence in sequences):,} tokens; mean over layers: {mean}")
    title = f"{Path(model).name}: {', '.join(path.name for path in text)}"
    if output is not None:
        statistics.save(output)
    if plot is not None:
        plot_load(statistics, plot, title)
    if plot_domains is not None:
        plot_specialization(by_name, plot_domains, Path(model).name)
    if plot_pairs is not None:
        pairs = [recorder.coactivation() for recorder in recorders.values()]
        plot_coactivation(
            {name: sum(of[name] for of in pairs).numpy() for name in pairs[0]}, plot_pairs, title, statistics
        )
    if html is not None:
        first, sequence = sequences[0]
        _write_page(network, tokenizer, sequence, statistics, html, f"{Path(model).name}: {first.name}")
    if card:
        add_routing_section(model, by_name, of_training, taken_as(network.config, domain))
    for path in (output, plot, plot_domains, plot_pairs, html, Path(model, "README.md") if card else None):
        if path is not None:
            out.log(f"Wrote {path}")


def _write_page(network, tokenizer, sequence: "torch.Tensor", statistics, path: Path, title: str) -> None:
    import torch

    from ..token_page import routing_page
    from ..training.recorder import RoutingRecorder

    with RoutingRecorder(network, keep_choices=True) as recorder, torch.no_grad():
        network(sequence.to(network.device), logits_to_keep=1)
    num_experts = max(len(layer.counts) for layer in statistics.layers.values())
    routing_page(tokenizer.batch_decode(sequence[0][:, None]), recorder.choices(), num_experts, path, title)


def _check_paths(model: str, texts: list[Path]) -> None:
    """Refuse what cannot work before anything is loaded."""
    for path in texts:
        if not path.is_file():
            raise ValueError(f"--text: there is no file {path}.")
    check_folder(model)


def _check_output(path: Path, is_picture: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give a file to write.")
    if is_picture and path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{path} is no name of a picture. End it with .png, .pdf or .svg.")


def _check_card(model: str, card: bool, history: Path | None) -> "RoutingHistory | None":
    from ..hub.routing_section import split_card
    from ..training.history import RoutingHistory

    if history is not None and not card:
        raise ValueError("--history is for the card. Give --card too.")
    if card and not Path(model).is_dir():
        raise ValueError(f"--card writes into the folder of a model, and {model} is none.")
    if card:
        split_card(model)  # or an error, before anything is loaded
    if history is None:
        return None
    of_training = RoutingHistory.load(history)
    if not of_training.steps:
        raise ValueError(f"The history in {history} is empty: nothing was logged.")
    return of_training


def _row(name: str, layer: "LayerRouting", shows_slots: bool) -> dict[str, str | int]:
    from ..training.statistics import layer_number

    load = layer.load.tolist()
    slots = {"experts/token": f"{layer.experts_per_token:.2f}"} if shows_slots else {}
    if layer.num_dropped:
        slots["dropped"] = f"{layer.dropped_fraction:.1%}"
    if layer.num_zero_computation_experts:
        slots["no computation"] = f"{layer.zero_computation_fraction:.1%}"
    row: dict[str, str | int] = {
        "layer": layer_number(name),
        "entropy": f"{layer.entropy:.3f}",
        "max_violation": f"{layer.max_violation:.3f}",
        "cv": f"{layer.coefficient_of_variation:.3f}",
        "dead": len(layer.dead_experts),
        **slots,
    }
    if len(load) <= 8:
        shares = [f"{share:.2f}" for share in load]
        if layer.num_zero_computation_experts:  # stand behind a bar
            shares.insert(len(shares) - layer.num_zero_computation_experts, "|")
        return row | {"load": " ".join(shares)}
    return row | {"least": f"{min(load):.4f}", "most": f"{max(load):.4f}"}


def _sequences(tokenizer, path: Path, max_tokens: int, length: int) -> "list[torch.Tensor]":
    """`(1, S)` token ids of at most `length`."""
    import torch

    ids = tokenizer(read_text(path), return_tensors="pt", verbose=False)["input_ids"]
    sequences = [sequence for sequence in torch.split(ids[:, :max_tokens], length, dim=1) if sequence.numel()]
    if not sequences:
        raise ValueError(f"There is no text in {path}.")
    return sequences
