# SPDX-License-Identifier: Apache-2.0
"""`add_gradient`: the gradient of a loss, added where a backward pass comes by; and what the trainer's loss is scaled with."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import DistributedType

from .router_hooks import RouterCall


Factor = Callable[[], float | torch.Tensor]


def add_gradient(call: RouterCall, loss: torch.Tensor, factor: Factor) -> Any:
    """
    The output of a router, unchanged, whose backward pass also goes through a loss.

    Args:
        call (`RouterCall`): The pass of the router.
        loss (`torch.Tensor`): A scalar.
        factor (`Callable`): Gives what the gradient of the loss is multiplied with, when the backward pass is there.
    """
    output = call.output
    if not isinstance(output, tuple):
        return _AddGradient.apply(output, loss, factor)
    # The routing weights if there are any; the logits alone do not always lead on to the loss.
    floating = [place for place, value in enumerate(output) if isinstance(value, torch.Tensor) and value.requires_grad]
    places = sorted(floating, key=lambda place: place == call.router.logits_index)
    if not places:
        return None
    carrier = _AddGradient.apply(output[places[0]], loss, factor)
    return (*output[: places[0]], carrier, *output[places[0] + 1 :])


def loss_scale_of(accelerator: Any, gradient_accumulation_steps: Callable[[], int]) -> Factor:
    """
    A function for what every micro-batch's loss has to be multiplied with, for the gradients of an optimizer step to be the
    mean over its micro-batches. Data-parallel ranks are averaged by those that reduce their gradients.

    Args:
        accelerator ([`~accelerate.Accelerator`], *optional*): What scales the loss in float16.
        gradient_accumulation_steps (`Callable`): Gives the number of micro-batches of the step that is running.
    """

    def loss_scale() -> float | torch.Tensor:
        share = 1 / gradient_accumulation_steps()
        if accelerator is None:
            return share
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
            return share * getattr(optimizer, "loss_scale", 1.0)
        if accelerator.scaler is not None:
            return accelerator.scaler.scale(torch.full((), share, device=accelerator.device))
        return share

    return loss_scale


class _AddGradient(torch.autograd.Function):
    """An identity whose backward pass also gives a loss its gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor, factor: Factor) -> torch.Tensor:
        ctx.factor, ctx.device = factor, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        factor = ctx.factor()
        if not isinstance(factor, torch.Tensor):
            factor = torch.full((), factor, device=ctx.device)
        return gradient, factor.to(ctx.device, torch.float32), None
