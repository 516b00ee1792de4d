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

`BlockConfigMixin` adds localized filtering to the families that can have it.
"""

from dataclasses import dataclass
from typing import ClassVar


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
        if self.use_localized_filtering and (reason := self._reason_against_filtering()) is not None:
            raise ValueError(
                f"`use_localized_filtering` is not possible with {type(self).__name__}: {reason}. Leave it at False, or take a causal family "
                "with separate projections, such as MoeLlamaConfig."
            )

    def _reason_against_filtering(self) -> str | None:
        if not self.is_causal_model or getattr(self, "use_bidirectional_attention", False):
            return "its attention sees later tokens, the filter only earlier ones"
        if self.has_fused_projections:
            return "one matrix makes query, key and value of the same hidden states, but values must not be filtered"
        if self.hidden_size % 2:
            return f"`hidden_size` must be even, because the first convolution halves it, got {self.hidden_size}"
        return None
