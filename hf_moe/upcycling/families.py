# SPDX-License-Identifier: Apache-2.0
"""
Which dense models can be upcycled, and into what.

`FAMILIES` maps the dense `model_type` to a [`Family`]: where its feed-forward stands, its class in hf_moe, and the
native classes of transformers that can represent the result, best first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..models.configuration_moe_llama import MoeLlamaConfig
from ..models.configuration_moe_mistral import MoeMistralConfig
from ..models.configuration_moe_qwen2 import MoeQwen2Config
from ..models.configuration_moe_qwen3 import MoeQwen3Config
from .feed_forward import FeedForwardNames
from .granite_targets import (
    GRANITE_MOE,
    GRANITE_MOE_OF_LLAMA,
    GRANITE_MOE_SHARED,
    GRANITE_MOE_SHARED_OF_LLAMA,
    GRANITE_MOE_SHARED_OF_MISTRAL,
    GRANITE_MOE_SWA_OF_SMOLLM3,
)
from .layouts import FusedLayout
from .native_targets import (
    COHERE2_MOE,
    ERNIE4_5_MOE,
    FLEX_OLMO,
    GLM4_MOE_OF_PHI3,
    GLM4_MOE_OF_QWEN2,
    GLM4_MOE_OF_QWEN3,
    HUNYUAN_V1_MOE,
    MELLUM,
    MIXTRAL,
    MIXTRAL_OF_PHI3,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
)
from .router_init import RouterInput
from .target import SharedExpert, Target, listed_by_type, shared_expert_names


LLAMA_FEED_FORWARD = FeedForwardNames(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """
    A dense architecture.

    Args:
        prefix (`str`): What the names of its model classes start with, e.g. `"Llama"`.
        target (`Target`, *optional*): The class of hf_moe, if there is one.
        native_targets (`tuple[Target, ...]`): Classes of transformers, best first.
        heads (`dict[str, str]`): What the dense classes' names end in, where that is not what ours end in.
        layers (`str`): Where the backbone keeps its layers.
        feed_forward (`FeedForwardNames`): Where a layer keeps its feed-forward.
        router_input: From the function that reads a tensor of the backbone, the layer's name with a dot at the end and its
            index to what is known of the states that the feed-forward sees, see [`after_norm`].
    """

    prefix: str
    target: Target | None
    native_targets: tuple[Target, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    layers: str = "layers"
    feed_forward: FeedForwardNames = LLAMA_FEED_FORWARD
    router_input: Callable[["ReadTensor", str, int], RouterInput] = field(
        default_factory=lambda: after_norm("post_attention_layernorm")
    )


ReadTensor = Callable[[str], Any]  # a tensor, or None if there is none of that name


def after_norm(name: str, *, offset: float = 0.0) -> Callable[[ReadTensor, str, int], RouterInput]:
    """
    The feed-forward sees the output of the norm `name`, a normalised state times `offset` plus the norm's weight.

    A normalised state has as many independent values of variance 1 as there are weights, so the expected squared length
    is that of the weights. The bias of a LayerNorm shifts every state alike.
    """

    def router_input(read: ReadTensor, layer: str, layer_index: int) -> RouterInput:
        weight = read(f"{layer}{name}.weight")
        length = (weight.detach().cpu().double() + offset).norm().item()
        shift = read(f"{layer}{name}.bias")
        return RouterInput(len(weight), length, None if shift is None else shift.detach().cpu())

    return router_input


def _own_target(config_class: type[PreTrainedConfig]) -> Target:
    prefix = config_class.__name__.removesuffix("Config")
    return Target(
        config_class,
        FusedLayout(),
        prefix,
        extra_fields=("head_dim", "layer_types"),
        dense_layers=listed_by_type,
        shared_expert=SharedExpert(shared_expert_names("mlp.shared_expert"), "shared_expert_intermediate_size"),
        mixed_layers=True,
        biased_experts=True,
    )


def after_embeddings_and_norms(*norms: str) -> Callable[[ReadTensor, str, int], RouterInput]:
    """
    The feed-forward sees the hidden state itself: the embedding and the outputs of all norms before it, each of which adds
    its squared length to the expected one.

    Args:
        norms (`str`): The norms of a layer whose outputs are added to the hidden state, the one after the feed-forward last.
    """

    def router_input(read: ReadTensor, layer: str, layer_index: int) -> RouterInput:
        embeddings = read("embed_tokens.weight")
        squared = embeddings.detach().cpu().double().pow(2).sum(-1).mean().item()
        layers = layer.rstrip(".").rpartition(".")[0]
        for index in range(layer_index + 1):
            for norm in norms if index < layer_index else norms[:-1]:
                squared += read(f"{layers}.{index}.{norm}.weight").detach().cpu().double().pow(2).sum().item()
        return RouterInput(embeddings.shape[1], squared**0.5)

    return router_input


PHI3_FEED_FORWARD = FeedForwardNames(up="mlp.gate_up_proj", down="mlp.down_proj", fused=True)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama", _own_target(MoeLlamaConfig), (MIXTRAL, GRANITE_MOE_OF_LLAMA, GRANITE_MOE_SHARED_OF_LLAMA)
    ),
    "mistral": Family("Mistral", _own_target(MoeMistralConfig), (MIXTRAL, GRANITE_MOE_SHARED_OF_MISTRAL)),
    "qwen2": Family("Qwen2", _own_target(MoeQwen2Config), (QWEN2_MOE, GLM4_MOE_OF_QWEN2)),
    "qwen3": Family("Qwen3", _own_target(MoeQwen3Config), (QWEN3_MOE, MELLUM, GLM4_MOE_OF_QWEN3)),
    "phi3": Family("Phi3", None, (MIXTRAL_OF_PHI3, GLM4_MOE_OF_PHI3), feed_forward=PHI3_FEED_FORWARD),
    "olmo2": Family(
        "Olmo2",
        None,
        (FLEX_OLMO,),
        router_input=after_embeddings_and_norms("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "granite": Family("Granite", None, (GRANITE_MOE, GRANITE_MOE_SHARED)),
    "smollm3": Family("SmolLM3", None, (GRANITE_MOE_SWA_OF_SMOLLM3,)),
    "qwen3_5_text": Family(
        "Qwen3_5",
        None,
        (QWEN3_5_MOE,),
        heads={"Model": "TextModel"},
        router_input=after_norm("post_attention_layernorm", offset=1.0),
    ),
    "cohere2": Family("Cohere2", None, (COHERE2_MOE,), router_input=after_norm("input_layernorm")),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", None, (HUNYUAN_V1_MOE,)),
    "ernie4_5": Family("Ernie4_5", None, (ERNIE4_5_MOE,)),
}
