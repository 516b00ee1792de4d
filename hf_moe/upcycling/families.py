# SPDX-License-Identifier: Apache-2.0
"""
Which dense models can be upcycled, and into what.

`FAMILIES` maps the dense `model_type` to a [`Family`]: where its feed-forward stands, its class in hf_moe, and the
native classes of transformers that can represent the result, best first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ..models.configuration_moe_bert import MoeBertConfig
from ..models.configuration_moe_gpt2 import MoeGPT2Config
from ..models.configuration_moe_gpt_neox import MoeGPTNeoXConfig
from ..models.configuration_moe_llama import MoeLlamaConfig
from ..models.configuration_moe_mistral import MoeMistralConfig
from ..models.configuration_moe_qwen2 import MoeQwen2Config
from ..models.configuration_moe_qwen3 import MoeQwen3Config
from ..models.configuration_moe_vit import MoeViTConfig
from .feed_forward import FeedForwardNames
from .layouts import FusedLayout, PerExpertLayout
from .router_init import RouterInput


@dataclass(frozen=True)
class Target:
    """
    A class that can hold the result.

    Args:
        config_class (`type`): Its configuration.
        layout: Names and arrangement of a sparse layer's tensors on disk.
        prefix (`str`): What the names of its model classes start with, e.g. `"Mixtral"`.
        block (`str`): What a layer in memory calls its sparse block; on disk the layout says so.
        native (`bool`): Whether it belongs to transformers.
        neutral (`dict[str, Any]`): Dense fields for which the class has no place, with the value that changes nothing.
        ignored (`tuple[str, ...]`): Dense fields for which it has no place and needs none.
        extra_fields (`tuple[str, ...]`): Fields the class reads although its configuration does not declare them.
        num_experts_field (`str`): Name of the field that holds the number of experts.
        expert_size_field (`str`): Name of the field that holds the intermediate size of one expert.
        dense_layers (`bool`): Whether some layers can stay dense.
        shared_expert (`str`): `"none"`, `"optional"`, or `"gated"` if there always is one behind a sigmoid gate.
        mixed_layers (`bool`): Whether its layers can have different numbers of experts.
        biased_experts (`bool`): Whether its experts can have biases.
        refuses (`Callable`, *optional*): A further condition on the dense configuration; returns the reason or None.
    """

    config_class: type[PreTrainedConfig]
    layout: FusedLayout | PerExpertLayout
    prefix: str
    block: str = "mlp"
    native: bool = False
    neutral: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    extra_fields: tuple[str, ...] = ()
    num_experts_field: str = "num_experts"
    expert_size_field: str = "moe_intermediate_size"
    dense_layers: bool = True
    shared_expert: str = "optional"
    mixed_layers: bool = False
    biased_experts: bool = False
    refuses: Callable[[Any], str | None] | None = None


LLAMA_FEED_FORWARD = FeedForwardNames(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """
    A dense architecture.

    Args:
        prefix (`str`): What the names of its model classes start with, e.g. `"Llama"`.
        target (`Target`): The class of hf_moe.
        native_targets (`tuple[Target, ...]`): Classes of transformers, best first.
        heads (`dict[str, str]`): What the dense classes' names end in, where that is not what ours end in.
        layers (`str`): Where the backbone keeps its layers.
        feed_forward (`FeedForwardNames`): Where a layer keeps its feed-forward.
        router_input: From the function that reads a tensor of the backbone, the layer's name with a dot at the end and its
            index to what is known of the states that the feed-forward sees, see [`after_norm`].
        once_per_sequence (`dict[str, tuple[str, ...]]`): By what our class' name ends in, the modules that run once for a
            sequence, not for every token.
    """

    prefix: str
    target: Target
    native_targets: tuple[Target, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    layers: str = "layers"
    feed_forward: FeedForwardNames = LLAMA_FEED_FORWARD
    router_input: Callable[["ReadTensor", str, int], RouterInput] = field(
        default_factory=lambda: after_norm("post_attention_layernorm")
    )
    once_per_sequence: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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


def _own_target(config_class: type[PreTrainedConfig], *extra_fields: str) -> Target:
    prefix = config_class.__name__.removesuffix("Config")
    return Target(
        config_class,
        FusedLayout(),
        prefix,
        extra_fields=("head_dim", "layer_types", *extra_fields),
        mixed_layers=True,
        biased_experts=True,
    )


def _layer_types_refused(config: MistralConfig) -> str | None:
    layer_types = getattr(config, "layer_types", None)
    return None if not layer_types else f"layer_types={layer_types} (Mixtral has one attention type for all layers)"


def _partial_window_refused(config: Qwen3Config) -> str | None:
    if config.sliding_window is None or set(config.layer_types) == {"sliding_attention"}:
        return None
    return "layer_types mixes full and sliding attention (Qwen3-MoE has one attention type for all layers)"


MIXTRAL = Target(
    MixtralConfig,
    PerExpertLayout("block_sparse_moe", "w1", "w3", "w2"),
    "Mixtral",
    native=True,
    neutral={"attention_bias": False, "mlp_bias": False},
    ignored=("pretraining_tp",),
    num_experts_field="num_local_experts",
    expert_size_field="intermediate_size",
    dense_layers=False,
    shared_expert="none",
    refuses=_layer_types_refused,
)
QWEN2_MOE = Target(
    Qwen2MoeConfig,
    PerExpertLayout("mlp", "gate_proj", "up_proj", "down_proj"),
    "Qwen2Moe",
    native=True,
    extra_fields=("head_dim",),
    shared_expert="gated",
)
QWEN3_MOE = Target(
    Qwen3MoeConfig,
    PerExpertLayout("mlp", "gate_proj", "up_proj", "down_proj"),
    "Qwen3Moe",
    native=True,
    ignored=("max_window_layers", "layer_types"),  # `refuses` sees to it that all layers have one attention type
    extra_fields=("head_dim",),
    shared_expert="none",
    refuses=_partial_window_refused,
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
    "llama": Family("Llama", _own_target(MoeLlamaConfig), (MIXTRAL,)),
    "mistral": Family("Mistral", _own_target(MoeMistralConfig), (MIXTRAL,)),
    "qwen2": Family("Qwen2", _own_target(MoeQwen2Config), (QWEN2_MOE,)),
    "qwen3": Family("Qwen3", _own_target(MoeQwen3Config), (QWEN3_MOE,)),
    "vit": Family(
        "ViT",
        _own_target(MoeViTConfig),
        feed_forward=FeedForwardNames(up="mlp.fc1", down="mlp.fc2"),
        router_input=after_norm("layernorm_after"),
        once_per_sequence={"Model": ("pooler",), "ForImageClassification": ("classifier",)},
    ),
}
