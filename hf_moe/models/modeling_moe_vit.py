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
"""ViT with sparse layers."""

from transformers import ViTForImageClassification, ViTModel
from transformers.models.vit.modeling_vit import ViTPreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moe_vit import MoeViTConfig
from .modeling_moe import MoeHeadMixin, MoeModelMixin, MoePreTrainedModelMixin
from .routers import MoeRouter


class MoeViTPreTrainedModel(MoePreTrainedModelMixin, ViTPreTrainedModel):
    """Base class of ViT with sparse layers."""

    config: MoeViTConfig
    _can_record_outputs = {
        **ViTPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeRouter, index=0),
    }


class MoeViTModel(MoeModelMixin, MoeViTPreTrainedModel, ViTModel):
    """The backbone, [`~transformers.ViTModel`] with sparse layers."""


class MoeViTForImageClassification(MoeHeadMixin, MoeViTPreTrainedModel, ViTForImageClassification):
    """[`~transformers.ViTForImageClassification`] with sparse layers."""

    model_class = MoeViTModel
