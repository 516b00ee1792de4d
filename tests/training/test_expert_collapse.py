# SPDX-License-Identifier: Apache-2.0
"""Experts without tokens are found and brought to life."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from router_gradients import rows, trainable
from small_models import small_moe
from test_callbacks import logged, make_trainer

from hf_moe import ExpertCollapseCallback, RouterStatisticsCallback, RoutingHistory
from hf_moe.plots import plot_history
from hf_moe.training.routers import find_routers


def with_dead_experts(kind: str = "mixtral", **values) -> torch.nn.Module:
    """In the first sparse layer no token chooses the expert 2."""
    model = trainable(kind, **values)
    router = next(iter(find_routers(model).values()))

    def avoid(module, args, output):
        if not avoid.is_on:
            return None
        logits, weights, index = output
        others = torch.where(index == 2, (index.sum(-1, keepdim=True) - index + 1) % 4, index)
        return logits, weights, torch.where(others == 2, 3, others)

    avoid.is_on = True
    router.module.register_forward_hook(avoid)
    model.avoid = avoid
    return model


def test_a_warning_names_layer_and_expert(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        make_trainer(with_dead_experts(), tmp_path, ExpertCollapseCallback(patience=2), max_steps=3).train()
    warnings = [record.message for record in caplog.records if "no token came" in record.message]
    assert warnings == ["Step 2: no token came to the experts [2] of layer 0 (model.layers.0.mlp.gate) in 2 steps."]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3", "moe_llama"])
def test_a_dead_expert_becomes_a_copy_of_the_busiest(kind, tmp_path, caplog):
    model = with_dead_experts(kind)
    name, router = next(iter(find_routers(model).items()))
    trainer = make_trainer(
        model,
        tmp_path,
        ExpertCollapseCallback(2, "reseed"),
        RouterStatisticsCallback(),
        max_steps=2,
        learning_rate=1e-3,
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    (message,) = [record.message for record in caplog.records if "begin anew as copies" in record.message]
    donor = int(message.split("copies of the experts [")[1][0])
    experts = model.get_submodule(name.rpartition(".")[0]).experts
    for parameter in experts.parameters():
        assert torch.equal(parameter[2], parameter[donor])
        state = trainer.optimizer.state[parameter]
        assert not state["exp_avg"][[2, donor]].any()
        assert state["exp_avg"][[e for e in range(4) if e not in (2, donor)]].any()
    rows_of = router.module.weight
    change = (rows_of[2] - rows_of[donor]).norm() / rows_of[donor].norm()
    assert 0 < change < 0.05
    # Both get tokens now.
    model.avoid.is_on = False
    counted: list[torch.Tensor] = []
    router.module.register_forward_hook(lambda m, a, o: counted.append(o[2]))
    model(torch.stack([row["input_ids"] for row in rows(16)]))
    assert {2, donor} <= set(counted[0].flatten().tolist())


def test_the_picture_shows_that_an_expert_is_revived(tmp_path):
    """Its bias keeps all tokens from it, until it becomes a copy of the busiest expert after two steps."""
    model = trainable("deepseek_v3")
    next(iter(find_routers(model).values())).module.e_score_correction_bias[2] = -10
    callbacks = [ExpertCollapseCallback(2, "reseed"), RouterStatisticsCallback(folder=str(tmp_path / "routing"))]
    make_trainer(model, tmp_path, *callbacks, logging_steps=1, gradient_accumulation_steps=4).train()
    assert (tmp_path / "routing" / "load_over_steps.png").is_file()
    figure = plot_history(RoutingHistory.load(tmp_path / "routing"))
    first = next(axes for part in figure.subfigs for axes in part.axes if axes.get_title() == "layer 1")
    load = first.images[0].get_array()[:, 2]
    assert (load == 0).tolist() == [True, True, False, False]


def test_most_experts_are_dead(tmp_path, caplog):
    """Two of eight live: the others become copies of these in turn, each with a router's row of its own."""
    model = trainable("mixtral", num_local_experts=8)
    routers = list(find_routers(model).values())
    handles = [
        router.module.register_forward_hook(
            lambda m, a, o: (o[0], o[1], torch.tensor([[5, 3]]).expand_as(o[2]).contiguous())
        )
        for router in routers
    ]
    with caplog.at_level("WARNING"):
        make_trainer(model, tmp_path, ExpertCollapseCallback(2, "reseed"), max_steps=2, learning_rate=0.0).train()
    assert "experts [0, 1, 2, 4, 6, 7] of layer 0" in caplog.text
    assert (
        "copies of the experts [3, 5, 3, 5, 3, 5]" in caplog.text
        or "copies of the experts [5, 3, 5, 3, 5, 3]" in caplog.text
    )
    rows_of = torch.cat([router.module.weight for router in routers])
    assert len(rows_of.unique(dim=0)) == 8 * len(routers)
    for handle in handles:
        handle.remove()


def test_state_goes_on(tmp_path):
    arguments = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": True,
    }

    def make(folder):
        model = with_dead_experts("moe_llama")
        callbacks = [ExpertCollapseCallback(2, "reseed"), RouterStatisticsCallback()]
        return make_trainer(model, folder, *callbacks, **arguments, logging_steps=1)

    whole = make(tmp_path / "a")
    whole.train()
    other = make(tmp_path / "b")
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert logged(whole, "moe/reseeded_experts") == logged(other, "moe/reseeded_experts") == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"action": "kill"}, "action is 'kill'. Choose from 'warn', 'reseed'"),
        ({"noise": 0.0}, "noise is 0.0"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ExpertCollapseCallback(**values)


def test_frozen_experts_are_refused(tmp_path):
    model = get_peft_model(small_moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"are frozen, for instance by PEFT.*action='warn'"):
        make_trainer(model, tmp_path, ExpertCollapseCallback(action="reseed")).train()
