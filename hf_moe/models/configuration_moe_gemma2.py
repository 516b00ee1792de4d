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
"""Configuration of Gemma 2 with sparse layers."""

from huggingface_hub.dataclasses import strict
from transformers import Gemma2Config

from .configuration_moe import MoeConfigMixin


@strict
class MoeGemma2Config(MoeConfigMixin, Gemma2Config):
    r"""
    A [`~transformers.Gemma2Config`] with the fields of [`MoeConfigMixin`].

    Args:
        logits_scaling (`float`, *optional*, defaults to 1.0):
            What the logits are divided by, before `final_logit_softcapping`.

    ```python
    >>> from hf_moe import MoeGemma2Config, MoeGemma2ForCausalLM

    >>> config = MoeGemma2Config(num_experts=4, num_experts_per_tok=2)
    >>> model = MoeGemma2ForCausalLM(config)
    ```

    Gemma 2's block is also that of Grok-1: four norms, capped attention logits, embeddings times the square root of
    `hidden_size`, `gelu_pytorch_tanh`. The norms of Gemma multiply by `1 + weight` and those of Grok-1 by `weight`, so subtract
    1 from the norms of a Grok-1 checkpoint. What else is Grok-1's:

    ```python
    >>> config = MoeGemma2Config(
    ...     num_experts=8,
    ...     num_experts_per_tok=2,
    ...     norm_topk_prob=False,
    ...     router_dtype="float32",
    ...     num_hidden_layers=2,
    ...     layer_types=["full_attention"] * 2,
    ...     query_pre_attn_scalar=256,  # `head_dim`
    ...     attn_logit_softcapping=30.0,
    ...     final_logit_softcapping=None,
    ...     logits_scaling=3**0.5,  # 1 / 0.5773502691896257
    ...     rms_norm_eps=1e-5,
    ... )
    ```
    """

    model_type = "moe_gemma2"
    attribute_map = {**MoeConfigMixin.attribute_map, "hidden_act": "hidden_activation"}

    logits_scaling: float | int = 1.0

    def validate_logits_scaling(self):
        """Part of `@strict`-powered validation."""
        if self.logits_scaling <= 0:
            raise ValueError(f"`logits_scaling` must be positive, got {self.logits_scaling}.")


__all__ = ["MoeGemma2Config"]
