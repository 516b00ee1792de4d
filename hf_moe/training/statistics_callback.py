# SPDX-License-Identifier: Apache-2.0
"""`RouterStatisticsCallback`: how evenly experts are used in training, in the logs of the Trainer and as a history."""

from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..models import losses
from ..models.routers import MoeRouter
from .balance_losses import has_z_loss
from .dropped_slots import DroppedSlots
from .history import RoutingHistory
from .moe_callback import Attachment, MoeCallback
from .rank_sum import RankSum, is_first_process
from .router_hooks import RouterCall, RouterHooks
from .routers import Router
from .statistics import LayerRouting, RoutingStatistics, layer_number


logger = logging.get_logger(__name__)

MAX_PENDING = 64  # passes of a router


class RouterStatisticsCallback(MoeCallback):
    """
    Logs how evenly experts are used, with the training loss and wherever that is reported to.

    | key | what |
    |---|---|
    | `moe/load_max_mean` | slots that the router gave the busiest expert, by the mean |
    | `moe/load_cv` | coefficient of variation of the slots |
    | `moe/max_violation` | `load_max_mean - 1` |
    | `moe/entropy` | entropy of the load by its maximum |
    | `moe/dead_frac` | share of experts without a token |
    | `moe/experts_per_token` | mean number of experts that served a token, if that varies |
    | `moe/dropped_frac` | share of the slots that found no room, with a capacity |
    | `moe/zero_computation_frac` | share of the slots that went to experts without computation, if there are any |
    | `moe/aux_loss` | Switch's balance loss, 1 if balanced, of the steps that are logged |
    | `moe/z_loss` | mean square of the logits' logsumexp, of the steps that are logged |

    Counted are the tokens of training since the last log, without padding and evaluation, of all ranks, in both kinds of
    gradient checkpointing once. The load is what the router wants, with the slots that a capacity drops. Between logs nothing is
    asked of the device.

    Args:
        per_layer (`bool`, *optional*, defaults to `False`): Whether to log every layer too, as `moe/layer_3/entropy`.
        folder (`str` or `Path`, *optional*): Where to write the counts of every log, as `routing_history.jsonl`, and, at the end, pictures of
            them if matplotlib is installed.

    Example:

    ```python
    >>> from hf_moe import RouterStatisticsCallback, add_moe_callbacks

    >>> add_moe_callbacks(trainer, RouterStatisticsCallback(folder="routing"))
    ```
    """

    def __init__(self, per_layer: bool = False, folder: str | Path | None = None):
        self.per_layer, self.folder = per_layer, None if folder is None else str(folder)
        self._hooks: RouterHooks | None = None
        self._handles: list[RemovableHandle] = []
        super().__init__(per_layer=per_layer, folder=self.folder)

    def reset(self) -> None:
        # Per router: slots that each expert served, that it was given, number of tokens, passes with logits that are not finite;
        # sums of losses, their number; what capacities change about the slots.
        self._counts: dict[str, torch.Tensor] = {}
        self._losses: dict[str, torch.Tensor] = {}
        self._pending: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        self._changes: dict[str, torch.Tensor] = {}

    def begin(self, model: nn.Module, attachment: Attachment) -> None:
        self._hooks = attachment.hooks(model)
        self._sum_counts, self._sum_losses = RankSum(self._hooks, torch.int64), RankSum(self._hooks)
        self._unknown: set[str] = set()
        self._has_capacity: set[str] = set()
        self._sees_losses, self._step = True, attachment.trainer.state.global_step
        if self.folder is not None and attachment.trainer.is_world_process_zero():
            RoutingHistory.begin(self.folder, self._step)
        self._hooks.add(self._add)
        self._handles = DroppedSlots(model, self._hooks.routers).watch(self._add_change)

    def end(self) -> None:
        if self._hooks is not None:
            self._hooks.remove(self._add)
            self._hooks = None
            for handle in self._handles:
                handle.remove()

    def on_step_begin(self, args, state, control, **kwargs):
        is_first = state.global_step == 0 and args.logging_first_step
        by_steps = args.logging_strategy == IntervalStrategy.STEPS
        self._sees_losses = not by_steps or is_first or (state.global_step + 1) % state.logging_steps == 0

    def after_step(self, args, state, control, **kwargs):
        self._step = state.global_step

    def pool(self) -> None:
        self._add_pending()
        self._counts = self._sum_counts.on_first(self._counts)
        self._losses = self._sum_losses.on_first(self._losses)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.folder is not None and state.is_world_process_zero:
            _draw(self.folder)

    def save_state(self) -> dict[str, Any]:
        self._add_pending()
        sums = {"counts": self._counts, "losses": self._losses}
        return {key: {name: tensor.tolist() for name, tensor in of.items()} for key, of in sums.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        if is_first_process():
            self._counts = {name: torch.tensor(values) for name, values in state["counts"].items()}
            self._losses = {name: torch.tensor(values) for name, values in state["losses"].items()}

    def metrics(self) -> dict[str, float]:
        self._add_pending()
        counts, sums = self._sum_counts(self._counts), self._sum_losses(self._losses)
        self._counts, self._losses = {}, {}
        values = {name: of for name, tensor in counts.items() if any(of := tensor.tolist())}
        if not values:
            return {}
        if broken := [name for name, of_layer in values.items() if of_layer[-1]]:
            logger.warning(
                f"Before step {self._step} the logits of {broken[0]}{f' and {len(broken) - 1} other routers' if broken[1:] else ''} were NaN "
                "or infinite. Lower the learning rate, or look at what goes into that layer."
            )
        routers = cast(RouterHooks, self._hooks).routers
        layers = {name: _layer_routing(of, routers[name].num_zero_computation_experts) for name, of in values.items()}
        statistics = RoutingStatistics(layers)
        if self.folder is not None and is_first_process():
            RoutingHistory.append(self.folder, self._step, statistics)
        rows = {
            name: _row(layer, sums.get(name)) | _row_of_slots(layer, routers[name], name in self._has_capacity)
            for name, layer in layers.items()
        }
        found = {key for row in rows.values() for key in row}
        metrics = {key: fmean(row[key] for row in rows.values() if key in row) for key in sorted(found)}
        if self.per_layer:
            numbers = [layer_number(name) for name in rows]
            places = numbers if len(set(numbers)) == len(numbers) else list(rows)
            for place, row in zip(places, rows.values(), strict=True):
                metrics |= {f"layer_{place}/{key}": value for key, value in row.items()}
        return {f"moe/{key}": value for key, value in metrics.items()}

    @torch.no_grad()
    def _add_pending(self) -> None:
        """Add up what was put aside, which is done for many passes at once, since it costs as much as for one."""
        for name, passes in self._pending.items():
            counts, tokens, sums = (torch.stack(values) for values in zip(*passes, strict=True))
            num_broken = (~sums.isfinite()).sum()
            others = torch.stack([tokens.sum(), num_broken.to(tokens)])
            added = torch.cat([counts.sum(0), counts.sum(0), others]).long()
            self._counts[name] = added + self._counts.get(name, torch.zeros_like(added)).to(added.device)
        self._pending = {}
        for name, change in self._changes.items():
            change_E = change[:-1].long()
            self._counts[name][: len(change_E)] += change_E
        self._changes = {}

    @torch.no_grad()
    def _add(self, call: RouterCall) -> None:
        if not call.is_training or call.is_recomputation:
            return
        name, logits_TE = call.name, call.logits_TE.float()
        pending = self._pending.setdefault(name, [])
        # The experts of other modalities have a logit of -inf.
        pending.append((call.counts_E, call.num_tokens, logits_TE.masked_fill(logits_TE == -torch.inf, 0.0).sum()))
        if len(pending) >= MAX_PENDING:
            self._add_pending()
        if not self._sees_losses:
            return
        score, one = self._find_score(call), torch.ones((), device=logits_TE.device)
        with torch.autocast(logits_TE.device.type, enabled=False):
            balance = (
                losses.switch_loss(losses.scores_of(logits_TE, score), call.counts_E, call.mask_T)
                if score
                else one * 0
            )
            z = losses.z_loss(logits_TE, call.mask_T)
        # A router that returns probabilities for logits has no z-loss.
        has_z = score != "identity" and has_z_loss(call)
        sums = torch.stack([balance, z * has_z, one * bool(score), one * has_z])
        self._losses[name] = self._losses.get(name, torch.zeros_like(sums)).to(sums.device) + sums

    def _add_change(self, name: str, change: torch.Tensor, is_training: bool) -> None:
        if is_training and cast(RouterHooks, self._hooks).has_gradient:
            self._has_capacity.add(name)
            self._changes[name] = self._changes.get(name, 0) + change

    def _find_score(self, call: RouterCall) -> str | None:
        if call.name in self._unknown:
            return None
        try:
            return cast(RouterHooks, self._hooks).find_score(call)
        except ValueError as error:
            logger.warning(f"RouterStatisticsCallback leaves out `moe/aux_loss`: {error}")
            self._unknown.add(call.name)
            return None


def _layer_routing(counted: list[int], num_zero_computation_experts: int) -> LayerRouting:
    *both, num_tokens, _ = counted
    counts_E, demand_E = torch.tensor(both).chunk(2)
    return LayerRouting(counts_E, num_tokens, num_zero_computation_experts, demand_E)


def _row(layer: LayerRouting, sums: torch.Tensor | None) -> dict[str, float]:
    row = {
        "load_max_mean": layer.max_violation + 1,
        "load_cv": layer.coefficient_of_variation,
        "max_violation": layer.max_violation,
        "entropy": layer.entropy,
        "dead_frac": len(layer.dead_experts) / len(layer.counts),
    }
    balance, z, num_balance, num_z = [0.0] * 4 if sums is None else sums.tolist()
    row |= {"aux_loss": balance / num_balance} if num_balance else {}
    return row | ({"z_loss": z / num_z} if num_z else {})


def _row_of_slots(layer: LayerRouting, router: Router, has_capacity: bool) -> dict[str, float]:
    """What differs only where slots can be empty."""
    row = {"dropped_frac": layer.dropped_fraction} if has_capacity else {}
    if has_capacity or isinstance(router.module, MoeRouter) and router.module.leaves_slots_empty:
        row["experts_per_token"] = layer.experts_per_token
    if layer.num_zero_computation_experts:
        row["zero_computation_frac"] = layer.zero_computation_fraction
    return row


def _draw(folder: str) -> None:
    from ..plots import plot_history, plot_load

    history = RoutingHistory.load(folder)
    if history.steps:
        try:
            plot_load(history.statistics[-1], Path(folder, "load.png"), title=f"step {history.steps[-1]}")
            plot_history(history, Path(folder, "load_over_steps.png"))
        except ImportError as error:
            logger.warning(f"RouterStatisticsCallback drew nothing. {error}")
