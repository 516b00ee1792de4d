# SPDX-License-Identifier: Apache-2.0
"""What commands that run a model have in common: its folder, its routers' biases, texts."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from huggingface_hub.cli import out


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DomainOpt = Annotated[
    int | None,
    typer.Option(min=0, help="What the texts are to a model with experts by domain (router_type=hash), from 0 on."),
]


def check_folder(model: str) -> None:
    """Refuse a path that is no folder, and a folder without a tokenizer."""
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.count("/") > 1 or model.startswith(".")):
        raise ValueError(f"There is no folder {model}, and it is no id of a model on the Hub either.")
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise ValueError(f"The folder {model} has no tokenizer. Save that of the dense model into it.")


def load_model(
    model: str, trust_remote_code: bool, domain: int | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    A causal language model, with the biases of its routers if they lie beside it, and its tokenizer.

    It takes every sequence as one of `domain`, and every token as text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..training.bias_balancing import FILE_NAME, load_router_bias

    _check_domain(model, AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), domain)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    network = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=trust_remote_code, dtype="auto", device_map="auto"
    )
    if Path(model, FILE_NAME).is_file():
        load_router_bias(network, model)
        out.log(f"Routers choose with the biases of {Path(model, FILE_NAME)}")
    if domain is not None:
        network.register_forward_pre_hook(functools.partial(_add_domain, domain), with_kwargs=True)
    if (note := taken_as(network.config, domain)) is not None:
        out.log(note)
    return network, tokenizer


def taken_as(config: "PreTrainedConfig", domain: int | None) -> str | None:
    """What `load_model` has a model take all texts as; None if its experts are not divided."""
    if domain is not None:
        return f"All texts are taken as of domain {domain}: the experts of the others serve none of them."
    if (parts := getattr(config, "num_experts_per_modality", None)) is not None:
        return f"All tokens are taken as text: of the experts {parts} of the modalities only the first ones serve."
    return None


def _add_domain(
    domain: int, network: "PreTrainedModel", args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a model: all sequences are of one domain."""
    input_ids = args[0] if args else kwargs["input_ids"]
    return args, {**kwargs, "domain_ids": input_ids.new_full((len(input_ids),), domain)}


def _check_domain(model: str, config: "PreTrainedConfig", domain: int | None) -> None:
    router = getattr(config, "router_class", None)
    count = 1 if router is None else router.count_domains(config)
    if count == 1 and domain is not None:
        raise ValueError(f"--domain {domain} has no effect: {model} has no experts by domain. Leave it out.")
    if count > 1 and (domain is None or domain >= count):
        raise ValueError(
            f"{model} has experts for {count} domains: say with --domain 0 to --domain {count - 1} what the texts are"
            + ("." if domain is None else f", got {domain}.")
        )


def read_text(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
