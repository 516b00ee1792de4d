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
"""Qwen3 with sparse layers."""

from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3ForTokenClassification, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_qwen3 import MoeQwen3Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeQwen3PreTrainedModel(MoePreTrainedModelMixin, Qwen3PreTrainedModel):
    """Base class of Qwen3 with sparse layers."""

    config: MoeQwen3Config
    _can_record_outputs = {
        **Qwen3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeQwen3Model(MoeModelMixin, MoeQwen3PreTrainedModel, Qwen3Model):
    """The backbone, [`~transformers.Qwen3Model`] with sparse layers."""


class MoeQwen3ForCausalLM(MoeForCausalLMMixin, MoeQwen3PreTrainedModel, Qwen3ForCausalLM):
    """[`~transformers.Qwen3ForCausalLM`] with sparse layers."""

    model_class = MoeQwen3Model


class MoeQwen3ForSequenceClassification(
    MoeClassificationMixin, MoeQwen3PreTrainedModel, Qwen3ForSequenceClassification
):
    """[`~transformers.Qwen3ForSequenceClassification`] with sparse layers."""

    model_class = MoeQwen3Model


class MoeQwen3ForTokenClassification(MoeClassificationMixin, MoeQwen3PreTrainedModel, Qwen3ForTokenClassification):
    """[`~transformers.Qwen3ForTokenClassification`] with sparse layers."""

    model_class = MoeQwen3Model
