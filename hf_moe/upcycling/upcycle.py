# SPDX-License-Identifier: Apache-2.0
"""`upcycle`: a dense checkpoint on disk or on the Hub becomes a MoE checkpoint on disk, streamed, proved and resumable."""

import json
import time
from pathlib import Path
from typing import Any

from ..hub.card import read_parent_card, write_model_card
from ..version import __version__
from .checkpoint import Checkpoint
from .convert import DenseTensors, in_memory_names, plan_steps
from .errors import UpcycleError
from .methods import METHODS
from .output import OutputFolder, write_model_files, write_provenance
from .parity import FLOAT32_BOUND, Sample, Side, check_parity, draw_sample, measure_parity, summarize
from .plan import UpcyclePlan, plan_upcycle
from .recipe import UpcycleConfig, UpcycleReport
from .targets import dense_class, find_family, find_head, meta_model, target_class
from .writer import ShardWriter


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
        source (`str` or `Path`): The dense model, a folder or a Hub id.
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
    output = OutputFolder(output_dir, source, overwrite)
    checkpoint = Checkpoint(source, revision)
    checkpoint.config.dtype = checkpoint.main_dtype()
    plan = plan_upcycle(checkpoint.config, recipe)
    dense_model = meta_model(dense_class(checkpoint.config), checkpoint.config)
    checkpoint.rename(in_memory_names(list(checkpoint), dense_model))
    dense = DenseTensors({name: checkpoint.dtype_and_shape(name) for name in checkpoint}, checkpoint.read)
    steps = plan_steps(dense, checkpoint.config, plan, recipe, plan.target.layout)
    parent_data = read_parent_card(checkpoint.folder / "README.md")
    sample = draw_sample(checkpoint, recipe) if recipe.verify != "none" else None
    parent = {"name": checkpoint.name, "revision": checkpoint.revision, "sha256": checkpoint.sha256(progress)}

    with output.locked() as incomplete:
        writer = output.write_weights(
            steps, checkpoint, _fingerprint(recipe, parent), max_shard_size=max_shard_size, progress=progress
        )
        model = meta_model(target_class(plan.target, find_head(checkpoint.config)), plan.config)
        write_model_files(incomplete, checkpoint, model)
        parity = None
        if sample is not None:
            parity = _prove(checkpoint, incomplete, plan, recipe, sample, writer, progress)
        provenance = _provenance(recipe, plan, checkpoint, parent, parity)
        write_provenance(incomplete, provenance)
        write_model_card(incomplete, provenance, parent_data)
        output.publish()

    max_relative_error = None if parity is None else summarize(parity)
    return UpcycleReport(
        output_dir=output.given,
        model_type=plan.model_type,
        exact=max_relative_error is not None and max_relative_error <= FLOAT32_BOUND,
        max_relative_error=max_relative_error,
        parity=parity,
        num_parameters=plan.num_parameters,
        num_active_parameters=plan.num_active_parameters,
        bytes_written=writer.total_bytes,
        seconds=time.perf_counter() - started,
    )


def _fingerprint(recipe: UpcycleConfig, parent: dict[str, Any]) -> str:
    """What an interrupted conversion must share with the one that goes on with it."""
    weights_recipe = {name: value for name, value in recipe.to_dict().items() if name != "verify"}
    return json.dumps({"hf_moe": __version__, "recipe": weights_recipe, "sha256": parent["sha256"]})


def _prove(
    checkpoint: Checkpoint,
    incomplete: Path,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    sample: Sample,
    writer: ShardWriter,
    progress: bool,
) -> dict[str, Any]:
    """Measure the parity of what was written; fail if the method is exact and the files are not."""
    layers = find_family(checkpoint.config).layers
    parity = measure_parity(
        Side(dense_class(checkpoint.config), checkpoint, layers),
        Side(target_class(plan.target, find_head(checkpoint.config)), Checkpoint(incomplete), layers),
        plan,
        sample,
        whole_model=recipe.verify == "full",
        progress=progress,
    )
    if plan.exact:
        try:
            check_parity(parity, incomplete)
        except UpcycleError:
            writer.journal.unlink()  # never go on from files that failed
            raise
    return parity


def _provenance(
    recipe: UpcycleConfig,
    plan: UpcyclePlan,
    checkpoint: Checkpoint,
    parent: dict[str, Any],
    parity: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "hf_moe_version": __version__,
        "recipe": recipe.to_dict(),
        "paper": METHODS[recipe.method].paper,
        "parent": {
            **parent,
            "model_type": checkpoint.config.model_type,
            "num_parameters": plan.num_dense_parameters,
            "config": json.loads(checkpoint.config.to_json_string()),
        },
        "result": {
            "model_type": plan.model_type,
            "architecture": plan.architecture,
            "native": plan.native,
            "exact": plan.exact,
            "num_parameters": plan.num_parameters,
            "num_active_parameters": plan.num_active_parameters,
            "num_sparse_layers": len(plan.sparse_layers),
            "num_layers": checkpoint.config.num_hidden_layers,
            "dtype": str(checkpoint.config.dtype).removeprefix("torch."),
        },
        "parity": parity,
    }
