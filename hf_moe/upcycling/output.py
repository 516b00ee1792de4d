# SPDX-License-Identifier: Apache-2.0
"""
Where a result is written: `OutputFolder` keeps other processes and accidents away from it, and puts it in place once it
is complete; `write_model_files` and `write_provenance` write what stands beside the weights.
"""

import contextlib
import errno
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock, tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .checkpoint import LICENCE_FILES, TOKENIZER_FILES, Checkpoint
from .convert import Step
from .errors import UpcycleError
from .writer import JOURNAL, ShardWriter


class OutputFolder:
    """
    The folder of a result, `<output_dir>.incomplete` until [`publish`] gives it its name.

    Args:
        output_dir (`str` or `Path`): The folder to write.
        sources (`Sequence[str | Path]`): What the result is made from, folders and files; none of it may lie in the folder.
        overwrite (`bool`): Whether what is there is replaced, once the result is complete.

    Raises:
        UpcycleError: if the folder must not be written.
    """

    def __init__(self, output_dir: str | Path, sources: Sequence[str | Path], overwrite: bool):
        self.given = Path(output_dir)
        self.path = self.given.resolve()
        self.incomplete = self.path.with_name(self.path.name + ".incomplete")
        self.overwrite = overwrite
        self.num_bytes = 0
        self._check(sources)

    def _check(self, sources: Sequence[str | Path]) -> None:
        for folder in (self.path, self.incomplete):
            for source in sources:
                if Path(source).exists() and Path(source).resolve().is_relative_to(folder):
                    raise UpcycleError(
                        f"{folder}, which would be written, holds the source {source}. Choose another output folder."
                    )
            if folder.exists() and not folder.is_dir():
                raise UpcycleError(f"{folder} exists and is no folder. Choose another output folder.")
        if self.path.is_mount() or self.path == self.path.parent:
            raise UpcycleError(
                f"{self.path} is a mount point, which cannot be put in place at once. Choose a folder inside it."
            )
        holds_something = self.path.exists() and any(self.path.iterdir())
        if holds_something and self.overwrite and not (self.path / "config.json").exists():
            raise UpcycleError(
                f"{self.path} holds no model (there is no config.json), so it is not replaced. Choose another folder, or empty "
                "this one yourself."
            )
        if holds_something and not self.overwrite:
            raise UpcycleError(
                f"The output folder {self.path} exists and is not empty. Choose another one, or pass overwrite=True "
                "(--overwrite) to replace it."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[Path]:
        """
        The incomplete folder, which no other process writes meanwhile.

        Raises:
            UpcycleError: if another process does, or if the disk is full.
        """
        self.incomplete.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.upcycle.lock")
        try:
            with WeakFileLock(lock, timeout=0.1):
                if self.overwrite and (self.incomplete / JOURNAL).exists():
                    shutil.rmtree(self.incomplete)
                    self.incomplete.mkdir()
                yield self.incomplete
                lock.unlink(missing_ok=True)
        except Timeout as error:
            raise UpcycleError(
                f"Another process is writing {self.path}. Wait for it, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise UpcycleError(
                f"Writing to {self.incomplete} failed: {error.strerror}. The weights of the result take "
                f"{self.num_bytes:,} bytes. Make room and run the same command again: it goes on where it stopped."
            ) from error

    def open(
        self, steps: list[Step], checkpoint: Checkpoint, fingerprint: str, max_shard_size: str | int
    ) -> ShardWriter:
        """
        The writer of the tensors of `steps`, or of those that an interrupted run with the same `fingerprint` left to do.

        Raises:
            UpcycleError: if there is no room for them, or if the folder holds something else.
        """
        writer = ShardWriter(self.incomplete, steps, max_shard_size, fingerprint)
        self.num_bytes = writer.total_bytes
        self._check_space(checkpoint)
        return writer

    def write_weights(
        self, writer: ShardWriter, steps: list[Step], progress: bool, description: str = "Upcycling"
    ) -> None:
        """Write the tensors of `steps`, and the index."""
        with tqdm(
            total=writer.total_bytes,
            desc="Resuming" if writer.checksums else description,
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

    def _check_space(self, checkpoint: Checkpoint) -> None:
        there = sum(path.stat().st_size for path in self.incomplete.iterdir())
        free = shutil.disk_usage(self.incomplete).free
        if self.num_bytes - there > free:
            raise UpcycleError(
                f"The result of {checkpoint.name} needs {self.num_bytes:,} bytes, but only {free:,} are free at "
                f"{self.incomplete.parent}. Make room, choose another output folder, or ask for fewer experts."
            )

    def publish(self) -> None:
        """Put the finished folder in its place; a folder that stood there goes only once the new one is in place."""
        replaced = None
        if self.path.exists() and any(self.path.iterdir()):
            if not self.overwrite:
                raise UpcycleError(f"{self.path} was filled meanwhile. The finished result is in {self.incomplete}.")
            replaced = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.replaced-"))
            self.path.rename(replaced / self.path.name)
        elif self.path.exists():
            self.path.rmdir()
        self.incomplete.rename(self.path)
        (self.path / JOURNAL).unlink()
        if replaced is not None:
            shutil.rmtree(replaced)


def write_model_files(
    folder: Path, model: PreTrainedModel, config: PreTrainedConfig, checkpoint: Checkpoint, tokenizer: Checkpoint
) -> None:
    """
    Write the configuration, the code of the model's class if it is ours, and what stands beside the source's weights.

    Args:
        checkpoint (`Checkpoint`): Where licence files come from.
        tokenizer (`Checkpoint`): Where the tokenizer and the generation config come from.
    """
    config.architectures = [type(model).__name__]
    if not type(model).__module__.startswith("transformers."):
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    for origin, patterns in ((checkpoint, LICENCE_FILES), (tokenizer, TOKENIZER_FILES)):
        for path in origin.auxiliary_files(patterns):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin.folder / path, folder / path)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write `hf_moe.json`: where the result comes from, and what was measured."""
    text = json.dumps(_without_infinities(provenance), indent=2, allow_nan=False)
    (folder / "hf_moe.json").write_text(text + "\n", encoding="utf-8")


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity, but a model whose values overflow in float16 measures one: null stands for it."""
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
