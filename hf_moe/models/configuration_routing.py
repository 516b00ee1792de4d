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
"""The fields of a configuration that concern routing, and their validation; `MoeConfigMixin` adds the others."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from transformers.utils import logging

from .capacity import CAPACITY_POLICIES
from .router_base import CAPACITY_OPTIONS, MoeRouter
from .routers import ROUTERS


logger = logging.get_logger(__name__)
TYPO_CUTOFF = 0.85  # of difflib; no key of a dense configuration is as close to a field of ours


@dataclass(kw_only=True)
class RoutingConfigMixin:
    r"""
    What the router of a sparse layer, the capacity of its experts and its zero-computation experts are.

    A field that has no effect on the `router_type` is refused where it is not at its default.

    Args:
        router_type (`str`, *optional*, defaults to `"softmax_topk"`):
            Name of the router, see `ROUTERS`.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of the chosen experts are divided by their sum.
        routed_scaling_factor (`float`, *optional*, defaults to 1.0):
            Factor of the routing weights.
        router_dtype (`str`, *optional*):
            `"float32"` to compute logits in float32 where the router would do so in the model's data type, as Grok-1 and DeepSeek do.
        use_expert_bias (`bool`, *optional*, defaults to `False`):
            Whether the router chooses by the score plus a bias of each expert, `e_score_correction_bias`, which is no part of the
            routing weights. It is a buffer that training leaves alone; `BiasBalancingCallback` moves it.
        n_group (`int`, *optional*, defaults to 1):
            Number of groups of consecutive experts.
        topk_group (`int`, *optional*, defaults to 1):
            Number of groups whose experts a token may get.
        router_jitter_noise (`float`, *optional*, defaults to 0.0):
            In training, the input of the sparse block is multiplied by uniform noise from `1 - router_jitter_noise` to
            `1 + router_jitter_noise`, as Mixtral does; with `"switch"` that of the router alone.
        router_logit_scale (`float`, *optional*, defaults to 1.0):
            Standard deviation of the logits of `"normalized_logits"`.
        router_top_p (`float`, *optional*, defaults to 0.4):
            What the scores of the experts that `"top_p"` chooses exceed together.
        second_expert_policy (`str`, *optional*, defaults to `"all"`):
            Which second experts `"gshard"` takes in training: `"all"`, `"sampling"` or `"random"`.
        normalize_router_prob_before_dropping (`bool`, *optional*, defaults to `False`):
            Whether `"gshard"` divides the weights by their sum before tokens are dropped.
        num_hash_domains (`int`, *optional*, defaults to 1):
            Number of domains of `"hash"`, each with experts of its own. The model is then called with `domain_ids`.
        num_experts_per_modality (`list[int]`, *optional*):
            How many of the experts are for text, for the next modality and so on. The model is then called with
            `mm_token_type_ids`, 0 for text; what is beyond the last modality belongs to it.
        allow_causal_expert_choice (`bool`, *optional*, defaults to `False`):
            Whether `"expert_choice"` may be used in a causal model, where it sees later tokens.
        router_residual (`bool`, *optional*, defaults to `False`):
            Whether the logits of the sparse layer before are added, through a learned matrix, as in MoE++.
        num_constant_experts (`int`, *optional*, defaults to 0), num_copy_experts (`int`, *optional*, defaults to 0), num_zero_experts (`int`, *optional*, defaults to 0):
            Numbers of zero-computation experts, which the router can choose beside the `num_experts` feed-forwards.
        zero_expert_tau (`float`, *optional*, defaults to 0.75):
            How much load a feed-forward should have relative to a zero-computation expert, for the balance loss, the capacity and
            `BiasBalancingCallback`.
        capacity_policy (`str`, *optional*):
            Which tokens an expert leaves out if too many choose it: one of `CAPACITY_POLICIES`. By default what the router's paper
            has: `"position"` for `"gshard"` and `"switch"`, `"none"` for the others.
        capacity_factor (`float`, *optional*, defaults to 1.25):
            In training an expert takes at most `capacity_factor * num_experts_per_tok * tokens / num_experts` tokens.
        eval_capacity_factor (`float`, *optional*):
            The same in evaluation. By default no token is dropped there, so that generation with a cache gives what a full pass gives.
        min_capacity (`int`, *optional*, defaults to 4):
            The smallest number of tokens that an expert takes.
        capacity_group (`str` or `int`, *optional*, defaults to `"batch"`):
            Whose tokens are counted together: those of the `"batch"`, of a `"sequence"`, or this number of consecutive ones.
        expert_dropout (`float`, *optional*, defaults to 0.0):
            Dropout inside the routed experts, between their two layers, as Switch has in fine-tuning.
        moe_initializer_scale (`float`, *optional*):
            Instead of `initializer_range`: routers and experts start truncated normal with variance
            `moe_initializer_scale / fan_in`, as Switch does with 0.1.
    """

    router_type: str = "softmax_topk"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    router_dtype: str | None = None
    use_expert_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    router_jitter_noise: float | int = 0.0
    router_logit_scale: float | int = 1.0
    router_top_p: float | int = 0.4
    second_expert_policy: str = "all"
    normalize_router_prob_before_dropping: bool = False
    num_hash_domains: int = 1
    num_experts_per_modality: list[int] | None = None
    allow_causal_expert_choice: bool = False
    router_residual: bool = False
    num_constant_experts: int = 0
    num_copy_experts: int = 0
    num_zero_experts: int = 0
    zero_expert_tau: float | int = 0.75
    capacity_policy: str | None = None
    capacity_factor: float | int = 1.25
    eval_capacity_factor: float | int | None = None
    min_capacity: int = 4
    capacity_group: str | int = "batch"
    expert_dropout: float | int = 0.0
    moe_initializer_scale: float | int | None = None

    @property
    def router_class(self) -> type[MoeRouter]:
        """The class of the router."""
        return ROUTERS[self.router_type]

    @property
    def num_zero_computation_experts(self) -> int:
        """How many experts the router chooses from besides the feed-forwards."""
        return self.num_constant_experts + self.num_copy_experts + self.num_zero_experts

    @property
    def effective_capacity_policy(self) -> str:
        """`capacity_policy`, or what the router has if that is None."""
        return self.router_class.capacity_policy if self.capacity_policy is None else self.capacity_policy

    @property
    def has_capacity(self) -> bool:
        """Whether experts may leave out tokens."""
        return self.effective_capacity_policy != "none"

    @property
    def uses_mixtral_balance_loss(self) -> bool:
        """Whether `aux_loss` is Mixtral's."""
        return self.router_class.has_mixtral_loss and not self.num_zero_computation_experts

    @property
    def routing_needs(self) -> set[str]:
        """What the blocks must know of their tokens, fields of [`Tokens`]."""
        needs = set(self.router_class.requires)
        needs |= {"mask_T"} if self.has_capacity else set()
        needs |= {"modality_T"} if self.num_experts_per_modality is not None else set()
        return needs | ({"previous_logits_TE"} if self.router_residual else set())

    def validate_routing(self):
        """Part of `@strict`-powered validation."""
        choices = {
            "router_type": sorted(ROUTERS),
            "capacity_policy": [None, *CAPACITY_POLICIES],
            "router_dtype": [None, "float32"],
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"`{field}` must be one of {allowed}, got {getattr(self, field)!r}.")
        self._validate_options()
        self._validate_numbers()
        self._validate_groups()
        self._validate_top_k()
        self.router_class.validate(self)

    def _validate_options(self):
        options = {name for router in ROUTERS.values() for name in router.options}
        defaults = {field.name: field.default for field in fields(self) if field.name in options}
        for name in sorted(options - set(self.router_class.options)):
            if getattr(self, name) != defaults[name] and not (name == "capacity_policy" and not self.has_capacity):
                readers = sorted(router_type for router_type, router in ROUTERS.items() if name in router.options)
                raise ValueError(
                    f"`{name}`={getattr(self, name)!r} has no effect on router_type={self.router_type!r}, only on {readers}. "
                    f"Leave it at {defaults[name]!r}."
                )
        if not self.num_zero_computation_experts and self.zero_expert_tau != defaults["zero_expert_tau"]:
            raise ValueError(
                f"`zero_expert_tau`={self.zero_expert_tau} has no effect without zero-computation experts: set `num_copy_experts`, "
                "`num_constant_experts` or `num_zero_experts`."
            )
        if not self.has_capacity:
            for name in set(CAPACITY_OPTIONS) - {"capacity_policy"}:
                is_read = name == "capacity_group" and "allow_causal_expert_choice" in self.router_class.options
                if name in self.router_class.options and getattr(self, name) != defaults[name] and not is_read:
                    others = [policy for policy in CAPACITY_POLICIES if policy != "none"]
                    raise ValueError(
                        f"`{name}`={getattr(self, name)!r} has no effect with `capacity_policy='none'`. Leave it at {defaults[name]!r}, or "
                        f"choose a policy of {others}."
                    )

    def _validate_numbers(self):
        for name, is_right, allowed in (
            ("routed_scaling_factor", self.routed_scaling_factor > 0, "positive"),
            ("router_logit_scale", self.router_logit_scale > 0, "positive"),
            ("router_jitter_noise", 0 <= self.router_jitter_noise < 1, "at least 0 and less than 1"),
            ("router_top_p", 0 <= self.router_top_p <= 1, "between 0 and 1"),
            ("num_hash_domains", self.num_hash_domains >= 1, "at least 1"),
            ("num_constant_experts", self.num_constant_experts >= 0, "at least 0"),
            ("num_copy_experts", self.num_copy_experts >= 0, "at least 0"),
            ("num_zero_experts", self.num_zero_experts >= 0, "at least 0"),
            ("zero_expert_tau", 0 < self.zero_expert_tau < math.inf, "positive and finite"),
            ("capacity_factor", 0 < self.capacity_factor < math.inf, "positive and finite"),
            (
                "eval_capacity_factor",
                self.eval_capacity_factor is None or 0 < self.eval_capacity_factor < math.inf,
                "positive and finite",
            ),
            ("min_capacity", self.min_capacity >= 0, "at least 0"),
            ("expert_dropout", 0 <= self.expert_dropout < 1, "at least 0 and less than 1"),
            (
                "moe_initializer_scale",
                self.moe_initializer_scale is None or self.moe_initializer_scale > 0,
                "positive",
            ),
        ):
            if not is_right:
                raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)}.")
        group = self.capacity_group
        if group not in ("batch", "sequence") and (not isinstance(group, int) or group < 1):
            raise ValueError(f"`capacity_group` must be 'batch', 'sequence' or a number of tokens, got {group!r}.")

    def _validate_top_k(self):
        allowed = self.router_class.fixed_top_k
        if self.router_class.chooses_all:
            allowed = self.num_experts + self.num_zero_computation_experts
        if allowed is not None and self.num_experts_per_tok != allowed:
            raise ValueError(
                f"router_type={self.router_type!r} chooses {allowed} of the experts for every token: set `num_experts_per_tok={allowed}`, "
                f"got {self.num_experts_per_tok}."
            )

    def _validate_groups(self):
        if self.n_group < 1:
            raise ValueError(f"`n_group` must be at least 1, which means no groups, got {self.n_group}.")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"`topk_group` ({self.topk_group}) must lie between 1 and `n_group` ({self.n_group}), the number of groups."
            )
        for count in self.counts_of_experts:
            total = count + self.num_zero_computation_experts
            if total % self.n_group:
                raise ValueError(f"`n_group` ({self.n_group}) must divide the number of experts ({total}).")
            in_groups = self.topk_group * (total // self.n_group)
            if "topk_group" in self.router_class.options and self.num_experts_per_tok > in_groups:
                raise ValueError(
                    f"`topk_group` ({self.topk_group}) groups have {in_groups} experts, fewer than `num_experts_per_tok` "
                    f"({self.num_experts_per_tok})."
                )
        parts = self.num_experts_per_modality
        if parts is not None:
            counts = set(self.counts_of_experts)
            if self.num_zero_computation_experts or counts != {sum(parts)}:
                raise ValueError(
                    f"`num_experts_per_modality` {parts} must sum to the number of experts of every layer ({sorted(counts)}), of which none "
                    "is a zero-computation expert."
                )
            if min(parts) < self.num_experts_per_tok and not self.router_class.has_variable_top_k:
                raise ValueError(
                    f"`num_experts_per_modality` {parts} must leave every modality `num_experts_per_tok` ({self.num_experts_per_tok}) experts."
                )
            if self.n_group > 1:
                raise ValueError(
                    "`num_experts_per_modality` and `n_group` cannot go together: the best groups of a token could hold experts of another "
                    "modality. Leave one of them out."
                )
            if self.router_residual:
                raise ValueError(
                    "`num_experts_per_modality` and `router_residual` cannot go together: a layer would see the logits of experts that the "
                    "layer before did not have for the token. Leave one of them out."
                )
            if self.capacity_policy == "recycle":
                raise ValueError(
                    "`capacity_policy='recycle'` sends tokens to any expert with room, and `num_experts_per_modality` allows a token only some. "
                    "Choose another policy."
                )
        if self.capacity_policy == "recycle":
            self._validate_recycle()
        if self.router_residual and len(set(self.counts_of_experts)) > 1:
            raise ValueError("`router_residual` needs the same number of experts in all layers.")
        if self.routing_needs and getattr(self, "chunk_size_feed_forward", 0):
            raise ValueError(
                f"router_type={self.router_type!r} sees tokens together, so that `chunk_size_feed_forward` must be 0, got "
                f"{self.chunk_size_feed_forward}."
            )

    def _validate_recycle(self):
        if self.n_group > 1 or self.router_class.divides_by_top_k:
            raise ValueError(
                f"`capacity_policy='recycle'` sends tokens to any expert with room, and router_type={self.router_type!r} chooses them in "
                "groups. Choose another policy."
            )
        reads_norm = "norm_topk_prob" in self.router_class.options
        if self.num_experts_per_tok == 1 and reads_norm and self.norm_topk_prob:
            raise ValueError(
                "`capacity_policy='recycle'` with one expert per token needs `norm_topk_prob=False`: divided by its sum the single weight is "
                "always 1, and the router would get no gradient."
            )


def warn_of_typos(given: Iterable[str], known: list[str]) -> None:
    """Warn of names that transformers would keep without a word although they look like misspelt fields."""
    for name in given:
        if close := difflib.get_close_matches(name, known, n=1, cutoff=TYPO_CUTOFF):
            logger.warning_once(
                f"`{name}` is no field of this configuration and has no effect. Did you mean `{close[0]}`?"
            )
