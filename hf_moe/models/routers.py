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
"""Routers: which experts serve a token, and with what weight.

`ROUTERS` is the table from `config.router_type` to a class, `build_router` makes the one of a layer. [`MoeRouter`] is the base class that recorders and
initialisers look for; what a router does is said by the `contract` of its class.
"""

from .router_base import MoeRouter
from .routers_fixed import ExpertChoiceRouter, HashRouter
from .routers_grouped import GroupedRouter, HierarchicalRouter, PrototypesRouter
from .routers_noisy import GShardRouter, HierarchicalNoisyTopKRouter, NoisyTopKRouter, SwitchRouter
from .routers_sigmoid import Llama4Router, ReluRouter, SigmoidTopKRouter
from .routers_softmax import (
    AttentionRouter,
    ModalityRouter,
    NormalizedLogitsRouter,
    SoftmaxTopKRouter,
    SoftRouter,
    TopPRouter,
)


ROUTERS: dict[str, type[MoeRouter]] = {
    "soft": SoftRouter,
    "noisy_topk": NoisyTopKRouter,
    "hierarchical_noisy_topk": HierarchicalNoisyTopKRouter,
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "softmax_topk": SoftmaxTopKRouter,
    "sigmoid_topk": SigmoidTopKRouter,
    "llama4": Llama4Router,
    "attention": AttentionRouter,
    "normalized_logits": NormalizedLogitsRouter,
    "expert_choice": ExpertChoiceRouter,
    "top_p": TopPRouter,
    "relu": ReluRouter,
    "prototypes": PrototypesRouter,
    "grouped": GroupedRouter,
    "hash": HashRouter,
    "modality": ModalityRouter,
    "hierarchical": HierarchicalRouter,
}


def build_router(config, num_experts: int, layer_index: int) -> MoeRouter:
    """The router of a sparse layer with this many feed-forwards."""
    router = ROUTERS[config.router_type](config, num_experts)
    if "sparse" not in config.mlp_layer_types[:layer_index]:
        router.residual_weight = None  # there is no router before it, and nothing may stay without a gradient
    return router
