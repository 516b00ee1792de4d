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
"""Localized filtering: what the attention makes its queries and keys of, as in Yuan 2.0-M32.

`LocalizedFiltering` mixes every token with the two before it; `filter_queries_and_keys` puts one before an attention of
transformers, whose values are still made of what came in.

Dimension letters: B sequences, S tokens of a sequence, P these with the ones before them that a cache has kept, H hidden
size, I and O inputs and outputs of a convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .filter_state import open_filter_states
from .routing_context import RoutingContext


class CausalConvolution(nn.Module):
    """A convolution over a token and the one before it, which counts as zero where there is none."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, 2, 1))  # (O, I, 2, 1), as Yuan stores it
        self.bias = nn.Parameter(torch.empty(output_size))

    def init_weights(self, std: float) -> None:
        """Initialise the parameters; `std` is the configuration's `initializer_range`."""
        init.normal_(self.weight, mean=0.0, std=std)
        init.zeros_(self.bias)

    def forward(self, inputs_BPI: torch.Tensor, follows_BP: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, P, O)`; `follows_BP` is False where the place before is not to be seen."""
        previous_BPI = F.pad(inputs_BPI, (0, 0, 1, -1))
        if follows_BP is not None:
            previous_BPI = previous_BPI.masked_fill(~follows_BP[..., None], 0.0)
        pairs_BPJ = torch.stack([previous_BPI, inputs_BPI], dim=-1).flatten(2)  # J = 2 * I, in the weight's order
        return F.linear(pairs_BPJ, self.weight.flatten(1), self.bias)


class FilterNorm(nn.RMSNorm):
    """A norm of its own, because Gemma starts every `RMSNorm` at 0."""

    def init_weights(self, std: float) -> None:
        """Initialise the weight; there is nothing random about it."""
        init.ones_(self.weight)


class LocalizedFiltering(nn.Module):
    """
    `(B, S, H)` to `(B, S, H)`: a norm of every token plus what two causal convolutions make of it and the two before it.

    Padding counts as zero in both convolutions, and so does what stands before a sequence: the second one sees a zero
    there, not the bias of the first. Sequences that are packed into a row do not see each other, as in the attention of
    transformers: `position_ids` that start again, without `attention_mask` and without cache.
    """

    def __init__(self, config, layer_index: int = 0):
        super().__init__()
        self.layer_index = layer_index
        self.num_layers = config.num_hidden_layers
        self.conv1 = CausalConvolution(config.hidden_size, config.hidden_size // 2)
        self.conv2 = CausalConvolution(config.hidden_size // 2, config.hidden_size)
        self.output_layernorm = FilterNorm(config.hidden_size, eps=1e-6)

    def forward(
        self,
        hidden_states_BSH: torch.Tensor,
        routing: RoutingContext | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        routing = routing or RoutingContext()
        length = hidden_states_BSH.shape[1]
        mask_BS = routing.mask(length, hidden_states_BSH.device)
        if past_key_values is not None:
            hidden_states_BPH, mask_BP = self._with_past(hidden_states_BSH, mask_BS, past_key_values)
            follows_BP = _after_true(mask_BP)
        else:
            hidden_states_BPH = hidden_states_BSH
            follows_BP = _after_true(mask_BS) if mask_BS is not None else _same_sequence(routing.position_ids)
        reduced_BPO = self.conv1(hidden_states_BPH, follows_BP)
        mixed_BPH = self.conv2(reduced_BPO, follows_BP)
        return self.output_layernorm(mixed_BPH + hidden_states_BPH)[:, -length:]

    def _with_past(
        self, hidden_states_BSH: torch.Tensor, mask_BS: torch.Tensor | None, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        open_filter_states(cache, self.num_layers)
        index = self.num_layers + self.layer_index
        num_seen, num_cached = cache.get_seq_length(index), cache.get_seq_length(self.layer_index)
        if num_seen != num_cached:
            raise ValueError(
                f"The cache has the keys of {num_cached} tokens, but localized filtering has seen {num_seen} of them. Give an empty "
                "cache, or one that this model has filled; prefix tuning has no hidden states to filter."
            )
        if mask_BS is None:
            mask_BS = torch.ones(hidden_states_BSH.shape[:2], dtype=torch.bool, device=hidden_states_BSH.device)
        mask_B1S1 = mask_BS[:, None, :, None].to(hidden_states_BSH.dtype)
        hidden_states_B1PH, mask_B1P1 = cache.update(hidden_states_BSH[:, None], mask_B1S1, index)
        return hidden_states_B1PH[:, 0], mask_B1P1[:, 0, :, 0].bool()


def filter_queries_and_keys(attention: nn.Module, config) -> None:
    """Put a [`LocalizedFiltering`] before `q_proj` and `k_proj` of an attention, as its `lfa`."""
    attention.lfa = LocalizedFiltering(config, attention.layer_idx)
    attention.routing = None  # of the forward pass at hand
    _let_see_raw(attention.v_proj)
    attention.register_forward_pre_hook(_filter_input, with_kwargs=True)


def _filter_input(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention: all of it gets the filtered hidden states, but `v_proj` the raw ones."""
    routing, attention.routing = attention.routing, None
    if routing is None:
        raise ValueError(
            "Localized filtering must know which tokens are padding, but this attention was not called by its layer in a forward "
            "pass of the model. Call the model, or the backbone."
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            "Localized filtering does not support paged attention (`generate_batch`), which keeps no hidden states of the tokens "
            "before. Use `generate`."
        )
    hidden_states_BSH = kwargs["hidden_states"]
    filtered_BSH = attention.lfa(hidden_states_BSH, routing, kwargs.get("past_key_values"))
    _let_see_raw(attention.v_proj)  # which PEFT may have wrapped since
    attention.v_proj.raw_input = hidden_states_BSH
    return args, {**kwargs, "hidden_states": filtered_BSH}


def _let_see_raw(projection: nn.Module) -> None:
    if _take_raw_input not in projection._forward_pre_hooks.values():
        projection.raw_input = None
        projection.register_forward_pre_hook(_take_raw_input, prepend=True)  # before those that distribute the input


def _take_raw_input(projection: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of `v_proj`. What a wrapper passes on is raw already, and nothing is left here for it."""
    raw_input_BSH, projection.raw_input = projection.raw_input, None
    return args if raw_input_BSH is None else (raw_input_BSH, *args[1:])


def _after_true(mask_BP: torch.Tensor) -> torch.Tensor:
    return F.pad(mask_BP, (1, -1))


def _same_sequence(position_ids_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Whether a position follows on the one before it."""
    return None if position_ids_BS is None else F.pad(position_ids_BS.diff(dim=-1) == 1, (1, 0))
