# SPDX-License-Identifier: Apache-2.0
"""
Which dense models can be upcycled, and into what.

`FAMILIES` maps the dense `model_type` to a [`Family`]: where its feed-forward stands, its class in hf_moe, and the
native classes of transformers that can represent the result, best first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..models.configuration_moe_bert import MoeBertConfig
from ..models.configuration_moe_gemma2 import MoeGemma2Config
from ..models.configuration_moe_gemma3_text import MoeGemma3TextConfig
from ..models.configuration_moe_gpt2 import MoeGPT2Config
from ..models.configuration_moe_gpt_neox import MoeGPTNeoXConfig
from ..models.configuration_moe_granite import MoeGraniteConfig
from ..models.configuration_moe_llama import MoeLlamaConfig
from ..models.configuration_moe_mistral import MoeMistralConfig
from ..models.configuration_moe_olmo2 import MoeOlmo2Config
from ..models.configuration_moe_olmo3 import MoeOlmo3Config
from ..models.configuration_moe_phi3 import MoePhi3Config
from ..models.configuration_moe_qwen2 import MoeQwen2Config
from ..models.configuration_moe_qwen3 import MoeQwen3Config
from ..models.configuration_moe_smollm3 import MoeSmolLM3Config
from ..models.configuration_moe_stablelm import MoeStableLmConfig
from ..models.configuration_moe_vit import MoeViTConfig
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
            index to what is known of the states that the feed-forward sees: [`after_norm`] or [`residual_stream`].
        once_per_sequence (`dict[str, tuple[str, ...]]`): By what our class' name ends in, the modules that run once for a
            sequence, not for every token.
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
    once_per_sequence: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


ReadTensor = Callable[[str], Any]  # a tensor, or None if there is none of that name
NUM_EMBEDDINGS = 4096  # so many rows are enough for a mean length


def after_norm(*names: str, offset: float = 0.0) -> Callable[[ReadTensor, str, int], RouterInput]:
    """
    The feed-forward sees the output of a norm: a normalised state times `offset` plus the norm's weight.

    It is the first norm of `names` that the layer has.

    A normalised state has as many independent values of variance 1 as there are weights, so the expected squared length
    is that of the weights. The bias of a LayerNorm shifts every state alike.
    """

    def router_input(read: ReadTensor, layer: str, layer_index: int) -> RouterInput:
        norm, weight = next((name, weight) for name in names if (weight := read(f"{layer}{name}.weight")) is not None)
        length = (weight.detach().cpu().double() + offset).norm().item()
        shift = read(f"{layer}{norm}.bias")
        return RouterInput(len(weight), length, None if shift is None else shift.detach().cpu())

    return router_input


def residual_stream(
    embedding: str, attention_norm: str, feed_forward_norm: str
) -> Callable[[ReadTensor, str, int], RouterInput]:
    """
    The feed-forward sees the residual stream as it is: the token's embedding and what the attention and feed-forward of
    the layers so far have added, each behind a norm of its own.

    These parts are taken as independent of each other, so that their expected squared lengths add up.
    """

    def router_input(read: ReadTensor, layer: str, layer_index: int) -> RouterInput:
        embeddings = read(f"{embedding}.weight")
        some_rows = embeddings[:: math.ceil(len(embeddings) / NUM_EMBEDDINGS)]
        layers = layer.removesuffix(f"{layer_index}.")
        norms = [f"{layers}{index}.{attention_norm}.weight" for index in range(layer_index + 1)]
        norms += [f"{layers}{index}.{feed_forward_norm}.weight" for index in range(layer_index)]
        squared_length = _sum_of_squares(some_rows) / len(some_rows)
        squared_length += sum(_sum_of_squares(read(norm)) for norm in norms)
        return RouterInput(embeddings.shape[1], math.sqrt(squared_length))

    return router_input


def _sum_of_squares(tensor: torch.Tensor) -> float:
    return tensor.detach().cpu().double().square().sum().item()


OLMO_ROUTER_INPUT = residual_stream("embed_tokens", "post_attention_layernorm", "post_feedforward_layernorm")


def _own_target(config_class: type[PreTrainedConfig], *extra_fields: str) -> Target:
    prefix = config_class.__name__.removesuffix("Config")
    return Target(
        config_class,
        FusedLayout(),
        prefix,
        extra_fields=("head_dim", "layer_types", *extra_fields),
        dense_layers=listed_by_type,
        shared_expert=SharedExpert(shared_expert_names("mlp.shared_expert"), "shared_expert_intermediate_size"),
        mixed_layers=True,
        biased_experts=True,
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(
        "Bert",
        _own_target(MoeBertConfig),
        layers="encoder.layer",
        feed_forward=FeedForwardNames(up="intermediate.dense", down="output.dense"),
        router_input=after_norm("attention.output.LayerNorm"),
        once_per_sequence={"Model": ("pooler",), "ForSequenceClassification": ("bert.pooler", "classifier")},
    ),
    "cohere2": Family("Cohere2", None, (COHERE2_MOE,), router_input=after_norm("input_layernorm")),
    "ernie4_5": Family("Ernie4_5", None, (ERNIE4_5_MOE,)),
    "gemma2": Family(
        "Gemma2",
        _own_target(MoeGemma2Config),
        router_input=after_norm("pre_feedforward_layernorm", offset=1.0),
    ),
    "gemma3_text": Family(
        "Gemma3",
        _own_target(MoeGemma3TextConfig),
        heads={"Model": "TextModel", "ForSequenceClassification": "TextForSequenceClassification"},
        router_input=after_norm("pre_feedforward_layernorm", offset=1.0),
    ),
    "gpt2": Family(
        "GPT2",
        _own_target(MoeGPT2Config, "classifier_dropout", "hidden_dropout"),
        heads={"ForCausalLM": "LMHeadModel"},
        layers="h",
        feed_forward=FeedForwardNames(up="mlp.c_fc", down="mlp.c_proj", transposed=True),
        router_input=after_norm("ln_2"),
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        _own_target(MoeGPTNeoXConfig),
        feed_forward=FeedForwardNames(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    ),
    "granite": Family("Granite", _own_target(MoeGraniteConfig), (GRANITE_MOE, GRANITE_MOE_SHARED)),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", None, (HUNYUAN_V1_MOE,)),
    "llama": Family(
        "Llama", _own_target(MoeLlamaConfig), (MIXTRAL, GRANITE_MOE_OF_LLAMA, GRANITE_MOE_SHARED_OF_LLAMA)
    ),
    "mistral": Family("Mistral", _own_target(MoeMistralConfig), (MIXTRAL, GRANITE_MOE_SHARED_OF_MISTRAL)),
    "olmo2": Family("Olmo2", _own_target(MoeOlmo2Config), (FLEX_OLMO,), router_input=OLMO_ROUTER_INPUT),
    "olmo3": Family("Olmo3", _own_target(MoeOlmo3Config), router_input=OLMO_ROUTER_INPUT),
    "phi3": Family(
        "Phi3",
        _own_target(MoePhi3Config),
        (MIXTRAL_OF_PHI3, GLM4_MOE_OF_PHI3),
        feed_forward=FeedForwardNames(up="mlp.gate_up_proj", down="mlp.down_proj", fused=True),
    ),
    "qwen2": Family("Qwen2", _own_target(MoeQwen2Config), (QWEN2_MOE, GLM4_MOE_OF_QWEN2)),
    "qwen3": Family("Qwen3", _own_target(MoeQwen3Config), (QWEN3_MOE, MELLUM, GLM4_MOE_OF_QWEN3)),
    "qwen3_5_text": Family(
        "Qwen3_5",
        None,
        (QWEN3_5_MOE,),
        heads={"Model": "TextModel"},
        router_input=after_norm("post_attention_layernorm", offset=1.0),
    ),
    "smollm3": Family("SmolLM3", _own_target(MoeSmolLM3Config), (GRANITE_MOE_SWA_OF_SMOLLM3,)),
    "stablelm": Family(
        "StableLm",
        _own_target(MoeStableLmConfig),
        # A parallel residual has one norm for both; otherwise the feed-forward has its own.
        router_input=after_norm("post_attention_layernorm", "input_layernorm"),
    ),
    "vit": Family(
        "ViT",
        _own_target(MoeViTConfig),
        feed_forward=FeedForwardNames(up="mlp.fc1", down="mlp.fc2"),
        router_input=after_norm("layernorm_after"),
        once_per_sequence={"Model": ("pooler",), "ForImageClassification": ("classifier",)},
    ),
}
