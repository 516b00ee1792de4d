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
"""Phi-3 with sparse layers."""

from transformers import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_phi3 import MoePhi3Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoePhi3PreTrainedModel(MoePreTrainedModelMixin, Phi3PreTrainedModel):
    """Base class of Phi-3 with sparse layers."""

    config: MoePhi3Config
    _can_record_outputs = {
        **Phi3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoePhi3Model(MoeModelMixin, MoePhi3PreTrainedModel, Phi3Model):
    """The backbone, [`~transformers.Phi3Model`] with sparse layers."""


class MoePhi3ForCausalLM(MoeForCausalLMMixin, MoePhi3PreTrainedModel, Phi3ForCausalLM):
    """[`~transformers.Phi3ForCausalLM`] with sparse layers."""

    model_class = MoePhi3Model


class MoePhi3ForSequenceClassification(MoeClassificationMixin, MoePhi3PreTrainedModel, Phi3ForSequenceClassification):
    """[`~transformers.Phi3ForSequenceClassification`] with sparse layers."""

    model_class = MoePhi3Model


class MoePhi3ForTokenClassification(MoeClassificationMixin, MoePhi3PreTrainedModel, Phi3ForTokenClassification):
    """[`~transformers.Phi3ForTokenClassification`] with sparse layers."""

    model_class = MoePhi3Model
