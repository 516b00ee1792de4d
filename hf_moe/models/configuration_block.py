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
"""The fields of a configuration that concern the block around the experts, and their validation.

`BlockConfigMixin` adds localized filtering to the families that can have it. `BLOCK_OPTIONS` are options of a block that
some families of transformers have; the others refuse them, because an attribute that nothing reads would do nothing.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple


class BlockOption(NamedTuple):
    """The configurations that have an option of the block, or what to set instead, and values with which it does nothing."""

    families: tuple[str, ...]
    neutral: tuple[float | None, ...] = (None,)
    instead: str = ""


GEMMA = ("MoeGemma2Config", "MoeGemma3TextConfig")
GRANITE = ("MoeGraniteConfig",)
BLOCK_OPTIONS = {
    "attn_logit_softcapping": BlockOption(GEMMA),
    "final_logit_softcapping": BlockOption(GEMMA),
    "query_pre_attn_scalar": BlockOption(GEMMA),
    "attention_multiplier": BlockOption(GRANITE),
    "embedding_multiplier": BlockOption(GRANITE, (None, 1)),
    "residual_multiplier": BlockOption(GRANITE, (None, 1)),
    "logits_scaling": BlockOption((*GRANITE, "MoeGemma2Config"), (None, 1)),
    # As the configurations of Grok-1 on the Hub call them.
    "max_attn_value": BlockOption((), instead="`attn_logit_softcapping` of MoeGemma2Config"),
    "attn_output_multiplier": BlockOption((), instead="`query_pre_attn_scalar`=1/x**2 of MoeGemma2Config"),
    "output_multiplier_scale": BlockOption((), (None, 1), "`logits_scaling`=1/x of MoeGemma2Config"),
    "embedding_multiplier_scale": BlockOption(
        (), (None, 1), "MoeGemma2Config, which always multiplies by the square root of `hidden_size`"
    ),
}


@dataclass(kw_only=True)
class BlockConfigMixin:
    r"""
    What the block around the experts has besides what the dense one has.

    Args:
        use_localized_filtering (`bool`, *optional*, defaults to `False`):
            Whether queries and keys are made of hidden states that two causal convolutions have mixed with the two tokens
            before, as in Yuan 2.0-M32.
    """

    has_fused_projections: ClassVar[bool] = False  # whether one matrix makes query, key and value

    use_localized_filtering: bool = False

    def validate_block(self):
        """Part of `@strict`-powered validation."""
        name = type(self).__name__
        if self.use_localized_filtering and (reason := self._reason_against_filtering()) is not None:
            raise ValueError(
                f"`use_localized_filtering` is not possible with {name}: {reason}. Leave it at False, or take a causal family "
                "with separate projections, such as MoeLlamaConfig."
            )
        declared = {field.name for field in fields(self)}
        for option, (families, neutral, instead) in BLOCK_OPTIONS.items():
            value = getattr(self, option, None)
            if option not in declared and value not in neutral:
                able = instead or " or ".join(families)
                raise ValueError(
                    f"`{option}`={value!r} has no effect on {name}, whose block has no such option. Use {able}."
                )

    def _reason_against_filtering(self) -> str | None:
        if not self.is_causal_model or getattr(self, "use_bidirectional_attention", False):
            return "its attention sees later tokens, the filter only earlier ones"
        if self.has_fused_projections:
            return "one matrix makes query, key and value of the same hidden states, but values must not be filtered"
        if self.hidden_size % 2:
            return f"`hidden_size` must be even, because the first convolution halves it, got {self.hidden_size}"
        return None
