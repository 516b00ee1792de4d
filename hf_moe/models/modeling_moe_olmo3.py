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
"""OLMo 3 with sparse layers."""

from transformers import Olmo3ForCausalLM, Olmo3ForSequenceClassification, Olmo3Model
from transformers.models.olmo3.modeling_olmo3 import Olmo3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_olmo3 import MoeOlmo3Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeOlmo3PreTrainedModel(MoePreTrainedModelMixin, Olmo3PreTrainedModel):
    """Base class of OLMo 3 with sparse layers."""

    config: MoeOlmo3Config
    _can_record_outputs = {
        **Olmo3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeOlmo3Model(MoeModelMixin, MoeOlmo3PreTrainedModel, Olmo3Model):
    """The backbone, [`~transformers.Olmo3Model`] with sparse layers."""


class MoeOlmo3ForCausalLM(MoeForCausalLMMixin, MoeOlmo3PreTrainedModel, Olmo3ForCausalLM):
    """[`~transformers.Olmo3ForCausalLM`] with sparse layers."""

    model_class = MoeOlmo3Model


class MoeOlmo3ForSequenceClassification(
    MoeClassificationMixin, MoeOlmo3PreTrainedModel, Olmo3ForSequenceClassification
):
    """[`~transformers.Olmo3ForSequenceClassification`] with sparse layers."""

    model_class = MoeOlmo3Model
