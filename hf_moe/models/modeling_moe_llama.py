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
"""Llama with sparse layers."""

from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_llama import MoeLlamaConfig
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeLlamaPreTrainedModel(MoePreTrainedModelMixin, LlamaPreTrainedModel):
    """Base class of Llama with sparse layers."""

    config: MoeLlamaConfig
    _can_record_outputs = {
        **LlamaPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeLlamaModel(MoeModelMixin, MoeLlamaPreTrainedModel, LlamaModel):
    """The backbone, [`~transformers.LlamaModel`] with sparse layers."""


class MoeLlamaForCausalLM(MoeForCausalLMMixin, MoeLlamaPreTrainedModel, LlamaForCausalLM):
    """[`~transformers.LlamaForCausalLM`] with sparse layers."""

    model_class = MoeLlamaModel


class MoeLlamaForSequenceClassification(
    MoeClassificationMixin, MoeLlamaPreTrainedModel, LlamaForSequenceClassification
):
    """[`~transformers.LlamaForSequenceClassification`] with sparse layers."""

    model_class = MoeLlamaModel


class MoeLlamaForTokenClassification(MoeClassificationMixin, MoeLlamaPreTrainedModel, LlamaForTokenClassification):
    """[`~transformers.LlamaForTokenClassification`] with sparse layers."""

    model_class = MoeLlamaModel
