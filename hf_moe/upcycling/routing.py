# SPDX-License-Identifier: Apache-2.0
"""What the recipe's router means for a conversion: how its weights sum up, and which tensors it has besides its rows."""

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from ..models.configuration_routing import RoutingConfigMixin
from ..models.routers import ROUTERS, build_router
from ..models.routing_context import Tokens
from ..models.zero_experts import ZeroComputationExperts
from .feed_forward import LayerContext
from .router_init import RouterInput, normal


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


DEFAULT_ROUTER = "softmax_topk"
# What a recipe may set of the router; the others are fields of the recipe itself.
ROUTER_OPTIONS = sorted(
    {field.name for field in dataclasses.fields(RoutingConfigMixin)} - {"router_type", "norm_topk_prob"}
)
# Those of the block, which no router reads.
UNROUTED_OPTIONS = ("router_jitter_noise", "expert_dropout", "moe_initializer_scale")


def router_fields(recipe: "UpcycleConfig") -> dict[str, Any]:
    """The fields of hf_moe's configurations that the recipe sets."""
    router_type = recipe.router_type or DEFAULT_ROUTER
    return {"router_type": router_type, "norm_topk_prob": recipe.norm_topk_prob, **(recipe.router_options or {})}


def weight_sum(recipe: "UpcycleConfig", num_experts: int) -> float | None:
    """What the weights of a token sum to whatever the router's rows are; None if that depends on the token."""
    return weight_sum_of(_fields(recipe), num_experts)


def weight_sum_of(config: Any, num_experts: int) -> float | None:
    """The same of a model of hf_moe."""
    return None if _leaves_parts_out(config) else ROUTERS[config.router_type].weight_sum(config, num_experts)


def weight_sum_at_zero(recipe: "UpcycleConfig", num_experts: int) -> float | None:
    """What they sum to with a router of zeros, asked of one; None if experts cannot make up for it."""
    fields = _fields(recipe)
    if _leaves_parts_out(fields) or not ROUTERS[fields.router_type].decides_alone:
        return None
    weights_TK, _ = _ask(fields, num_experts, std=0.0)
    sums = weights_TK.sum(-1).tolist()
    return sums[0] if sums[0] > 0 and max(sums) - min(sums) < 1e-6 else None


def weighs_all_alike(recipe: "UpcycleConfig", num_experts: int, std: float) -> bool:
    """
    Whether a token gets each of the experts, all with one weight, where `num_experts_per_tok` is their number.

    It is asked of a router whose rows have this standard deviation.
    """
    fields = _fields(recipe)
    if _leaves_parts_out(fields):
        return False
    weights_TK, index_TK = _ask(fields, num_experts, std)
    gets_all = torch.equal(index_TK.sort(-1).values, torch.arange(num_experts).expand_as(index_TK))
    return gets_all and (weights_TK.max() - weights_TK.min()).item() < 1e-6


def chosen_at_zero(recipe: "UpcycleConfig", num_experts: int) -> tuple[int, int]:
    """How many experts tokens of all modalities get from a router of zeros, and of how many, zero-computation ones included."""
    fields = _fields(recipe)
    total = num_experts + fields.num_zero_computation_experts
    _, index_TK = _ask(fields, num_experts, std=0.0)
    return len(index_TK[index_TK < total].unique()), total


@torch.no_grad()
def _ask(fields: SimpleNamespace, num_experts: int, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`(T, K)` weights and experts that a router with such rows gives to a token of every modality."""
    fields = SimpleNamespace(**{**vars(fields), "hidden_size": 1, "vocab_size": 1, "capacity_group": "batch"})
    router = ROUTERS[fields.router_type](fields, num_experts).eval()
    with torch.random.fork_rng(devices=[]):
        router.init_weights(std)
        if router.weight is not None:
            router.weight.normal_(0.0, std)
    num_tokens = len(fields.num_experts_per_modality or [num_experts])
    nothing_T = torch.zeros(num_tokens, dtype=torch.long)
    tokens = Tokens(num_tokens, input_ids_T=nothing_T, domain_T=nothing_T, modality_T=torch.arange(num_tokens))
    _, weights_TK, index_TK = router(torch.ones(num_tokens, 1), tokens)
    return weights_TK, index_TK


def _leaves_parts_out(fields: Any) -> bool:
    """Whether the weights of a token do not tell what the feed-forwards give together."""
    has_zero_experts = bool(fields.num_zero_computation_experts)
    return has_zero_experts or _drops(fields) or ROUTERS[fields.router_type].weighs_input


def unsteady_because(recipe: "UpcycleConfig") -> str:
    """Why the weights of a token do not sum to one number."""
    fields = _fields(recipe)
    if fields.num_zero_computation_experts:
        return "tokens that go to zero-computation experts leave the feed-forwards out"
    if _drops(fields):
        return f"tokens beyond the capacity are left out (eval_capacity_factor={fields.eval_capacity_factor})"
    if ROUTERS[fields.router_type].weighs_input:
        return f"router_type={fields.router_type!r} multiplies what goes into the experts"
    if not ROUTERS[fields.router_type].decides_alone:
        return f"other tokens decide which experts a token gets (router_type={fields.router_type!r})"
    how = (
        ""
        if recipe.norm_topk_prob or "norm_topk_prob" not in ROUTERS[fields.router_type].options
        else "norm_topk_prob=False, "
    )
    return f"the weights of the chosen experts do not sum to 1 ({how}router_type={fields.router_type!r})"


def varying_because(recipe: "UpcycleConfig") -> str | None:
    """Why `num_experts_per_tok` is not the number of experts that a token gets; None if it is."""
    router_type = _fields(recipe).router_type
    return (
        f"the number of experts of a token varies (router_type={router_type!r})"
        if ROUTERS[router_type].has_variable_top_k
        else None
    )


def kinds_of_tokens(recipe: "UpcycleConfig") -> tuple[str, int]:
    """What a text may be where that decides which experts it can have, `"domains"` or `"modalities"`, and how many there are."""
    return kinds_of_tokens_of(_fields(recipe))


def kinds_of_tokens_of(config: Any) -> tuple[str, int]:
    """The same of a model of hf_moe."""
    num_domains = ROUTERS[config.router_type].count_domains(config)
    return ("domains", num_domains) if num_domains > 1 else ("modalities", len(config.num_experts_per_modality or [0]))


def has_loud_zero_experts(recipe: "UpcycleConfig") -> bool:
    """Whether there are zero-computation experts that give something."""
    fields = _fields(recipe)
    return bool(fields.num_constant_experts + fields.num_copy_experts)


def ranks_all_experts(recipe: "UpcycleConfig") -> bool:
    """Whether a token gets the experts with the K largest scores, so that experts of equal scores go together."""
    fields = _fields(recipe)
    return ROUTERS[fields.router_type].ranks_all_experts and fields.n_group == 1 and not fields.use_expert_bias


def _fields(recipe: "UpcycleConfig") -> SimpleNamespace:
    """What routers read of a configuration."""
    defaults = {field.name: field.default for field in dataclasses.fields(RoutingConfigMixin)}
    fields = SimpleNamespace(**{**defaults, **router_fields(recipe)}, num_experts_per_tok=recipe.num_experts_per_tok)
    fields.num_zero_computation_experts = (
        fields.num_constant_experts + fields.num_copy_experts + fields.num_zero_experts
    )
    return fields


def _drops(fields: Any) -> bool:
    """Whether tokens are dropped in evaluation."""
    return fields.eval_capacity_factor is not None


def router_shapes(
    config: PreTrainedConfig, num_experts: int, layer_index: int
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """By name within the block: type, float32 standing for that of the weights, and shape of what routes in hf_moe's block."""
    with torch.device("meta"):
        modules = _modules(config, num_experts, layer_index)
    return {
        f"{prefix}.{name}": (tensor.dtype, tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def router_tensors(
    config: PreTrainedConfig,
    rows: torch.Tensor,
    router_input: RouterInput,
    context: LayerContext,
    experts_per_copy: int = 1,
) -> dict[str, torch.Tensor]:
    """
    The values of [`router_shapes`] in float32, integers excepted.

    Args:
        rows (`torch.Tensor` of shape `(E, H)`): The rows of the feed-forwards, from the recipe's `router_init`.
        router_input (`RouterInput`): What the router will see.
        context (`LayerContext`): The layer.
        experts_per_copy (`int`, *optional*, defaults to 1): So many experts in a row are the parts of one copy, which are to get
            the same scores.
    """
    is_zero = context.recipe.router_init == "zero"
    std = context.recipe.router_logit_std / router_input.length
    modules = _modules(config, context.num_experts, context.layer_index)
    seed = int(torch.randint(2**62, (), generator=context.generator(0, "router_tensors")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in modules.values():
            needs_more = module is modules["gate"] and module.ties_at_zero_rows
            module.init_weights(0.0 if is_zero and not needs_more else std)
    router = modules["gate"]
    with torch.no_grad():
        for tensor in router.parameters():
            if experts_per_copy > 1 and len(tensor) == context.num_experts:
                tensor.copy_(tensor[::experts_per_copy].repeat_interleave(experts_per_copy, dim=0))
    if router.weight is not None:
        with torch.no_grad():
            router.weight[: context.num_experts] = rows
            num_others = len(router.weight) - context.num_experts
            if num_others and not is_zero:
                all_rows = normal(len(router.weight), router_input, context)
                router.weight[context.num_experts :] = all_rows[context.num_experts :]
            elif num_others:
                router.weight[context.num_experts :] = 0
    return {
        f"{prefix}.{name}": tensor.detach()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _modules(config: PreTrainedConfig, num_experts: int, layer_index: int) -> dict[str, Any]:
    modules: dict[str, Any] = {"gate": build_router(config, num_experts, layer_index)}
    if config.num_zero_computation_experts:
        modules["zero_experts"] = ZeroComputationExperts(config, num_experts)
    return modules
