# SPDX-License-Identifier: Apache-2.0
"""
What a conversion will give, from the configuration alone: `plan_upcycle` and `UpcyclePlan`.

The plan also is what the writer and the in-memory conversion follow, so that both make the same model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.routers import ROUTERS
from .checkpoint import read_config
from .compose import check_experts, composed_config, read_expert_configs
from .errors import UpcycleError
from .families import Family
from .feed_forward import FeedForward, LayerSizes
from .methods import METHODS, inexact_because
from .readers import misreadings
from .recipe import UpcycleConfig
from .router_init import ROUTER_INITIALIZERS
from .routing import DEFAULT_ROUTER, chosen_at_zero, weight_sum
from .target import Target
from .targets import (
    build_config,
    choose_target,
    dense_class,
    find_family,
    find_head,
    find_sparse_layers,
    layer_prefix,
    meta_model,
    target_class,
)


# torch's grouped products want rows that start at multiples of 16 bytes.
EXPERT_SIZE_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """
    What a conversion will give.

    Args:
        model_type (`str`): Model type of the result.
        architecture (`str`): Its model class.
        native (`bool`): Whether that class belongs to transformers.
        exact (`bool`): Whether the result computes what the dense model computes.
        inexact_because (`str`, *optional*): Why not.
        warnings (`list[str]`): What to know before training or serving the result.
        misread_by (`dict[str, list[str]]`): Programs that load the result and compute something else, and what.
        num_parameters (`int`): Parameters of the result.
        num_active_parameters (`int`): Parameters that one token uses, embeddings included.
        num_dense_parameters (`int`): Parameters of the dense model.
        bytes (`int`): Bytes of the result's weights, in the data type of the dense configuration.
        flops_per_token (`int`): Floating-point operations of one token's forward pass in matrix products with weights.
            Left out are attention scores, which depend on the length of the context, and what runs once per sequence: a
            pooler, and a classifier behind it. For images a token is a patch, its projection included.
        dense_flops_per_token (`int`): The same for the dense model.
        experts_in_layer (`dict[int, int]`): Number of routed experts by the index of every converted layer.
        sizes (`LayerSizes`): Sizes of the experts.
        target (`Target`): Entry of the family table that was chosen.
        model_class (`type`): Class of the result.
        config (`PreTrainedConfig`): Configuration of the result.
    """

    model_type: str
    architecture: str
    native: bool
    exact: bool
    inexact_because: str | None
    warnings: list[str]
    misread_by: dict[str, list[str]]
    num_parameters: int
    num_active_parameters: int
    num_dense_parameters: int
    bytes: int
    flops_per_token: int
    dense_flops_per_token: int
    experts_in_layer: dict[int, int]
    sizes: LayerSizes
    target: Target
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the converted layers."""
        return list(self.experts_in_layer)

    def num_router_rows(self, layer_index: int) -> int:
        """Rows of a layer's router that are not copies of another: one per expert, or per copy of several experts."""
        return self.experts_in_layer[layer_index] // self.sizes.experts_per_copy

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, without the configuration itself."""
        values = {name: value for name, value in vars(self).items() if name not in ("target", "model_class", "config")}
        return {**values, "sizes": self.sizes._asdict(), "sparse_layers": self.sparse_layers}


def plan_upcycle(
    source: str | Path | PreTrainedConfig,
    config: UpcycleConfig | None = None,
    *,
    revision: str | None = None,
    experts: Mapping[str, PreTrainedConfig] | None = None,
) -> UpcyclePlan:
    """
    Say what [`upcycle`] would do; reads the configurations of the source and of the recipe's `experts`, and no weights.

    Args:
        source (`str`, `Path` or `PreTrainedConfig`): The dense model: a folder, a Hub id, or its configuration.
        config (`UpcycleConfig`, *optional*): The recipe. The default one if None.
        revision (`str`, *optional*): Branch, tag or commit of a Hub source.
        experts (`Mapping[str, PreTrainedConfig]`, *optional*): The configurations of the checkpoints in the recipe's
            `experts`, by entry. Read from there if None.

    Raises:
        UpcycleError: if the conversion cannot be done.
    """
    recipe = config or UpcycleConfig()
    dense_config = source if isinstance(source, PreTrainedConfig) else read_config(source, revision)
    family = find_family(dense_config)
    head = find_head(dense_config)
    experts = read_expert_configs(recipe) if experts is None else experts
    check_experts(dense_config, experts)
    dense_model = meta_model(dense_class(dense_config), dense_config)
    _check_what_it_looks_at(recipe, dense_model)
    dense = _meta_feed_forward(dense_model, layer_prefix(family, dense_model), family)
    experts_in = find_sparse_layers(dense_config, recipe)
    sizes = _sizes(recipe, list(experts_in.values()), dense.intermediate_size)
    _check_data(recipe, experts_in, sizes)
    rest_config = composed_config(dense_config, experts, recipe)
    target = choose_target(rest_config, recipe, dense, sizes)
    target_config = build_config(target, rest_config, recipe, sizes)

    model = meta_model(target_class(target, head), target_config)
    num_parameters = model.num_parameters()
    idle_experts = sum(count - recipe.num_experts_per_tok for count in experts_in.values())
    expert = dense.take(slice(0, sizes.expert))
    idle = idle_experts * expert.numel
    idle_weights = idle_experts * sum(tensor.numel() for tensor in expert[:3] if tensor is not None)
    dtype = dense_config.dtype or torch.float32
    if isinstance(dtype, str):  # what `save_pretrained` leaves behind in the configuration of a model
        dtype = getattr(torch, dtype)
    reason = inexact_because(recipe, dtype, dense.is_gated)
    misread_by = misreadings(target_config) if target.native else {}
    once_per_sequence = tuple(f"{module}." for module in family.once_per_sequence.get(head, ()))
    return UpcyclePlan(
        model_type=target_config.model_type,
        architecture=type(model).__name__,
        native=target.native,
        exact=reason is None,
        inexact_because=reason,
        warnings=_warnings(recipe, dtype, dense.is_gated, misread_by),
        misread_by=misread_by,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - idle,
        num_dense_parameters=dense_model.num_parameters(),
        bytes=num_parameters * dtype.itemsize,
        flops_per_token=_matrix_flops(model, once_per_sequence) - 2 * idle_weights,
        dense_flops_per_token=_matrix_flops(dense_model, once_per_sequence),
        experts_in_layer=experts_in,
        sizes=sizes,
        target=target,
        model_class=type(model),
        config=target_config,
    )


def _check_what_it_looks_at(recipe: UpcycleConfig, dense_model: PreTrainedModel) -> None:
    """Refuse recipes that want of the dense model what it cannot give."""
    name = type(dense_model).__name__
    if hasattr(dense_model.config, "image_size"):
        if recipe.looks_at_tokens:
            looks = recipe.learns_from_text or [f"router_init={recipe.router_init!r}"]
            raise UpcycleError(
                f"{name} sees images, but {_who_looks(looks)} at text. Use a `router_init` of 'normal', 'orthogonal' or 'zero', and a "
                "`split_by` of 'random' or 'kmeans'."
            )
        if recipe.calibration_text:
            raise UpcycleError(f"{name} sees images, for which `calibration_text` has no use. Leave it out.")
    if recipe.method == "split" and recipe.split_by == "gradient" and not dense_model.can_generate():
        raise UpcycleError(f"split_by='gradient' needs the loss of a causal language model, not of {name}.")
    if recipe.max_kl is not None and dense_model.base_model is dense_model:
        raise UpcycleError(f"`max_kl` compares predictions, and {name} makes none. Give `expert_noise`.")


def _check_data(recipe: UpcycleConfig, experts_in: Mapping[int, int], sizes: LayerSizes) -> None:
    """Refuse recipes that do not come with as many texts or prompts as they need."""
    needs = ROUTER_INITIALIZERS[recipe.router_init].needs
    if needs is not None and len(set(experts_in.values())) > 1:
        raise UpcycleError(
            f"router_init={recipe.router_init!r} needs the same number of experts in every layer, got {recipe.num_experts}."
        )
    num_rows, files = max(experts_in.values()) // sizes.experts_per_copy, recipe.calibration_files
    if needs == "prompts" and len(recipe.prompts or []) != num_rows:
        raise UpcycleError(
            f"router_init='prompts' needs one entry of `prompts` per row of the router ({num_rows}), got "
            f"{len(recipe.prompts or [])}."
        )
    if recipe.learns_from_text and not files:
        raise UpcycleError(
            f"{_who_looks(recipe.learns_from_text)} at text: give `calibration_text`, a text file or a list of them."
        )
    # With `router_statistics`, how many domains those know is seen when they are read.
    if needs == "domains" and recipe.router_statistics is None and len(files) != num_rows:
        raise UpcycleError(
            f"router_init={recipe.router_init!r} needs one file of `calibration_text` per row of the router ({num_rows}), got "
            f"{len(files)}."
        )
    if recipe.method == "split" and recipe.split_by == "gradient" and len(files) not in (1, num_rows):
        raise UpcycleError(
            f"split_by='gradient' takes one file of `calibration_text` per expert ({num_rows}), or one that is cut into "
            f"clusters; got {len(files)}."
        )


def _who_looks(choices: list[str]) -> str:
    return f"{' and '.join(choices)} look{'s' if len(choices) == 1 else ''}"


def _warnings(
    recipe: UpcycleConfig, dtype: torch.dtype, is_gated: bool, misread_by: Mapping[str, list[str]]
) -> list[str]:
    found = _warnings_of_zeros(recipe) if recipe.router_init == "zero" else []
    if recipe.scale_on == "megatron":
        found.append(
            "scale_on='megatron' is for comparison with Megatron-Core: it changes what goes through the activation, and so the "
            f"output, {'by 6 to 30 % for 2 to 16 parts' if is_gated else 'unless the activation is ReLU'}. Use 'up_down'."
        )
    if recipe.method in ("drop", "qwen", "split") and METHODS[recipe.method].inexact_because(recipe, dtype, is_gated):
        found.append(
            f"method {recipe.method!r} starts far from the dense model. After 50B tokens such starts were reported well below the "
            "dense model (https://huggingface.co/papers/2603.13364, table 1); 'copy' and 'residual' start from its quality."
        )
    found += [
        f"{program} loads the result and computes something else: it {' and '.join(what)}."
        for program, what in misread_by.items()
    ]
    return found


def _warnings_of_zeros(recipe: UpcycleConfig) -> list[str]:
    """What to know of `router_init="zero"`; refused where no expert is chosen, which training cannot change."""
    router_type = recipe.router_type or DEFAULT_ROUTER
    router, num_experts = ROUTERS[router_type], max(recipe.expert_counts)
    num_chosen, total = chosen_at_zero(recipe, num_experts)
    if num_chosen == 0:
        raise UpcycleError(
            f"With router_init='zero' a router of router_type={router_type!r} chooses no expert, and gets no gradient by which it "
            "could learn to. Use 'normal', or another `router_type`."
        )
    # Where one expert has all of the weight, whatever the router says, the loss cannot tell it which would be better.
    loss_breaks_tie = recipe.num_experts_per_tok > 1 or weight_sum(recipe, num_experts) is None
    has_noise = bool(recipe.expert_noise) or recipe.max_kl is not None
    if num_chosen == total or router.has_noise or (has_noise and loss_breaks_tie):
        return []
    remedies = [
        "a balance loss",
        *(["`expert_noise`"] if loss_breaks_tie else []),
        *(["a selection bias"] if "use_expert_bias" in router.options else []),
    ]
    return [
        "router_init='zero': all logits tie, so every token goes to the same experts, and the others get no gradient until training "
        f"breaks the tie. Train with {' or '.join(remedies)}, or use 'normal'."
    ]


def _meta_feed_forward(model: PreTrainedModel, layers: str, family: Family) -> FeedForward:
    """The feed-forward of the first layer without values."""
    tensors = model.state_dict()
    return family.feed_forward.read(f"{layers}0.", tensors)


def _sizes(recipe: UpcycleConfig, expert_counts: list[int], intermediate_size: int) -> LayerSizes:
    """What the method makes of every layer; a model has one size of experts."""
    sizes = {METHODS[recipe.method].sizes(recipe, count, intermediate_size) for count in expert_counts}
    if len(sizes) > 1:
        raise UpcycleError(
            f"Method {recipe.method!r} makes experts of different sizes when the layers have different numbers of them "
            f"(num_experts={recipe.num_experts}). All experts of a model have one size: give one number."
        )
    (result,) = sizes
    if result.expert != intermediate_size and result.expert % EXPERT_SIZE_MULTIPLE:
        raise UpcycleError(
            f"The experts would have an intermediate size of {result.expert}, but the grouped matrix products with which "
            f"transformers runs experts need a multiple of {EXPERT_SIZE_MULTIPLE}. Cut the {intermediate_size} dense neurons into "
            "fewer or other parts."
        )
    return result


def _matrix_flops(model: PreTrainedModel, left_out: tuple[str, ...]) -> int:
    """Two operations per weight of every matrix that multiplies a token, each expert once."""
    output = model.get_output_embeddings()
    looked_up = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if output is not None:
        looked_up.discard(output.weight)
    return 2 * sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and not name.endswith("bias")
        and not name.startswith(left_out)
        and parameter not in looked_up
        and not (parameter.dim() == 3 and len(parameter) == 1)  # what is added to an image's tokens, not multiplied
    )
