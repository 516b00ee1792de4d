# SPDX-License-Identifier: Apache-2.0
"""
Writing safetensors shards whose tensors need not fit into memory.

`ShardWriter` fixes the place of every tensor first, then takes their bytes piece by piece. A journal beside the shards
says which steps are done, so that an interrupted run goes on where it stopped.
"""

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch.utils.weak import WeakTensorKeyDictionary

from .checkpoint import READ_CHUNK, SAFETENSORS_DTYPES, SAFETENSORS_TABLE_DTYPES
from .convert import Step, TensorInfo, num_bytes
from .errors import UpcycleError


JOURNAL = ".upcycle-journal.jsonl"
MIN_BACKGROUND_BYTES = 2**20
WRITE_CHUNK = 2**17  # as `cp` does; larger ones can take Linux several times as long
SAFETENSORS_NAMES = {dtype: name for name, dtype in (SAFETENSORS_DTYPES | SAFETENSORS_TABLE_DTYPES).items()}


class ShardWriter:
    """
    Writes the tensors of `steps` into `folder` as `model.safetensors` or as shards with an index.

    Args:
        folder (`Path`): Where to write; exists. If it holds the journal of an interrupted run with the same fingerprint,
            that run is continued.
        steps (`list[Step]`): What will be written.
        max_shard_size (`str` or `int`): Largest size of one file, e.g. `"5GB"`. A tensor is never split.
        fingerprint (`str`): Identifies source and recipe.

    Raises:
        UpcycleError: if the folder holds the journal of another conversion.
    """

    def __init__(self, folder: Path, steps: list[Step], max_shard_size: str | int, fingerprint: str):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {name: info for step in steps for name, info in step.tensors.items()}
        split = split_state_dict_into_shards_factory(
            self.tensors,
            get_storage_size=num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.files = split.filename_to_tensors
        self.total_bytes = sum(map(num_bytes, self.tensors.values()))
        headers = {file: self._header(names) for file, names in self.files.items()}
        self.start = {
            name: (file, start + len(headers[file]))
            for file, names in self.files.items()
            for name, start in self._starts(names)
        }
        fingerprint = f"{fingerprint}/{zlib.crc32(b''.join(headers.values())):08x}"
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.known_checksums = WeakTensorKeyDictionary()
        self.journal = folder / JOURNAL
        self.checksums: dict[str, dict[str, int]] = {}
        if self.journal.exists():
            self._read_journal(fingerprint)
        elif any(folder.iterdir()):
            raise UpcycleError(
                f"{folder} exists, is not empty, and holds no conversion that could go on. Delete it, or choose another output "
                "folder."
            )
        else:
            self.journal.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        for file, header in headers.items():
            self._ensure_header(folder / file, header)

    def is_done(self, step: Step) -> bool:
        """Whether the journal names the step and the bytes on disk are still those it wrote."""
        if step.name not in self.checksums:
            return False
        return all(self._checksum_on_disk(name) == crc for name, crc in self.checksums[step.name].items())

    def write(self, step: Step) -> Iterator[int]:
        """Write a step, yielding the number of bytes after each piece, and enter it in the journal."""
        checksums, written = dict.fromkeys(step.tensors, 0), dict.fromkeys(step.tensors, 0)
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context((self.folder / file).open("r+b", buffering=0))
                for file in {self.start[name][0] for name in step.tensors}
            }
            for piece in step.pieces():
                data = _bytes_of(piece.tensor, self.tensors[piece.name][0])
                file, start = self.start[piece.name]
                offset = piece.offset * piece.tensor.itemsize
                if offset != written[piece.name]:
                    raise RuntimeError(
                        f"Pieces of {piece.name!r} must come in order: {offset} != {written[piece.name]}."
                    )
                # Equal experts are one tensor, whose checksum is known once it was written.
                known = self.known_checksums.get(piece.tensor) if offset == 0 else None
                if known is None and len(data) > MIN_BACKGROUND_BYTES:
                    # Both leave the interpreter to others, so that the checksum costs no time of its own.
                    checksum = self.pool.submit(zlib.crc32, data, checksums[piece.name])
                    _write_all(files[file], data, start + offset)
                    checksums[piece.name] = checksum.result()
                else:
                    checksums[piece.name] = zlib.crc32(data, checksums[piece.name]) if known is None else known
                    _write_all(files[file], data, start + offset)
                if offset == 0:
                    self.known_checksums[piece.tensor] = checksums[piece.name]
                written[piece.name] += len(data)
                yield len(data)
        for name, count in written.items():
            if count != num_bytes(self.tensors[name]):
                raise RuntimeError(
                    f"Step {step.name!r} made {count} bytes of {name!r}, not {num_bytes(self.tensors[name])}."
                )
        with self.journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"step": step.name, "crc32": checksums}) + "\n")

    def write_index(self) -> None:
        """Write the index, if there are several shards."""
        if len(self.files) > 1:
            weight_map = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _ensure_header(self, path: Path, header: bytes) -> None:
        if path.exists():
            with path.open("rb") as file:
                if file.read(len(header)) == header:
                    return
        path.write_bytes(header)

    def _checksum_on_disk(self, name: str) -> int:
        file, start = self.start[name]
        left, crc = num_bytes(self.tensors[name]), 0
        with (self.folder / file).open("rb", buffering=0) as stream:
            stream.seek(start)
            while left and (chunk := stream.read(min(READ_CHUNK, left))):
                crc = zlib.crc32(chunk, crc)
                left -= len(chunk)
        return crc

    def _read_journal(self, fingerprint: str) -> None:
        lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line short
        if not entries or entries[0].get("fingerprint") != fingerprint:
            raise UpcycleError(
                f"{self.folder} holds an interrupted conversion of another model, or with another recipe. Pass "
                "overwrite=True (--overwrite) to throw it away, or choose another output folder."
            )
        if len(entries) < len(lines):
            self.journal.write_text("".join(lines[:-1]), encoding="utf-8")
        self.checksums = {entry["step"]: entry["crc32"] for entry in entries[1:]}

    def _starts(self, names: list[str]) -> Iterator[tuple[str, int]]:
        start = 0
        for name in names:
            yield name, start
            start += num_bytes(self.tensors[name])

    def _header(self, names: list[str]) -> bytes:
        """The head of a safetensors file: length, JSON, spaces up to a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, start in self._starts(names):
            dtype, shape = self.tensors[name]
            end = start + num_bytes(self.tensors[name])
            entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _write_all(file: io.FileIO, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file.fileno(), data[:WRITE_CHUNK], offset)
        data, offset = data[count:], offset + count


def _bytes_of(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    if tensor.dtype != dtype:
        raise RuntimeError(f"A tensor of type {tensor.dtype} was made where {dtype} was planned.")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
