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
"""SmolLM3 with sparse layers."""

from transformers import (
    SmolLM3ForCausalLM,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)
from transformers.models.smollm3.modeling_smollm3 import SmolLM3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_smollm3 import MoeSmolLM3Config
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeSmolLM3PreTrainedModel(MoePreTrainedModelMixin, SmolLM3PreTrainedModel):
    """Base class of SmolLM3 with sparse layers."""

    config: MoeSmolLM3Config
    _can_record_outputs = {
        **SmolLM3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeSmolLM3Model(MoeModelMixin, MoeSmolLM3PreTrainedModel, SmolLM3Model):
    """The backbone, [`~transformers.SmolLM3Model`] with sparse layers."""


class MoeSmolLM3ForCausalLM(MoeForCausalLMMixin, MoeSmolLM3PreTrainedModel, SmolLM3ForCausalLM):
    """[`~transformers.SmolLM3ForCausalLM`] with sparse layers."""

    model_class = MoeSmolLM3Model


class MoeSmolLM3ForSequenceClassification(
    MoeClassificationMixin, MoeSmolLM3PreTrainedModel, SmolLM3ForSequenceClassification
):
    """[`~transformers.SmolLM3ForSequenceClassification`] with sparse layers."""

    model_class = MoeSmolLM3Model


class MoeSmolLM3ForTokenClassification(
    MoeClassificationMixin, MoeSmolLM3PreTrainedModel, SmolLM3ForTokenClassification
):
    """[`~transformers.SmolLM3ForTokenClassification`] with sparse layers."""

    model_class = MoeSmolLM3Model
