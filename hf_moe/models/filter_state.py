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
"""What a cache keeps for localized filtering.

`FilterState` is that of one layer, `open_filter_states` makes room for all of them, and `FilterStateGenerationMixin` lets
`generate` do so.
"""

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


class FilterState(DynamicSlidingWindowLayer):
    """
    The last two hidden states of a layer, as "keys" of one head, and which of them are tokens and not padding, as "values".

    A window of three is what the filter sees, so a cache reorders, repeats, crops and offloads it like any other layer.
    """

    is_sliding = False  # the masks of the attention are made for the first layer that slides

    def __init__(self):
        super().__init__(sliding_window=3)

    def get_max_length(self) -> int:
        """No bound on the length of the cache."""
        return -1


def open_filter_states(cache: Cache, num_layers: int) -> None:
    """
    Add a [`FilterState`] for every layer behind those of the attention, if `cache` has none yet.

    Raises:
        ValueError: if the cache is not dynamic.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) < 2 * num_layers:
        others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, DynamicLayer)}
        if others or len(cache.layers) != num_layers:
            raise ValueError(
                f"Localized filtering needs a `DynamicCache` of {num_layers} layers, got a `{type(cache).__name__}` of "
                f"{len(cache.layers)}{f' with layers of {sorted(others)}' if others else ''}. Leave `cache_implementation` out."
            )
        cache.layers.extend(FilterState() for _ in range(num_layers))


class FilterStateGenerationMixin:
    """Opens the states of a cache before the first pass, when assisted generation tells it what to keep for going back."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if self.config.use_localized_filtering and cache is not None:
            open_filter_states(cache, self.config.num_hidden_layers)
            if generation_config.is_assistant:
                cache.activate_past_recording()
