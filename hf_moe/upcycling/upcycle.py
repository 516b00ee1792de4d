# SPDX-License-Identifier: Apache-2.0
"""`upcycle`: a dense checkpoint on disk or on the Hub becomes a MoE checkpoint on disk, streamed, proved and resumable."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import CardData
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ..hub.card import licence, read_parent_card, write_model_card
from ..models.routers import ROUTERS
from ..training.statistics import RoutingStatistics
from ..version import __version__
from .calibration import Calibration, Observations, calibrate, read_calibration
from .checkpoint import Checkpoint, load_tokenizer
from .compose import BASE, parse_expert
from .convert import Step, plan_steps
from .errors import UpcycleError
from .expert_parity import check_expert_parity, largest_error, measure_expert_parity
from .feed_forward import FeedForward
from .legacy_config import add_legacy_keys
from .methods import METHODS
from .noise import find_expert_noise
from .output import OutputFolder, write_model_files, write_provenance
from .parents import Composition, compose_parents, open_experts, open_parent
from .parity import FLOAT32_BOUND, check_parity, measure_parity, summarize
from .plan import UpcyclePlan, plan_upcycle
from .recipe import UpcycleConfig
from .report import UpcycleReport
from .ridge import RIDGE_FOLDER
from .router_facts import describe_router
from .routing import DEFAULT_ROUTER, weight_sum
from .sample import Sample, describe_sample, draw_sample
from .streaming import Side, streamed_model
from .targets import dense_class, find_family, layer_prefix, meta_model
from .writer import ShardWriter


logger = logging.get_logger(__name__)
OBSERVATIONS, NOISE = ".upcycle-observations.safetensors", ".upcycle-noise"


def upcycle(
    source: str | Path,
    output_dir: str | Path,
    config: UpcycleConfig | None = None,
    *,
    revision: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> UpcycleReport:
    r"""
    Convert a dense model into a mixture of experts.

    Tensors are read and written one at a time, so memory grows neither with the model nor with the number of experts.
    The work is done in `<output_dir>.incomplete`, which becomes `output_dir` at the end; if the call is interrupted, the
    same call goes on where it stopped. The folder holds weights, configuration, tokenizer, generation config, the code
    of the class if it is ours, `hf_moe.json` (recipe, parent, parity) and a model card.

    Args:
        source (`str` or `Path`): The dense model, a folder or a Hub id. With method `"compose"` the base of the experts.
        output_dir (`str` or `Path`): The folder to write.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Largest weight file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` is replaced, once the new
            one is complete; an interrupted conversion is then thrown away.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`UpcycleReport`]

    Raises:
        UpcycleError: if the conversion cannot be done, or if a method that is exact misses its bound of 1e-5.

    Example:

    ```python
    >>> from hf_moe import UpcycleConfig, upcycle

    >>> report = upcycle("HuggingFaceTB/SmolLM2-135M", "smollm2-moe", UpcycleConfig(num_experts=4))
    ```
    """
    started = time.perf_counter()
    recipe = config or UpcycleConfig()
    # All that can be refused is refused before anything large is downloaded, read or written.
    plan_upcycle(source, recipe, revision=revision)
    sources = [source, *(parse_expert(entry)[0] for entry in recipe.experts or [] if entry != BASE)]
    output = OutputFolder(output_dir, [*sources, *recipe.calibration_files], overwrite)
    checkpoint = Checkpoint(source, revision)
    base = open_parent(BASE, checkpoint)
    checkpoint.config.dtype = checkpoint.main_dtype()
    experts = open_experts(recipe)
    plan = plan_upcycle(checkpoint.config, recipe, experts={entry: expert.config for entry, expert in experts.items()})
    for warning in plan.warnings:
        logger.warning(warning)
    checkpoints = {BASE: checkpoint, **experts}
    digests = {
        entry: _in_background(functools.partial(opened.sha256, progress)) for entry, opened in checkpoints.items()
    }
    parents = {BASE: base, **{entry: open_parent(entry, expert) for entry, expert in experts.items()}}
    composition = compose_parents(parents, recipe)
    observations: Observations = {index: {} for index in plan.experts_in_layer}

    def steps_for(wanted: UpcycleConfig) -> list[Step]:
        dense, config = composition.dense, composition.config
        return plan_steps(dense, config, plan, wanted, plan.target.layout, observations, composition.experts)

    steps = steps_for(recipe)
    calibration = None
    if recipe.looks_at_tokens:
        max_length = getattr(checkpoint.config, "max_position_embeddings", 0)
        calibration = read_calibration(recipe, plan, load_tokenizer(checkpoint), max_length)
    sample = None
    if recipe.verify != "none" or recipe.max_kl is not None:
        sample = draw_sample(checkpoint, recipe)
    texts = _digests(recipe)
    cards = {entry: read_parent_card(opened.folder / "README.md") for entry, opened in checkpoints.items()}
    described = {entry: _describe(opened, cards[entry], digests[entry]()) for entry, opened in checkpoints.items()}

    with output.locked() as incomplete:
        writer = output.open(steps, checkpoint, _fingerprint(recipe, described, texts), max_shard_size)
        if calibration is not None:
            found = _observe(checkpoint, calibration, plan, recipe, incomplete, progress)
            for index, tensors in found.items():
                observations[index].update(tensors)
        expert_noise = float(recipe.expert_noise)
        if recipe.max_kl is not None and sample is not None:
            side = Side(dense_class(checkpoint.config), checkpoint, find_family(checkpoint.config).layers)
            expert_noise = _find_noise(incomplete, side, plan, recipe, sample, steps_for, progress)
            steps = steps_for(dataclasses.replace(recipe, expert_noise=expert_noise, max_kl=None))
        output.write_weights(writer, steps, progress)
        model = meta_model(plan.model_class, plan.config)
        write_model_files(incomplete, model, plan.config, checkpoint, checkpoints[composition.tokenizer])
        if plan.native:
            add_legacy_keys(incomplete / "config.json", plan.config)
        parity = None
        if recipe.verify != "none" and sample is not None:
            parity = _prove(checkpoints, composition, incomplete, plan, recipe, sample, writer, progress)
        provenance = {**_provenance(recipe, plan, checkpoint, described, texts, parity), "expert_noise": expert_noise}
        write_provenance(incomplete, provenance)
        write_model_card(incomplete, provenance, cards[BASE])
        for name in (OBSERVATIONS, NOISE):
            (incomplete / name).unlink(missing_ok=True)
        output.publish()

    max_relative_error = None if parity is None or "float32" not in parity else summarize(parity)
    expert_errors = None
    if parity is not None and recipe.experts:
        expert_errors = {recipe.experts[row["experts"][0]]: largest_error(row) for row in parity["per_expert"]}
    routing = None
    if parity is not None and "routing" in parity:
        routing = RoutingStatistics.from_dict(parity["routing"])
        _warn_of_dead_experts(routing, recipe)
    return UpcycleReport(
        output_dir=output.given,
        model_type=plan.model_type,
        exact=max_relative_error is not None and max_relative_error <= FLOAT32_BOUND,
        inexact_because=plan.inexact_because,
        max_relative_error=max_relative_error,
        expert_errors=expert_errors,
        parity=parity,
        routing=routing,
        expert_noise=expert_noise,
        num_parameters=plan.num_parameters,
        num_active_parameters=plan.num_active_parameters,
        bytes_written=writer.total_bytes,
        seconds=time.perf_counter() - started,
    )


def _in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start `function` in a thread that does not keep the process alive; what is returned waits for its result."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


def _warn_of_dead_experts(routing: RoutingStatistics, recipe: UpcycleConfig) -> None:
    router = ROUTERS[recipe.router_type or DEFAULT_ROUTER]
    dead = {name: layer.dead_experts for name, layer in routing.layers.items() if layer.dead_experts}
    if dead:
        name, experts = next(iter(dead.items()))
        logger.warning(
            f"In {len(dead)} of {len(routing.layers)} layers some experts got none of {routing[name].num_tokens} tokens, for "
            f"example {experts} of {name}. "
            + (
                "They get no gradient either: another `router_init`, a smaller `router_logit_std` or the load-balancing loss "
                "spreads the tokens."
                if router.has_rows
                else f"The table of router_type={recipe.router_type!r} gives each of them as many token ids as the others, of which "
                "none is in this text. Other text has some: nothing is wrong, unless your training data are as narrow as this."
            )
        )


def _describe(checkpoint: Checkpoint, card: CardData | None, sha256: dict[str, str]) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "license": licence(card),
        "sha256": sha256,
    }


def _fingerprint(recipe: UpcycleConfig, parents: dict[str, dict[str, Any]], texts: list[dict[str, str]]) -> str:
    """What an interrupted conversion must share with the one that goes on with it."""
    weights_recipe = {name: value for name, value in recipe.to_dict().items() if name != "verify"}
    sha256 = {entry: parent["sha256"] for entry, parent in parents.items()}
    return json.dumps({"hf_moe": __version__, "recipe": weights_recipe, "sha256": sha256, "calibration_text": texts})


def _digests(recipe: UpcycleConfig) -> list[dict[str, str]]:
    """Name and SHA-256 of every calibration text: where it lies on somebody's disk is of no use to others."""
    files = [Path(file) for file in recipe.calibration_files]
    return [{"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files]


def _prove(
    checkpoints: dict[str, Checkpoint],
    composition: Composition,
    incomplete: Path,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    sample: Sample,
    writer: ShardWriter,
    progress: bool,
) -> dict[str, Any]:
    """Measure the parity of what was written; fail if the method is exact and the files are not."""
    checkpoint = checkpoints[BASE]
    layers = find_family(checkpoint.config).layers
    dense = Side(dense_class(checkpoint.config), checkpoint, layers)
    result = Side(plan.model_class, Checkpoint(incomplete), layers)
    if recipe.experts and recipe.verify != "full":
        parity = describe_sample(sample, checkpoint.config)
    else:
        parity = measure_parity(dense, result, plan, sample, whole_model=recipe.verify == "full", progress=progress)
    if recipe.experts:
        parity["per_expert"] = measure_expert_parity(
            checkpoints, result, plan, recipe, sample, rounded_from=composition.rounded_from, progress=progress
        )
    try:
        if plan.exact:
            check_parity(parity, incomplete)
        if recipe.experts:
            check_expert_parity(parity["per_expert"], recipe, composition.rounded_from, incomplete)
    except UpcycleError:
        writer.journal.unlink()  # never go on from files that failed
        raise
    return parity


def _observe(
    checkpoint: Checkpoint,
    calibration: Calibration,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    incomplete: Path,
    progress: bool,
) -> Observations:
    """What the calibration text shows; an interrupted run left it on disk, so that the rest fits what is written."""
    path = incomplete / OBSERVATIONS
    if path.exists():
        observations: Observations = {}
        for name, tensor in load_file(path).items():
            index, _, key = name.partition(".")
            observations.setdefault(int(index), {})[key] = tensor
        return observations
    family = find_family(checkpoint.config)
    model_class, dtype = dense_class(checkpoint.config), checkpoint.config.dtype
    if recipe.method == "split" and recipe.split_by == "gradient":
        model = model_class.from_pretrained(checkpoint.folder, dtype=dtype)
    else:
        model = streamed_model(Side(model_class, checkpoint, family.layers), checkpoint.config, dtype)
    layers = layer_prefix(family, model)

    def read_feed_forward(index: int) -> FeedForward:
        names = family.feed_forward.tensors(f"{layers}{index}.", dict.fromkeys(checkpoint))
        return family.feed_forward.read(f"{layers}{index}.", {name: checkpoint.read(name) for name in names})

    observations = calibrate(
        model,
        calibration,
        family,
        plan,
        recipe,
        read_feed_forward,
        folder=incomplete / RIDGE_FOLDER,
        progress=progress,
    )
    tensors = {f"{index}.{key}": tensor for index, found in observations.items() for key, tensor in found.items()}
    save_file(tensors, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)
    return observations


def _find_noise(
    incomplete: Path,
    dense: Side,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    sample: Sample,
    steps_for: Callable[[UpcycleConfig], list[Step]],
    progress: bool,
) -> float:
    """The noise that `max_kl` allows; an interrupted run left it on disk, so that the rest fits what is written."""
    path = incomplete / NOISE
    if not path.exists():
        noise = find_expert_noise(dense, plan, recipe, sample, steps_for, progress=progress)
        path.with_suffix(".partial").write_text(repr(noise), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
    return float(path.read_text(encoding="utf-8"))


def _hides_experts(recipe: UpcycleConfig) -> bool:
    """Whether the router cannot tell at first that it has a choice: equal experts, with weights that always have one sum."""
    has_fixed_sum = all(weight_sum(recipe, count) is not None for count in recipe.expert_counts)
    return recipe.method == "copy" and has_fixed_sum and not recipe.expert_noise and recipe.max_kl is None


def _provenance(
    recipe: UpcycleConfig,
    plan: UpcyclePlan,
    checkpoint: Checkpoint,
    parents: dict[str, dict[str, Any]],
    texts: list[dict[str, str]],
    parity: dict[str, Any] | None,
) -> dict[str, Any]:
    values, experts = recipe.to_dict(), {}
    if recipe.experts:
        # Where a folder lies on somebody's disk is of no use to readers of the card.
        names = {entry: "@".join(filter(None, (of["name"], of["revision"]))) for entry, of in parents.items()}
        values["experts"] = [entry if entry == BASE else names[entry] for entry in recipe.experts]
        experts = {"experts": [parents[entry] for entry in recipe.experts]}
    if texts:
        values["calibration_text"] = [text["name"] for text in texts]
    if recipe.router_statistics is not None:
        values["router_statistics"] = Path(recipe.router_statistics).name
    return {
        "hf_moe_version": __version__,
        "recipe": values,
        "calibration_text": texts,
        "paper": METHODS[recipe.method].paper,
        "hides_experts": _hides_experts(recipe),
        "parent": {
            **parents[BASE],
            "model_type": checkpoint.config.model_type,
            "num_parameters": plan.num_dense_parameters,
            "config": json.loads(checkpoint.config.to_json_string()),
        },
        **experts,
        "result": {
            "model_type": plan.model_type,
            "architecture": plan.architecture,
            "native": plan.native,
            "exact": plan.exact,
            "inexact_because": plan.inexact_because,
            "misread_by": plan.misread_by,
            "num_experts": sorted({*plan.experts_in_layer.values()}),
            "router": describe_router(plan.config),
            "num_parameters": plan.num_parameters,
            "num_active_parameters": plan.num_active_parameters,
            "num_sparse_layers": len(plan.sparse_layers),
            "num_layers": checkpoint.config.num_hidden_layers,
            "dtype": str(checkpoint.config.dtype).removeprefix("torch."),
        },
        "parity": parity,
    }
