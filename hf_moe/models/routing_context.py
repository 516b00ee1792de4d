# Copyright 2026 The hf_moe authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a layer may depend on besides the hidden states: padding, sequences, token ids, modalities, domains, other layers.

`RoutingContext` belongs to one forward pass of a model, `Tokens` to one layer in it. `open_routing`, a hook of the backbone,
and `with_routing`, for its layers, bring the one to the blocks; a model has them only if its routers, or localized
filtering, ask for it.

Dimension letters: B sequences, S tokens of a sequence, T tokens (B * S), E experts.
"""

import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import torch_compilable_check


# What a caller may give the model for its routers, not for the layers of the dense class, and the field of `Tokens` it becomes.
ROUTING_INPUTS = {"mm_token_type_ids": "modality_T", "domain_ids": "domain_T"}


@dataclass
class Tokens:
    """
    The tokens of one layer.

    Args:
        batch_size (`int`): Number of sequences B, of `T / B` tokens each.
        mask_T (`torch.Tensor` of shape `(T,)`, *optional*): True for tokens, False for padding; None if nothing is padded.
        input_ids_T (`torch.Tensor` of shape `(T,)`, *optional*): Token ids.
        modality_T (`torch.Tensor` of shape `(T,)`, *optional*): 0 for text, 1 and above for other modalities.
        domain_T (`torch.Tensor` of shape `(T,)`, *optional*): Domains.
        previous_logits_TE (`torch.Tensor` of shape `(T, E)`, *optional*): Router logits of the sparse layer before.
        wants_balance_loss (`bool`): Whether the router is to leave its balance loss here.
        balance_loss (`torch.Tensor`, *optional*): The loss.
    """

    batch_size: int
    mask_T: torch.Tensor | None = None
    input_ids_T: torch.Tensor | None = None
    modality_T: torch.Tensor | None = None
    domain_T: torch.Tensor | None = None
    previous_logits_TE: torch.Tensor | None = None
    wants_balance_loss: bool = False
    balance_loss: torch.Tensor | None = None

    def num_groups(self, group: str | int, num_tokens: int) -> int:
        """Into how many groups of consecutive tokens `"batch"`, `"sequence"` or a number of tokens divides these."""
        if isinstance(group, str):
            return 1 if group == "batch" else self.batch_size
        if num_tokens % group:
            raise ValueError(
                f"`capacity_group` ({group}) must divide the number of tokens of a batch with its padding, got {num_tokens}. Pad to a multiple "
                "of it, or use 'sequence' or 'batch'."
            )
        return num_tokens // group


class RoutingContext:
    """
    One forward pass of a model. No dataclass, of which FSDP would give every layer a copy.

    Attributes:
        attention_mask (`Any`, *optional*): What the model was called with.
        input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids.
        position_ids (`torch.Tensor` of shape `(B, S)`, *optional*): What the model was called with.
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Modalities: 0 for text.
        domain_ids (`torch.Tensor` of shape `(B,)`, *optional*): The domain of each sequence.
        wants_balance_losses (`bool`): Whether the layers leave their balance losses here.
        router_logits (`dict[int, torch.Tensor]`): By layer, `(T, E)`, of routers that look at those of the layer before.
        balance_losses (`dict[int, torch.Tensor]`): By layer.
        without_gradient (`set[int]`): Layers that ran with gradients switched off.
    """

    def __init__(
        self,
        attention_mask: Any = None,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        wants_balance_losses: bool = False,
    ):
        self.attention_mask = attention_mask
        self.input_ids, self.position_ids = input_ids, position_ids
        self.mm_token_type_ids, self.domain_ids = mm_token_type_ids, domain_ids
        self.wants_balance_losses = wants_balance_losses
        self.router_logits: dict[int, torch.Tensor] = {}
        self.balance_losses: dict[int, torch.Tensor] = {}
        self.without_gradient: set[int] = set()

    def tokens(self, hidden_states: torch.Tensor, layer_index: int, needs: set[str]) -> Tokens:
        """What the layer must know of its `(B, S, H)` tokens, `needs` being fields of [`Tokens`]."""
        batch_size, device = hidden_states.shape[0], hidden_states.device
        length = hidden_states.shape[:-1].numel() // batch_size
        tokens = Tokens(batch_size, wants_balance_loss=self.wants_balance_losses)
        if "mask_T" in needs or self.wants_balance_losses:
            mask_BS = self.mask(length, device)
            tokens.mask_T = None if mask_BS is None else mask_BS.reshape(-1)
        if "input_ids_T" in needs and self.input_ids is not None:
            tokens.input_ids_T = self.input_ids.reshape(-1).to(device)
        if "modality_T" in needs:
            tokens.modality_T = self._modality(batch_size, length, device)
        if "domain_T" in needs:
            tokens.domain_T = self._domain(batch_size, length, device)
        if "previous_logits_TE" in needs:
            tokens.previous_logits_TE = self._logits_before(layer_index, device)
        return tokens

    def mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """`(B, S)`, True for tokens, False for padding; None if nothing is padded."""
        mask = self.attention_mask
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                "This model depends on which tokens are padding, so `attention_mask` must be of shape (batch, length), got "
                f"{shape}. A static cache makes masks of another shape: leave `cache_implementation` out."
            )
        # With a cache the mask is longer than what the layer sees.
        return mask[:, mask.shape[1] - length :].to(device, torch.bool)

    def keep_logits(self, layer_index: int, router_logits_TE: torch.Tensor) -> None:
        """Leave the logits of a layer to the next one."""
        self.router_logits[layer_index] = router_logits_TE
        if not torch.is_grad_enabled():
            self.without_gradient.add(layer_index)

    def _logits_before(self, layer_index: int, device: torch.device) -> torch.Tensor | None:
        earlier = [index for index in self.router_logits if index < layer_index]
        if not earlier:
            return None
        before = max(earlier)
        if torch.is_grad_enabled() and before in self.without_gradient:
            raise ValueError(
                "`router_residual` adds the router logits of the layer before, which have no gradient here, because reentrant gradient "
                "checkpointing runs the layers without one. Use `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        return self.router_logits[before].to(device)

    def _domain(self, batch_size: int, length: int, device: torch.device) -> torch.Tensor | None:
        if self.domain_ids is None:
            return None
        if self.domain_ids.shape != (batch_size,):
            raise ValueError(
                f"`domain_ids` must have one domain per sequence, shape ({batch_size},), got {tuple(self.domain_ids.shape)}."
            )
        return self.domain_ids.to(device, torch.long).repeat_interleave(length, output_size=batch_size * length)

    def _modality(self, batch_size: int, length: int, device: torch.device) -> torch.Tensor | None:
        if self.mm_token_type_ids is None:
            return None
        modality_BS = self.mm_token_type_ids.to(device, torch.long)
        if modality_BS.shape == (batch_size, length):
            return modality_BS.reshape(-1)
        raise ValueError(
            f"`mm_token_type_ids` must be of shape ({batch_size}, {length}), as the tokens, got {tuple(modality_BS.shape)}."
        )


def refuse_unread_inputs(config: Any, given: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a model is given something for its routers that they do not read.
    """
    for name, field_of_tokens in ROUTING_INPUTS.items():
        if given.get(name) is not None and field_of_tokens not in config.routing_needs:
            raise ValueError(f"`{name}` has no effect on this model: router_type={config.router_type!r}.")


def check_routing_input(config: Any, name: str, value: Any) -> None:
    """
    Raises:
        ValueError: if what a model is given for its routers is not the numbers of modalities or domains.
    """
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        kind = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"`{name}` must be a tensor of integers, got {kind}.")
    if name == "domain_ids":
        is_right, allowed = (
            (value >= 0) & (value < config.num_hash_domains),
            f"from 0 to {config.num_hash_domains - 1}",
        )
    else:
        is_right, allowed = value >= 0, "0 for text, 1 and above for other modalities"
    torch_compilable_check(is_right.all(), lambda: f"`{name}` must be {allowed}, got {value.unique().tolist()}.")


def open_routing(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a backbone: put what concerns routing into a [`RoutingContext`] for its layers."""
    kwargs = dict(kwargs)
    given = dict(zip(inspect.signature(backbone.forward).parameters, args, strict=False)) | kwargs
    routing = kwargs.get("routing") or RoutingContext()
    routing.input_ids = given.get("input_ids")
    routing.attention_mask = given.get("attention_mask")
    routing.position_ids = given.get("position_ids")
    refuse_unread_inputs(backbone.config, kwargs)
    for name in ROUTING_INPUTS:
        value = kwargs.pop(name, None)
        if value is not None:
            check_routing_input(backbone.config, name, value)
        setattr(routing, name, value)
    return args, {**kwargs, "routing": routing}


class RoutedLayer:
    """
    Mixed into the class of a layer: gives the context to its sparse block and to its attention, if they have a place for it.

    It does so inside `forward`, which gradient checkpointing runs again with what it was given the first time.
    """

    def forward(self, *args, routing: RoutingContext | None = None, **kwargs):
        for name in ("mlp", "self_attn"):
            for reader in _readers(getattr(self, name, None)):
                reader.routing = routing
        return super().forward(*args, **kwargs)

    def __reduce__(self):
        return _unpickle_layer, (type(self).__mro__[2],), self.__dict__  # its own class has no name to be found by


def _readers(part: nn.Module | None) -> list[nn.Module]:
    """What has a place for the context: a part of a layer or, if PEFT trains a copy of it, the part and the copies."""
    if not hasattr(part, "routing"):
        return []
    return [part] if "routing" in vars(part) else [module for module in part.modules() if "routing" in vars(module)]


@functools.cache
def with_routing(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with [`RoutedLayer`]; it keeps its name, by which layers are found to be wrapped or split."""
    return types.new_class(layer_class.__name__, (RoutedLayer, layer_class))


def _unpickle_layer(layer_class: type[nn.Module]) -> nn.Module:
    routed: Any = with_routing(layer_class)
    return routed.__new__(routed)
