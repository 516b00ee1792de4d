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
"""GPT-2 with sparse layers."""

import torch
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel, GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_gpt2 import MoeGPT2Config
from .modeling_moe import MoeForCausalLMMixin, MoeHeadMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter
from .sparse_block import MoeSparseBlock


class MoeGPT2SparseBlock(MoeSparseBlock):
    """A [`MoeSparseBlock`] that drops a part of its output in training, as the dense feed-forward of GPT-2 does."""

    def __init__(self, config, num_experts: int, layer_index: int = 0):
        super().__init__(config, num_experts, layer_index)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(super().forward(hidden_states))


class MoeGPT2PreTrainedModel(MoePreTrainedModelMixin, GPT2PreTrainedModel):
    """Base class of GPT-2 with sparse layers."""

    config: MoeGPT2Config
    _can_record_outputs = {
        **GPT2PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeGPT2Model(MoeModelMixin, MoeGPT2PreTrainedModel, GPT2Model):
    """The backbone, [`~transformers.GPT2Model`] with sparse layers."""

    layers_path = "h"
    block_class = MoeGPT2SparseBlock


class MoeGPT2ForCausalLM(MoeForCausalLMMixin, MoeGPT2PreTrainedModel, GPT2LMHeadModel):
    """[`~transformers.GPT2LMHeadModel`] with sparse layers."""

    model_class = MoeGPT2Model


class MoeGPT2ForSequenceClassification(MoeHeadMixin, MoeGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """[`~transformers.GPT2ForSequenceClassification`] with sparse layers."""

    model_class = MoeGPT2Model


class MoeGPT2ForTokenClassification(MoeHeadMixin, MoeGPT2PreTrainedModel, GPT2ForTokenClassification):
    """[`~transformers.GPT2ForTokenClassification`] with sparse layers."""

    model_class = MoeGPT2Model
