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
"""Configuration of OLMo 2 with sparse layers."""

from huggingface_hub.dataclasses import strict
from transformers import Olmo2Config

from .configuration_moe import MoeConfigMixin


@strict
class MoeOlmo2Config(MoeConfigMixin, Olmo2Config):
    r"""
    A [`~transformers.Olmo2Config`] with the fields of [`MoeConfigMixin`].

    ```python
    >>> from hf_moe import MoeOlmo2Config, MoeOlmo2ForCausalLM

    >>> config = MoeOlmo2Config(num_experts=4, num_experts_per_tok=2)
    >>> model = MoeOlmo2ForCausalLM(config)
    ```
    """

    model_type = "moe_olmo2"
    auto_classes = {
        "AutoModel": "Model",
        "AutoModelForCausalLM": "ForCausalLM",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
    }


__all__ = ["MoeOlmo2Config"]
