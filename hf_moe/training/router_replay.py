# SPDX-License-Identifier: Apache-2.0
"""`RouterReplay`: the experts that one forward pass chose, chosen again in another."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..models.routers import ROUTERS, MoeRouter
from .moe_callback import Attachment, MoeCallback
from .random_state import RandomState
from .router_hooks import ModelCalls
from .routers import Router, find_routers


SELECTIONS = {torch.topk, torch.Tensor.topk, torch.sort, torch.Tensor.sort}
LARGEST = {torch.argmax, torch.Tensor.argmax, torch.max, torch.Tensor.max}


class RouterReplay:
    """
    Records which experts the routers choose, and lets them choose the same again.

    What is replayed is the choice alone: routing weights are computed from the logits at hand, and have their gradient. Two
    uses: between a rollout and the training on it, which would otherwise choose other experts for some tokens
    (https://huggingface.co/papers/2510.11370), and in the second pass of gradient checkpointing, where the smallest
    difference can change a choice that was nearly a tie, and with it the shapes of tensors.

    Works for routers that choose with `topk`, `sort`, `argmax` or `max` and return the choice, also limited to groups or with a
    bias. Of hf_moe's routers others are refused at once, of transformers' in their first pass. What a capacity drops of the
    choice is not replayed: it follows from the choice, but for `capacity_policy="random"` and `"recycle"`.

    Args:
        model (`torch.nn.Module`): The model, or a module around it.

    Raises:
        ValueError: if the model declares no router, or one of hf_moe's that cannot be replayed.

    Example:

    ```python
    >>> replay = RouterReplay(model)
    >>> with replay.record() as choices, torch.no_grad():
    ...     model(**batch)
    >>> with replay.replay(choices):
    ...     model(**batch).loss.backward()
    ```
    """

    def __init__(self, model: nn.Module):
        self.routers = find_routers(model)
        for name, router in self.routers.items():
            if isinstance(router.module, MoeRouter) and router.module.unreplayable_because is not None:
                others = [
                    repr(router_type) for router_type, kind in ROUTERS.items() if kind.unreplayable_because is None
                ]
                raise ValueError(
                    f"{name} ({type(router.module).__name__}) cannot be replayed: {router.module.unreplayable_because}. Choose a "
                    f"`router_type` of {', '.join(others)}."
                )
        self._calls = ModelCalls(model)
        self._num_selections: dict[str, int] = {}
        self._num_experts: dict[str, int] = {}
        self._first_passes: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._checked: set[str] = set()

    @contextmanager
    def record(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Record one forward pass.

        Yields:
            `dict[str, torch.Tensor]`: after the pass, by the name of the router `(T, K)` chosen experts.
        """
        choices: dict[str, torch.Tensor] = {}

        def before(name: str, router: Router, args: tuple, kwargs: dict) -> "_Selections":
            return _Selections()

        def after(name: str, selections: "_Selections", output: Any) -> None:
            if name in choices:
                raise ValueError(f"{name} ran a second time in `record`, which is for one forward pass of the model.")
            choices[name] = selections.last(name)
            self._num_selections[name] = len(selections.found)
            self._num_experts[name] = self.routers[name].logits(output).shape[-1]
            self._check(name, choices[name], output)

        with self._around_routers(before, after):
            yield choices

    @contextmanager
    def replay(self, choices: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """
        Let the routers choose what is given, in every forward pass inside.

        Args:
            choices (`Mapping[str, torch.Tensor]`): By the name of the router the experts of each token, `(T, K)` or `(B, S, K)`, with
                -1 where the router is free. Routers that are not named are free.

        Raises:
            ValueError: if there is no such router, or the tokens are not as many as given.
        """
        if unknown := [name for name in choices if name not in self.routers]:
            raise ValueError(f"There is no router {unknown[0]!r}. The model has {', '.join(self.routers)}.")
        if not choices:
            raise ValueError(
                "No choices are given to be replayed. In `record` there has to be a forward pass of the model."
            )
        for name, index in choices.items():
            if index.is_floating_point() or index.dim() < 2:
                raise ValueError(
                    f"The choices given for {name} are {tuple(index.shape)} of {index.dtype}. Give numbers of experts as integers, (tokens, K)."
                )
        given = {name: index.flatten(0, -2) for name, index in choices.items()}
        in_range: set[str] = set()  # looked at once, not in every pass

        def before(name: str, router: Router, args: tuple, kwargs: dict) -> "_Selections":
            if name not in given:
                return _Selections()
            if name not in self._num_selections:
                random_state = RandomState.before(*args, *kwargs.values())
                with torch.no_grad(), random_state.again(), _Selections() as live:
                    output = router.module.forward(*args, **kwargs)
                self._num_selections[name] = len(live.found)
                self._num_experts[name] = router.logits(output).shape[-1]
            if name not in in_range and given[name].max() >= self._num_experts[name]:
                num_experts = self._num_experts[name]
                raise ValueError(
                    f"The choices given for {name} go up to {int(given[name].max())}, and it has {num_experts} experts, 0 to "
                    f"{num_experts - 1}."
                )
            in_range.add(name)
            return _Selections(given[name], self._num_selections[name], name)

        def after(name: str, selections: "_Selections", output: Any) -> None:
            if name in given:
                self._check(name, selections.last(name), output)

        with self._around_routers(before, after):
            yield

    @contextmanager
    def in_recomputation(self) -> Iterator["RouterReplay"]:
        """
        Let the second pass of gradient checkpointing choose what the first chose. Call [`~RouterReplay.forget`] after every
        optimizer step. Passes of the model without gradients do not count; of those with gradients, the backward passes have
        to run in the opposite order, as in one `backward` of a sum of losses.
        """
        self.forget()

        def before(name: str, router: Router, args: tuple, kwargs: dict) -> "_Selections":
            is_recomputation = torch._C._current_graph_task_id() != -1
            if is_recomputation and self._first_passes[name]:
                # Backward passes run the other way round, the last forward pass first.
                return _Selections(self._first_passes[name].pop(), self._num_selections[name], name)
            model_call = self._calls.current
            has_gradient = torch.is_grad_enabled() if model_call is None else model_call.has_gradient
            return _Selections(keep=router.module.training and has_gradient and not is_recomputation)

        def after(name: str, selections: "_Selections", output: Any) -> None:
            if selections.keep:
                chosen = selections.last(name)
                self._check(name, chosen, output)
                self._first_passes[name].append(chosen)
                self._num_selections[name] = len(selections.found)

        with self._around_routers(before, after):
            yield self

    def forget(self) -> None:
        """Forget the first passes that had no second one."""
        self._first_passes.clear()

    def _check(self, name: str, chosen_TK: torch.Tensor, output: Any) -> None:
        """Once for each router, whether what was selected last is what the router says that it chose."""
        if name in self._checked:
            return
        router = self.routers[name]
        index_TK = router.top_k_index(output)
        if chosen_TK.shape != index_TK.shape or not torch.equal(chosen_TK, index_TK.to(chosen_TK.dtype)):
            raise ValueError(
                f"{name} ({type(router.module).__name__}) does not return what it selects last, so that its choice cannot be replayed."
            )
        self._checked.add(name)

    @contextmanager
    def _around_routers(self, before: Callable, after: Callable) -> Iterator[None]:
        running: dict[str, _Selections] = {}
        handles = self._calls.attach()

        def hooks_of(name: str, router: Router) -> tuple[Callable, Callable]:
            def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
                running[name] = before(name, router, args, kwargs)
                running[name].__enter__()

            def leave(module: nn.Module, args: tuple, output: Any) -> None:
                selections = running.pop(name, None)
                if selections is not None:
                    selections.__exit__(None, None, None)
                    if output is not None:
                        after(name, selections, output)

            return enter, leave

        for name, router in self.routers.items():
            enter, leave = hooks_of(name, router)
            handles.append(router.module.register_forward_pre_hook(enter, with_kwargs=True))
            # Before the hooks of others, who may select something too.
            handles.append(router.module.register_forward_hook(leave, prepend=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class RouterReplayCallback(MoeCallback):
    """
    [`RouterReplay.in_recomputation`] for [`~transformers.Trainer`]: gradient checkpointing that cannot choose other experts in its
    second pass.
    """

    def __init__(self):
        super().__init__()
        self._context: Any = None

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        self._context = RouterReplay(model).in_recomputation()
        self._replay = self._context.__enter__()

    def end(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def after_step(self, args, state, control, **kwargs):
        self._replay.forget()


class _Selections(TorchFunctionMode):
    """
    Sees what a router selects with `topk` and the like, and puts given experts in the place of its last selection: those
    before it select groups.
    """

    def __init__(self, given_TK: torch.Tensor | None = None, number: int = 0, name: str = "", keep: bool = False):
        super().__init__()
        self.given_TK, self.number, self.name, self.keep = given_TK, number, name, keep
        self.found: list[torch.Tensor] = []

    def last(self, name: str) -> torch.Tensor:
        """`(T, K)`: the last selection."""
        if not self.found:
            raise ValueError(
                f"{name} chooses its experts without `topk`, `sort`, `argmax` or `max`, so that it cannot be replayed."
            )
        index = self.found[-1]
        return index.reshape(-1, index.shape[-1] if index.dim() > 1 else 1)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        is_selection = func in SELECTIONS or (func in LARGEST and (len(args) > 1 or "dim" in kwargs))
        if not is_selection:
            return func(*args, **kwargs)
        with torch.no_grad():
            result = func(*args, **kwargs)
        index = result if isinstance(result, torch.Tensor) else result.indices
        if self.given_TK is not None and len(self.found) + 1 == self.number:
            index = self._given_for(index)
        self.found.append(index)
        if isinstance(result, torch.Tensor):
            return index
        # In every pass alike, since checkpointing compares what the two save for the backward pass.
        scores = args[0] if args else kwargs["input"]
        has_dim = index.dim() == scores.dim()
        values = scores.gather(-1, index if has_dim else index[..., None])
        return type(result)((values if has_dim else values[..., 0], index))

    def _given_for(self, index: torch.Tensor) -> torch.Tensor:
        given_TK = cast(torch.Tensor, self.given_TK)
        if given_TK.numel() != index.numel():
            raise ValueError(
                f"The choices given for {self.name} are {tuple(given_TK.shape)}, and it chooses {tuple(index.shape)}: tokens and "
                "experts per token have to be the same."
            )
        given = given_TK.to(index.device, index.dtype).reshape(index.shape)
        return torch.where(given >= 0, given, index)
