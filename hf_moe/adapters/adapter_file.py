# SPDX-License-Identifier: Apache-2.0
"""`AdapterFile`: a LoRA adapter on disk or on the Hub, as PEFT saves it, and a converted copy of one."""

import json
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub.utils import tqdm
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from .config import METADATA
from .errors import ExpertLoraError
from .esft import SELECTION_NAME
from .factors import Factors, swap_all


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFile:
    """
    A LoRA adapter as it is stored.

    Args:
        source (`str`): The folder or Hub id.
        folder (`Path`): Where its files are.
        config (`dict`): What `adapter_config.json` holds.
        tensors (`dict[str, torch.Tensor]`): What `adapter_model.safetensors` holds.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, source: str | Path, progress: bool = False) -> "AdapterFile":
        """
        Read an adapter.

        Raises:
            ExpertLoraError: if there is none, if it is no LoRA, or if its files cannot be read.
        """
        path = _find(source, CONFIG)
        if path is None:
            experts = _find(source, SELECTION_NAME)
            raise ExpertLoraError(
                f"{source} is no adapter: it has no {CONFIG}. "
                + (
                    "It has experts of `save_esft`: `load_esft(model, folder)` puts them into a model, and looks at them before."
                    if experts
                    else "Give the folder or Hub id that `save_pretrained` of a model with an adapter wrote."
                )
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExpertLoraError(f"{path} is broken ({error}). Save or download the adapter again.") from error
        if config.get("peft_type") != "LORA":
            raise ExpertLoraError(
                f"{source} is a {config.get('peft_type')} adapter. Only LORA adapters can be examined."
            )
        weights = _find(source, WEIGHTS)
        if weights is None:
            pickled = _find(source, PICKLED)
            raise ExpertLoraError(
                f"{source} has its weights in {PICKLED}, which can run code when it is read. Where you trust it, load it with "
                "`PeftModel.from_pretrained` and save it again with `save_pretrained`, which writes safetensors."
                if pickled
                else f"{source} has no {WEIGHTS}. Save or download the adapter again."
            )
        return cls(str(source), path.parent, config, _read_tensors(weights, progress))

    def lora_config(self) -> LoraConfig:
        """
        PEFT's configuration, in which nothing depends on the values of the model, and dropout keeps nothing from loading.
        """
        with warnings.catch_warnings(action="ignore"):  # of fields that a newer PEFT has
            config = LoraConfig.from_pretrained(str(self.folder))
        config.inference_mode = False
        config.init_lora_weights = True
        if config.target_parameters:
            config.lora_dropout = 0.0
        return config

    def converted(self, factors: Iterable[Factors]) -> "AdapterFile":
        """The adapter with the factors of experts the other way round, as of the PEFT that is installed."""
        config = self.config | {"peft_version": peft.__version__}
        return replace(self, config=config, tensors=swap_all(factors, self.tensors))

    def write(self, folder: Path) -> None:
        """
        Write the adapter, with its card and what belongs to hf_moe, into a new folder.

        Raises:
            ExpertLoraError: if there is something already.
        """
        if folder.exists():
            raise ExpertLoraError(f"{folder} is there already. Choose a folder that is not.")
        incomplete = folder.with_name(f"{folder.name}.incomplete")
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (incomplete / CONFIG).write_text(text, encoding="utf-8")
        save_file(self.tensors, incomplete / WEIGHTS, metadata={"format": "pt"})
        for name in ("README.md", METADATA):
            if (path := _find(self.source, name)) is not None:
                shutil.copyfile(path, incomplete / name)
        incomplete.rename(folder)


def _find(source: str | Path, name: str) -> Path | None:
    """A file of a folder or Hub repository."""
    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ExpertLoraError(
            f"{source} is no folder with an adapter, and no adapter that can be had from the Hub."
        ) from error
    return None if path is None else Path(path)


def _read_tensors(path: Path, progress: bool) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = tqdm(file.keys(), desc="Reading the adapter", unit=" tensors", disable=None if progress else True)
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ExpertLoraError(
            f"{path} is no complete safetensors file ({error}). A download or copy was probably cut short: save or download the "
            "adapter again."
        ) from error
