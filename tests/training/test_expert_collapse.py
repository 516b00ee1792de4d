# SPDX-License-Identifier: Apache-2.0
"""Experts without tokens are found and brought to life."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from router_gradients import rows, trainable
from small_models import small_moe
from test_callbacks import logged, make_trainer

from hf_moe import ExpertCollapseCallback, RouterStatisticsCallback, RoutingHistory
from hf_moe.plots import plot_history
from hf_moe.training.expert_collapse import _find_dead
from hf_moe.training.routers import find_routers


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import build_model


def with_dead_experts(kind: str = "mixtral", layer: int = 0, **values) -> torch.nn.Module:
    """In a sparse layer, the first one, no token chooses the expert 2."""
    model = trainable(kind, **values)
    router = list(find_routers(model).values())[layer]

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


NATIVE = ("mixtral", "gpt_oss", "deepseek_v3")
# Routers with more than one row of weights for an expert, and experts that are no feed-forwards.
OURS = (
    {},
    {"router_type": "attention", "use_expert_bias": True},
    {"router_type": "noisy_topk"},
    {"router_type": "grouped", "n_group": 2, "use_expert_bias": True},
    {"router_type": "softmax_topk", "num_constant_experts": 4, "num_zero_experts": 1, "router_residual": True},
)


@pytest.mark.parametrize(
    ("kind", "values"), [*((kind, {}) for kind in NATIVE), *(("moe_llama", values) for values in OURS)]
)
def test_a_dead_expert_becomes_a_copy_of_the_busiest(kind, values, tmp_path, caplog):
    model = with_dead_experts(kind, layer=-1, **values)
    name, router = list(find_routers(model).items())[-1]
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
    messages = [record.message for record in caplog.records if "begin anew as copies" in record.message]
    (message,) = [message for message in messages if f"({name})" in message]
    donor = int(message.split("copies of the experts [")[1][0])
    experts = model.get_submodule(name.rpartition(".")[0]).experts
    for parameter in experts.parameters():
        assert torch.equal(parameter[2], parameter[donor])
        state = trainer.optimizer.state[parameter]
        assert not state["exp_avg"][[2, donor]].any()
        assert state["exp_avg"][[e for e in range(4) if e not in (2, donor)]].any()
    num_changed = 0
    for key, parameter in (*router.module.named_parameters(), *router.module.named_buffers()):
        assert len(parameter) == len(router.module.weight), key
        change = (parameter[2] - parameter[donor]).norm() / parameter[donor].norm()
        assert 0 < change < 0.05 if parameter.dim() > 1 else change == 0, key
        num_changed += parameter.dim() > 1
    assert num_changed == {"attention": 3, "noisy_topk": 2, "softmax_topk": 2}.get(values.get("router_type"), 1)
    # Both get tokens now.
    model.avoid.is_on = False
    counted: list[torch.Tensor] = []
    router.module.register_forward_hook(lambda m, a, o: counted.append(o[2]))
    model(torch.stack([row["input_ids"] for row in rows(16)]))
    assert {2, donor} <= set(counted[0].flatten().tolist())


@pytest.mark.parametrize(
    ("case", "counts", "expected"),
    [
        ("modality", [0, 5, 3, 9, 2, 4, 0, 1], {0: 3, 6: 5}),
        ("modality", [0, 5, 3, 9, 2, 0, 0, 0], {0: 3}),  # no images
        ("hash", [0, 0, 0, 0, 7, 0, 6, 5], {5: 4}),  # one domain
        ("prototypes", [0, 9, 1, 0, 2, 3, 0, 5], {0: 1, 3: 2, 6: 7}),
        ("grouped", [0, 9, 8, 7, 2, 3, 0, 5], {0: 1, 6: 7}),
        ("hierarchical", [0, 3, 0, 0, 1, 1, 5, 0], {0: 1, 2: None, 3: None, 7: 6}),
        ("softmax_topk", [0, 1, 2, 3, 4, 5, 6, 7], {0: 7}),
        ("relu", [0] * 8, dict.fromkeys(range(8))),
        ("zero-computation experts", [0, 1, 2, 3, 4, 3, 2, 1, 90, 0, 0, 0], {0: 4}),
        ("zero-computation experts", [0] * 8 + [90, 90, 0, 0], dict.fromkeys(range(8))),
    ],
)
def test_the_dead_and_whom_they_can_become(case, counts, expected):
    router = next(iter(find_routers(build_model(case)).values()))
    assert _find_dead(router, torch.tensor(counts)) == expected


def test_a_group_that_no_token_chooses_stays(tmp_path, caplog):
    values = {"router_type": "hierarchical", "num_experts": 6, "n_group": 3, "norm_topk_prob": False}
    model = trainable("moe_llama", **values)
    routers = list(find_routers(model).values())
    for router in routers:
        router.module.register_forward_hook(lambda m, a, o: (o[0], o[1], o[2] * 0 + torch.tensor([0, 4])))
    before = [expert.clone() for expert in model.model.layers[0].mlp.experts.down_proj]
    callback = ExpertCollapseCallback(1, "reseed")
    with caplog.at_level("WARNING"):
        make_trainer(model, tmp_path, callback, max_steps=1, learning_rate=0.0).train()
    assert "experts [1, 2, 3, 5] of layer 0" in caplog.text
    assert "The experts [1, 5] begin anew as copies of [0, 4]. The experts [2, 3] stay, since none that" in caplog.text
    after = model.model.layers[0].mlp.experts.down_proj
    for expert, source in enumerate([0, 0, 2, 3, 4, 4]):
        assert torch.equal(after[expert], before[source])


@pytest.mark.parametrize("action", ["warn", "reseed"])
def test_a_router_without_rows(action, tmp_path):
    """Nothing can be copied, but it can be watched."""
    trainer = make_trainer(
        trainable("moe_llama", router_type="hash"), tmp_path, ExpertCollapseCallback(action=action), max_steps=1
    )
    if action == "warn":
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"\(HashRouter\) has no weight with a row for each expert.*action='warn'"):
        trainer.train()


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
