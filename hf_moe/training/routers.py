# SPDX-License-Identifier: Apache-2.0
"""`find_routers`: the routers of any MoE in transformers, and how to read what they return."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..models.losses import SCORES
from ..models.routers import MoeRouter


TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_top_k", "moe_topk")

SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")

# Modules that transformers declares as routers and that hold several.
ROUTERS_INSIDE = {"Ernie4_5_VLMoeMoeBlock": ("text_moe.gate", "vision_moe.gate")}
TOP_1_ROUTERS = ("SwitchTransformersTop1Router",)  # whose configuration does not say so
UNREADABLE = {
    "DogeCDMoE": "it chooses among pairs of keys, and returns what it makes of each key",
    "NllbMoeTop2Router": "it returns the first expert of each token and not the second",
}


class Router(NamedTuple):
    """A router module, the place of the logits in its output, and the number of experts it chooses, if that is known."""

    module: nn.Module
    logits_index: int
    top_k: int | None

    @property
    def num_zero_computation_experts(self) -> int:
        """How many of the experts, the last ones, compute nothing."""
        if isinstance(self.module, MoeRouter):
            return self.module.num_zero_computation_experts
        is_longcat = type(self.module).__name__ == "LongcatFlashTopkRouter"
        return int(self.module.n_routed_experts) - int(self.module.num_experts) if is_longcat else 0

    def split_into_parts(self, values_E: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of values of the experts those of each part of experts that compete with each other."""
        sizes = self.module.sizes_of_parts if isinstance(self.module, MoeRouter) else [len(values_E)]
        return values_E.split(sizes)

    def even_counts(self, counts_E: torch.Tensor) -> torch.Tensor:
        """`(E,)`: the slots of each part, dealt out as they should be: evenly, to a feed-forward of hf_moe `zero_expert_tau` times
        what a zero-computation expert gets."""
        shares_E = torch.ones_like(counts_E)
        if isinstance(self.module, MoeRouter) and self.num_zero_computation_experts:
            shares_E[: -self.num_zero_computation_experts] = self.module.zero_expert_tau
        parts = zip(self.split_into_parts(counts_E), self.split_into_parts(shares_E), strict=True)
        return torch.cat([counts.sum() * shares / shares.sum() for counts, shares in parts])

    def logits(self, output: Any) -> torch.Tensor:
        """`(T, E)` logits of an output."""
        logits = output[self.logits_index] if isinstance(output, tuple) else output
        return logits.reshape(-1, logits.shape[-1])

    def top_k_index(self, output: Any) -> torch.Tensor:
        """
        `(T, K)` chosen experts: the router's own choice if its output shows it, else the K largest logits.

        Raises:
            ValueError: if neither can be known.
        """
        if isinstance(self.module, MoeRouter):
            return output[2]
        logits_TE = self.logits(output)
        num_tokens, num_experts = logits_TE.shape
        for tensor in output if isinstance(output, tuple) else ():
            if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dim() < 2:
                continue
            # The width tells a choice from a mask over the experts, the number of rows from a permutation of tokens.
            width = tensor.shape[-1]
            if tensor.numel() != num_tokens * width:
                continue
            if width < num_experts if self.top_k is None else width == self.top_k:
                return self._with_skips(tensor.reshape(num_tokens, width), output)
            if width == num_experts and self.top_k is not None:
                chosen_TK, index_TK = tensor.reshape(num_tokens, width).topk(self.top_k, dim=-1)
                return index_TK.masked_fill(chosen_TK == 0, num_experts)
        has_bias = any(name.rpartition(".")[2] in SELECTION_BIASES for name in self.module.state_dict())
        if self.top_k is None or has_bias:
            raise ValueError(
                f"{type(self.module).__name__} does not say which experts it chose, and "
                + (
                    "chooses with a bias"
                    if has_bias
                    else f"the configuration not how many (none of {', '.join(TOP_K_FIELDS)})"
                )
                + ", so its routing cannot be recorded."
            )
        return logits_TE.topk(self.top_k, dim=-1).indices

    def _with_skips(self, index_TK: torch.Tensor, output: Any) -> torch.Tensor:
        weights_TK = self._weights_of(index_TK, output)
        if not self._has_skip or weights_TK is None:
            return index_TK
        return index_TK.masked_fill((weights_TK == 0) & (index_TK == 0), self.logits(output).shape[-1] - 1)

    @property
    def _has_skip(self) -> bool:
        """Whether the last logit is for no expert; where that wins the router returns the first, with a weight of 0."""
        return type(self.module).__name__ == "ZayaRouter"

    def top_k_weights(self, output: Any) -> torch.Tensor | None:
        """`(T, K)` routing weights, if the output shows them, for the chosen experts or for all."""
        return self._weights_of(self.top_k_index(output), output)

    def _weights_of(self, index_TK: torch.Tensor, output: Any) -> torch.Tensor | None:
        logits_TE = self.logits(output)
        for place, tensor in enumerate(output if isinstance(output, tuple) else ()):
            if place == self.logits_index or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if tensor.shape[-1:] == index_TK.shape[-1:] and tensor.numel() == index_TK.numel():
                return tensor.reshape(index_TK.shape)
            if tensor.shape[-1:] == logits_TE.shape[-1:] and tensor.numel() == logits_TE.numel():
                return tensor.reshape(logits_TE.shape).gather(-1, index_TK)
        return None

    @torch.no_grad()
    def find_score(self, output: Any, hint: str = "softmax") -> tuple[str, bool]:
        """
        Which of `SCORES` the routing weights were made with, found out by comparing them with each.

        Args:
            output (`Any`): What the router returned.
            hint (`str`, *optional*, defaults to `"softmax"`): What it is if all fit alike, as with logits of zero.

        Returns:
            `tuple[str, bool]`: The score, and False if other logits of this router can tell more.

        Raises:
            ValueError: if it is none of them.
        """
        if isinstance(self.module, MoeRouter):
            return self.module.score, True
        weights_TK = self.top_k_weights(output)
        if weights_TK is None:
            raise ValueError(
                f"{type(self.module).__name__} does not return its routing weights. Say with `score` what it makes of its logits: one of "
                f"{', '.join(SCORES)}."
            )
        logits_TE, index_TK = self.logits(output), self.top_k_index(output)
        if not logits_TE.isfinite().all():
            raise ValueError(f"The logits of {type(self.module).__name__} are NaN or infinite.")
        if torch.allclose(logits_TE.float().sum(-1), torch.ones(()).to(logits_TE.device)) and (logits_TE >= 0).all():
            return "identity", True  # probabilities already, as Gemma 4's
        is_certain = bool((logits_TE.float().std(-1) > 1e-3).any())  # a router of zeros gives the same to all
        if index_TK.shape[-1] == 1 and torch.allclose(weights_TK, weights_TK[:1]):
            return hint, is_certain  # a single weight, normalised, is 1 whatever it was made of
        # Weights may be normalised and scaled: their proportions count, of a token's K, or of all tokens if K is 1.
        dim = -1 if index_TK.shape[-1] > 1 else 0
        is_expert_TK = index_TK < logits_TE.shape[-1] - self._has_skip
        index_TK = index_TK.clamp(max=logits_TE.shape[-1] - 1)

        def proportions(values_TK: torch.Tensor) -> torch.Tensor:
            values_TK = values_TK.float() * is_expert_TK
            total = values_TK.sum(dim, keepdim=True) if dim else values_TK.mean(dim, keepdim=True)
            return values_TK / total.clamp(min=1e-20)

        measured_TK = proportions(weights_TK)
        errors = {
            score: float(
                (proportions(SCORES[score](logits_TE.float()).gather(-1, index_TK)) - measured_TK).abs().max()
            )
            for score in SCORES
        }
        best = min(errors, key=lambda score: errors[score])
        if not errors[best] < 0.05:
            raise ValueError(
                f"The routing weights of {type(self.module).__name__} are in proportion to none of {', '.join(SCORES)} of its "
                "logits. Say with `score` what a balance loss should make of the logits."
            )
        return hint if errors[hint] <= 2 * errors[best] + 1e-6 else best, is_certain


def find_routers(model: nn.Module) -> dict[str, Router]:
    """
    The routers of a model by name.

    Raises:
        ValueError: if there is none, or if it cannot be seen what one of them chooses.
    """
    routers = _declared_routers(model)
    for name, router in routers.items():
        if (why := UNREADABLE.get(type(router.module).__name__)) is not None:
            raise ValueError(
                f"The routing of {type(model).__name__} cannot be seen: {name} is a {type(router.module).__name__}, and {why}."
            )
    # A module that holds a router, and is declared as one too, is not the router.
    routers = {
        name: router for name, router in routers.items() if not any(of.startswith(f"{name}.") for of in routers)
    }
    if not routers:
        raise ValueError(
            f"{type(model).__name__} declares no router: neither it nor a model inside it records `router_logits`. Is it a "
            "mixture of experts of transformers or hf_moe?"
        )
    return routers


def has_routers(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts whose routing can be seen."""
    return bool(_declared_routers(model))


def _declared_routers(model: nn.Module) -> dict[str, Router]:
    routers: dict[str, Router] = {}
    for prefix, owner in model.named_modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        for spec in router_specs(owner):
            for name, module in owner.named_modules(prefix=prefix):
                matches_name = spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f".{name}."
                if spec.target_class is None or not isinstance(module, spec.target_class) or not matches_name:
                    continue
                inside = ROUTERS_INSIDE.get(type(module).__name__, ())
                routers |= {
                    f"{name}.{path}": Router(module.get_submodule(path), 0, _find_top_k(owner)) for path in inside
                }
                if not inside:
                    is_top_1 = type(module).__name__ in TOP_1_ROUTERS
                    routers[name] = Router(module, spec.index, 1 if is_top_1 else _find_top_k(owner))
    return routers


def find_selection_bias(model: nn.Module, router: str) -> torch.Tensor | None:
    """The bias with which a router chooses and does not weigh, a buffer or parameter of its own or of its block."""
    block = router.replace(".base_layer", "").rpartition(".")[0]
    for owner in (model.get_submodule(router), model.get_submodule(block)):
        for name, tensor in (*owner.named_buffers(), *owner.named_parameters()):
            if name.rpartition(".")[2] in SELECTION_BIASES:
                return tensor
    return None


def router_specs(model: PreTrainedModel) -> list[OutputRecorder]:
    """The declarations with which transformers records the router logits of a model."""
    specs = (model._can_record_outputs or {}).get("router_logits", [])
    specs = specs if isinstance(specs, list) else [specs]
    return [spec if isinstance(spec, OutputRecorder) else OutputRecorder(spec, index=1) for spec in specs]


def parameters_around(model: nn.Module, routers: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each router, its own and those of adapters around it."""
    parameters = [(f"{without_wrappers(name)}.", parameter) for name, parameter in model.named_parameters()]
    return {
        router: [parameter for name, parameter in parameters if name.startswith(f"{without_wrappers(router)}.")]
        for router in routers
    }


def without_wrappers(name: str) -> str:
    """The name without the modules that PEFT puts around one."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def plain_name(name: str) -> str:
    """The name that a module or parameter has in a model without PEFT."""
    return without_wrappers(name.removeprefix("base_model.model."))


def _find_top_k(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    for owner in (config, getattr(config, "ffn_config", None)):
        for field in TOP_K_FIELDS:
            if isinstance(top_k := getattr(owner, field, None), int):
                return top_k
    return None
