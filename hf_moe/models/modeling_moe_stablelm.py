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
"""StableLM with sparse layers."""

from transformers import (
    StableLmForCausalLM,
    StableLmForSequenceClassification,
    StableLmForTokenClassification,
    StableLmModel,
)
from transformers.models.stablelm.modeling_stablelm import StableLmPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_stablelm import MoeStableLmConfig
from .modeling_moe import MoeClassificationMixin, MoeForCausalLMMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeStableLmPreTrainedModel(MoePreTrainedModelMixin, StableLmPreTrainedModel):
    """Base class of StableLM with sparse layers."""

    config: MoeStableLmConfig
    _can_record_outputs = {
        **StableLmPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeStableLmModel(MoeModelMixin, MoeStableLmPreTrainedModel, StableLmModel):
    """The backbone, [`~transformers.StableLmModel`] with sparse layers."""


class MoeStableLmForCausalLM(MoeForCausalLMMixin, MoeStableLmPreTrainedModel, StableLmForCausalLM):
    """[`~transformers.StableLmForCausalLM`] with sparse layers."""

    model_class = MoeStableLmModel


class MoeStableLmForSequenceClassification(
    MoeClassificationMixin, MoeStableLmPreTrainedModel, StableLmForSequenceClassification
):
    """[`~transformers.StableLmForSequenceClassification`] with sparse layers."""

    model_class = MoeStableLmModel


class MoeStableLmForTokenClassification(
    MoeClassificationMixin, MoeStableLmPreTrainedModel, StableLmForTokenClassification
):
    """[`~transformers.StableLmForTokenClassification`] with sparse layers."""

    model_class = MoeStableLmModel
