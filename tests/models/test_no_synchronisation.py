# SPDX-License-Identifier: Apache-2.0
"""No router and no capacity makes the host wait for the device, in either pass; a block does so once, whatever its size."""

import pytest
import torch
from router_cases import ALL_CASES, NUM_EXPERTS, build_block, router_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from hf_moe.models.routing_context import RoutingContext
from hf_moe.models.sparse_block import MoeSparseBlock


# Operators whose result has a size or a value that the host must know.
WAITING = {
    "aten._local_scalar_dense",
    "aten._unique2",
    "aten.bincount",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten.repeat_interleave",
    "aten.unique_dim",
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class OperatorNames(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.names.append(name)
        if name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.names.append("aten.nonzero")  # to which a mask is turned inside the operator
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> list[str]:
        return [name for name in self.names if name in WAITING]


def config_of(case: str, num_experts: int) -> PreTrainedConfig:
    """The configuration of a case with more experts."""
    values, config = {"num_experts": num_experts}, router_config(case)
    if config.router_type == "soft":
        values["num_experts_per_tok"] = num_experts
    if config.num_experts_per_modality is not None:
        values["num_experts_per_modality"] = [
            count * num_experts // NUM_EXPERTS for count in config.num_experts_per_modality
        ]
    return router_config(case, **values)


def training_block(config: PreTrainedConfig) -> tuple[MoeSparseBlock, torch.Tensor]:
    """A block that knows all about its tokens, and their hidden states."""
    config._experts_implementation = "grouped_mm"
    block = build_block(config).train()
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :2] = 0
    block.routing = RoutingContext(
        attention_mask=mask,
        input_ids=torch.randint(0, config.vocab_size, (3, 8), generator=generator),
        mm_token_type_ids=torch.randint(0, 2, (3, 8), generator=generator),
        domain_ids=torch.arange(3) % config.num_hash_domains,
        wants_balance_losses=config.router_class.has_balance_loss,
    )
    block.routing.router_logits[-1] = torch.randn(24, block.gate.num_experts, generator=generator)
    return block, torch.randn(3, 8, config.hidden_size, generator=generator).requires_grad_()


def operators_of_routing(config: PreTrainedConfig) -> OperatorNames:
    """What runs forward and backward in router, capacity and balance loss."""
    block, hidden_states = training_block(config)
    routing = block.routing
    with OperatorNames() as operators:
        weights_TK, _ = block.route(hidden_states)
        outputs = [weights_TK.sum(), *routing.balance_losses.values()]
        for output in outputs:
            if output.requires_grad:
                output.backward(retain_graph=True)
    return operators


@pytest.mark.parametrize("case", ALL_CASES)
def test_routing_waits_for_nothing(case):
    few, many = operators_of_routing(config_of(case, 16)), operators_of_routing(config_of(case, 32))
    assert few.waiting == many.waiting == []
    assert few.names == many.names, "as many operators for more experts"


@pytest.mark.parametrize("case", ALL_CASES)
def test_a_block_waits_once(case):
    waiting = []
    for num_experts in (NUM_EXPERTS, 32):
        block, hidden_states = training_block(config_of(case, num_experts))
        with OperatorNames() as forward:
            output = block(hidden_states)
        with OperatorNames() as backward:
            output.sum().backward()
        assert "transformers.grouped_mm_fallback" not in forward.names
        assert backward.waiting == []
        waiting.append(forward.waiting)
    assert waiting[0] == waiting[1] == (["aten.nonzero"] if block.has_empty_slots else [])


def test_what_waits_is_seen():
    numbers = torch.tensor([1.0, 0.0, 2.0])
    with OperatorNames() as operators:
        numbers[numbers > 0].sum().item()
        numbers.nonzero()
        torch.nn.functional.one_hot(numbers.long())
    assert operators.waiting == ["aten.nonzero", "aten._local_scalar_dense", "aten.nonzero", *operators.waiting[3:]]
    assert operators.waiting[3:]
