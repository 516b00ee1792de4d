# SPDX-License-Identifier: Apache-2.0
"""`upcycle`: a dense checkpoint on disk or on the Hub becomes a MoE checkpoint on disk, streamed, proved and resumable."""

import errno
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock, tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from ..hub.card import read_parent_card, write_model_card
from ..version import __version__
from .checkpoint import Checkpoint
from .convert import DenseTensors, Step, in_memory_names, plan_steps
from .errors import UpcycleError
from .legacy_config import add_legacy_keys
from .methods import METHODS
from .parity import FLOAT32_BOUND, Sample, Side, check_parity, draw_sample, measure_parity, summarize
from .plan import UpcyclePlan, plan_upcycle
from .recipe import UpcycleConfig, UpcycleReport
from .targets import dense_class, find_family, find_head, meta_model, target_class
from .writer import JOURNAL, ShardWriter


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
    given_dir, output_dir = Path(output_dir), Path(output_dir).resolve()
    incomplete = output_dir.with_name(output_dir.name + ".incomplete")
    _check_output(output_dir, incomplete, source, overwrite)
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

    incomplete.mkdir(parents=True, exist_ok=True)
    lock = output_dir.with_name(f".{output_dir.name}.upcycle.lock")
    try:
        with WeakFileLock(lock, timeout=0.1):
            if overwrite and (incomplete / JOURNAL).exists():
                shutil.rmtree(incomplete)
                incomplete.mkdir()
            writer = ShardWriter(incomplete, steps, max_shard_size, _fingerprint(recipe, parent))
            _check_space(incomplete, writer.total_bytes, checkpoint)
            _write_weights(writer, steps, progress)
            _write_other_files(incomplete, checkpoint, plan)
            parity = None
            if sample is not None:
                parity = _prove(checkpoint, incomplete, plan, recipe, sample, writer, progress)
            provenance = _provenance(recipe, plan, checkpoint, parent, parity)
            text = json.dumps(_without_infinities(provenance), indent=2, allow_nan=False)
            (incomplete / "hf_moe.json").write_text(text + "\n", encoding="utf-8")
            write_model_card(incomplete, provenance, parent_data)
            _publish(incomplete, output_dir, overwrite)
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UpcycleError(
            f"Another process is writing {output_dir}. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise UpcycleError(
            f"Writing to {incomplete} failed: {error.strerror}. The weights of the result take "
            f"{sum(step.num_bytes for step in steps):,} bytes. Make room and run the same command again: it goes on where it "
            "stopped."
        ) from error

    max_relative_error = None if parity is None else summarize(parity)
    return UpcycleReport(
        output_dir=given_dir,
        model_type=plan.model_type,
        exact=max_relative_error is not None and max_relative_error <= FLOAT32_BOUND,
        max_relative_error=max_relative_error,
        parity=parity,
        num_parameters=plan.num_parameters,
        num_active_parameters=plan.num_active_parameters,
        bytes_written=writer.total_bytes,
        seconds=time.perf_counter() - started,
    )


def _check_output(output_dir: Path, incomplete: Path, source: str | Path, overwrite: bool) -> None:
    dense = Path(source).resolve()
    for folder in (output_dir, incomplete):
        if Path(source).is_dir() and dense.is_relative_to(folder):
            raise UpcycleError(
                f"{folder}, which would be written, holds the source {source}. Choose another output folder."
            )
        if folder.exists() and not folder.is_dir():
            raise UpcycleError(f"{folder} exists and is no folder. Choose another output folder.")
    if output_dir.is_mount() or output_dir == output_dir.parent:
        raise UpcycleError(
            f"{output_dir} is a mount point, which cannot be put in place at once. Choose a folder inside it."
        )
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise UpcycleError(
            f"The output folder {output_dir} exists and is not empty. Choose another one, or pass overwrite=True "
            "(--overwrite) to replace it."
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


def _check_space(folder: Path, needed: int, checkpoint: Checkpoint) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise UpcycleError(
            f"The result of {checkpoint.name} needs {needed:,} bytes, but only {free:,} are free at {folder.parent}. Make "
            "room, choose another output folder, or ask for fewer experts."
        )


def _write_weights(writer: ShardWriter, steps: list[Step], progress: bool) -> None:
    with tqdm(
        total=writer.total_bytes,
        desc="Resuming" if writer.checksums else "Upcycling",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for step in steps:
            if writer.is_done(step):
                bar.update(step.num_bytes)
                continue
            for num_bytes in writer.write(step):
                bar.update(num_bytes)
    writer.write_index()


def _write_other_files(folder: Path, checkpoint: Checkpoint, plan: UpcyclePlan) -> None:
    model = meta_model(target_class(plan.target, find_head(checkpoint.config)), plan.config)
    plan.config.architectures = [plan.architecture]
    if not plan.native:
        custom_object_save(model, folder, config=plan.config)
    plan.config.save_pretrained(folder)
    if plan.native:
        add_legacy_keys(folder / "config.json", plan.config)
    for path in checkpoint.auxiliary_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / path, folder / path)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(plan.config).save_pretrained(folder)


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
        "parent": {**parent, "model_type": checkpoint.config.model_type, "num_parameters": plan.num_dense_parameters},
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


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity, but a model whose values overflow in float16 measures one: null stands for it."""
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _publish(incomplete: Path, output_dir: Path, overwrite: bool) -> None:
    """Put the finished folder in its place; a folder that stood there goes only once the new one is in place."""
    replaced = None
    if output_dir.exists() and any(output_dir.iterdir()):
        if not overwrite:
            raise UpcycleError(f"{output_dir} was filled meanwhile. The finished result is in {incomplete}.")
        replaced = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}.replaced-"))
        output_dir.rename(replaced / output_dir.name)
    elif output_dir.exists():
        output_dir.rmdir()
    incomplete.rename(output_dir)
    (output_dir / JOURNAL).unlink()
    if replaced is not None:
        shutil.rmtree(replaced)
