# SPDX-License-Identifier: Apache-2.0
"""
The first weights of a router, and the source of everything random in a conversion.

An initialiser is one function decorated with [`router_initializer`], which enters it in `ROUTER_INITIALIZERS`.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .recipe import UpcycleConfig


RouterInitializer = Callable[[torch.Tensor, "UpcycleConfig", int], torch.Tensor]
ROUTER_INITIALIZERS: dict[str, RouterInitializer] = {}


def seeded_generator(seed: int, layer_index: int, expert_index: int, purpose: str) -> torch.Generator:
    """A generator that depends on its four arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{layer_index}/{expert_index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def router_initializer(name: str) -> Callable[[RouterInitializer], RouterInitializer]:
    """
    Enter the decorated function in `ROUTER_INITIALIZERS`.

    Its arguments are the weight `(H,)` of the norm before the feed-forward, the recipe and the layer's index; it returns
    the router's weight `(num_experts, H)` in float32.
    """

    def register(initializer: RouterInitializer) -> RouterInitializer:
        if name in ROUTER_INITIALIZERS:
            raise ValueError(f"There is a router initialiser {name!r} already.")
        ROUTER_INITIALIZERS[name] = initializer
        return initializer

    return register


@router_initializer("normal")
def normal(norm_weight: torch.Tensor, config: "UpcycleConfig", layer_index: int) -> torch.Tensor:
    """
    Normal rows scaled so that the logits have a standard deviation of `config.router_logit_std`.

    The router sees a normalised state times the norm's weight g, whose squared length is that of g in expectation, so
    rows of standard deviation `router_logit_std / |g|` give the logits asked for at every width and depth.
    """
    # On the CPU and in fixed types, so that the result depends neither on the device nor on torch's defaults.
    scale = config.router_logit_std / norm_weight.detach().cpu().double().norm().item()
    rows = [
        torch.randn(
            norm_weight.shape[0],
            generator=seeded_generator(config.seed, layer_index, expert_index, "router"),
            dtype=torch.float32,
            device="cpu",
        )
        for expert_index in range(config.num_experts)
    ]
    return torch.stack(rows) * scale
