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
"""Qwen2 with sparse layers."""

from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2ForTokenClassification, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_qwen2 import MoeQwen2Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeQwen2PreTrainedModel(MoePreTrainedModelMixin, Qwen2PreTrainedModel):
    """Base class of Qwen2 with sparse layers."""

    config: MoeQwen2Config
    _can_record_outputs = {
        **Qwen2PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeQwen2Model(MoeModelMixin, MoeQwen2PreTrainedModel, Qwen2Model):
    """The backbone, [`~transformers.Qwen2Model`] with sparse layers."""


class MoeQwen2ForCausalLM(MoeForCausalLMMixin, MoeQwen2PreTrainedModel, Qwen2ForCausalLM):
    """[`~transformers.Qwen2ForCausalLM`] with sparse layers."""

    model_class = MoeQwen2Model


class MoeQwen2ForSequenceClassification(
    MoeClassificationMixin, MoeQwen2PreTrainedModel, Qwen2ForSequenceClassification
):
    """[`~transformers.Qwen2ForSequenceClassification`] with sparse layers."""

    model_class = MoeQwen2Model


class MoeQwen2ForTokenClassification(MoeClassificationMixin, MoeQwen2PreTrainedModel, Qwen2ForTokenClassification):
    """[`~transformers.Qwen2ForTokenClassification`] with sparse layers."""

    model_class = MoeQwen2Model
