# SPDX-License-Identifier: Apache-2.0
"""`LoadBalancer`: adds the gradient of a balance loss at the routers, whatever the trainer makes of the model's own loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models import losses
from ..models.routing_context import Tokens
from .balance_losses import balance_loss, refuse_to_balance, sparsity_loss
from .dropped_slots import DroppedSlots
from .gradient_injection import add_gradient, loss_scale_of
from .random_state import RandomState
from .rank_sum import RankSum, is_first_process
from .router_hooks import RouterCall, RouterHooks
from .routers import parameters_around


logger = logging.get_logger(__name__)

# The coefficients of the papers.
DEFAULT_COEF = {
    "switch": 1e-2,
    "global_batch": 1e-2,
    "sequence": 1e-4,
    "device": 0.05,
    "importance_load": 1e-2,
    "z": 1e-3,
    "entropy": 1e-4,
    "sparsity": 1e-8,
    "squared_deviation": 1e-2,
    "heterogeneous": 1e-2,
}
OWN_COEFS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight", "aux_loss_alpha", "router_z_loss_coef")
ADAPTIVE_RATE, ADAPTIVE_DECAY = 0.2, 0.99  # Skywork-MoE's xi and beta
SPARSITY_FACTOR = 1.2  # ReMoE's


@dataclass
class LoadBalancer:
    """
    A balance loss for the routers of any MoE, outside of the model's own loss.

    The gradient is added in the backward pass at the router's output, so that it does not matter how the trainer computes or
    scales its loss. In an optimizer step it is the mean of the gradients of all micro-batches and data-parallel ranks, each
    computed from its own tokens without padding. In evaluation nothing is added, and nothing where a router is frozen.

    Args:
        kind (`str`, *optional*, defaults to `"switch"`):
            | kind | loss of a layer | balanced | paper |
            |---|---|---|---|
            | `"switch"` | share of the slots times mean score of every expert | 1 | [Switch](https://huggingface.co/papers/2101.03961) |
            | `"global_batch"` | the same, with the shares of the whole optimizer step, over all ranks; for micro-batches other than the one at hand as they were in the step before | 1 | [Qwen](https://huggingface.co/papers/2501.11873) |
            | `"sequence"` | the same within every sequence | 1 | [DeepSeek-V3](https://huggingface.co/papers/2412.19437) |
            | `"device"` | the same for groups of consecutive experts | 1 | [DeepSeekMoE](https://huggingface.co/papers/2401.06066) |
            | `"squared_deviation"` | squared distance of every expert's mean score from an even one | 0 | [Skywork-MoE](https://huggingface.co/papers/2406.06563) |
            | `"heterogeneous"` | Switch's, with zero-computation experts counted `zero_expert_tau` times | | [MoE++](https://huggingface.co/papers/2410.07348) |
            | `"importance_load"` | variation of the routing weights and of a smooth load | 0 | [Shazeer](https://huggingface.co/papers/1701.06538) |
            | `"z"` | mean square of the logits' logsumexp | | [ST-MoE](https://huggingface.co/papers/2202.08906) |
            | `"entropy"` | entropy of a token's scores, for routers with a variable number of experts | 0 | [dynamic routing](https://huggingface.co/papers/2403.07652) |
            | `"sparsity"` | sum of the weights of a ReLU router, with a coefficient that holds the number of experts | | [ReMoE](https://huggingface.co/papers/2412.14711) |
        coef (`float`, *optional*): Coefficient of the loss, of every layer. The default is the paper's, in `DEFAULT_COEF`.
        grad_to (`str`, *optional*, defaults to `"all"`): `"all"`: the loss also reaches what is before the router, as in the papers.
            `"router"`: only the router's own parameters, at the price of running it a second time, with the same random numbers.
        warmup_steps (`int`, *optional*, defaults to 0): Optimizer steps in which the coefficient rises from 0.
        decay_steps (`int`, *optional*): Optimizer steps after these in which it falls to 0; it stays if None.
        adaptive (`bool`, *optional*, defaults to `False`): Skywork-MoE's coefficient of each layer
            (https://huggingface.co/papers/2406.06563): it follows the share of tokens that found no room, or in a layer without a
            capacity the share beyond an even load, and `coef` is its bound and start.
        num_devices (`int`, *optional*): For `"device"`, into how many groups the experts are divided.
        noise_std (`float`, *optional*): For `"importance_load"`, the noise of the smooth load; `1 / num_experts` if None. A router
            that adds noise knows its own.
        score (`str`, *optional*): What the router makes of its logits, one of `"softmax"`, `"sigmoid"`, `"sqrtsoftplus"`, `"relu"`,
            `"identity"`. By default it is found out from the routing weights.

    Raises:
        ValueError: if a value is not allowed.

    Example:

    ```python
    >>> balancer = LoadBalancer("global_batch").attach(model, accelerator)
    >>> for batch in dataloader:
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(model(**batch).loss)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     if accelerator.sync_gradients:
    ...         balancer.step()
    >>> balancer.detach()
    ```
    """

    kind: str = "switch"
    coef: float | None = None
    grad_to: str = "all"
    warmup_steps: int = 0
    decay_steps: int | None = None
    adaptive: bool = False
    num_devices: int | None = None
    noise_std: float | None = None
    score: str | None = None

    def __post_init__(self):
        for name, allowed in (
            ("kind", DEFAULT_COEF),
            ("grad_to", ("all", "router")),
            ("score", (None, *losses.SCORES)),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(repr(value) for value in allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose from {choices}.")
        self.base_coef = DEFAULT_COEF[self.kind] if self.coef is None else self.coef
        for name in ("coef", "warmup_steps", "decay_steps", "num_devices", "noise_std"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r}. Give a number.")
        for name, is_right, choice in (
            ("coef", 0 <= self.base_coef < math.inf, "0 or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("decay_steps", self.decay_steps is None or self.decay_steps > 0, "a number above 0, or None"),
            ("num_devices", self.num_devices is None or self.num_devices > 0, "a number above 0"),
            ("noise_std", self.noise_std is None or self.noise_std > 0, "a number above 0, or None"),
        ):
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose {choice}.")
        if (self.kind == "device") != (self.num_devices is not None):
            raise ValueError(
                f"num_devices is {self.num_devices!r} with kind={self.kind!r}. 'device', and it alone, needs it: into how many groups the "
                "experts are divided, such as num_devices=4."
            )
        if self.adaptive and self.kind in ("z", "entropy", "sparsity"):
            raise ValueError(f"adaptive is for losses that balance the load, and kind is {self.kind!r}.")
        self._hooks: RouterHooks | None = None
        self.num_steps = 0
        # Per router: its own coefficient; slots of each expert in the last optimizer step, its tokens, its micro-batches.
        self._coefs: dict[str, torch.Tensor] = {}
        self._window: dict[str, torch.Tensor] = {}
        # Since they were last asked for: the sum of the losses, and of how many passes.
        self._values: dict[str, torch.Tensor] = {}

    def attach(
        self,
        model: nn.Module | RouterHooks,
        accelerator: Any = None,
        gradient_accumulation_steps: int = 1,
        loss_scale: Callable[[], float | torch.Tensor] | None = None,
        own_loss: bool | None = None,
    ) -> "LoadBalancer":
        """
        Begin to add gradients.

        Args:
            model (`torch.nn.Module`): The model, or a module around it.
            accelerator ([`~accelerate.Accelerator`], *optional*): What scales the loss and divides it by its
                `gradient_accumulation_steps`.
            gradient_accumulation_steps (`int`, *optional*, defaults to 1): Without an accelerator, what the loss is divided by.
            loss_scale (`Callable`, *optional*): Instead of both, a function that gives the factor of a micro-batch's loss.
            own_loss (`bool`, *optional*): Whether the model's own balance loss is on as well, which is said. By default its
                configuration's `output_router_logits` tells.

        Raises:
            ValueError: if the model has no routers, or such as no loss of this kind can balance.
        """
        self.detach()
        hooks = model if isinstance(model, RouterHooks) else RouterHooks(model)
        if self.base_coef:
            refuse_to_balance(hooks.routers.values(), self.kind)
        self._hooks = hooks
        self._sum_counts, self._sum_values, self._sum_dropped = (RankSum(self._hooks) for _ in range(3))
        if loss_scale is None:
            steps = gradient_accumulation_steps if accelerator is None else accelerator.gradient_accumulation_steps
            loss_scale = loss_scale_of(accelerator, lambda: steps)
        self._loss_scale = loss_scale
        self._parameters = parameters_around(self._hooks.model, self._hooks.routers)
        self._counts: dict[str, torch.Tensor] = {}
        self._dropped: dict[str, torch.Tensor] = {}  # slots that found no room
        self._num_added, self._num_arrived, self._was_checked = 0, 0, False
        is_trained = any(parameter.requires_grad for group in self._parameters.values() for parameter in group)
        if self.base_coef and not is_trained:
            logger.warning(
                f"The routers of {type(self._hooks.model).__name__} are frozen, so that no balance loss {self.kind!r} is added. Train them, "
                "for instance with `train_router=True` in an ExpertLoraConfig or the routers in `modules_to_save`, or leave the loss out."
            )
        if self.base_coef:
            _warn_of_own_loss(self._hooks.model, own_loss, is_trained)
        self._hooks.add(self._add_gradient, sees_recomputation=True)
        self._handles = (
            DroppedSlots(self._hooks.model, self._hooks.routers).watch(self._add_dropped) if self.adaptive else []
        )
        self._random_states: dict[str, RandomState] = {}  # before the last pass of each router
        if self.grad_to == "router":
            self._handles += [
                router.module.register_forward_pre_hook(self._keep_random_state(name), with_kwargs=True)
                for name, router in self._hooks.routers.items()
            ]
        return self

    def detach(self) -> None:
        """Add no gradients any more."""
        if self._hooks is not None:
            self._hooks.remove(self._add_gradient)
            for handle in self._handles:
                handle.remove()
            self._hooks = None

    @torch.no_grad()
    def step(self) -> None:
        """To be called after every optimizer step; with several processes, by each."""
        if self._hooks is None:
            raise ValueError("This LoadBalancer is attached to no model: call `attach(model)` first.")
        if self._num_added and not self._num_arrived and not self._was_checked:
            logger.warning(
                f"The gradient of the balance loss {self.kind!r} was added to no backward pass: what the routers return does not "
                "reach the loss."
            )
        if self._needs_counts:
            self._window = self._sum_counts(self._counts)
            if self.adaptive:
                dropped = self._sum_dropped(self._dropped)
                self._coefs = {
                    name: self._adapted_coef(name, window[:-2], dropped.get(name))
                    for name, window in self._window.items()
                }
            elif self.kind == "sparsity" and self._window:
                self._coefs = self._coefs_for_sparsity()
        self._was_checked = self._was_checked or self._num_added > 0
        self._counts, self._dropped, self._num_added, self._num_arrived = {}, {}, 0, 0
        self.num_steps += 1
        self._hooks.forget()

    def values(self) -> dict[str, torch.Tensor]:
        """The mean loss of each layer since the last call, over all processes, without its coefficient; every process calls."""
        values = {name: both[0] / both[1].clamp(min=1) for name, both in self._sum_values(self._values).items()}
        self._values = {}
        return values

    def pool(self) -> None:
        """Let the first process have what [`~LoadBalancer.values`] is made of, before it takes the state of all."""
        self._values = self._sum_values.on_first(self._values)

    def state_dict(self) -> dict[str, Any]:
        """What a training goes on with, as plain numbers."""
        tensors = {"coefs": self._coefs, "window": self._window, "values": self._values}
        lists = {key: {name: tensor.tolist() for name, tensor in of.items()} for key, of in tensors.items()}
        return {"kind": self.kind, "num_steps": self.num_steps} | lists

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where [`~LoadBalancer.state_dict`] was taken.

        Raises:
            ValueError: if it was taken of another kind of loss.
        """
        if state["kind"] != self.kind:
            raise ValueError(
                f"The state is of a balance loss of kind {state['kind']!r}, and this is one of kind {self.kind!r}. Give the kinds of the "
                "training that goes on, in its order."
            )
        self.num_steps = state["num_steps"]
        self._coefs = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["coefs"].items()}
        self._window = {name: torch.tensor(value) for name, value in state["window"].items()}
        if is_first_process():
            self._values = {name: torch.tensor(value) for name, value in state["values"].items()}

    @property
    def schedule(self) -> float:
        """The factor of the coefficient at this step."""
        if self.num_steps < self.warmup_steps:
            return self.num_steps / self.warmup_steps
        if self.decay_steps is None:
            return 1.0
        return max(0.0, 1 - (self.num_steps - self.warmup_steps) / self.decay_steps)

    def _add_gradient(self, call: RouterCall) -> Any:
        if not call.is_training or not self.base_coef:
            return None
        name = call.name
        if self._needs_counts and not call.is_recomputation:
            one = torch.ones_like(call.counts_E[:1])
            counted = torch.cat([call.counts_E, call.num_tokens.reshape(1), one])
            self._counts[name] = self._counts.get(name, 0) + counted
        is_trained = any(parameter.requires_grad for parameter in self._parameters[name])
        if not is_trained or not torch.is_grad_enabled() or not self.schedule:
            return None
        with torch.autocast(call.logits_TE.device.type, enabled=False):
            loss = self._loss(self._detached(call) if self.grad_to == "router" else call)
        value = torch.stack([loss.detach(), torch.ones_like(loss)])
        self._values[name] = value + self._values.get(name, torch.zeros_like(value)).to(value.device)
        self._num_added += 1

        def factor() -> float | torch.Tensor:
            self._num_arrived += 1
            return self.schedule * self._coefs.get(name, self.base_coef) * self._loss_scale()

        return add_gradient(call, loss, factor)

    def _detached(self, call: RouterCall) -> RouterCall:
        """The same pass once more, of inputs without a gradient."""
        if any(name.endswith("experts") for name, _ in call.router.module.named_modules()):
            raise ValueError(
                f"{call.name} is more than a router: it holds experts, which would run twice. Use grad_to='all'."
            )

        inputs = tuple(_without_gradient(value) for value in call.inputs)
        keyword_inputs = {name: _without_gradient(value) for name, value in call.keyword_inputs.items()}
        with self._random_states.pop(call.name).again():
            output = call.router.module.forward(*inputs, **keyword_inputs)
        return replace(call, inputs=inputs, keyword_inputs=keyword_inputs, output=output)

    def _keep_random_state(self, name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def hook(module: nn.Module, inputs: tuple, keyword_inputs: dict[str, Any]) -> None:
            if module.training:
                self._random_states[name] = RandomState.before(*inputs, *keyword_inputs.values())

        return hook

    def _loss(self, call: RouterCall) -> torch.Tensor:
        score = self.score or cast(RouterHooks, self._hooks).find_score(call)
        if self.kind == "sparsity":
            return sparsity_loss(call, score, self._top_k(call.name))
        return balance_loss(call, self.kind, score, self._counts_of_step(call), self.num_devices, self.noise_std)

    def _counts_of_step(self, call: RouterCall) -> torch.Tensor:
        """Of the tokens at hand; for the global batch with those of the step before for its other micro-batches."""
        if self.kind != "global_batch" or call.name not in self._window:
            return call.counts_E
        window = self._window[call.name].to(call.logits_TE.device)
        return call.counts_E + (1 - 1 / window[-1].clamp(min=1)) * window[:-2]

    @property
    def _needs_counts(self) -> bool:
        return self.adaptive or self.kind in ("global_batch", "sparsity")

    def _add_dropped(self, name: str, change: torch.Tensor, is_training: bool) -> None:
        if is_training and cast(RouterHooks, self._hooks).has_gradient:
            self._dropped[name] = self._dropped.get(name, 0) + change[-1:]

    def _adapted_coef(self, name: str, counts_E: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Skywork-MoE's; without a capacity with the share of slots beyond an even load for that of dropped ones."""
        wide = torch.float32 if counts_E.device.type == "mps" else torch.float64
        coef = self._coefs.get(name, torch.tensor(self.base_coef, dtype=torch.float64)).to(counts_E.device, wide)
        counts_E = counts_E.to(wide)
        if dropped is None:
            rate = (counts_E / counts_E.sum().clamp(min=1) - 1 / len(counts_E)).relu().sum()
        else:
            rate = dropped[0].to(wide) / counts_E.sum().clamp(min=1)
        return ADAPTIVE_DECAY * coef + (1 - ADAPTIVE_DECAY) * (ADAPTIVE_RATE * rate).clamp(max=self.base_coef)

    def _coefs_for_sparsity(self) -> dict[str, torch.Tensor]:
        """ReMoE's, one for all layers: up where experts are chosen more often than they should be, else down."""
        excess = torch.stack(
            [
                window[:-2].sum() / window[-2].clamp(min=1) / self._top_k(name) - 1
                for name, window in self._window.items()
            ]
        ).mean()
        coef = next(iter(self._coefs.values()), torch.tensor(self.base_coef)).to(excess.device)
        coef = coef * SPARSITY_FACTOR ** excess.sign()
        return dict.fromkeys(self._window, coef)

    def _top_k(self, name: str) -> int:
        """The number of experts per token that the configuration asks for."""
        top_k = cast(RouterHooks, self._hooks).routers[name].top_k
        if top_k is None:
            raise ValueError(f"The configuration does not say how many experts {name} should choose.")
        return top_k


def _without_gradient(value: Any) -> Any:
    """An input of a router that leads back to nothing, and in which it leaves no loss for the model."""
    if isinstance(value, Tokens):
        before = value.previous_logits_TE
        return replace(value, previous_logits_TE=None if before is None else before.detach(), wants_balance_loss=False)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _warn_of_own_loss(model: nn.Module, is_on: bool | None, is_trained: bool) -> None:
    """The model's own balance loss would come on top."""
    configs = [module.config.get_text_config() for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners = [owner for config in configs[:1] for owner in (config, getattr(config, "ffn_config", None))]
    coefs = {name: getattr(owner, name, None) for owner in owners for name in OWN_COEFS if getattr(owner, name, None)}
    if is_on is None:
        is_on = any(getattr(owner, "output_router_logits", False) for owner in owners)
    if is_on and coefs:
        given = ", ".join(f"{name}={value}" for name, value in coefs.items())
        what = "comes on top of hf_moe's" if is_trained else "bends what is trained to please routers that are frozen"
        logger.warning(
            f"The model's own balance loss is on as well ({given}) and {what}. Switch it off: "
            "`model.config.output_router_logits = False`, or `router_aux_loss_coef=0.0` in TRL's configuration."
        )
