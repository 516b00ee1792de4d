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
"""What every MoE configuration adds to its dense one.

`MoeConfigMixin` holds the fields, their validation, the `auto_map` and the parallel plans, to which `MOE_TP_PLAN`,
`MOE_EP_PLAN` and `MOE_BIAS_EP_PLAN` add the sparse block.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from .configuration_block import BlockConfigMixin
from .configuration_routing import RoutingConfigMixin, warn_of_typos


MOE_TP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared_expert.gate_proj": "colwise",
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
}
MOE_EP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}
MOE_BIAS_EP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj_bias": "grouped_gemm",
    "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
}


def ungated_ep_plan(layers: str) -> dict[str, str]:
    """The expert-parallel plan of a backbone that keeps its layers in `layers`, for experts without a gate and with biases."""
    experts = f"{layers}.*.mlp.experts"
    tensors = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    return {**{f"{experts}.{tensor}": "grouped_gemm" for tensor in tensors}, experts: "ep_dispatch_experts"}


@dataclass(kw_only=True)
class MoeConfigMixin(BlockConfigMixin, RoutingConfigMixin):
    r"""
    The fields of a sparse block, added to those of the dense configuration, with those of [`RoutingConfigMixin`] and
    [`BlockConfigMixin`].

    Args:
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts in a sparse layer; the largest one if the layers differ.
        num_experts_per_layer (`list[int]`, *optional*):
            Number of routed experts of every layer where they differ; 0 for a dense layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Number of routed experts that serve one token.
        moe_intermediate_size (`int`, *optional*):
            Intermediate size of one routed expert. Defaults to `intermediate_size`.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Coefficient of the router's balance loss, which is added to the loss when `output_router_logits` is on.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the model returns the router logits and the load-balancing loss.
        shared_expert_intermediate_size (`int`, *optional*):
            Intermediate size of the shared expert that every token takes. None by default: no shared expert.
        use_shared_expert_gate (`bool`, *optional*, defaults to `False`):
            Whether a learned sigmoid gate scales the shared expert's output, as in Qwen2-MoE.
        mlp_layer_types (`list[str]`, *optional*):
            Per layer `"sparse"` or `"dense"`. Every layer is sparse by default.
    """

    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Model",
        "AutoModelForCausalLM": "ForCausalLM",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
        "AutoModelForTokenClassification": "ForTokenClassification",
    }
    gated_experts: ClassVar[bool] = True

    num_experts: int = 8
    num_experts_per_layer: list[int] | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_aux_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    shared_expert_intermediate_size: int | None = None
    use_shared_expert_gate: bool = False
    mlp_layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        # Fields that were given by an alias, such as `hidden_size` for GPT-2's `n_embd`: defaults depend on them.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        warn_of_typos(
            (name for name in kwargs if not hasattr(self, name)), [field.name for field in fields(MoeConfigMixin)]
        )
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        # The code travels with every checkpoint, so the map always names the files beside the configuration.
        kwargs["auto_map"] = self.auto_class_references()
        super().__post_init__(**kwargs)

    @property
    def biased_experts(self) -> bool:
        """Whether the experts have biases, as the dense feed-forward has."""
        return getattr(self, "mlp_bias", False)

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """
        The tensor-parallel plan: the dense one and that of a gated sparse block; None where the dense class has none.

        Every rank would add the output bias to its part of the sum, so experts with biases are left whole.
        """
        dense_plan = super().base_model_tp_plan
        if dense_plan is None or not self.gated_experts:
            return dense_plan
        moe_plan = {
            rule: style for rule, style in MOE_TP_PLAN.items() if "shared_expert" in rule or not self.biased_experts
        }
        return {**dense_plan, **moe_plan}

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """The expert-parallel plan: whole experts with their biases, dealt out to the ranks."""
        return {**MOE_EP_PLAN, **(MOE_BIAS_EP_PLAN if self.biased_experts else {})}

    def num_experts_in(self, layer_index: int) -> int:
        """Number of routed experts of a sparse layer."""
        return self.num_experts if self.num_experts_per_layer is None else self.num_experts_per_layer[layer_index]

    @property
    def counts_of_experts(self) -> list[int]:
        """Numbers of routed experts of the sparse layers."""
        counts = [self.num_experts] if self.num_experts_per_layer is None else self.num_experts_per_layer
        return [count for count in counts if count]

    @property
    def is_causal_model(self) -> bool:
        """Whether the family is one of causal language models."""
        return "AutoModelForCausalLM" in self.auto_classes

    @classmethod
    def auto_class_references(cls) -> dict[str, str]:
        """The `auto_map` of the family, e.g. `{"AutoModel": "modeling_moe_llama.MoeLlamaModel", ...}`."""
        configuration_module = cls.__module__.rpartition(".")[2]
        modeling_module = configuration_module.replace("configuration_", "modeling_", 1)
        family = cls.__name__.removesuffix("Config")
        references = {"AutoConfig": f"{configuration_module}.{cls.__name__}"}
        references.update({auto: f"{modeling_module}.{family}{head}" for auto, head in cls.auto_classes.items()})
        return references

    def validate_moe(self):
        """Part of `@strict`-powered validation."""
        num_experts = self.num_experts + self.num_zero_computation_experts
        if not 1 <= self.num_experts_per_tok <= num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must lie between 1 and `num_experts` ({num_experts}), got "
                f"{self.num_experts_per_tok}."
            )
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`mlp_layer_types` must have one entry per layer ({self.num_hidden_layers}), got "
                f"{len(self.mlp_layer_types)}. Change both together."
            )
        unknown = sorted(set(self.mlp_layer_types) - {"sparse", "dense"})
        if unknown:
            raise ValueError(f"`mlp_layer_types` entries must be 'sparse' or 'dense', got {unknown}.")
        if "sparse" not in self.mlp_layer_types:
            raise ValueError(
                "`mlp_layer_types` has no 'sparse' layer: such a model is dense, use its dense class instead."
            )
        if getattr(self, "add_cross_attention", False):
            raise ValueError(
                "`add_cross_attention` is not supported: sparse layers are for models without a second input."
            )
        if self.use_shared_expert_gate and self.shared_expert_intermediate_size is None:
            raise ValueError("`use_shared_expert_gate` needs a `shared_expert_intermediate_size`.")
        if self.num_experts_per_layer is not None:
            self._validate_num_experts_per_layer()

    def _validate_num_experts_per_layer(self):
        counts = self.num_experts_per_layer
        if len(counts) != self.num_hidden_layers:
            raise ValueError(
                f"`num_experts_per_layer` must have one entry per layer ({self.num_hidden_layers}), got {len(counts)}."
            )
        for index, (count, layer_type) in enumerate(zip(counts, self.mlp_layer_types, strict=True)):
            if (count == 0) != (layer_type == "dense"):
                raise ValueError(
                    f"`num_experts_per_layer` must be 0 for dense layers and only for them, but layer {index} is "
                    f"{layer_type!r} and has {count}."
                )
            if layer_type == "sparse" and count < self.num_experts_per_tok:
                raise ValueError(
                    f"`num_experts_per_layer` must be at least `num_experts_per_tok` ({self.num_experts_per_tok}), but layer "
                    f"{index} has {count}."
                )
        if max(counts) != self.num_experts:
            raise ValueError(
                f"`num_experts` ({self.num_experts}) must be the largest of `num_experts_per_layer` ({max(counts)})."
            )
