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
"""Granite with sparse layers."""

import torch
from transformers import GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GranitePreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_granite import MoeGraniteConfig
from .modeling_moe import MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeGranitePreTrainedModel(MoePreTrainedModelMixin, GranitePreTrainedModel):
    """Base class of Granite with sparse layers."""

    config: MoeGraniteConfig
    _can_record_outputs = {
        **GranitePreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeGraniteModel(MoeModelMixin, MoeGranitePreTrainedModel, GraniteModel):
    """The backbone, [`~transformers.GraniteModel`] with sparse layers."""


class MoeGraniteForCausalLM(MoeForCausalLMMixin, MoeGranitePreTrainedModel, GraniteForCausalLM):
    """[`~transformers.GraniteForCausalLM`] with sparse layers."""

    model_class = MoeGraniteModel

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits, divided by `config.logits_scaling`."""
        return super().compute_logits(hidden_states) / self.config.logits_scaling
