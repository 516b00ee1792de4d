# SPDX-License-Identifier: Apache-2.0
"""Choices are replayed on every layout, with weights and gradients of the logits at hand."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, assert_close
from router_gradients import rows
from small_models import ALL, small_moe
from test_callbacks import make_trainer
from torch import nn
from torch.utils.checkpoint import CheckpointError

from hf_moe import LoadBalancingCallback, RouterReplay, RouterReplayCallback
from hf_moe.training.routers import find_routers


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, ROUTER_CASES, build_model, with_routing_inputs


# Routers that do not return what they select last.
REFUSED = (
    "soft",
    "hierarchical_noisy_topk",
    "expert_choice",
    "top_p",
    "relu",
    "prototypes",
    "grouped",
    "hierarchical",
)


def ids(number: int = 2) -> torch.Tensor:
    return torch.stack([row["input_ids"] for row in rows(number)])


def chosen(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the routers return, as a pass goes by."""
    found: dict[str, torch.Tensor] = {}
    for name, router in find_routers(model).items():
        router.module.register_forward_hook(lambda m, a, o, n=name, r=router: found.update({n: r.top_k_index(o)}))
    return found


def shaken(model: nn.Module) -> nn.Module:
    """The model with other routers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in find_routers(model).values():
            router.module.weight.add_(torch.randn(router.module.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ALL)
def test_what_was_recorded_is_chosen_again(kind):
    model = small_moe(kind)
    replay, found = RouterReplay(model), chosen(model)
    with replay.record() as choices, torch.no_grad():
        expected = model(ids()).logits
    assert choices.keys() == found.keys() == replay.routers.keys()
    assert all(torch.equal(choices[name], found[name]) for name in choices)
    with replay.replay(choices):
        assert torch.equal(model(ids()).logits, expected)
    shaken(model)(ids())
    assert any(not torch.equal(choices[name].sort(-1).values, found[name].sort(-1).values) for name in choices)
    with replay.replay(choices):
        model(ids())
    assert all(torch.equal(choices[name], found[name]) for name in choices)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case not in REFUSED])
def test_every_router_of_ours(case, is_training, batch):
    """With what a capacity drops, noise and zero-computation experts."""
    model = build_model(case).train(is_training)
    inputs, replay, found = with_routing_inputs(batch, model), RouterReplay(model), chosen(model)

    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        return model(**inputs).logits

    with torch.no_grad(), replay.record() as choices:
        expected = logits()
    with torch.no_grad(), RouterReplay(model).replay(choices):
        assert torch.equal(logits(), expected)
    if case != "hash":
        shaken(model)
        logits()
        assert any(not torch.equal(choices[name], found[name]) for name in choices)
    with replay.replay(choices):
        logits()
    assert all(torch.equal(choices[name], found[name]) for name in choices)


@pytest.mark.parametrize("case", REFUSED)
def test_routers_that_select_otherwise_are_refused(case):
    with pytest.raises(ValueError, match="cannot be replayed: it.* Choose a `router_type` of") as refusal:
        RouterReplay(build_model(case))
    named = [name for name in ROUTER_CASES if f"'{name}'" in str(refusal.value)]
    assert named == [name for name in ROUTER_CASES if name not in REFUSED]


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_lots_are_refused(policy):
    with pytest.raises(ValueError, match=f"draws lots .* `second_expert_policy='{policy}'` instead of 'all'"):
        RouterReplay(build_model("gshard", second_expert_policy=policy))


def test_groups_stay_the_routers_own_business():
    model = small_moe("deepseek_v3", n_routed_experts=8, n_group=4, topk_group=2)
    replay, found = RouterReplay(model), chosen(model)
    name = next(iter(replay.routers))
    given = torch.tensor([[0, 7]]).repeat(24, 1)  # of two groups, which not every token would allow
    with replay.replay({name: given}):
        model(ids())
    assert torch.equal(found[name], given)


def test_weights_and_gradients_are_those_of_the_logits_at_hand():
    model = small_moe("mixtral").requires_grad_(True)
    name, router = next(iter(find_routers(model).items()))
    given, outputs = torch.randint(0, 4, (24, 1)).repeat(1, 2), []
    given[:, 1] = (given[:, 0] + 1) % 4
    router.module.register_forward_hook(lambda m, a, o: outputs.append(o))
    with RouterReplay(model).replay({name: given}):
        model(ids())
    logits, weights, index = outputs[-1]
    assert torch.equal(index, given)
    scores = logits.softmax(-1).gather(1, given)
    expected = scores / scores.sum(-1, keepdim=True)
    assert_close(weights, expected)
    factor = torch.randn(weights.shape)
    gradients = [
        torch.autograd.grad((of * factor).sum(), router.module.weight, retain_graph=True)[0]
        for of in (weights, expected)
    ]
    assert_close(*gradients)
    assert gradients[0].any()


def test_free_tokens_and_the_shape_of_sequences():
    model = small_moe("mixtral")
    replay, found = RouterReplay(model), chosen(model)
    name = next(iter(replay.routers))
    model(ids())
    live = found[name].clone()
    given = torch.full((2, 12, 2), -1)
    given[:, 6:] = torch.tensor([2, 3])
    with replay.replay({name: given}):
        model(ids())
    expected = live.view(2, 12, 2)
    expected[:, 6:] = torch.tensor([2, 3])
    assert torch.equal(found[name], expected.view(24, 2))


class NearlyTied(nn.Module):
    """Logits that are ties but for what is added, and that is something else in every pass."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.passes = 0
        router.weight.data.zero_()
        router.register_forward_pre_hook(self.shift)

    def shift(self, router: nn.Module, args: tuple) -> None:
        self.passes += 1
        router.weight.data.normal_(std=1e-6, generator=torch.Generator().manual_seed(self.passes))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_chooses_what_the_first_pass_chose(use_reentrant):
    def one_step(is_replayed: bool) -> torch.Tensor:
        model = small_moe("mixtral").train()
        model.set_experts_implementation("eager")  # whose shapes depend on the choice
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for router in find_routers(model).values():
            NearlyTied(router.module)
        replay = RouterReplay(model)
        if is_replayed:
            with replay.in_recomputation():
                # Two passes before one backward pass.
                sum(model(part).logits.logsumexp(-1).mean() for part in ids(4).split(2)).backward()
                assert not any(replay._first_passes.values())
        else:
            model(ids(4)).logits.logsumexp(-1).mean().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    if not use_reentrant:
        with pytest.raises(CheckpointError, match="have different metadata"):
            one_step(is_replayed=False)
    assert one_step(is_replayed=True).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_pass_without_gradients_in_between_does_not_count(use_reentrant):
    """As DPO's reference has it, between the policy's pass and its backward pass."""

    def gradients(is_replayed: bool) -> torch.Tensor:
        model = small_moe("mixtral").requires_grad_(True).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        context = RouterReplay(model).in_recomputation() if is_replayed else contextlib.nullcontext()
        with context:
            loss = model(ids(2)).logits.logsumexp(-1).mean()
            with torch.no_grad():
                model(ids(4)[2:])
            loss.backward()
        return torch.stack([router.module.weight.grad for router in find_routers(model).values()])

    assert torch.equal(gradients(True), gradients(False))


def test_routers_that_hide_their_choice_are_refused():
    config = transformers.PhimoeConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.PhimoeForCausalLM(config)
    with (
        pytest.raises(ValueError, match="PhimoeTopKRouter.* does not return what it selects last"),
        RouterReplay(model).record(),
    ):
        model(ids())


def test_the_callback(tmp_path):
    def train(*callbacks) -> list[float]:
        model = small_moe("mixtral").requires_grad_(True)
        trainer = make_trainer(model, tmp_path, *callbacks, gradient_checkpointing=True, gradient_accumulation_steps=2)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert train(RouterReplayCallback()) == train()
    model = small_moe("mixtral").requires_grad_(True)
    model.set_experts_implementation("eager")
    for router in find_routers(model).values():
        NearlyTied(router.module)
    make_trainer(model, tmp_path, RouterReplayCallback(), gradient_checkpointing=True).train()


@pytest.mark.parametrize("is_first", [False, True])
def test_beside_losses_that_run_the_router_again_or_select_too(is_first, tmp_path):
    model = small_moe("mixtral").requires_grad_(True)
    model.set_experts_implementation("eager")
    for router in find_routers(model).values():
        NearlyTied(router.module)
    losses = [LoadBalancingCallback("switch", grad_to="router"), LoadBalancingCallback("importance_load")]
    callbacks = [RouterReplayCallback(), *losses] if is_first else [*losses, RouterReplayCallback()]
    trainer = make_trainer(model, tmp_path, *callbacks, gradient_checkpointing=True)
    trainer.train()
    assert trainer.state.global_step == 4


def test_what_is_refused():
    model = small_moe("mixtral")
    replay = RouterReplay(model)
    with pytest.raises(ValueError, match="There is no router 'gate'. The model has model.layers.0.mlp.gate, "):
        with replay.replay({"gate": torch.zeros(24, 2)}):
            pass
    name = next(iter(replay.routers))
    with (
        pytest.raises(ValueError, match=r"given for model.layers.0.mlp.gate are \(5, 2\), and it chooses \(24, 2\)"),
        replay.replay({name: torch.zeros(5, 2, dtype=torch.long)}),
    ):
        model(ids())
    with replay.record():
        model(ids())
        with pytest.raises(ValueError, match="ran a second time in `record`"):
            model(ids())
    again = RouterReplay(model)
    with again.replay({name: torch.tensor([[0, 3]]).repeat(24, 1)}):
        model(ids())
    with (
        pytest.raises(ValueError, match="up to 4, and it has 4 experts, 0 to 3"),
        again.replay({name: torch.tensor([[0, 4]]).repeat(24, 1)}),
    ):
        model(ids())
    model(ids())
    with pytest.raises(ValueError, match="Linear declares no router"):
        RouterReplay(nn.Linear(2, 2))


def test_hooks_are_gone_afterwards():
    model = small_moe("mixtral")
    replay = RouterReplay(model)
    with replay.record(), torch.no_grad():
        model(ids())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
