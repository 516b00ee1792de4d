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
"""Gemma 2 with sparse layers."""

import torch
from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2ForTokenClassification, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_gemma2 import MoeGemma2Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeGemma2PreTrainedModel(MoePreTrainedModelMixin, Gemma2PreTrainedModel):
    """Base class of Gemma 2 with sparse layers."""

    config: MoeGemma2Config
    _can_record_outputs = {
        **Gemma2PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeGemma2Model(MoeModelMixin, MoeGemma2PreTrainedModel, Gemma2Model):
    """The backbone, [`~transformers.Gemma2Model`] with sparse layers."""


class MoeGemma2ForCausalLM(MoeForCausalLMMixin, MoeGemma2PreTrainedModel, Gemma2ForCausalLM):
    """[`~transformers.Gemma2ForCausalLM`] with sparse layers."""

    model_class = MoeGemma2Model

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits, divided by `config.logits_scaling` and softly capped at `config.final_logit_softcapping`."""
        # CODEPATH: divided Grok-1, not divided google/gemma-2-2b
        logits = super().compute_logits(hidden_states) / self.config.logits_scaling
        # CODEPATH: capped google/gemma-2-2b, not capped where the field is None
        if self.config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / self.config.final_logit_softcapping) * self.config.final_logit_softcapping
        return logits


class MoeGemma2ForSequenceClassification(
    MoeClassificationMixin, MoeGemma2PreTrainedModel, Gemma2ForSequenceClassification
):
    """[`~transformers.Gemma2ForSequenceClassification`] with sparse layers."""

    model_class = MoeGemma2Model


class MoeGemma2ForTokenClassification(MoeClassificationMixin, MoeGemma2PreTrainedModel, Gemma2ForTokenClassification):
    """[`~transformers.Gemma2ForTokenClassification`] with sparse layers."""

    model_class = MoeGemma2Model
