# SPDX-License-Identifier: Apache-2.0
"""What the user asks for: `UpcycleConfig`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..models.routers import ROUTERS
from .compose import BASE
from .errors import UpcycleError
from .methods import METHODS
from .router_init import ROUTER_INITIALIZERS
from .routing import DEFAULT_ROUTER, ROUTER_OPTIONS, UNROUTED_OPTIONS, unsteady_because, weight_sum
from .typos import did_you_mean


@strict
@dataclass(kw_only=True)
class UpcycleConfig:
    r"""
    The recipe of a conversion from a dense model to a mixture of experts.

    Args:
        method (`str`, *optional*, defaults to `"copy"`):
            How the experts are made, see `hf_moe.upcycling.methods`: `"copy"`, `"residual"`, `"granular"`, `"drop"`,
            `"qwen"`, `"split"` or `"compose"`.
        num_experts (`int` or `list[int]`, *optional*, defaults to 8):
            Number of routed experts per converted layer. A list has one number per converted layer, and needs a class of
            hf_moe to hold the result. `"compose"` has as many as `experts` has entries.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Number of routed experts that serve one token.
        granularity (`int`, *optional*, defaults to 1):
            Into how many experts one feed-forward is cut, for `"granular"`, `"qwen"` and the routed experts of
            `"residual"`.
        scale_on (`str`, *optional*, defaults to `"up_down"`):
            Which matrices take a factor that the method needs, see [`~hf_moe.upcycling.scaling.scale_output`]:
            `"up_down"`, `"down"` or `"megatron"`, which changes the function.
        reinit_ratio (`float`, *optional*, defaults to 0.5):
            Share of the neurons (`"drop"`) or weights (`"qwen"`) that are drawn anew.
        index_sets (`str`, *optional*, defaults to `"shared"`):
            Whether `"drop"` draws the same neurons anew in all matrices, or `"independent"` ones.
        split_by (`str`, *optional*, defaults to `"random"`):
            What decides which neurons go together in `"split"`: `"random"`, `"kmeans"` of the gate's rows,
            `"activation"`, by the tokens of the calibration text that they answer to, or `"gradient"`, by the text for
            which they matter, which needs the dense model in memory.
        num_shared_neurons (`int`, *optional*, defaults to 0):
            Neurons that `"split"` keeps for every token, as a shared expert.
        experts (`list[str]`, *optional*):
            The checkpoints that `"compose"` takes its experts from, in their order: folders, Hub ids, ids with a revision
            as `"owner/name@revision"`, or `"base"` for the source itself (a folder of that name is `"./base"`). One may be
            listed several times.
        compose_rest (`str`, *optional*, defaults to `"base"`):
            Where `"compose"` takes attention, norms and embeddings from: the `"base"`, or the `"mean"` over the checkpoints
            in `experts`, each counted once. Rows of the embeddings that only some checkpoints have are the mean over those.
        expert_noise (`float`, *optional*, defaults to 0.0):
            Standard deviation of the noise added to every tensor of an expert, relative to that of the tensor.
        max_kl (`float`, *optional*):
            Instead of `expert_noise`: the largest noise is searched for which the mean KL divergence of the result's
            predictions from the dense model's stays within this bound, in nats, on the text of the proof.
        target (`str`, *optional*, defaults to `"auto"`):
            Class of the result: `"native"` for a class of transformers (Mixtral, Qwen-MoE, Granite-MoE, GLM-4-MoE, ...),
            `"hf_moe"` for the class of hf_moe, `"auto"` for a native class where one represents the result exactly and
            is not the worse choice in other ways, else ours.
        layers (`list[int]` or `str`, *optional*):
            The layers to convert: indices, or a text of indices, ranges and slices, `"4,6,8-11"`, `"::2"` for every
            second layer, `":4"` for the first and `"-4:"` for the last four. All of them by default.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of the chosen experts are divided by their sum. `"copy"` is exact only then.
        router_type (`str`, *optional*):
            The router of the result, one of `hf_moe.models.routers.ROUTERS`. By default `"softmax_topk"`, or what a native class
            has instead where it is as exact. `"copy"` is exact with those whose weights sum to one number, `"residual"` with all.
        router_options (`dict`, *optional*):
            Fields of the configuration that the router, the capacity and zero-computation experts read, see
            [`~hf_moe.models.configuration_routing.RoutingConfigMixin`]: `{"capacity_factor": 2.0}`.
        router_init (`str`, *optional*, defaults to `"normal"`):
            How the router is initialised, see `hf_moe.upcycling.router_init`: `"normal"`, `"orthogonal"` or `"zero"`
            from the weights alone; `"kmeans"` from text, `"ridge"` and `"domain_embedding"` from one text per expert,
            `"prompts"` from prompts per expert.
        router_logit_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the router logits that the initialisation aims at.
        calibration_text (`str` or `list[str]`, *optional*):
            Text files, or `.jsonl` files with a field `text`, for what looks at data. `"ridge"` and `"domain_embedding"`
            take file e as the domain of expert e, and so does `split_by="gradient"` where there are several. The proof and
            its report of the routing look at the first tokens of this text too, as many of each file: 256 of them, or 16 E / K
            if that is more.
        calibration_tokens (`int`, *optional*, defaults to 8192):
            How many tokens of it are used, as many of each file. They pass at once, so memory grows with them.
        prompts (`list[dict]`, *optional*):
            For `router_init="prompts"`, per expert a mapping with the lists `positive` and, if wanted, `negative`.
        ridge_penalty (`float`, *optional*, defaults to 0.001):
            Penalty of `"ridge"`, relative to the mean square of the router's inputs, summed over the tokens.
        router_statistics (`str`, *optional*):
            The folder `router_statistics` of an earlier conversion with `"ridge"`, whose domains then come first.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Coefficient of the load-balancing loss, which is used in training with `output_router_logits=True`.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything random. Shard sizes and resuming do not change the result.
        verify (`str`, *optional*, defaults to `"full"`):
            What is compared with the dense model: `"full"` every converted layer and the logits of the whole model,
            `"layers"` the layers only, `"none"` nothing. With `"compose"` each expert is compared with its own checkpoint,
            all tokens being sent to it: `"layers"` its feed-forwards, `"per_expert"` the logits too, `"full"` also compares
            the routed model with the base. Each checkpoint costs two passes of a dense model over a few hundred tokens.

    Raises:
        StrictDataclassError: if a field has a wrong type or a value outside its range.
    """

    method: str = "copy"
    num_experts: int | list[int] | None = None
    num_experts_per_tok: int = 2
    granularity: int = 1
    scale_on: str = "up_down"
    reinit_ratio: float | int = 0.5
    index_sets: str = "shared"
    split_by: str = "random"
    num_shared_neurons: int = 0
    experts: list[str] | None = None
    compose_rest: str = "base"
    expert_noise: float | int = 0.0
    max_kl: float | int | None = None
    target: str = "auto"
    layers: list[int] | str | None = None
    norm_topk_prob: bool = True
    router_type: str | None = None
    router_options: dict[str, Any] | None = None
    router_init: str = "normal"
    router_logit_std: float | int = 1.0
    calibration_text: str | list[str] | None = None
    calibration_tokens: int = 8192
    prompts: list[dict[str, list[str]]] | None = None
    ridge_penalty: float | int = 1e-3
    router_statistics: str | None = None
    router_aux_loss_coef: float | int = 0.01
    seed: int = 0
    verify: str = "full"

    def __post_init__(self):
        if self.num_experts is None:
            self.num_experts = 8 if self.experts is None else len(self.experts)

    def validate_choices(self):
        choices: dict[str, list[Any]] = {
            "method": sorted(METHODS),
            "target": ["auto", "native", "hf_moe"],
            "scale_on": ["up_down", "down", "megatron"],
            "index_sets": ["shared", "independent"],
            "split_by": ["random", "kmeans", "activation", "gradient"],
            "compose_rest": ["base", "mean"],
            "router_type": [None, *sorted(ROUTERS)],
            "router_init": sorted(ROUTER_INITIALIZERS),
            "verify": ["full", "layers", "per_expert", "none"],
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"`{field}` must be one of {allowed}, got {value!r}.{did_you_mean([value], allowed)}")
        self._validate_router()

    def _validate_router(self):
        given, router_type = set(self.router_options or {}), self.router_type or DEFAULT_ROUTER
        if unknown := sorted(given - set(ROUTER_OPTIONS)):
            raise ValueError(
                f"`router_options` may have {ROUTER_OPTIONS}, got {unknown}.{did_you_mean(unknown, ROUTER_OPTIONS)}"
            )
        read = sorted({*ROUTERS[router_type].options, *UNROUTED_OPTIONS} & set(ROUTER_OPTIONS))
        if unread := sorted(given - set(read)):
            raise ValueError(f"`router_options` of router_type={router_type!r} may have {read}, got {unread}.")
        if self.router_type is not None and not ROUTERS[self.router_type].has_rows and self.router_init != "normal":
            raise ValueError(
                f"`router_init`={self.router_init!r} has no effect on router_type={self.router_type!r}, which has no weights to initialise."
            )

    def validate_numbers(self):
        if not self.expert_counts:
            raise ValueError("`num_experts` must be a number, or have one for every converted layer, got [].")
        if min(self.expert_counts) < 2:
            raise ValueError(f"`num_experts` must be at least 2, got {self.num_experts}.")
        if not 1 <= self.num_experts_per_tok <= min(self.expert_counts):
            raise ValueError(
                f"`num_experts_per_tok` (top-k) must lie between 1 and `num_experts` ({min(self.expert_counts)}), got "
                f"{self.num_experts_per_tok}."
            )
        for field, smallest in (("granularity", 1), ("num_shared_neurons", 0), ("calibration_tokens", 1)):
            if getattr(self, field) < smallest:
                raise ValueError(f"`{field}` must be at least {smallest}, got {getattr(self, field)}.")
        if self.router_logit_std == 0:
            raise ValueError("`router_logit_std` must be positive, got 0. A router of zeros is router_init='zero'.")
        for field in ("router_logit_std", "router_aux_loss_coef", "expert_noise", "ridge_penalty"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{field}` must be a finite number and not negative, got {value}.")
        if not 0 <= self.reinit_ratio <= 1:
            raise ValueError(f"`reinit_ratio` must lie between 0 and 1, got {self.reinit_ratio}.")

    def validate_layers(self):
        if isinstance(self.layers, list) and (len(set(self.layers)) != len(self.layers) or not self.layers):
            raise ValueError(f"`layers` must name at least one layer, each once, got {self.layers}.")
        if isinstance(self.layers, str):
            parse_layers(self.layers, 1)

    def validate_method(self):
        used_by = {
            "granularity": ("granular", "qwen", "residual"),
            "scale_on": ("copy", "drop", "granular", "qwen", "split"),
            "reinit_ratio": ("drop", "qwen"),
            "index_sets": ("drop",),
            "split_by": ("split",),
            "num_shared_neurons": ("split",),
            "experts": ("compose",),
            "compose_rest": ("compose",),
        }
        for field, methods in used_by.items():
            default = type(self).__dataclass_fields__[field].default
            if getattr(self, field) != default and self.method not in methods:
                raise ValueError(
                    f"`{field}`={getattr(self, field)!r} has no effect on method {self.method!r}, only on {list(methods)}."
                )
        makes_up = self.method in ("granular", "split") or any(
            weight_sum(self, count) != 1 for count in self.expert_counts
        )
        if self.scale_on != "up_down" and not makes_up:
            raise ValueError(
                f"`scale_on`={self.scale_on!r} has no effect: with weights that sum to 1, method {self.method!r} scales nothing."
            )
        if self.method in ("granular", "qwen") and self.granularity == 1:
            raise ValueError(f"Method {self.method!r} needs a `granularity` of at least 2.")
        if self.num_shared_neurons and self.split_by in ("random", "kmeans"):
            raise ValueError(
                f"`num_shared_neurons`={self.num_shared_neurons} needs a `split_by` that finds out which neurons most tokens "
                f"use; {self.split_by!r} does not look at tokens."
            )

    def validate_noise(self):
        if self.max_kl is None:
            return
        if not 0 < self.max_kl < float("inf"):
            raise ValueError(f"`max_kl` must be a positive number of nats, got {self.max_kl}.")
        if self.expert_noise:
            raise ValueError(f"`max_kl` searches for the noise: leave `expert_noise` out (got {self.expert_noise}).")
        if METHODS[self.method].noise_is_silent:
            raise ValueError(f"`max_kl` has no effect on method {self.method!r}, whose experts are silent at first.")

    def validate_data(self):
        needs = ROUTER_INITIALIZERS[self.router_init].needs
        if self.prompts is not None and needs != "prompts":
            raise ValueError(f"`prompts` has no effect on router_init={self.router_init!r}, only on 'prompts'.")
        for expert_index, entry in enumerate(self.prompts or []):
            if unknown := sorted(set(entry) - {"positive", "negative"}):
                raise ValueError(
                    f"`prompts` of expert {expert_index} may have 'positive' and 'negative', got {unknown}."
                )
            if not entry.get("positive") or not all(prompt.strip() for kind in entry.values() for prompt in kind):
                raise ValueError(
                    f"`prompts` of expert {expert_index} need at least one 'positive', and none that is empty."
                )
        defaults = type(self).__dataclass_fields__
        for field in ("ridge_penalty", "router_statistics"):
            if getattr(self, field) != defaults[field].default and self.router_init != "ridge":
                raise ValueError(f"`{field}` has no effect on router_init={self.router_init!r}, only on 'ridge'.")
        if self.router_init == "zero" and self.router_logit_std != defaults["router_logit_std"].default:
            raise ValueError(f"`router_logit_std`={self.router_logit_std} has no effect on router_init='zero'.")
        if self.calibration_tokens != defaults["calibration_tokens"].default and not self.learns_from_text:
            raise ValueError(
                f"`calibration_tokens`={self.calibration_tokens} has no effect: nothing in this recipe learns from a "
                "`calibration_text` (a data-driven `router_init` or `split_by` would)."
            )
        if self.calibration_text and self.verify == "none" and self.max_kl is None and not self.learns_from_text:
            raise ValueError(
                "`calibration_text` has no effect: nothing in this recipe learns from it, and with verify='none' nothing is "
                "compared on it."
            )
        if needs == "prompts" and self.learns_from_text:
            raise ValueError(
                f"router_init='prompts' and split_by={self.split_by!r} would look at different text, prompts and "
                "`calibration_text`. Use another of the two."
            )

    @property
    def learns_from_text(self) -> list[str]:
        """The choices in which `calibration_text` decides something."""
        learns = []
        if ROUTER_INITIALIZERS[self.router_init].needs not in (None, "prompts"):
            learns.append(f"router_init={self.router_init!r}")
        if self.method == "split" and self.split_by in ("activation", "gradient"):
            learns.append(f"split_by={self.split_by!r}")
        return learns

    @property
    def looks_at_tokens(self) -> bool:
        """Whether `calibration_text` or `prompts` decide something."""
        return bool(self.learns_from_text) or ROUTER_INITIALIZERS[self.router_init].needs == "prompts"

    @property
    def calibration_files(self) -> list[str]:
        """`calibration_text` as a list, which may be empty."""
        return [self.calibration_text] if isinstance(self.calibration_text, str) else self.calibration_text or []

    def validate_experts(self):
        if self.verify == "per_expert" and self.method != "compose":
            raise ValueError(
                "`verify`='per_expert' is for method 'compose', whose experts have checkpoints of their own."
            )
        if self.method != "compose":
            return
        if not self.experts or not all(self.experts) or set(self.experts) == {BASE}:
            raise ValueError(
                "Method 'compose' needs `experts`: folders or Hub ids, at least one of them another model than 'base' (the "
                f"source), got {self.experts}."
            )
        if not self.norm_topk_prob or weight_sum(self, len(self.experts)) != 1:
            raise ValueError(
                "Method 'compose' needs `norm_topk_prob` and a router whose weights sum to 1: others would make each expert another "
                f"model than its checkpoint. Here {unsteady_because(self)}."
            )
        if self.num_experts != len(self.experts):
            raise ValueError(
                f"Method 'compose' makes one expert of each of the {len(self.experts)} entries in `experts`, in every layer: "
                f"leave `num_experts` out, or make the two agree (got {self.num_experts})."
            )

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` as a list: of one number for all layers, or of one per converted layer."""
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts or 0]

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
            raise UpcycleError(
                f"{path} names unknown fields {unknown}. A recipe may have {known}.{did_you_mean(unknown, known)}"
            )
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


def parse_layers(text: str, num_layers: int) -> list[int]:
    """
    The indices that a text of indices, ranges and slices means in a model of `num_layers`, ascending, each as often as it is
    named.

    `"4,6,8-11"` is 4, 6, 8, 9, 10 and 11, whatever the number of layers; slices are Python's.
    """
    layers: list[int] = []
    for part in text.split(","):
        try:
            if ":" in part:
                layers += range(num_layers)[slice(*(int(item) if item.strip() else None for item in part.split(":")))]
            else:
                first, dash, last = part.partition("-")
                layers += range(int(first), int(last if dash else first) + 1)
        except (ValueError, TypeError):
            raise ValueError(
                f"`layers` takes indices, ranges and slices such as '4,6,8-11', '::2' or '-4:', got {text!r}."
            ) from None
    return sorted(layers)
