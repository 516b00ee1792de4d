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
"""The text model of Gemma 3 with sparse layers."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_gemma3_text import MoeGemma3TextConfig
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeGemma3TextPreTrainedModel(MoePreTrainedModelMixin, Gemma3PreTrainedModel):
    """Base class of the text model of Gemma 3 with sparse layers."""

    config: MoeGemma3TextConfig
    _can_record_outputs = {
        **Gemma3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeGemma3TextModel(MoeModelMixin, MoeGemma3TextPreTrainedModel, Gemma3TextModel):
    """The backbone, [`~transformers.Gemma3TextModel`] with sparse layers."""


class MoeGemma3TextForCausalLM(MoeForCausalLMMixin, MoeGemma3TextPreTrainedModel, Gemma3ForCausalLM):
    """[`~transformers.Gemma3ForCausalLM`] with sparse layers."""

    model_class = MoeGemma3TextModel

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits, softly capped at `config.final_logit_softcapping`."""
        logits = super().compute_logits(hidden_states)
        # CODEPATH: not capped google/gemma-3-1b-it, capped where the field is set
        if self.config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / self.config.final_logit_softcapping) * self.config.final_logit_softcapping
        return logits


class MoeGemma3TextForSequenceClassification(
    MoeClassificationMixin, MoeGemma3TextPreTrainedModel, Gemma3TextForSequenceClassification
):
    """[`~transformers.Gemma3TextForSequenceClassification`] with sparse layers."""

    model_class = MoeGemma3TextModel
