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
"""Configuration of GPT-NeoX with sparse layers."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig

from .configuration_moe import MoeConfigMixin, ungated_ep_plan


@strict
class MoeGPTNeoXConfig(MoeConfigMixin, GPTNeoXConfig):
    r"""
    A [`~transformers.GPTNeoXConfig`] with the fields of [`MoeConfigMixin`].

    ```python
    >>> from hf_moe import MoeGPTNeoXConfig, MoeGPTNeoXForCausalLM

    >>> config = MoeGPTNeoXConfig(num_experts=4, num_experts_per_tok=2)
    >>> model = MoeGPTNeoXForCausalLM(config)
    ```
    """

    model_type = "moe_gpt_neox"
    base_model_ep_plan = ungated_ep_plan("layers")
    gated_experts: ClassVar[bool] = False
    biased_experts: ClassVar[bool] = True
    has_fused_projections: ClassVar[bool] = True


__all__ = ["MoeGPTNeoXConfig"]
