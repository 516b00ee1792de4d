# SPDX-License-Identifier: Apache-2.0
"""What the user asks for and what they get: `UpcycleConfig`, `UpcycleReport` and the error `UpcycleError`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .methods import METHODS
from .router_init import ROUTER_INITIALIZERS


class UpcycleError(ValueError):
    """A conversion that cannot be done; the message says what was given, what is allowed and what to do next."""


@strict
@dataclass(kw_only=True)
class UpcycleConfig:
    r"""
    The recipe of a conversion from a dense model to a mixture of experts.

    Args:
        method (`str`, *optional*, defaults to `"copy"`):
            How the experts are made. `"copy"` makes every expert a copy of the dense feed-forward
            (https://huggingface.co/papers/2212.05055). `"residual"` keeps the dense feed-forward as a shared expert and
            adds routed experts whose down-projection is zero.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts per converted layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Number of routed experts that serve one token.
        target (`str`, *optional*, defaults to `"auto"`):
            Class of the result: `"native"` for a class of transformers (Mixtral, Qwen2-MoE, Qwen3-MoE), `"hf_moe"` for
            the class of hf_moe, `"auto"` for the native class where it represents the result exactly, else ours.
        layers (`list[int]`, *optional*):
            Indices of the layers to convert. All of them by default.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of the chosen experts are divided by their sum. `"copy"` is exact only then.
        router_init (`str`, *optional*, defaults to `"normal"`):
            How the router is initialised, see `hf_moe.upcycling.router_init`.
        router_logit_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the router logits that the initialisation aims at.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Coefficient of the load-balancing loss in the result's configuration. The loss is used when the model is
            trained with `output_router_logits=True`.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything random. Shard sizes and resuming do not change the result.
        verify (`str`, *optional*, defaults to `"full"`):
            What is compared with the dense model: `"full"` every converted layer and the logits of the whole model,
            `"layers"` the layers only, `"none"` nothing.

    Raises:
        StrictDataclassError: if a field has a wrong type or a value outside its range.
    """

    method: str = "copy"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    target: str = "auto"
    layers: list[int] | None = None
    norm_topk_prob: bool = True
    router_init: str = "normal"
    router_logit_std: float | int = 1.0
    router_aux_loss_coef: float | int = 0.01
    seed: int = 0
    verify: str = "full"

    def validate_choices(self):
        choices: dict[str, list[str]] = {
            "method": sorted(METHODS),
            "target": ["auto", "native", "hf_moe"],
            "router_init": sorted(ROUTER_INITIALIZERS),
            "verify": ["full", "layers", "none"],
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"`{field}` must be one of {allowed}, got {value!r}.")

    def validate_numbers(self):
        if self.num_experts < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {self.num_experts}.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` (top-k) must lie between 1 and `num_experts` ({self.num_experts}), got "
                f"{self.num_experts_per_tok}."
            )
        for field in ("router_logit_std", "router_aux_loss_coef"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{field}` must be a finite number and not negative, got {value}.")
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or not self.layers):
            raise ValueError(f"`layers` must name at least one layer, each once, got {self.layers}.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "UpcycleConfig":
        """
        Read a recipe: a YAML mapping from field names to values.

        Raises:
            UpcycleError: if there is no such file, or if it is no mapping, names a field that does not exist, or holds a
                value that is not allowed.
        """
        if not Path(path).is_file():
            raise UpcycleError(f"There is no recipe file {path}.")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise UpcycleError(f"{path} is no YAML: {error}") from error
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise UpcycleError(f"{path} must hold a mapping from field names to values, got {type(values).__name__}.")
        if unknown := [name for name in values if name not in known]:
            raise UpcycleError(f"{path} names unknown fields {unknown}. A recipe may have {known}.")
        try:
            return cls(**values)
        except StrictDataclassError as error:
            raise UpcycleError(f"{path}: {error.__cause__ or error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The recipe as YAML, which [`UpcycleConfig.from_yaml`] reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class UpcycleReport:
    """
    What a conversion did.

    Args:
        output_dir (`Path`): The folder that was written.
        model_type (`str`): Model type of the result, e.g. `"mixtral"` or `"moe_llama"`.
        exact (`bool`): Whether the result was measured to compute what the dense model computes, within 1e-5 in float32.
            False as well if nothing was measured.
        max_relative_error (`float`, *optional*): Largest difference in float32, divided by the largest value: of the
            logits, or of the layers' outputs with `verify="layers"`. None if nothing was measured.
        parity (`dict`, *optional*): Everything that was measured, per data type and per layer, see
            [`~hf_moe.upcycling.parity.measure_parity`].
        num_parameters (`int`): Parameters of the result.
        num_active_parameters (`int`): Parameters that one token uses.
        bytes_written (`int`): Bytes of the weight files.
        seconds (`float`): Wall time of the whole call, verification included.
    """

    output_dir: Path
    model_type: str
    exact: bool
    max_relative_error: float | None
    parity: dict[str, Any] | None
    num_parameters: int
    num_active_parameters: int
    bytes_written: int
    seconds: float
