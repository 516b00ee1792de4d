# SPDX-License-Identifier: Apache-2.0
"""
Running a checkpoint that need not fit into memory: `streamed_model`, whose modules read their weights when they run.

The experts of a mixture are read one by one. A comparison can have their choices counted, and tokens sent where it wants,
by attributes of their module: `num_counted`, `deal_from` and `experts_per_copy`, `forced_experts`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .convert import in_memory_names
from .layouts import FusedExpert, FusedLayout, PerExpertLayout
from .sample import Sample
from .target import Target


class Readable(Protocol):
    """What is needed of a checkpoint: its configuration, names, tensors, and what one expert has of them."""

    config: PreTrainedConfig

    def __iter__(self) -> Iterator[str]: ...

    def read(self, name: str, check_finite: bool = True) -> torch.Tensor: ...

    def read_row(self, name: str, index: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints that are compared, the class that computes it, and the path to its layers."""

    model_class: type[PreTrainedModel]
    checkpoint: Readable
    layers: str = "layers"


class _Tensors(Mapping):
    """The tensors of a checkpoint by their names in memory, in one data type or that of the model, read when asked for."""

    def __init__(self, checkpoint: Readable, dtype: torch.dtype, model: PreTrainedModel):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        names = in_memory_names(list(checkpoint), model)
        self.name_on_disk = {in_memory: on_disk for on_disk, in_memory in names.items()}
        tied = model.all_tied_weights_keys
        self.name_on_disk |= {name: self.name_on_disk[other] for name, other in tied.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self.name_on_disk[name]).to(self.dtypes[name])

    def on_disk(self, name: str, row: int | None) -> torch.Tensor:
        """An expert's tensor, or one row of it, by its name on disk."""
        return (self._read(name) if row is None else self.checkpoint.read_row(name, row)).to(self.dtype)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, check_finite=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.name_on_disk)

    def __len__(self) -> int:
        return len(self.name_on_disk)


def streamed_model(
    side: Side, config: PreTrainedConfig, dtype: torch.dtype, target: Target | None = None
) -> PreTrainedModel:
    """
    A model without weights of its own: each module reads its weights from the checkpoint for the time of its forward.

    Args:
        target (`Target`, *optional*): What the model is, if it is a mixture of experts; its experts are read one by one.
    """
    config = copy.deepcopy(config)
    config.chunk_size_feed_forward = 0  # each feed-forward is to run once
    if target is not None:
        config._experts_implementation = "hf_moe_streamed"
    with init_empty_weights(include_buffers=False):
        model = side.model_class._from_config(config, dtype=dtype)
    model.eval()
    tensors = _Tensors(side.checkpoint, dtype, model)
    if target is not None:
        for name, module in model.named_modules():
            if name.endswith(f"{target.block}.experts"):
                module.read_expert = _expert_reader(tensors, target.layout, name, module)
                module._parameters.clear()
                module.num_counted, module.deal_from, module.forced_experts = 0, None, None
    for name, buffer in model.named_buffers():
        if name in tensors.name_on_disk:  # a selection bias, say; hooks bring parameters only
            buffer.copy_(tensors[name])
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=tensors)
    return model


def _expert_reader(
    tensors: _Tensors, layout: FusedLayout | PerExpertLayout, name: str, experts: torch.nn.Module
) -> Callable[[int], FusedExpert]:
    layer = name.removesuffix("experts").rpartition(".")[0].rpartition(".")[0] + "."
    return lambda expert_index: layout.read(tensors.on_disk, layer, expert_index, experts.has_gate, experts.has_bias)


def _streamed_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The arithmetic of transformers' grouped_mm, with the weights of one expert in memory at a time.

    The choices for the first `self.num_counted` tokens are counted. From token `self.deal_from` on, tokens are then dealt
    out to the copies in turn instead of being routed. With `self.forced_experts` each token goes to one of them alone, in
    turn, with weight 1.
    """
    self.counts = torch.bincount(top_k_index[: self.num_counted].reshape(-1), minlength=self.num_experts)
    if self.forced_experts is not None:
        turns = torch.arange(len(top_k_index)) % len(self.forced_experts)
        top_k_index = torch.tensor(self.forced_experts)[turns, None]
        top_k_weights = torch.ones_like(top_k_weights[:, :1])
    if self.deal_from is not None:
        size = self.experts_per_copy
        dealt_rows = top_k_index[self.deal_from :]
        copies = torch.arange(dealt_rows.numel() // size) % (self.num_experts // size)
        dealt = copies[:, None] * size + torch.arange(size)
        top_k_index = torch.cat([top_k_index[: self.deal_from], dealt.reshape(dealt_rows.shape)])
    slots = torch.empty(*top_k_index.shape, hidden_states.shape[-1], dtype=hidden_states.dtype)
    for expert_index in top_k_index.unique().tolist():
        expert = self.read_expert(expert_index)
        token, slot = torch.where(top_k_index == expert_index)
        # As grouped_mm does, the product is rounded before the bias is added.
        hidden = F.linear(hidden_states[token], expert.up_proj)
        hidden = hidden if expert.up_bias is None else hidden + expert.up_bias
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        output = F.linear(hidden, expert.down_proj)
        slots[token, slot] = output if expert.down_bias is None else output + expert.down_bias
    return (slots * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("hf_moe_streamed", _streamed_experts_forward)


def run_sample(
    side: Side, config: PreTrainedConfig, sample: Sample, dtype: torch.dtype, target: Target | None = None
) -> torch.Tensor:
    """The logits of a checkpoint, or its last hidden states if it has no head; the arguments are those of [`streamed_model`]."""
    routing = {} if target is None else sample.routing
    with torch.no_grad():
        return output_of(streamed_model(side, config, dtype, target)(**sample.as_type(dtype), **routing))


def output_of(outputs: Any) -> torch.Tensor:
    """The logits, or the last hidden states of a model without a head."""
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state
