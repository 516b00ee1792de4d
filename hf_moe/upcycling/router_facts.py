# SPDX-License-Identifier: Apache-2.0
"""What a reader of the model's card must know of its router, from what the router's class declares."""

from typing import Any

from transformers import PreTrainedConfig

from ..models.capacity import CAPACITY_POLICIES
from ..models.configuration_routing import RoutingConfigMixin


def describe_router(config: PreTrainedConfig) -> dict[str, Any] | None:
    """
    The router of a model of hf_moe; None for a class of transformers, whose own documentation says it.

    Returns:
        `dict`: `router_type`, `experts_per_token` (`"top-2"`, `"1 per token"`, ...), `has_variable_top_k`, `has_balance_loss`, `is_trained` (whether it
        has weights), `facts` (what stands in the card's table) and `inputs` (what the model must be called with, a sentence each).
    """
    if not isinstance(config, RoutingConfigMixin):
        return None
    router = config.router_class
    return {
        "router_type": config.router_type,
        "experts_per_token": _experts_per_token(config),
        "has_variable_top_k": router.has_variable_top_k,
        "has_balance_loss": router.has_balance_loss,
        "is_trained": router.has_rows,
        "facts": _facts(config),
        "inputs": _inputs(config),
    }


def _experts_per_token(config: Any) -> str:
    router, top_k = config.router_class, config.num_experts_per_tok
    if router.has_variable_top_k:
        return "a varying number per token"
    if top_k == config.num_experts + config.num_zero_computation_experts:
        return "all for every token"
    return f"top-{top_k}" if router.has_rows else f"{top_k} per token"


def _facts(config: Any) -> dict[str, str]:
    contract = config.router_class.contract
    papers = ", ".join(f"[{paper}](https://huggingface.co/papers/{paper})" for paper in contract.papers)
    facts = {
        "`router_type`": f"`{config.router_type}`: {contract.system}{f' ({papers})' if papers else ''}",
        "score": contract.score,
        "chooses": contract.selection,
        "weight": contract.weight,
        "balance loss": contract.balance,
        "training differs in": contract.training_differs,
        "state besides `weight`": contract.state,
    }
    facts = {name: value.replace("|", "\\|") for name, value in facts.items() if value not in ("no", "none")}
    if config.num_zero_computation_experts:
        kinds = {kind: getattr(config, f"num_{kind}_experts") for kind in ("constant", "copy", "zero")}
        facts["zero-computation experts"] = (
            f"{', '.join(f'{count} {kind}' for kind, count in kinds.items() if count)}, the last ones of a layer; a token that "
            "chooses one costs nothing there"
        )
        facts.pop("balance loss", None)  # most routers have another with them
    if config.has_capacity:
        policy, factor = config.effective_capacity_policy, config.eval_capacity_factor
        facts["capacity"] = (
            f"in training {config.capacity_factor:g} times an even share, at least {config.min_capacity} tokens; `{policy}`: "
            f"{CAPACITY_POLICIES[policy]}. In evaluation "
            + ("no token is dropped" if factor is None else f"{factor:g} times an even share")
        )
    return facts


def _inputs(config: Any) -> list[str]:
    needs, num_domains = config.routing_needs, config.router_class.count_domains(config)
    sentences = []
    if "input_ids_T" in needs:
        sentences.append("The router reads token ids: call the model with `input_ids`, not with `inputs_embeds`.")
    if num_domains > 1:
        size = config.num_experts // num_domains
        sentences.append(
            f"Call the model with `domain_ids`, a tensor of shape (batch,) with the domain of each sequence, 0 to {num_domains - 1}: "
            f"each has {size} experts of its own, in this order. `hf_moe.extract_domain` cuts one domain out."
        )
    if config.num_experts_per_modality is not None:
        sentences.append(
            f"Of the experts {config.num_experts_per_modality} are for text and the next modalities, in this order. "
            "`mm_token_type_ids` of shape (batch, length), 0 for text, says which a token is of; without it all tokens are text."
        )
    if "mask_T" in needs:
        sentences.append(
            "Where sequences are padded, give the `attention_mask` of shape (batch, length): padding must take no room."
        )
    if not config.router_class.decides_alone and config.is_causal_model:
        sentences.append(
            "Later tokens decide about a token's experts, so that generation is not what a full pass computes."
        )
    return sentences
