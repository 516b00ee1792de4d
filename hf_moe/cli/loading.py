# SPDX-License-Identifier: Apache-2.0
"""What commands that run a model have in common: its folder, its routers' biases, texts."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.cli import out


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_folder(model: str) -> None:
    """Refuse a path that is no folder, and a folder without a tokenizer."""
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.count("/") > 1 or model.startswith(".")):
        raise ValueError(f"There is no folder {model}, and it is no id of a model on the Hub either.")
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise ValueError(f"The folder {model} has no tokenizer. Save that of the dense model into it.")


def load_model(model: str, trust_remote_code: bool) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model, with the biases of its routers if they lie beside it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.bias_balancing import FILE_NAME, load_router_bias

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    network = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=trust_remote_code, dtype="auto", device_map="auto"
    )
    if Path(model, FILE_NAME).is_file():
        load_router_bias(network, model)
        out.log(f"Routers choose with the biases of {Path(model, FILE_NAME)}")
    return network, tokenizer


def read_text(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
