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
"""Configuration of ViT with sparse layers."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_moe import MoeConfigMixin, ungated_ep_plan


@strict
class MoeViTConfig(MoeConfigMixin, ViTConfig):
    r"""
    A [`~transformers.ViTConfig`] with the fields of [`MoeConfigMixin`].

    ```python
    >>> from hf_moe import MoeViTConfig, MoeViTForImageClassification

    >>> config = MoeViTConfig(num_experts=4, num_experts_per_tok=2)
    >>> model = MoeViTForImageClassification(config)
    ```
    """

    model_type = "moe_vit"
    base_model_ep_plan = ungated_ep_plan("layers")
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Model",
        "AutoModelForImageClassification": "ForImageClassification",
    }
    gated_experts: ClassVar[bool] = False
    biased_experts: ClassVar[bool] = True


__all__ = ["MoeViTConfig"]
