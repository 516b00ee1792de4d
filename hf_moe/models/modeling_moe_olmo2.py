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
"""OLMo 2 with sparse layers."""

from transformers import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_olmo2 import MoeOlmo2Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeOlmo2PreTrainedModel(MoePreTrainedModelMixin, Olmo2PreTrainedModel):
    """Base class of OLMo 2 with sparse layers."""

    config: MoeOlmo2Config
    _can_record_outputs = {
        **Olmo2PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeOlmo2Model(MoeModelMixin, MoeOlmo2PreTrainedModel, Olmo2Model):
    """The backbone, [`~transformers.Olmo2Model`] with sparse layers."""


class MoeOlmo2ForCausalLM(MoeForCausalLMMixin, MoeOlmo2PreTrainedModel, Olmo2ForCausalLM):
    """[`~transformers.Olmo2ForCausalLM`] with sparse layers."""

    model_class = MoeOlmo2Model


class MoeOlmo2ForSequenceClassification(
    MoeClassificationMixin, MoeOlmo2PreTrainedModel, Olmo2ForSequenceClassification
):
    """[`~transformers.Olmo2ForSequenceClassification`] with sparse layers."""

    model_class = MoeOlmo2Model
