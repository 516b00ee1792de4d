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
"""Configuration of GPT-2 with sparse layers."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .configuration_moe import MoeConfigMixin, ungated_ep_plan


@strict
class MoeGPT2Config(MoeConfigMixin, GPT2Config):
    r"""
    A [`~transformers.GPT2Config`] with the fields of [`MoeConfigMixin`].

    ```python
    >>> from hf_moe import MoeGPT2Config, MoeGPT2ForCausalLM

    >>> config = MoeGPT2Config(num_experts=4, num_experts_per_tok=2)
    >>> model = MoeGPT2ForCausalLM(config)
    ```
    """

    model_type = "moe_gpt2"
    base_model_ep_plan = ungated_ep_plan("h")
    attribute_map: ClassVar[dict[str, str]] = {
        **MoeConfigMixin.attribute_map,
        **GPT2Config.attribute_map,
        "hidden_act": "activation_function",
        "intermediate_size": "n_inner",
    }
    gated_experts: ClassVar[bool] = False
    biased_experts: ClassVar[bool] = True
    has_fused_projections: ClassVar[bool] = True

    n_inner: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.n_inner


__all__ = ["MoeGPT2Config"]
