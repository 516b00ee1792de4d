# SPDX-License-Identifier: Apache-2.0
"""
Reading checkpoints: `Checkpoint` finds the files of a model, checks them, and reads one tensor at a time.

Tensors are read with plain reads, not mapped into memory, so that resident memory is what is in use.
"""

import functools
import hashlib
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import UpcycleError


logger = logging.get_logger(__name__)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS_FILES = ("model*.safetensors", "model.safetensors.index.json")
LICENCE_FILES = ("LICENSE*", "NOTICE*")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor_config.json",
    # What makes an encoder a sentence encoder: the list of its modules, and a folder for each, such as 1_Pooling.
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/*",
)
AUXILIARY_FILES = (*TOKENIZER_FILES, *LICENCE_FILES)


class Checkpoint:
    """
    A model on disk or on the Hub: the dense source, or the result that is compared with it.

    Args:
        source (`str` or `Path`): A folder, or the id of a Hub repository, which is then downloaded.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        UpcycleError: if there is no model, or if its weight files are missing, broken or name files outside the folder.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.source = str(source)
        self.folder, self.revision = _resolve(self.source, revision)
        self.config = read_config(self.folder)
        self.file_of = self._find_tensors()
        self._name_on_disk: dict[str, str] = {}
        self._handles: dict[Path, safe_open] = {}

    @property
    def name(self) -> str:
        """The Hub id, or the name of the local folder."""
        return self.source if self.revision else Path(self.source).resolve().name

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def rename(self, new_names: dict[str, str]) -> None:
        """Call the tensors by other names from now on, and forget those for which `new_names` has none."""
        self.file_of = {new_names[name]: path for name, path in self.file_of.items() if name in new_names}
        self._name_on_disk = {new: old for old, new in new_names.items()}

    def read(self, name: str, check_finite: bool = True) -> torch.Tensor:
        """
        One tensor.

        Raises:
            UpcycleError: if it holds a value that is not finite, unless `check_finite` is False.
        """
        path, on_disk = self.file_of[name], self._name_on_disk.get(name, name)
        tensor = _load_bin(path)[on_disk] if path.suffix == ".bin" else self._open(path).get_tensor(on_disk)
        if check_finite and not is_finite(tensor):
            raise UpcycleError(
                f"{path.name}: tensor {name!r} holds NaN or infinite values. A mixture of experts made from it could not "
                "be used; repair the checkpoint or take an earlier one."
            )
        return tensor

    def read_row(self, name: str, index: int | slice | tuple[int | slice, ...]) -> torch.Tensor:
        """Row `index` of a tensor, or the rows of a slice, without reading the others."""
        path, on_disk = self.file_of[name], self._name_on_disk.get(name, name)
        if path.suffix == ".bin":
            return _load_bin(path)[on_disk][index].clone()
        # Plain reads would take in the whole tensor for one row; the map is dropped as soon as the row is copied.
        with safe_open(path, framework="pt") as file:
            return file.get_slice(on_disk)[index].clone()

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """
        Data type and shape of a tensor, without reading it.

        Raises:
            UpcycleError: if it does not hold floating-point numbers of a common type.
        """
        path, on_disk = self.file_of[name], self._name_on_disk.get(name, name)
        if path.suffix == ".bin":
            tensor = _load_bin(path)[on_disk]
            dtype, shape = tensor.dtype, tensor.shape
        else:
            view = self._open(path).get_slice(on_disk)
            types = SAFETENSORS_DTYPES | SAFETENSORS_TABLE_DTYPES
            dtype, shape = types.get(view.get_dtype(), view.get_dtype()), view.get_shape()
        is_table = on_disk.endswith(TABLES) and dtype in SAFETENSORS_TABLE_DTYPES.values()
        if dtype not in SAFETENSORS_DTYPES.values() and not is_table:
            raise UpcycleError(
                f"{path.name}: tensor {on_disk!r} is of type {dtype}. Upcycling reads {sorted(SAFETENSORS_DTYPES)}; a "
                "quantized checkpoint must be dequantized first."
            )
        return dtype, tuple(shape)

    def main_dtype(self) -> torch.dtype:
        """The data type that most of the bytes have."""
        sizes: Counter[torch.dtype] = Counter()
        for name in self:
            dtype, shape = self.dtype_and_shape(name)
            sizes[dtype] += dtype.itemsize * torch.Size(shape).numel()
        return sizes.most_common(1)[0][0]

    def sha256(self, progress: bool = True) -> dict[str, str]:
        """Digest of every weight file."""
        digests = {}
        paths = sorted(set(self.file_of.values()))
        with tqdm(
            total=sum(path.stat().st_size for path in paths),
            desc="Hashing the source",
            unit="B",
            unit_scale=True,
            delay=2,
            disable=None if progress else True,
        ) as bar:
            for path in paths:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while chunk := file.read(READ_CHUNK):
                        digest.update(chunk)
                        bar.update(len(chunk))
                digests[path.name] = digest.hexdigest()
        return digests

    def _open(self, path: Path) -> safe_open:
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", backend="pread")
        return self._handles[path]

    def auxiliary_files(self, patterns: tuple[str, ...] = AUXILIARY_FILES) -> list[Path]:
        """Tokenizer, processor, chat templates, generation config and licence, relative to the folder."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder) for path in found)

    def _find_tensors(self) -> dict[str, Path]:
        for single in WEIGHT_FILES:
            index = self.folder / f"{single}.index.json"
            if index.exists():
                return self._read_index(index)
            if (self.folder / single).exists():
                return dict.fromkeys(_names(self.folder / single), self.folder / single)
        raise UpcycleError(
            f"{self.source} holds no weights: expected one of {', '.join(WEIGHT_FILES)} or its .index.json. Weights in "
            "another format (GGUF, ...) must first be saved with `save_pretrained`."
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UpcycleError(f"{index.name} is no index of weight files ({error!r}). Download it again.") from error
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise UpcycleError(
                    f"{index.name} names the file {shard!r}, which lies outside the model's folder. Only names of files "
                    "beside the index are read."
                )
            if not (self.folder / shard).exists():
                raise UpcycleError(
                    f"{index.name} names the shard {shard!r}, which is not in {self.source}. Download the model again, or "
                    "copy the missing file into the folder."
                )
        names_in = {shard: set(_names(self.folder / shard)) for shard in set(weight_map.values())}
        for name, shard in weight_map.items():
            if name not in names_in[shard]:
                raise UpcycleError(
                    f"{index.name} says that {shard!r} holds {name!r}, but it does not. Download it again."
                )
        return {name: self.folder / shard for name, shard in weight_map.items()}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; as fast as memory, where `torch.isfinite` takes thirty times as long."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's folder; None if there is none, with a warning if there is one that does not load."""
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in checkpoint.auxiliary_files()):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ImportError, OSError, TypeError, ValueError, KeyError) as error:
        logger.warning(f"The tokenizer of {checkpoint.source} does not load. ({error})")
        return None


READ_CHUNK = 16 * 2**20
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Numbers of experts, in buffers of hf_moe's own.
SAFETENSORS_TABLE_DTYPES = {"I32": torch.int32}
TABLES = ("expert_of_token",)


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """
    The configuration of a dense model, from a folder or the Hub.

    Raises:
        UpcycleError: if there is none, or if transformers does not know its model type.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise UpcycleError(f"The folder {source} has no config.json: it is no model saved with `save_pretrained`.")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise UpcycleError(
            f"No configuration at {source}: expected a folder with a config.json, or the id of a model on the Hub. "
            f"({error})"
        ) from error
    except (ValueError, StrictDataclassError) as error:
        raise UpcycleError(f"transformers cannot read the configuration of {source}: {error}") from error


def _resolve(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of the model and, for the Hub, its commit."""
    if Path(source).is_dir():
        return Path(source), None
    try:
        # No `*.safetensors`: `*` crosses folders, and repositories hold other formats of the same weights.
        patterns = ["config.json", "README.md", "hf_moe.json", *SAFETENSORS_FILES, *AUXILIARY_FILES]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not (folder / WEIGHT_FILES[0]).exists() and not (folder / f"{WEIGHT_FILES[0]}.index.json").exists():
            patterns = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError) as error:
        raise UpcycleError(
            f"{source!r} is neither a folder nor a model that can be had from the Hub: {error}"
        ) from error
    return folder, folder.name


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_load_bin(path))
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UpcycleError(
            f"{path.name} is no complete safetensors file ({error}); a download or copy was probably cut short. Download "
            "it again."
        ) from error


@functools.lru_cache(maxsize=1)
def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UpcycleError(
            f"{path.name} is broken, or holds more than tensors, which could run code when read. Download it again, or save "
            f"the model as safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
