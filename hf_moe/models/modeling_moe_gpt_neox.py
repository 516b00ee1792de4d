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
"""GPT-NeoX with sparse layers."""

from transformers import (
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_gpt_neox import MoeGPTNeoXConfig
from .modeling_moe import MoeForCausalLMMixin, MoeHeadMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeGPTNeoXPreTrainedModel(MoePreTrainedModelMixin, GPTNeoXPreTrainedModel):
    """Base class of GPT-NeoX with sparse layers."""

    config: MoeGPTNeoXConfig
    _can_record_outputs = {
        **GPTNeoXPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeGPTNeoXModel(MoeModelMixin, MoeGPTNeoXPreTrainedModel, GPTNeoXModel):
    """The backbone, [`~transformers.GPTNeoXModel`] with sparse layers."""


class MoeGPTNeoXForCausalLM(MoeForCausalLMMixin, MoeGPTNeoXPreTrainedModel, GPTNeoXForCausalLM):
    """[`~transformers.GPTNeoXForCausalLM`] with sparse layers."""

    model_class = MoeGPTNeoXModel


class MoeGPTNeoXForSequenceClassification(MoeHeadMixin, MoeGPTNeoXPreTrainedModel, GPTNeoXForSequenceClassification):
    """[`~transformers.GPTNeoXForSequenceClassification`] with sparse layers."""

    model_class = MoeGPTNeoXModel


class MoeGPTNeoXForTokenClassification(MoeHeadMixin, MoeGPTNeoXPreTrainedModel, GPTNeoXForTokenClassification):
    """[`~transformers.GPTNeoXForTokenClassification`] with sparse layers."""

    model_class = MoeGPTNeoXModel
