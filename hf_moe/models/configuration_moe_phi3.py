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
"""Configuration of Phi-3 with sparse layers."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config

from .configuration_moe import MoeConfigMixin


@strict
class MoePhi3Config(MoeConfigMixin, Phi3Config):
    r"""
    A [`~transformers.Phi3Config`] with the fields of [`MoeConfigMixin`].

    ```python
    >>> from hf_moe import MoePhi3Config, MoePhi3ForCausalLM

    >>> config = MoePhi3Config(num_experts=4, num_experts_per_tok=2)
    >>> model = MoePhi3ForCausalLM(config)
    ```
    """

    model_type = "moe_phi3"
    has_fused_projections: ClassVar[bool] = True


__all__ = ["MoePhi3Config"]
