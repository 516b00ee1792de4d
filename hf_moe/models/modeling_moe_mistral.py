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
"""Mistral with sparse layers."""

from transformers import (
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_mistral import MoeMistralConfig
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeMistralPreTrainedModel(MoePreTrainedModelMixin, MistralPreTrainedModel):
    """Base class of Mistral with sparse layers."""

    config: MoeMistralConfig
    _can_record_outputs = {
        **MistralPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeMistralModel(MoeModelMixin, MoeMistralPreTrainedModel, MistralModel):
    """The backbone, [`~transformers.MistralModel`] with sparse layers."""


class MoeMistralForCausalLM(MoeForCausalLMMixin, MoeMistralPreTrainedModel, MistralForCausalLM):
    """[`~transformers.MistralForCausalLM`] with sparse layers."""

    model_class = MoeMistralModel


class MoeMistralForSequenceClassification(
    MoeClassificationMixin, MoeMistralPreTrainedModel, MistralForSequenceClassification
):
    """[`~transformers.MistralForSequenceClassification`] with sparse layers."""

    model_class = MoeMistralModel


class MoeMistralForTokenClassification(
    MoeClassificationMixin, MoeMistralPreTrainedModel, MistralForTokenClassification
):
    """[`~transformers.MistralForTokenClassification`] with sparse layers."""

    model_class = MoeMistralModel
