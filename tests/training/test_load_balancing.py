# SPDX-License-Identifier: Apache-2.0
"""What a LoadBalancer adds to the routers' gradients, beside losses written out by hand, in every setting of a Trainer."""

import copy
import itertools

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from conftest import TINY, assert_close, moe_config, moe_model
from guide_tables import TABLES, place
from peft import LoraConfig, get_peft_model
from router_gradients import KINDS, MODELS, SETTINGS, injected_gradients, native_gradient, rows, trainable
from small_models import small_moe
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from hf_moe import LoadBalancer, LoadBalancingCallback, add_moe_callbacks
from hf_moe.models.routers_sigmoid import ReluRouter
from hf_moe.models.routing_context import Tokens
from hf_moe.training.routers import find_routers


def by_hand(kind: str, logits, index, weights, mask, sigmoid: bool, counts=None) -> torch.Tensor:
    """The loss of one layer, expert by expert and sequence by sequence: `mask` is `(B, S)`."""
    num_experts = logits.shape[-1]
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True) if sigmoid else logits.softmax(-1)

    def switch(kept: torch.Tensor, groups: int = num_experts) -> torch.Tensor:
        chosen = index[kept].flatten()
        share = torch.stack([(chosen == expert).float().mean() for expert in range(num_experts)])
        if counts is not None:  # those of another step, and how many micro-batches it had
            own = torch.stack([(chosen == expert).sum() for expert in range(num_experts)])
            share = own + (1 - 1 / counts[-1]) * counts[:-1]
            share = share / share.sum()
        return groups * sum(
            share[group].sum() * scores[kept][:, group].sum(-1).mean()
            for group in torch.arange(num_experts).chunk(groups)
        )

    kept = mask.flatten().bool()
    if kind in ("switch", "global_batch"):
        return switch(kept)
    if kind == "device":
        return switch(kept, 2)
    if kind == "sequence":
        of_row = [torch.zeros_like(mask).index_copy(0, torch.tensor([row]), mask[[row]]) for row in range(len(mask))]
        return sum(switch(row.flatten().bool()) for row in of_row) / len(mask)
    if kind == "z":
        return torch.log(logits[kept].exp().sum(-1)).pow(2).mean()
    if kind == "entropy":
        return -(scores[kept] * scores[kept].log()).sum(-1).mean()
    importance = torch.stack([weights[kept][index[kept] == expert].sum() for expert in range(num_experts)])
    normal, load = torch.distributions.Normal(0.0, 1 / num_experts), []
    for expert in range(num_experts):
        others = torch.cat([logits[:, :expert], logits[:, expert + 1 :]], dim=-1)
        load.append(normal.cdf(logits[:, expert] - others.topk(index.shape[-1]).values[:, -1])[kept].sum())
    return sum(value.var(correction=0) / value.mean() ** 2 for value in (importance, torch.stack(load)))


def expected_gradient(kind: str, model_kind: str, data, counts=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mean over micro-batches of two rows of the routers' own gradients; what layers counted, in how many of them."""
    model, outputs = trainable(model_kind), []
    routers = [router.module for router in find_routers(model).values()]
    for router in routers:
        router.register_forward_hook(lambda module, args, output: outputs.append(output))
    gradients, counted = [], [0] * len(routers)
    for first in range(0, len(data), 2):
        outputs.clear()
        micro_batch = {key: torch.stack([row[key] for row in data[first : first + 2]]) for key in data[0]}
        model(**micro_batch)
        mask, loss = micro_batch["attention_mask"], 0
        for layer, (logits, weights, index) in enumerate(outputs):
            given = None if counts is None else counts[layer]
            loss = loss + by_hand(kind, logits, index, weights, mask, model_kind == "deepseek_v3", given)
            chosen = index[mask.flatten().bool()].flatten()
            one_batch = torch.tensor([1])
            counted[layer] = counted[layer] + torch.cat(
                [torch.bincount(chosen, minlength=logits.shape[-1]), one_batch]
            )
        gradients.append(torch.stack(torch.autograd.grad(loss, [router.weight for router in routers])))
    return torch.stack(gradients).mean(0), counted


# Qwen3-MoE's routers are Mixtral's, but for what they return.
SLOW_SETTINGS = {("Qwen3-MoE", setting) for setting in SETTINGS} - {("Qwen3-MoE", "accumulation 4")}


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        pytest.param(model, setting, marks=[pytest.mark.slow] if (model, setting) in SLOW_SETTINGS else [])
        for model in MODELS
        for setting in SETTINGS
    ],
)
def test_the_same_gradient_in_every_setting(model, setting):
    """All micro-batches are alike, so that the gradient is that of one of them."""
    found = injected_gradients(MODELS[model], rows(), **SETTINGS[setting])
    for kind, gradient in found.items():
        expected, _ = expected_gradient(kind.split(",")[0], MODELS[model], rows())
        assert_close(gradient, expected, 1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_that_differ(model):
    data = rows(8)
    found = injected_gradients(MODELS[model], data, gradient_accumulation_steps=4)
    for kind in KINDS:
        expected, counted = expected_gradient(kind, MODELS[model], data)
        assert_close(found[kind], expected, 1e-6)
    # The second step of the global batch takes the counts of the first for the other micro-batches.
    expected, _ = expected_gradient("global_batch", MODELS[model], data, counted)
    assert_close(found["global_batch, second step"], expected, 1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_adaptive_coefficients_in_every_setting(setting):
    """Skywork-MoE's equations 7 to 9, with `grad_to="router"`, so that a layer's gradient is of its own coefficient."""
    kinds = {"switch": {"adaptive": True, "grad_to": "router"}}
    found = injected_gradients("mixtral", rows(), kinds, **SETTINGS[setting])
    _, counted = expected_gradient("switch", "mixtral", rows())
    for layer, counts in enumerate(counted):
        overflow = (counts[:-1] / counts[:-1].sum() - 1 / 4).relu().sum()
        coef = 0.99 + 0.01 * float((0.2 * overflow).clamp(max=1.0))
        first, second = found["switch"][layer], found["switch, second step"][layer]
        assert first.norm() > 0.1
        assert_close(second, coef * first, 1e-6)


class MixtralReluRouter(MixtralTopKRouter):
    """A token's two largest logits, where they are positive."""

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, index = logits.relu().topk(self.top_k, dim=-1)
        return logits, weights, index


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_sparsity_loss_in_every_setting(setting):
    """ReMoE's loss: once with the coefficient that it starts with, once with the next one."""

    def relu_model() -> transformers.PreTrainedModel:
        model = trainable("mixtral")
        for router in find_routers(model).values():
            router.module.__class__ = MixtralReluRouter
        return model

    found = injected_gradients(relu_model(), rows(), {"sparsity": {}}, **SETTINGS[setting])
    model, outputs = relu_model(), []
    routers = [router.module for router in find_routers(model).values()]
    for router in routers:
        router.register_forward_hook(lambda module, args, output: outputs.append(output))
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    model(**batch)
    kept, loss = batch["attention_mask"].flatten().bool(), 0
    for logits, _, index in outputs:
        slots = torch.bincount(index[kept].flatten(), minlength=4)
        loss = loss + 4 * (slots / (2 * kept.sum()) * logits[kept].relu().mean(0)).sum()
    expected = torch.stack(torch.autograd.grad(loss, [router.weight for router in routers]))
    assert_close(found["sparsity"], expected, 1e-6)
    # As many experts as there should be: the coefficient goes neither up nor down.
    assert_close(found["sparsity, second step"], expected, 1e-6)


@pytest.mark.slow
def test_the_table_of_the_guide():
    name = "balance in every setting"
    assert place(name)[1] == TABLES[name][1](), "run `python tests/guide_tables.py`"


@pytest.mark.slow
def test_what_transformers_makes_of_its_own():
    """The figures of the guide, for one model: hf_moe has no part in these."""
    found = {name: native_gradient("mixtral", rows(), **setting).norm().item() for name, setting in SETTINGS.items()}
    ratios = {name: round(norm / found["one micro-batch"], 3) for name, norm in found.items()}
    assert ratios["accumulation 8"] == 8
    assert (ratios["label smoothing"], ratios["`compute_loss_func`"], ratios["reentrant checkpointing"]) == (0, 0, 0)


def test_the_last_window_of_an_epoch_is_shorter(tmp_path):
    """Six micro-batches in windows of four: the second has two."""
    data = rows(12)
    model, gradients = trainable("mixtral"), {}
    for coef in (0.0, 1.0):
        found = gradients[coef] = []

        class Take(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, found=found, **kwargs):
                found.append(torch.stack([r.module.weight.grad.clone() for r in find_routers(model).values()]))

        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            gradient_accumulation_steps=4,
            learning_rate=0.0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Take()])
        add_moe_callbacks(trainer, LoadBalancingCallback("switch", coef))
        trainer.train()
    for window, part in enumerate((data[:8], data[8:])):
        expected, _ = expected_gradient("switch", "mixtral", part)
        assert_close(gradients[1.0][window] - gradients[0.0][window], expected, 1e-6)


def test_a_plain_loop_with_accelerate():
    GradientState._reset_state()  # of the Trainers before
    data, accelerator = rows(8), Accelerator(cpu=True, gradient_accumulation_steps=4)
    gradients = []
    for coef in (0.0, 1.0):
        model = trainable("mixtral")
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
        balancer = LoadBalancer("switch", coef).attach(model, accelerator)
        for first in range(0, 8, 2):
            with accelerator.accumulate(model):
                batch = {key: torch.stack([row[key] for row in data[first : first + 2]]) for key in data[0]}
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    gradients.append(torch.stack([r.module.weight.grad.clone() for r in find_routers(model).values()]))
                optimizer.step()
                optimizer.zero_grad()
        balancer.step()
        balancer.detach()
    expected, _ = expected_gradient("switch", "mixtral", data)
    assert_close(gradients[1] - gradients[0], expected, 1e-6)


def test_a_scaled_loss():
    """A gradient scaler multiplies the loss before the backward pass and divides the gradients behind it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    (gradient,) = gradient_added(small_moe("mixtral").train().requires_grad_(True), accelerator)
    (unscaled,) = gradient_added(small_moe("mixtral").train().requires_grad_(True), None)
    assert_close(gradient, 1024 * unscaled)


def gradient_added(model: nn.Module, accelerator=None, **options) -> list[torch.Tensor]:
    """What a loss adds to the routers where the model's own loss has no gradient."""
    balancer = LoadBalancer("switch", 1.0, **options).attach(model, accelerator)
    model.zero_grad()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "attention_mask")}
    (model(**batch).logits.sum() * 0).backward()
    balancer.step()
    balancer.detach()
    return [torch.stack([router.module.weight.grad.clone() for router in find_routers(model).values()])]


def test_autocast_does_not_round_the_loss():
    model = trainable("mixtral")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balancer = LoadBalancer("switch", 1.0).attach(model)
        model(torch.stack([row["input_ids"] for row in rows()]))
    assert {value.dtype for value in balancer.values().values()} == {torch.float32}


def test_only_the_router_is_reached():
    for grad_to, reaches in (("all", True), ("router", False)):
        model = trainable("mixtral")
        (gradient,) = gradient_added(model, grad_to=grad_to)
        others = [p.grad for name, p in model.named_parameters() if "gate.weight" not in name and p.grad is not None]
        assert any(gradient.any() for gradient in others) == reaches
        if grad_to == "all":
            # No gradient of a later layer comes to the last router's own weight in either case.
            last = gradient[-1]
    assert_close(gradient[-1], last)


# Routers that draw random numbers, or look at the logits of the layer before.
DRAWING = (
    {"router_type": "noisy_topk"},
    {"router_type": "gshard", "second_expert_policy": "random"},
    {"router_type": "gshard", "second_expert_policy": "sampling"},
    {"router_type": "switch", "router_jitter_noise": 0.3, "num_experts_per_tok": 1},
    {"router_type": "sigmoid_topk", "router_residual": True},
)


def watched_pass(model, balancer: LoadBalancer | None) -> tuple[list[tuple], dict[str, torch.Tensor], torch.Tensor]:
    """Of a training step: what the routers were called with and returned, the gradients, the state of the random numbers."""
    seen: list[tuple] = []
    for router in find_routers(model).values():
        router.module.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
    if balancer is not None:
        balancer.attach(model)
    torch.manual_seed(0)
    (model(torch.stack([row["input_ids"] for row in rows()])).logits.sum() * 0).backward()
    gradients = {name: of.grad for name, of in model.named_parameters() if of.grad is not None and of.grad.any()}
    return seen, gradients, torch.get_rng_state()


@pytest.mark.parametrize(
    ("options", "use_reentrant"), [*itertools.product(DRAWING, (None, False)), *((of, True) for of in DRAWING[:-1])]
)
def test_the_second_pass_of_a_router_is_the_first(options, use_reentrant):
    """With its random numbers, which the rest of the training does not miss."""
    results = []
    for balancer in (None, LoadBalancer("switch", 1.0, "router")):
        model = moe_model("llama", **options).train()
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        results.append(watched_pass(model, balancer))
    (without, none, state_without), (seen, gradients, state) = results
    assert not none
    assert torch.equal(state, state_without)
    for (_, _, output), (_, _, expected) in zip(seen, without, strict=True):
        assert all(torch.equal(*both) for both in zip(output, expected, strict=True))
    assert gradients
    assert all(".gate." in name for name in gradients)
    values = balancer.values()
    for (router, _, (logits, _, index)), name in zip(seen[:3], find_routers(model), strict=True):
        counts = torch.bincount(index.flatten(), minlength=5)[:4]
        scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        scores = scores if router.score == "sigmoid" else logits.softmax(-1)
        assert_close(values[name], 4 * (counts / counts.sum() * scores.mean(0)).sum().detach(), 1e-6)


def test_the_logits_of_the_layer_before_get_no_gradient():
    model = moe_model("llama", router_type="sigmoid_topk", router_residual=True).train()
    seen, gradients, _ = watched_pass(model, LoadBalancer("switch", 1.0, "router"))
    for layer, (router, (hidden, tokens), _) in enumerate(list(seen)):
        before = None if tokens.previous_logits_TE is None else tokens.previous_logits_TE.detach()
        logits, weights, index = router(hidden.detach(), Tokens(2, previous_logits_TE=before))
        loss = by_hand("switch", logits, index, weights, torch.ones(2, 12), True)
        for key, gradient in zip(
            dict(router.named_parameters()), torch.autograd.grad(loss, list(router.parameters())), strict=True
        ):
            assert_close(gradients[f"model.layers.{layer}.mlp.gate.{key}"], gradient, 1e-6)


def test_the_models_own_loss_keeps_its_gradient():
    """The second pass of a router leaves the loss alone that the first left for the model."""
    gradients = []
    for balancer in (None, LoadBalancer("switch", 1.0, "router")):
        model = moe_model("llama", router_type="normalized_logits", router_aux_loss_coef=1.0).train()
        if balancer is not None:
            balancer.attach(model)
        ids = torch.stack([row["input_ids"] for row in rows()])
        model(ids, labels=ids, output_router_logits=True).aux_loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("grad_to", ["all", "router"])
def test_frozen_routers_bend_nothing(grad_to, caplog):
    model = get_peft_model(small_moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with caplog.at_level("WARNING"):
        balancer = LoadBalancer("switch", 1.0, grad_to).attach(model.train())
    assert "are frozen, so that no balance loss 'switch' is added" in caplog.text
    (model(torch.stack([row["input_ids"] for row in rows()])).logits.sum() * 0).backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert not balancer.values()


@pytest.mark.parametrize("adapter", [{"target_parameters": ["mlp.gate.weight"]}, {"modules_to_save": ["mlp.gate"]}])
def test_adapters_of_routers_are_trained(adapter):
    config = LoraConfig(r=2, target_modules=["q_proj"], **adapter, init_lora_weights=False)
    model = get_peft_model(small_moe("mixtral"), config)
    LoadBalancer("switch", 1.0).attach(model.train())
    (model(torch.stack([row["input_ids"] for row in rows()])).logits.sum() * 0).backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_nothing_in_evaluation_or_without_gradients():
    model = trainable("mixtral")
    balancer = LoadBalancer("global_batch", 1.0).attach(model)
    input_ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        model(input_ids)
    model.eval()
    (model(input_ids).logits.sum() * 0).backward()
    assert not any(router.module.weight.grad.any() for router in find_routers(model).values())
    balancer.step()
    assert balancer.state_dict()["window"] == {}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_passes_before_one_backward_pass(use_reentrant):
    """Recomputation takes the padding of its own pass."""
    one, two = rows(2), rows(4)[2:]
    model = trainable("mixtral")
    single = [expected_gradient("switch", "mixtral", part)[0] for part in (one, two)]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    LoadBalancer("switch", 1.0).attach(model)
    loss = 0
    for part in (one, two):
        batch = {key: torch.stack([row[key] for row in part]) for key in ("input_ids", "attention_mask")}
        loss = loss + model(**batch).logits.sum() * 0
    loss.backward()
    found = torch.stack([router.module.weight.grad for router in find_routers(model).values()])
    assert_close(found, sum(single), 1e-6)


def test_warm_up_and_decay():
    balancer, model = LoadBalancer("switch", 1.0, warmup_steps=4, decay_steps=10), trainable("mixtral")
    schedule = []
    for _ in range(16):
        schedule.append(balancer.schedule)
        balancer.attach(model)
        balancer.step()
        balancer.detach()
    assert schedule == pytest.approx([0, 0.25, 0.5, 0.75, *(1 - step / 10 for step in range(10)), 0, 0])


def test_the_adaptive_coefficient_follows_the_overflow():
    """Skywork-MoE's equations 7 to 9 by hand."""
    model = trainable("mixtral")
    balancer = LoadBalancer("switch", 0.01, adaptive=True).attach(model)
    router = next(iter(find_routers(model)))
    expected = 0.01
    for _ in range(3):
        counted = []
        handle = model.get_submodule(router).register_forward_hook(lambda m, a, o, c=counted: c.append(o[2]))
        model(torch.stack([row["input_ids"] for row in rows()]))
        handle.remove()
        shares = (torch.bincount(counted[0].flatten(), minlength=4).double() / counted[0].numel()).tolist()
        overflow = sum(max(0.0, share - 0.25) for share in shares)
        balancer.step()
        expected = 0.99 * expected + 0.01 * min(0.2 * overflow, 0.01)
        assert balancer.state_dict()["coefs"][router] == pytest.approx(expected, rel=1e-12)


def test_the_adaptive_coefficient_follows_what_is_dropped():
    """In a layer with a capacity: the share of slots that the experts had no room for, counted where they get them."""
    model = moe_model(
        "llama", router_type="normalized_logits", capacity_policy="position", capacity_factor=0.6, min_capacity=1
    ).train()
    balancer = LoadBalancer("squared_deviation", 0.1, adaptive=True).attach(model)
    ids = torch.stack([row["input_ids"] for row in rows()])
    routers, expected = list(find_routers(model)), [0.1] * 3
    for _ in range(4):
        seen = []
        handles = [
            layer.mlp.capacity.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out[1]))
            for layer in model.model.layers
        ]
        model(ids).logits.sum().backward()
        for handle in handles:
            handle.remove()
        balancer.step()
        for layer, index_TK in enumerate(seen):
            dropped = (index_TK == 4).sum().item() / index_TK.numel()
            assert dropped > 0.1
            expected[layer] = 0.99 * expected[layer] + 0.01 * min(0.2 * dropped, 0.1)
        coefs = balancer.state_dict()["coefs"]
        assert [coefs[name] for name in routers] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["squared_deviation", "heterogeneous", "importance_load"])
def test_the_gradient_is_that_of_the_models_own_loss(kind):
    """Beside the loss that the model adds itself."""
    options = {
        "squared_deviation": {"router_type": "normalized_logits"},
        "heterogeneous": {"num_copy_experts": 1, "num_zero_experts": 1},
        "importance_load": {"router_type": "noisy_topk"},
    }[kind]
    gradients = []
    for is_own in (True, False):
        model = moe_model("llama", router_aux_loss_coef=0.3 if is_own else 0.0, **options).train()
        batch = {name: torch.stack([row[name] for row in rows()[:2]]) for name in ("input_ids", "attention_mask")}
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if not is_own:
            balancer = LoadBalancer(kind, coef=0.3 / 3).attach(
                model
            )  # which adds the layers, where the model takes their mean
        torch.manual_seed(0)
        model(**batch, output_router_logits=is_own).loss.backward()
        gradients.append(torch.stack([router.module.weight.grad for router in find_routers(model).values()]))
    balancer.detach()
    assert gradients[0].abs().max() > 0
    assert_close(gradients[1], gradients[0], 1e-5)


def test_heterogeneous_needs_zero_computation_experts():
    model = moe_model("llama").train()
    LoadBalancer("heterogeneous").attach(model)
    with pytest.raises(ValueError, match="which model.layers.0.mlp.gate has not. Use kind='switch'"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_sparsity_comes_to_its_target():
    """ReMoE's controller: from half of the experts to a quarter of them, within 2 %."""
    torch.manual_seed(0)
    inputs = torch.cat([torch.randn(512, 15), torch.ones(512, 1)], dim=1)  # the last one makes a bias
    router = ReluRouter(moe_config("llama", hidden_size=16, num_experts=8, router_type="relu"), num_experts=8)
    torch.nn.init.normal_(router.weight, std=0.3)
    model = router_model(router)
    balancer = LoadBalancer("sparsity", 1e-4).attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsity = []
    for _ in range(400):
        logits, weights, _ = model(inputs_embeds=inputs[None])
        loss = -(weights.clamp(max=1).mean())  # which wants more experts
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        sparsity.append(float((logits <= 0).float().mean()))
    assert sparsity[0] < 0.6
    assert sum(sparsity[-50:]) / 50 == pytest.approx(1 - 2 / 8, abs=0.02)


def router_model(router: nn.Module) -> transformers.PreTrainedModel:
    """A model that is a router alone."""

    class RouterModel(transformers.PreTrainedModel):
        config_class = transformers.MixtralConfig
        _can_record_outputs = {
            "router_logits": transformers.utils.output_capturing.OutputRecorder(type(router), index=0)
        }

        def __init__(self, config):
            super().__init__(config)
            self.gate = router

        def forward(self, inputs_embeds):
            return self.gate(inputs_embeds.flatten(0, 1))

    return RouterModel(transformers.MixtralConfig(num_experts_per_tok=2)).train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "gshard"}, "kind is 'gshard'. Choose from 'switch', 'global_batch'"),
        ({"coef": -1.0}, "coef is -1.0. Choose 0 or more"),
        ({"coef": float("nan")}, "coef is nan"),
        ({"grad_to": "experts"}, "grad_to is 'experts'. Choose from 'all', 'router'"),
        ({"kind": "device"}, "num_devices is None with kind='device'"),
        ({"num_devices": 2}, "num_devices is 2 with kind='switch'"),
        ({"kind": "z", "adaptive": True}, "adaptive is for losses that balance"),
        ({"score": "tanh"}, "score is 'tanh'"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoadBalancer(**values)


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="Linear declares no router"):
        LoadBalancer().attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attached to no model"):
        LoadBalancer().step()
    model = trainable("mixtral")
    LoadBalancer("device", num_devices=3).attach(model)
    with pytest.raises(ValueError, match="4 experts cannot be divided into num_devices=3"):
        model(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"router_type": "hash"}, "z", "router_type='hash' .* learns nothing.* Leave the balance loss out"),
        (
            {"router_type": "soft", "num_experts_per_tok": 4},
            "switch",
            "router_type='soft' .* same load, so that 'switch'",
        ),
        (
            {"router_type": "expert_choice", "allow_causal_expert_choice": True},
            "global_batch",
            "router_type='expert_choice' .* same load",
        ),
        ({"router_type": "soft", "num_experts_per_tok": 4}, "sequence", "router_type='soft' .* same load"),
        (
            {"router_type": "expert_choice", "allow_causal_expert_choice": True, "capacity_group": "sequence"},
            "sequence",
            "router_type='expert_choice' .* same load",
        ),
    ],
)
def test_routers_that_no_loss_can_balance(options, kind, message):
    model = moe_model("llama", **options).train()
    with pytest.raises(ValueError, match=message):
        LoadBalancer(kind).attach(model)
    LoadBalancer(kind, coef=0.0).attach(model)
    if options["router_type"] != "hash":
        LoadBalancer("importance_load").attach(model)


def test_a_router_that_does_not_reach_the_loss_is_said(caplog):
    model = trainable("mixtral")
    balancer = LoadBalancer("switch").attach(model)
    model(torch.ones(1, 3, dtype=torch.long))
    with caplog.at_level("WARNING"):
        balancer.step()
    assert "was added to no backward pass" in caplog.text


def test_scores_are_found_out():
    for kind, score in (
        ("mixtral", "softmax"),
        ("gpt_oss", "softmax"),
        ("deepseek_v3", "sigmoid"),
        ("nemotron_h", "sigmoid"),
    ):
        model, found = small_moe(kind), []
        routers = find_routers(model)
        for router in routers.values():
            router.module.register_forward_hook(lambda m, a, output, r=router, f=found: f.append(r.find_score(output)))
        model(torch.ones(1, 9, dtype=torch.long).cumsum(1) + 3)
        assert set(found) == {(score, True)}
    router = next(iter(find_routers(small_moe("mixtral")).values()))
    zero = (torch.zeros(3, 4), torch.full((3, 2), 0.5), torch.tensor([[0, 1]] * 3))
    assert router.find_score(zero) == ("softmax", False)
    assert router.find_score(zero, "sigmoid") == ("sigmoid", False)
    odd = (torch.randn(3, 4), torch.tensor([[0.999, 0.001]] * 3), torch.tensor([[0, 1], [3, 1], [1, 2]]))
    with pytest.raises(ValueError, match="are in proportion to none of softmax"):
        router.find_score(odd)


def test_scores_of_a_single_expert():
    """Its weight is 1 where it is normalised; Llama 4 returns scores of all experts."""
    for kind, values, score in (
        ("mixtral", {"num_experts_per_tok": 1}, "softmax"),
        ("qwen2_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}, "softmax"),
        ("deepseek_v3", {"num_experts_per_tok": 1, "norm_topk_prob": False}, "sigmoid"),
    ):
        model = small_moe(kind, **values).train().requires_grad_(True)
        balancer = LoadBalancer("switch").attach(model)
        model(torch.stack([row["input_ids"] for row in rows()]))
        assert set(balancer._hooks._scores.values()) == {score}, kind
    values = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**TINY, **values})).train()
    balancer = LoadBalancer("switch").attach(model)
    model(torch.stack([row["input_ids"] for row in rows()]))
    assert set(balancer._hooks._scores.values()) == {"sigmoid"}


def test_routers_inside_routers_are_the_routers():
    config = transformers.JetMoeConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
    )
    assert set(find_routers(transformers.JetMoeForCausalLM(config))) == {
        f"model.layers.{layer}.{part}.router" for layer in range(2) for part in ("self_attention.experts", "mlp")
    }


def test_batches_that_are_refused():
    model = trainable("mixtral")
    input_ids = torch.stack([row["input_ids"] for row in rows()]).view(1, -1)
    positions = torch.arange(12).repeat(2)[None]
    LoadBalancer("sequence").attach(model)
    with pytest.raises(ValueError, match="packed or padding-free batches, in which sequences"):
        model(input_ids, position_ids=positions)
    model = trainable("mixtral")
    LoadBalancer("sparsity").attach(model)
    with pytest.raises(
        ValueError, match=r"of model.layers.0.mlp.gate are the softmax. Their number of experts is fixed"
    ):
        model(input_ids)
    model = trainable("mixtral")
    model.model.layers[1].mlp.gate.weight.data[0, 0] = float("nan")
    LoadBalancer("switch").attach(model)
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate: The logits of MixtralTopKRouter are NaN"):
        model(input_ids)


def test_state_goes_on():
    model = trainable("mixtral")
    balancer = LoadBalancer("global_batch", adaptive=True).attach(model)
    model(torch.stack([row["input_ids"] for row in rows()]))
    balancer.step()
    state = balancer.state_dict()
    other = LoadBalancer("global_batch", adaptive=True)
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict() == state
    assert state["num_steps"] == 1


def test_the_models_own_loss_is_said_in_a_loop_too(caplog):
    with caplog.at_level("WARNING"):
        LoadBalancer().attach(trainable("mixtral"))
        assert not caplog.text
        LoadBalancer().attach(nn.ModuleList([trainable("mixtral", output_router_logits=True)]))
    assert "The model's own balance loss is on as well (router_aux_loss_coef=0.001)" in caplog.text


def test_the_state_of_another_loss_is_refused():
    state = LoadBalancer("z").state_dict()
    with pytest.raises(ValueError, match="a balance loss of kind 'z', and this is one of kind 'switch'"):
        LoadBalancer("switch").load_state_dict(state)


@pytest.mark.parametrize("kind", ["global_batch", "sparsity"])
def test_a_step_without_a_pass_changes_nothing(kind):
    balancer = LoadBalancer(kind, 0.0).attach(trainable("mixtral"))
    balancer.step()
    assert balancer.state_dict()["coefs"] == {}


def test_a_router_that_did_not_run_in_the_step_before_has_its_own_counts_alone():
    """As one that no process ran, for which the sum over processes is zero."""
    model = trainable("mixtral")
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    gradients = []
    for kind in ("switch", "global_batch"):
        balancer = LoadBalancer(kind, 1.0)
        window = {name: [0.0] * 6 for name in find_routers(model)}
        balancer.load_state_dict({"kind": kind, "num_steps": 1, "coefs": {}, "window": window, "values": {}})
        balancer.attach(model)
        model.zero_grad()
        (model(**batch).logits.sum() * 0).backward()
        gradients.append(torch.stack([router.module.weight.grad.clone() for router in find_routers(model).values()]))
        balancer.detach()
    assert gradients[0].norm() > 0.1
    assert_close(gradients[1], gradients[0], 1e-6)


def test_attached_twice_and_detached_once():
    model, balancer = trainable("mixtral"), LoadBalancer("switch", 1.0)
    gradients = []
    for _ in range(2):
        balancer.attach(model)
        model.zero_grad()
        (model(torch.stack([row["input_ids"] for row in rows()])).logits.sum() * 0).backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert torch.equal(*gradients)
    balancer.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": "0.1"}, "coef is '0.1'. Give a number"),
        ({"coef": float("inf")}, "coef is inf. Choose 0 or more"),
        ({"warmup_steps": -3}, "warmup_steps is -3. Choose 0 or more"),
        ({"decay_steps": 0}, "decay_steps is 0. Choose a number above 0, or None"),
        ({"kind": "device", "num_devices": 0}, "num_devices is 0. Choose a number above 0"),
        ({"kind": "device"}, "num_devices is None with kind='device'. 'device', and it alone, needs it"),
        ({"noise_std": 0.0}, "noise_std is 0.0. Choose a number above 0, or None"),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LoadBalancer(**options)


def test_a_model_that_was_compiled_before():
    """A compiled model does not look for hooks that are added later, so that it is compiled again."""
    batch, gradients = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids",)}, []
    for is_compiled in (False, True):
        model = trainable("mixtral")
        model.set_experts_implementation("batched_mm")
        run = torch.compile(model, backend="eager") if is_compiled else model
        (run(**batch).logits.sum() * 0).backward()
        balancer = LoadBalancer("switch", 1.0).attach(model)
        (run(**batch).logits.sum() * 0).backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
        balancer.detach()
        (run(**batch).logits.sum() * 0).backward()
        assert torch.equal(model.model.layers[0].mlp.gate.weight.grad, gradients[-1])
    assert gradients[0].norm() > 0.1
    assert_close(gradients[1], gradients[0], 1e-5)


def test_a_score_is_not_kept_that_zeros_tell():
    """Routers begin with zeros, or choose with a bias, and are softmax all the same."""
    model = trainable("mixtral")
    for router in find_routers(model).values():
        router.module.register_buffer("e_score_correction_bias", torch.zeros(4))
        router.module.weight.data.zero_()
    balancer = LoadBalancer("switch", 1.0).attach(model)
    ids = torch.stack([row["input_ids"] for row in rows()])
    model(ids)
    assert balancer._hooks._scores == {}
    for router in find_routers(model).values():
        router.module.weight.data.normal_()
    model(ids)
    assert set(balancer._hooks._scores.values()) == {"softmax"}


@pytest.mark.parametrize("top_k", [1, 2])
def test_hf_moes_routers_say_their_score(top_k):
    model = small_moe("moe_llama", use_expert_bias=True, num_experts_per_tok=top_k).train()
    balancer = LoadBalancer("switch", 1.0).attach(model)
    model(torch.stack([row["input_ids"] for row in rows()]))
    assert set(balancer._hooks._scores.values()) == {"softmax"}


@pytest.mark.parametrize(
    "values", [{"router_type": "prototypes"}, {"router_type": "hierarchical", "n_group": 2, "norm_topk_prob": False}]
)
def test_log_probabilities_have_no_z_loss(values):
    model = moe_model("llama", **values).train()
    LoadBalancer("z").attach(model)
    with pytest.raises(ValueError, match="no z-loss. Leave 'z' out"):
        model(torch.ones(1, 3, dtype=torch.long))
