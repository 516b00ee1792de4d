# SPDX-License-Identifier: Apache-2.0
"""The balance losses of `hf_moe.models.losses` for one forward pass of a router, and when a router has none of a kind."""

from collections.abc import Iterable

import torch

from ..models import losses
from ..models.routers import ROUTERS, MoeRouter
from .router_hooks import RouterCall
from .routers import Router


OF_THE_LOAD = ("switch", "global_batch", "device")  # constant where all experts have the same load


def balance_loss(
    call: RouterCall,
    kind: str,
    score: str,
    counts_E: torch.Tensor,
    num_devices: int | None = None,
    noise_std: float | None = None,
) -> torch.Tensor:
    """
    A loss of [`LoadBalancer`], but for `"sparsity"`.

    Args:
        call (`RouterCall`): The pass.
        kind (`str`): Which loss.
        score (`str`): What the router makes of its logits, one of `SCORES`.
        counts_E (`torch.Tensor` of shape `(E,)`): Slots that each expert serves, for losses that are not of a sequence.
        num_devices (`int`, *optional*): For `"device"`, into how many groups the experts are divided.
        noise_std (`float`, *optional*): For `"importance_load"`, the noise of the smooth load; that of a noisy router is its own.

    Raises:
        ValueError: if the loss makes no sense for this router.
    """
    logits_TE, mask_T = call.logits_TE.float(), call.mask_T
    if kind == "z":
        if score == "identity" or not has_z_loss(call):
            raise ValueError(
                f"{call.name} returns no logits but probabilities or their logarithms, so that there is no z-loss. Leave 'z' out."
            )
        return losses.z_loss(logits_TE, mask_T)
    if kind == "importance_load":
        return _importance_load_loss(call, noise_std)
    scores_TE = losses.scores_of(logits_TE, score)
    if kind == "entropy":
        return losses.entropy_loss(scores_TE, mask_T)
    if kind == "squared_deviation":
        return losses.squared_deviation_loss(scores_TE, mask_T)
    if kind == "sequence":
        return _sequence_loss(call, scores_TE)
    if kind == "heterogeneous":
        router = call.router.module
        if not isinstance(router, MoeRouter) or not router.num_zero_computation_experts:
            raise ValueError(
                f"'heterogeneous' is for routers that have zero-computation experts (num_copy_experts and others), which {call.name} has "
                "not. Use kind='switch'."
            )
        num_feed_forwards = router.num_experts - router.num_zero_computation_experts
        return losses.heterogeneous_loss(scores_TE, counts_E, num_feed_forwards, router.zero_expert_tau, mask_T)
    if kind == "device":
        num_experts = logits_TE.shape[-1]
        if num_devices is None or num_experts % num_devices:
            raise ValueError(f"{num_experts} experts cannot be divided into num_devices={num_devices} groups.")
        return losses.device_loss(scores_TE, counts_E, num_devices, mask_T)
    return losses.switch_loss(scores_TE, counts_E, mask_T)


def refuse_to_balance(routers: Iterable[Router], kind: str) -> None:
    """
    Raises:
        ValueError: if a balance loss of this kind can change nothing about a router.
    """
    for module in (router.module for router in routers):
        if not isinstance(module, MoeRouter) or module.has_balance_loss:
            continue
        router_type = next(name for name, router_class in ROUTERS.items() if router_class is type(module))
        if not module.has_rows:
            raise ValueError(
                f"router_type={router_type!r} chooses by a fixed table and learns nothing, so that no loss can balance it. Leave the "
                "balance loss out, or choose another `router_type`."
            )
        if kind in OF_THE_LOAD or (kind == "sequence" and module.is_even_in_sequences):
            raise ValueError(
                f"router_type={router_type!r} gives all experts the same load, so that {kind!r} changes nothing. Leave it out, or choose a "
                "loss of weights or logits: 'importance_load', 'entropy' or 'z'."
            )


def has_z_loss(call: RouterCall) -> bool:
    """Whether a router's logits are not normalised already."""
    return not isinstance(call.router.module, MoeRouter) or call.router.module.has_z_loss


def sparsity_loss(call: RouterCall, score: str, top_k: int) -> torch.Tensor:
    """
    ReMoE's loss.

    Raises:
        ValueError: if the router's weights are not the relu of its logits.
    """
    if score != "relu":
        raise ValueError(
            f"'sparsity' is for routers whose weights are the relu of their logits, and those of {call.name} are the {score}. Their "
            "number of experts is fixed."
        )
    return losses.sparsity_loss(call.logits_TE.float().relu(), call.counts_E, top_k, call.mask_T)


def _sequence_loss(call: RouterCall, scores_TE: torch.Tensor) -> torch.Tensor:
    if call.batch_size is None:
        raise ValueError(
            "The model was called without `input_ids` and `inputs_embeds`, so that sequences are unknown."
        )
    if call.is_packed:
        raise ValueError(
            "The model was called with `position_ids` and no mask, as with packed or padding-free batches, in which sequences "
            "cannot be told apart here. Use kind='switch' or 'global_batch', or turn packing off."
        )
    if not call.sees_all_tokens:
        raise ValueError(
            f"{call.name} sees a part of the tokens, so that sequences cannot be told apart there. Use kind='switch' or "
            "'global_batch'."
        )
    return losses.sequence_loss(scores_TE, call.top_k_index_TK, call.batch_size, call.mask_T)


def _importance_load_loss(call: RouterCall, noise_std: float | None) -> torch.Tensor:
    logits_TE, index_TK = call.logits_TE.float(), call.top_k_index_TK
    num_experts, top_k = logits_TE.shape[-1], index_TK.shape[-1]
    weights_TK = call.router.top_k_weights(call.output)
    if weights_TK is None:
        raise ValueError(f"{call.name} does not return its routing weights, which 'importance_load' is about.")
    weights_TE = logits_TE.new_zeros(len(logits_TE), num_experts + 1)
    weights_TE = weights_TE.scatter(-1, index_TK, weights_TK.float())[:, :num_experts]
    loss = losses.importance_loss(weights_TE, call.mask_T)
    router = call.router.module
    if top_k == num_experts:
        return loss
    if isinstance(router, MoeRouter) and router.has_noise:
        hidden_states_TH = call.inputs[0].reshape(-1, call.inputs[0].shape[-1])
        return loss + router.smooth_load_loss(hidden_states_TH, logits_TE, call.mask_T)
    return loss + losses.load_loss(logits_TE, top_k, noise_std or 1 / num_experts, call.mask_T)
