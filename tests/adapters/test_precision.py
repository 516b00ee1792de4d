# SPDX-License-Identifier: Apache-2.0
"""Autocast, adapters in another precision than the model, and compiled models: beside PEFT's own computation."""

import copy

import pytest
import torch
from conftest import assert_close
from peft.tuners.lora.layer import ParamWrapper
from small_adapters import ids, loss_and_gradients, with_adapter
from small_models import small_moe

from hf_moe.adapters.grouped_lora import enable_grouped_lora


Results = tuple[torch.Tensor, dict[str, torch.Tensor]]


def results_of(model: torch.nn.Module, autocast: bool) -> Results:
    """Logits and gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=ids(4, 24), labels=ids(4, 24))
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors_of(results: Results, exact: Results) -> tuple[float, float]:
    """The mean error of the logits, and that of the gradients relative to their size."""
    (logits, gradients), (exact_logits, exact_gradients) = results, exact
    relative = [(gradients[name] - of).norm() / of.norm() for name, of in exact_gradients.items()]
    return (logits - exact_logits).abs().mean().item(), torch.stack(relative).mean().item()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "moe_llama biased"])
@pytest.mark.parametrize(
    ("base", "autocast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_errors_are_those_of_peft(kind, base, autocast):
    """With all experts of every token, so that none depends on a close choice of the router."""
    vanilla = with_adapter(small_moe(kind, num_experts_per_tok=4), r=8)
    exact = results_of(copy.deepcopy(vanilla), False)
    for name, parameter in vanilla.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    expected, results = results_of(vanilla, autocast), results_of(model, autocast)
    assert results[0].dtype == expected[0].dtype
    assert {gradient.dtype for gradient in results[1].values()} == {torch.float32}
    for ours, theirs in zip(errors_of(results, exact), errors_of(expected, exact), strict=True):
        assert 0 < ours < 1.2 * theirs


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
def test_experts_in_float32_stay_in_float32_under_autocast(kind):
    """Since grouped products take the type of the weights: as PEFT without autocast (before 0.21 it rounds the factors)."""
    results = []
    for enable, autocast in ((lambda model: model, False), (enable_grouped_lora, True)):
        model = enable(with_adapter(small_moe(kind), r=8))
        wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
        torch.manual_seed(0)
        hidden, index, weights = torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = wrapper(hidden.requires_grad_(), index, weights.requires_grad_())
        output.square().sum().backward()
        factors = [parameter.grad for name, parameter in wrapper.named_parameters() if "lora_" in name]
        results.append([output, hidden.grad, weights.grad, *factors])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs)


def test_compiled_models():
    """The experts are left out of what is compiled, the rest is not."""
    model = enable_grouped_lora(with_adapter(small_moe("mixtral", num_hidden_layers=1)))
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    output = compiled(input_ids=ids(), labels=ids())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert_close(parameter.grad, gradients[name])
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50
    reasons = " ".join(torch._dynamo.utils.counters["graph_break"])
    assert "torch.compiler.disable" in reasons
