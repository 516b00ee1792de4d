# SPDX-License-Identifier: Apache-2.0
"""`ExpertLoraConfig`: which experts of a model are adapted with which rank, saved as PEFT's plain LoRA."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from ..training.routers import find_routers, plain_name
from .errors import ExpertLoraError
from .layers import find_experts, is_experts, layer_index, name_in_layer, projections
from .param_wrapper import check_adaptable, wrap_experts


OURS = ("target_experts", "expert_rank", "expert_dropout", "train_router")
# Fields of PEFT that `for_model` changes or the file may not have, so that they are kept as they were written.
CHANGED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "lora_dropout")
METADATA = "hf_moe.json"


@dataclass
class ExpertLoraConfig(LoraConfig):
    """
    A [`~peft.LoraConfig`] that also says how experts are adapted. On disk it is a plain LoRA, which PEFT loads without hf_moe;
    what PEFT does not know is kept beside it in `hf_moe.json`.

    What the experts of a model are called and how they are stored differs from class to class.
    [`~ExpertLoraConfig.for_model`] finds it out; its result goes wherever PEFT takes a configuration, and the experts then
    compute as after [`enable_grouped_lora`].

    Args:
        target_experts (`str` or `list[str]`, *optional*, defaults to `"all"`):
            Which projections of the experts to adapt: `"all"`, or names such as `["down_proj"]`.
        expert_rank (`int`, `str`, `list[int]` or `dict[int, list[int]]`, *optional*, defaults to `"r"`):
            Rank of each expert. `"r"` takes `r` as for every other module. A token passes K experts: `"r//top_k"` gives it as
            many trained parameters as rank `r` does in a dense model. `"r//num_experts"` gives all experts of a layer
            together as many. A list has one rank per expert, a dictionary one list per layer; experts with rank 0, and layers
            that are left out, are not trained. They are stored with the largest rank, filled up with zeros that stay zero
            in training. The scaling is the same for all: `lora_alpha / r` (with `use_rslora` over the root of `r`).
        expert_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on what enters the adapters of experts. `lora_dropout` is for the other modules.
        train_router (`bool`, *optional*, defaults to `False`):
            Whether the routers are adapted too, all their matrices with the rank of the experts. In published comparisons of LoRA with trained and
            frozen routers neither won, a frozen one keeps the balance of the pretrained model, and serving programs load no
            LoRA on routers.
        kwargs:
            Everything that [`~peft.LoraConfig`] takes. `target_modules` (default: none) are modules outside the experts;
            `"all-linear"` is every linear module but routers, experts, the gate of a shared expert and the output layer. `layers_to_transform` holds for the
            experts as well.

    Raises:
        ExpertLoraError: if a value is not allowed.

    Example:

    ```python
    >>> from hf_moe import ExpertLoraConfig
    >>> from peft import get_peft_model

    >>> config = ExpertLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).for_model(model)
    >>> model = get_peft_model(model, config)
    ```
    """

    target_experts: str | list[str] = field(default="all")
    expert_rank: int | str | list[int] | dict[int, list[int]] = field(default="r")
    expert_dropout: float = field(default=0.0)
    train_router: bool = field(default=False)

    def __post_init__(self):
        super().__post_init__()
        self._resolved = False
        self.ranks_by_layer: dict[int | None, list[int]] | None = None
        self._written = {name: copy.deepcopy(getattr(self, name)) for name in (*OURS, *CHANGED)}
        if not _is_rank(self.r) or self.r < 1:
            raise ExpertLoraError(f"r is {self.r!r}. A rank is a whole number of at least 1.")
        if not isinstance(self.expert_dropout, (int, float)) or not 0.0 <= self.expert_dropout < 1.0:
            raise ExpertLoraError(
                f"expert_dropout is {self.expert_dropout!r}. Choose a share from 0.0 to less than 1.0."
            )
        if self.target_parameters:
            raise ExpertLoraError(
                f"target_parameters is {self.target_parameters}. ExpertLoraConfig finds the parameters itself: say which with "
                "`target_experts`, or use PEFT's LoraConfig and `enable_grouped_lora`."
            )

    @property
    def is_prompt_learning(self) -> bool:
        """False, as for every LoRA. PEFT asks for it before it changes a model: too late to find out what experts there are."""
        if not self._resolved:
            raise ExpertLoraError(
                "This ExpertLoraConfig does not know the model yet. Pass `config.for_model(model)` instead of `config`."
            )
        return False

    def for_model(self, model: PreTrainedModel) -> "ExpertLoraConfig":
        """
        The configuration with the names and ranks of a model's experts; this one stays as it is.

        Args:
            model ([`~transformers.PreTrainedModel`]): A mixture of experts, with or without adapters.

        Raises:
            ExpertLoraError: if the model has no experts that can be adapted, or the configuration does not fit them.
        """
        if self._resolved:
            raise ExpertLoraError(
                "This ExpertLoraConfig was made for a model already. Call `for_model` on the one you wrote."
            )
        config = copy.deepcopy(self)
        config._written = {name: copy.deepcopy(getattr(self, name)) for name in (*OURS, *CHANGED)}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        experts = find_experts(base)
        for name, layer in experts.items():
            check_adaptable(name, layer)
        if any(type(module) is ParamWrapper and is_experts(module.get_base_layer()) for module in base.modules()):
            raise ExpertLoraError(
                "The experts have an adapter that PEFT computes. Call `enable_grouped_lora(model)` first."
            )
        routers = {plain_name(name): router for name, router in find_routers(base).items()}
        config.target_parameters = self._parameters(experts, {name: of.module for name, of in routers.items()})
        config.target_modules, caught = self._modules(base, list(experts), list(routers))
        config._set_ranks(experts, caught, next(iter(routers.values())).top_k)
        config._check_what_peft_makes_of_it(base)
        config._register_custom_module(cast(Any, {nn.Module: wrap_experts}))
        config._resolved = True
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes into `adapter_config.json`: PEFT's own fields."""
        values = {name: value for name, value in super().to_dict().items() if name not in OURS}
        # PEFT refuses dropout beside adapters of experts, also where it only runs the model.
        return values | {"lora_dropout": 0.0} if self.target_parameters else values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` as PEFT does, and what PEFT has no place for to `hf_moe.json`."""
        super().save_pretrained(save_directory, **kwargs)
        # What the file beside it says, by which a reader sees that the two belong together.
        beside = {"r": self.r, "target_parameters": sorted(self.target_parameters or ())}
        text = json.dumps(
            {"expert_lora": self._written, "adapter_config": beside}, indent=2, sort_keys=True, default=sorted
        )
        Path(save_directory, METADATA).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """
        The configuration that an adapter was made with, as it was before [`~ExpertLoraConfig.for_model`].

        Raises:
            ExpertLoraError: if the adapter was not made with an ExpertLoraConfig.
        """
        plain = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        path = cached_file(
            pretrained_model_name_or_path,
            METADATA,
            subfolder=subfolder or "",
            _raise_exceptions_for_missing_entries=False,
            **kwargs,
        )
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        written = content.get("expert_lora")
        if written is None:
            raise ExpertLoraError(
                f"{pretrained_model_name_or_path} was not made with an ExpertLoraConfig: it has no {METADATA}. Load it with PEFT's "
                "`PeftModel.from_pretrained` and call `enable_grouped_lora` on the model."
            )
        if content["adapter_config"] != {"r": plain.r, "target_parameters": sorted(plain.target_parameters or ())}:
            raise ExpertLoraError(
                f"The {METADATA} of {pretrained_model_name_or_path} belongs to another adapter, which was there before. Delete that "
                "file, load the adapter with PEFT's `PeftModel.from_pretrained` and call `enable_grouped_lora` on the model."
            )
        if isinstance(written["expert_rank"], dict):
            written["expert_rank"] = {int(layer): ranks for layer, ranks in written["expert_rank"].items()}
        return cls(**{item.name: getattr(plain, item.name) for item in fields(LoraConfig)} | written)

    def _parameters(self, experts: dict[str, nn.Module], routers: dict[str, nn.Module]) -> list[str]:
        names = {projection for layer in experts.values() for projection in projections(layer)}
        chosen = names if self.target_experts == "all" else self.target_experts
        if not isinstance(chosen, (list, set, tuple)) or not chosen or not set(chosen) <= names:
            raise ExpertLoraError(
                f"target_experts is {self.target_experts!r}. This model's experts have {', '.join(sorted(names))}: give a list of "
                "these, or 'all'."
            )
        parameters = [f"{name}.{chosen_name}" for name in experts for chosen_name in chosen]
        if self.train_router:
            if self.lora_dropout:
                raise ExpertLoraError(
                    "PEFT has no dropout for a router. With train_router=True leave lora_dropout at 0; expert_dropout is free."
                )
            for name, router in routers.items():
                if getattr(getattr(router, "weight", None), "ndim", 0) != 2:
                    raise ExpertLoraError(
                        f"The router {name} ({type(router).__name__}) is no matrix called `weight`, so that PEFT cannot adapt it. Leave "
                        "train_router at False; one that has parameters can be trained in full with `modules_to_save`."
                    )
            parameters += [
                f"{name}.{matrix}"
                for name, router in routers.items()
                for matrix, parameter in router.named_parameters(recurse=False)
                if parameter.ndim == 2
            ]
        if self.exclude_modules and (
            excluded := [name for name in experts if check_target_module_exists(_only(self.exclude_modules), name)]
        ):
            raise ExpertLoraError(
                f"exclude_modules {self.exclude_modules!r} catches {excluded[0]!r}, but PEFT does not heed it for parameters. Choose "
                "layers with `layers_to_transform`, projections with `target_experts`."
            )
        wanted = self.layers_to_transform
        if wanted is not None:
            wanted = [wanted] if isinstance(wanted, int) else list(wanted)
            layers = [layer_index(name) for name in experts]
            if unknown := [layer for layer in wanted if layer not in layers]:
                raise ExpertLoraError(f"layers_to_transform has {unknown[0]}, but experts are in the layers {layers}.")
            return [name for name in parameters if layer_index(name) in wanted]
        if any(is_parametrized(layer) for layer in experts.values()):
            return parameters  # PEFT knows parametrized weights by their whole names only
        return sorted({name_in_layer(name) for name in parameters})

    def _modules(self, model: nn.Module, experts: list[str], routers: list[str]) -> tuple[list[str] | str, list[str]]:
        """`target_modules` as PEFT gets it, and the modules outside the experts that it catches."""
        modules = {plain_name(name): module for name, module in _outside_adapters(model)}
        chosen = self.target_modules or []
        if chosen == "all-linear":
            output = model.get_output_embeddings()
            caught = [
                name
                for name, module in modules.items()
                if isinstance(module, (nn.Linear, Conv1D))
                and module is not output
                and not name.endswith("shared_expert_gate")  # a vector
                and not any(f"{name}.".startswith(f"{outside}.") for outside in (*experts, *routers))
            ]
            chosen = sorted({name_in_layer(name) for name in caught})
        else:
            caught = [name for name in modules if chosen and check_target_module_exists(self, name)]
        if not self.train_router and (names := [name for name in routers if name in caught]):
            raise ExpertLoraError(
                f"target_modules {chosen!r} catches the router {names[0]!r}, but train_router is False. Take it out, or leave "
                "routers to train_router=True."
            )
        if names := [name for name in caught if isinstance(modules[name], Conv1D)]:
            raise ExpertLoraError(
                f"target_modules {chosen!r} catches {names[0]!r}, which stores its weight the other way round (Conv1D). PEFT "
                "refuses that in one adapter with experts: leave such modules out, or give them an adapter of their own."
            )
        return chosen if isinstance(chosen, str) else sorted(chosen), sorted({name_in_layer(name) for name in caught})

    def _set_ranks(self, experts: dict[str, Any], caught: list[str], top_k: int | None) -> None:
        rank = self._common_rank({layer.num_experts for layer in experts.values()}, top_k)
        if isinstance(self.expert_rank, (list, dict)):
            self.ranks_by_layer = _ranks_by_layer(self.expert_rank, experts)
        if rank != self.r:
            # PEFT warns of patterns that match no module, and takes parameters for none: so the modules get the pattern.
            rank_pattern, alpha_pattern = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
            for name in caught:
                rank_pattern.setdefault(get_pattern_key(list(rank_pattern), name), self.r)
                alpha_pattern.setdefault(get_pattern_key(list(alpha_pattern), name), self.lora_alpha)
            self.rank_pattern, self.alpha_pattern = rank_pattern, alpha_pattern
            alpha = self.lora_alpha * (rank / self.r) ** (0.5 if self.use_rslora else 1.0)
            self.r, self.lora_alpha = rank, cast(int, int(alpha) if alpha == int(alpha) else alpha)
        parameters = [f"{name}.{projection}" for name, layer in experts.items() for projection in projections(layer)]
        for pattern in ("rank_pattern", "alpha_pattern"):
            for name in parameters:
                if (key := get_pattern_key(list(getattr(self, pattern) or ()), name)) != name:
                    raise ExpertLoraError(
                        f"{pattern} has {key!r}, which PEFT takes for {name} too. The rank of experts is `expert_rank`: give the "
                        "longer name of the module that is meant."
                    )

    def _common_rank(self, counts: set[int], top_k: int | None) -> int:
        rank = self.expert_rank
        if isinstance(rank, (list, dict)):
            lists = list(rank.values()) if isinstance(rank, dict) else [rank]
            for ranks in lists:
                if not isinstance(ranks, list) or not all(
                    _is_rank(of_expert) and of_expert >= 0 for of_expert in ranks
                ):
                    raise ExpertLoraError(
                        f"expert_rank has {ranks!r}. A list has one whole number per expert, 0 for an expert not to train."
                    )
            if not any(any(ranks) for ranks in lists):
                raise ExpertLoraError("expert_rank is 0 for every expert, so that none would be trained.")
            return max(max(ranks, default=0) for ranks in lists)
        num_experts = min(counts) if len(counts) == 1 else None  # of every layer, if they do not differ
        divisors = {"r": 1, "r//top_k": top_k, "r//num_experts": num_experts}
        if isinstance(rank, str):
            if (divisor := divisors.get(rank)) is None:
                known = f"which is not known of this model (r={self.r})" if rank in divisors else "which is no rank"
                raise ExpertLoraError(
                    f"expert_rank is {rank!r}, {known}. Give a number, a list, or one of {', '.join(map(repr, divisors))}."
                )
            rank = self.r // divisor
        if not _is_rank(rank) or rank < 1:
            raise ExpertLoraError(
                f"expert_rank {self.expert_rank!r} is {rank!r} with r={self.r}, {' or '.join(map(str, sorted(counts)))} experts and {top_k} of them per token. "
                "A rank is a whole number of at least 1: give a larger `r` or the number itself."
            )
        return rank

    def _check_what_peft_makes_of_it(self, model: nn.Module) -> None:
        """PEFT reads names of a few classes' older checkpoints as experts or routers, and then changes parameters and ranks."""
        read = copy.deepcopy(self)
        written = set() if isinstance(self.target_modules, str) else set(self.target_modules or ())
        taken: list[str] = []
        try:
            convert_peft_config_for_transformers(read, model, None)
        except ValueError:  # some of the names of what is one parameter today
            taken = sorted(written)
        added = set(read.target_parameters or ()) - set(self.target_parameters or ())
        if taken := taken or sorted(written - set(read.target_modules or ())) or sorted(added):
            raise ExpertLoraError(
                f"Of {model.config.model_type} models PEFT takes module names among {taken} for the experts and routers of older "
                "checkpoints, so that shared experts and dense layers cannot be adapted under these names. Give `target_modules` "
                "without them; experts are chosen with `target_experts`, routers with `train_router`."
            )
        names = [plain_name(name) for name, _ in _outside_adapters(model)]
        unmatched = [name for name in sorted(written) if not any(f".{of}".endswith(f".{name}") for of in names)]
        if unmatched:
            raise ExpertLoraError(
                f"target_modules has {unmatched[0]!r}, but no module of {type(model).__name__} is called that. Experts are chosen with "
                "`target_experts`, not by the names that their projections have in dense models."
            )


def _ranks_by_layer(ranks: list[int] | dict[int, list[int]], experts: dict[str, Any]) -> dict[int | None, list[int]]:
    num_experts = {layer_index(name): layer.num_experts for name, layer in experts.items()}
    layers = list(num_experts)
    by_layer: dict[int | None, list[int]] = {layer: [0] * count for layer, count in num_experts.items()}
    given = ranks if isinstance(ranks, dict) else dict.fromkeys(layers, ranks)
    for layer, of_layer in given.items():
        if layer not in by_layer:
            raise ExpertLoraError(f"expert_rank has a list for layer {layer!r}; experts are in the layers {layers}.")
        if len(of_layer) != num_experts[layer]:
            raise ExpertLoraError(
                f"expert_rank has {len(of_layer)} ranks for layer {layer}, but there are {num_experts[layer]} experts. Where layers "
                "differ in that give a dictionary."
            )
        by_layer[layer] = list(of_layer)
    return by_layer


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _only(names: list[str] | str) -> LoraConfig:
    """A configuration whose targets are these, for PEFT's own way to match names."""
    return LoraConfig(target_modules=names)


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model itself, without what PEFT has put beside them."""
    added: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(added):
            yield name, module
        children = [child for child, _ in module.named_children() if child != "base_layer"]
        if isinstance(module, BaseTunerLayer):
            added += tuple(f"{name}.{child}" for child in children)
