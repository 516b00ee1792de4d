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
"""BERT with sparse layers."""

from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.models.bert.modeling_bert import BertLayer, BertPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_bert import MoeBertConfig
from .modeling_moe import MoeHeadMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter
from .sparse_block import MoeSparseBlock


class MoeBertLayer(BertLayer):
    """A layer whose feed-forward is `mlp`; dropout, residual and LayerNorm behind it stay in `output`."""

    def __init__(self, config, layer_idx: int, block: MoeSparseBlock):
        super().__init__(config, layer_idx)
        del self.intermediate
        self.mlp, self.output.dense = block, nn.Identity()

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self.output(self.mlp(attention_output), attention_output)


class MoeBertPreTrainedModel(MoePreTrainedModelMixin, BertPreTrainedModel):
    """Base class of BERT with sparse layers."""

    config: MoeBertConfig
    _can_record_outputs = {
        **BertPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeBertModel(MoeModelMixin, MoeBertPreTrainedModel, BertModel):
    """The backbone, [`~transformers.BertModel`] with sparse layers."""

    layers_path = "encoder.layer"

    def replace_feed_forward(self, layers: nn.ModuleList, index: int, block: MoeSparseBlock) -> None:
        layers[index] = MoeBertLayer(self.config, index, block)


class MoeBertForMaskedLM(MoeHeadMixin, MoeBertPreTrainedModel, BertForMaskedLM):
    """[`~transformers.BertForMaskedLM`] with sparse layers."""

    model_class = MoeBertModel


class MoeBertForSequenceClassification(MoeHeadMixin, MoeBertPreTrainedModel, BertForSequenceClassification):
    """[`~transformers.BertForSequenceClassification`] with sparse layers."""

    model_class = MoeBertModel


class MoeBertForTokenClassification(MoeHeadMixin, MoeBertPreTrainedModel, BertForTokenClassification):
    """[`~transformers.BertForTokenClassification`] with sparse layers."""

    model_class = MoeBertModel
