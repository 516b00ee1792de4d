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
"""The mixins that put a sparse block into a dense transformers model.

[`MoeSparseBlock`] takes the place of a layer's feed-forward. `MoePreTrainedModelMixin`, `MoeModelMixin`,
`MoeForCausalLMMixin`, `MoeClassificationMixin` and `MoeHeadMixin` are mixed into the dense classes of a family;
attention, caches, generation and parallel plans stay those of the dense classes.
"""

import copy

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple, logging

from .experts import BiasedMoeExperts, MoeExperts, UngatedMoeExperts
from .filter_state import FilterStateGenerationMixin
from .localized_filtering import CausalConvolution, FilterNorm, filter_queries_and_keys
from .losses import mixtral_balance_loss
from .routers import MoeRouter
from .routers_noisy import init_truncated_normal
from .routing_context import ROUTING_INPUTS, RoutingContext, open_routing, refuse_unread_inputs, with_routing
from .sparse_block import MoeSparseBlock
from .zero_experts import ZeroComputationExperts


logger = logging.get_logger(__name__)


class MoePreTrainedModelMixin:
    """Initialisation of the sparse block, and the experts interface, for the base class of a family."""

    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the file of the model class for the experts' decorator; ours stands in experts.py.
        return True

    def get_correct_experts_implementation(self, requested_experts):
        if requested_experts == "sonicmoe" and self.config.expert_dropout:
            raise ValueError(
                f"`expert_dropout` ({self.config.expert_dropout}) drops out between the two layers of an expert, which the kernel "
                "`experts_implementation='sonicmoe'` runs as one. Use 'grouped_mm', or `expert_dropout=0`."
            )
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std, scale = self.config.initializer_range, self.config.moe_initializer_scale
        if isinstance(module, (MoeExperts, BiasedMoeExperts, UngatedMoeExperts)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                elif scale is not None:
                    init_truncated_normal(parameter, scale)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, (MoeRouter, ZeroComputationExperts, CausalConvolution, FilterNorm)):
            module.init_weights(std)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As of the dense class; routers that know token ids follow."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MoeRouter):
                module.resize_vocabulary(embeddings.num_embeddings)
        return embeddings


class MoeModelMixin:
    """
    Puts a [`MoeSparseBlock`] into the layers that `config.mlp_layer_types` names `"sparse"`.

    `layers_path` is where the dense backbone keeps its layers, `block_class` what takes the place of a feed-forward.
    """

    layers_path = "layers"
    block_class = MoeSparseBlock

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        # `from_pretrained(folder, field=...)` changes fields of a configuration that was valid.
        for validate in (config.validate_moe, config.validate_routing, config.validate_block):
            validate()
        layers = self.get_submodule(self.layers_path)
        for index, layer_type in enumerate(config.mlp_layer_types):
            if layer_type == "sparse":
                block = self.block_class(config, config.num_experts_in(index), layer_index=index)
                self.replace_feed_forward(layers, index, block)
        # CODEPATH: with localized filtering Yuan 2.0-M32, without all others
        if config.use_localized_filtering:
            for layer in layers:
                filter_queries_and_keys(layer.self_attn, config)
        # A family may have put layers of a class of its own there.
        self._no_split_modules.update(type(layer).__name__ for layer in layers)
        # CODEPATH: Switch and hash routing need to know their tokens, Mixtral and Qwen-MoE do not
        if config.routing_needs or not config.uses_mixtral_balance_loss or config.use_localized_filtering:
            self.register_forward_pre_hook(open_routing, with_kwargs=True)
            for layer in layers:
                layer.__class__ = with_routing(type(layer))
        self.post_init()

    def replace_feed_forward(self, layers: nn.ModuleList, index: int, block: MoeSparseBlock) -> None:
        """Let `block` take the place of the dense feed-forward of layer `index`."""
        layers[index].mlp = block


class MoeForCausalLMMixin(FilterStateGenerationMixin):
    """
    The causal language model over a MoE backbone, with the load-balancing loss and the router logits in its outputs.

    `model_class` is the backbone of the family.
    """

    model_class: type

    def __init__(self, config):
        # Not the __init__ of the dense class, which would build a dense backbone only to drop it.
        PreTrainedModel.__init__(self, config)
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # `generate` looks for the name `inputs_embeds` in this signature.
    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, mm_token_type_ids=None, **kwargs):
        if mm_token_type_ids is not None:
            # What an assistant proposes is text, as all that is generated.
            num_proposed = max(input_ids.shape[-1] - mm_token_type_ids.shape[-1], 0)
            kwargs["mm_token_type_ids"] = nn.functional.pad(mm_token_type_ids, (0, num_proposed))
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model=None, **kwargs):
        # An assistant without such routers refuses what concerns them.
        if assistant_model is not None:
            needs: set[str] = getattr(assistant_model.config, "routing_needs", set())
            unread = {name for name, field_of_tokens in ROUTING_INPUTS.items() if field_of_tokens not in needs}
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in unread}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits of the dense class for the output of the backbone."""
        return self.lm_head(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, -100 where the loss ignores a position. They are shifted inside.
            output_router_logits (`bool`, *optional*):
                Whether to return `router_logits`, one `(batch_size * sequence_length, num_experts)` tensor per sparse
                layer, and `aux_loss`, which is then added to the loss times `config.router_aux_loss_coef`. Defaults to
                `config.output_router_logits`. `aux_loss` is what the router's contract names, averaged over the layers; of
                `"softmax_topk"` Mixtral's, whose minimum is `num_experts_per_tok`.
            mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                The modality of every token, 0 for text, for models with `config.num_experts_per_modality`.
            domain_ids (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                The domain of every sequence, for models with `config.num_hash_domains` above 1.

        Raises:
            ValueError: if the load-balancing loss is asked for where it would have no gradient, that is in training with
                reentrant gradient checkpointing; if modalities or domains are given to a model that has no use for them.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        given = {"mm_token_type_ids": mm_token_type_ids, "domain_ids": domain_ids}
        refuse_unread_inputs(self.config, given)
        kwargs |= {name: value for name, value in given.items() if value is not None}
        routing = None
        # CODEPATH: Mixtral's balance loss is computed from the logits alone, DeepSeek-V3's and Shazeer's are not
        if output_router_logits and not self.config.uses_mixtral_balance_loss:
            routing = kwargs["routing"] = RoutingContext(
                wants_balance_losses=self.config.router_class.has_balance_loss
            )
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.compute_logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)

        aux_loss = None
        if output_router_logits:
            if routing is None:
                mask = _padding_mask(attention_mask, outputs.last_hidden_state)
                aux_loss = mixtral_balance_loss(outputs.router_logits, self.config.num_experts_per_tok, mask)
            else:
                aux_loss = _mean(routing.balance_losses, logits)
            if labels is not None:
                has_no_gradient = loss.requires_grad and not aux_loss.requires_grad
                if has_no_gradient and self.config.router_class.has_balance_loss and self._trains_a_router():
                    raise ValueError(
                        "The load-balancing loss has no gradient here, because reentrant gradient checkpointing runs the "
                        "layers without one. Use `gradient_checkpointing_kwargs={'use_reentrant': False}`, or turn the "
                        "loss off with `output_router_logits=False`."
                    )
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
        )

    def _trains_a_router(self) -> bool:
        routers = [module for module in self.modules() if isinstance(module, MoeRouter)]
        return any(parameter.requires_grad for router in routers for parameter in router.parameters())


class MoeClassificationMixin:
    """
    A classification head over a MoE backbone; `model_class` is the backbone of the family.

    As in the native classes of transformers, the load-balancing loss is not part of a classifier's loss.
    """

    model_class: type

    def __init__(self, config):
        # The generic heads of transformers look their backbone up in AutoModel, also where this file is remote code.
        AutoModel.register(type(config), self.model_class, exist_ok=True)
        super().__init__(config)
        _warn_of_ignored_router_logits(self)


class MoeHeadMixin:
    """
    Any other head over a MoE backbone, for dense classes that name their backbone's class.

    `model_class` is the backbone of the family. The load-balancing loss is not part of the loss and the router logits are
    not part of the output: ask the backbone for them, `model.base_model(..., output_router_logits=True).router_logits`.
    """

    model_class: type

    def __init__(self, config):
        # The backbone that the dense class builds is replaced at once; it refuses implementations of experts.
        dense_config = copy.copy(config)
        dense_config._experts_implementation = "eager"
        super().__init__(dense_config)
        self.config = config
        has_no_pooler = getattr(self.base_model, "pooler", ...) is None
        options = {"add_pooling_layer": False} if has_no_pooler else {}
        setattr(self, self.base_model_prefix, self.model_class(config, **options))
        self.post_init()
        _warn_of_ignored_router_logits(self)


def _warn_of_ignored_router_logits(model: PreTrainedModel) -> None:
    if model.config.output_router_logits:
        logger.warning_once(
            f"{type(model).__name__} ignores `output_router_logits`: only the causal language model adds the "
            "load-balancing loss."
        )


def _mean(losses: dict[int, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Over the layers, 0 if there is none."""
    zero = torch.zeros((), dtype=torch.float32, device=like.device)
    return sum((loss.to(like.device) for loss in losses.values()), zero) / max(len(losses), 1)


def _padding_mask(attention_mask, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """The columns of a `(B, past + S)` mask that belong to the S positions at hand, None for masks of other shapes."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -hidden_states.shape[1] :]
