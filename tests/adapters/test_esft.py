# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of chosen experts beside training of all of them whose gradients are masked, and what is saved of it."""

import copy

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file
from small_adapters import Dequantized, ids, loss_and_gradients, with_adapter
from small_models import ALL, small_moe
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments

from hf_moe import ExpertSelection, apply_esft, load_esft, remove_esft, save_esft
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.layers import experts_by_layer, projections


def chosen(model: torch.nn.Module, ids_by_place: tuple[list[int], ...] = ([2, 0], [1])) -> ExpertSelection:
    return ExpertSelection(dict(zip(experts_by_layer(model), ids_by_place, strict=False)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of experts, biases included, by name."""
    return {
        f"{name}.{part}": parameter
        for name, module in experts_by_layer(model).values()
        for part, parameter in module.named_parameters(recurse=False)
        if part.removesuffix("_bias") in projections(module)
    }


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_the_rows_of_those_of_all_experts(kind):
    model = small_moe(kind)
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model))
    selection = chosen(model)
    loss, gradients = loss_and_gradients(apply_esft(model, selection))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    names = {}
    for layer, (name, module) in experts_by_layer(model).items():
        if layer in selection.experts:
            for part in module.trained_experts._parameters:
                names[f"{name}.trained_experts.{part}"] = (f"{name}.{part}", sorted(selection.experts[layer]))
    assert gradients.keys() == names.keys()
    for name, (whole, rows) in names.items():
        assert_close(gradients[name], expected[whole][rows])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_training_is_that_of_all_experts_with_masked_gradients(kind):
    """The reference has neither weight decay nor momentum for the other experts, since they are put back after every step."""
    reference = small_moe(kind)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    model = apply_esft(copy.deepcopy(reference), chosen(reference))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    of_reference = torch.optim.AdamW(weights(reference).values(), lr=1e-2, weight_decay=0.1)
    rows = {
        f"{name}.{part}": [row for row in range(4) if row not in chosen(reference).experts.get(layer, [])]
        for layer, (name, module) in experts_by_layer(reference).items()
        for part in module._parameters
    }
    for _ in range(4):
        loss, _ = loss_and_gradients(model)
        optimizer.step()
        expected_loss, _ = loss_and_gradients(reference)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        of_reference.step()
        with torch.no_grad():
            for name, parameter in weights(reference).items():
                parameter[rows[name]] = before[name][rows[name]]
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == sum(p.numel() for p in trained)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, parameter in reference.state_dict().items():
        assert_close(state[name], parameter)
        if name not in rows:
            assert torch.equal(state[name], before[name])


def test_several_passes_before_one_backward():
    model = small_moe("mixtral")
    model = apply_esft(model, chosen(model))
    loss_and_gradients(model)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = [model(input_ids=ids(), labels=ids()).loss for _ in range(2)]
    sum(losses).backward()
    for name, gradient in expected.items():
        assert_close(model.get_parameter(name).grad, 2 * gradient)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = small_moe("qwen3_moe")
    model = apply_esft(model, chosen(model)).train()
    loss, expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found_loss, found = loss_and_gradients(model)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_copies_in_float32_for_a_model_in_bfloat16():
    model = small_moe("mixtral").to(torch.bfloat16)
    model = apply_esft(model, chosen(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss_and_gradients(model)
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert changed == list(before)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_what_else_is_trained():
    def trained(**values) -> set[str]:
        model = small_moe("qwen2_moe")
        apply_esft(model, ExpertSelection({0: [1]}, **values))
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    own = {f"model.layers.0.mlp.experts.trained_experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert trained() == own
    shared = trained(shared_experts=True) - own
    assert shared
    assert all("shared_expert" in name for name in shared)
    others = trained(non_expert_modules=True) - own
    assert "model.embed_tokens.weight" in others
    assert not [name for name in others if "expert" in name]


def test_the_model_that_comes_out(tmp_path):
    model = small_moe("mixtral")
    model = apply_esft(model, chosen(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    expected = model(ids()).logits
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_close(again(ids()).logits, expected)
    remove_esft(model)
    assert model.config._experts_implementation != "lora_grouped_mm"
    assert_close(model(ids()).logits, expected)
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_experts_are_saved_alone(tmp_path):
    base = small_moe("gpt_oss")
    model = apply_esft(copy.deepcopy(base), chosen(base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    expected = model(ids()).logits
    save_esft(model, tmp_path)
    tensors = load_file(tmp_path / "experts.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert ExpertSelection.load(tmp_path / "expert_cfg.json").experts == {0: [0, 2], 1: [1]}
    assert_close(load_esft(copy.deepcopy(base), tmp_path)(ids()).logits, expected)

    untouched = copy.deepcopy(base)
    first, *_ = tensors
    wrong = {
        "is missing": {name: tensor for name, tensor in tensors.items() if name != first},
        "is left over": {**tensors, "model.other": tensors[first].clone()},
        "has the shape": {**tensors, first: tensors[first][:1].clone()},
        "is not finite": {**tensors, first: tensors[first] * float("nan")},
    }
    for message, content in wrong.items():
        save_file(content, tmp_path / "experts.safetensors")
        with pytest.raises(ExpertLoraError, match=message):
            load_esft(untouched, tmp_path)
    assert_close(untouched(ids()).logits, base(ids()).logits)


def test_the_trainer_resumes(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ids(8)]

    def train(steps: int, resume: bool):
        torch.manual_seed(0)
        model = small_moe(
            "moe_llama"
        )  # the Trainer resumes a Mixtral without its experts, whose names it does not convert
        model = apply_esft(model, chosen(model))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"run-{resume}"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = train(4, resume=False)
    (tmp_path / "run-False").rename(tmp_path / "run-True")
    for folder in (tmp_path / "run-True").glob("checkpoint-4/*"):
        folder.unlink()
    (tmp_path / "run-True" / "checkpoint-4").rmdir()
    again = train(4, resume=True)
    for name, tensor in whole.items():
        assert_close(again[name], tensor)


def test_loading_something_else_keeps_what_was_trained():
    model = small_moe("mixtral")
    model = apply_esft(model, chosen(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.5)
    expected = {name: parameter.detach().clone() for name, parameter in trained.items()}
    model.load_state_dict({"lm_head.weight": model.lm_head.weight.detach().clone()}, strict=False)
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    model.load_state_dict(model.state_dict())
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


def test_checkpoints_with_other_names_are_refused():
    """Under which transformers publishes Mixtral, and which the Trainer does not translate when it resumes."""
    model = small_moe("mixtral")
    model = apply_esft(model, chosen(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    state["model.layers.0.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(2, 2)
    with pytest.raises(ExpertLoraError, match=r"other names for 'model.layers.0.*block_sparse_moe.*from_pretrained"):
        model.load_state_dict(state, strict=False)


def test_experts_of_other_devices_are_not_trained_here():
    model = small_moe("gpt_oss")
    model = apply_esft(model, ExpertSelection({0: [1, 3]}))
    experts = model.model.layers[0].mlp.experts
    index = torch.tensor([[0, 4], [4, 1], [2, 3], [4, 4], [1, 0], [3, 4]])
    weights = torch.rand(6, 2).masked_fill(index == 4, 0.0)
    hidden = torch.randn(6, 32)
    results = []
    for parallel, of in ((True, index), (False, index.clamp(max=3))):
        experts._is_expert_parallel = parallel
        model.zero_grad()
        experts(hidden, of, weights).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in experts.trained_experts.parameters()])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_quantized_experts_are_refused():
    model = small_moe("mixtral")
    parametrize.register_parametrization(model.model.layers[0].mlp.experts, "down_proj", Dequantized())
    with pytest.raises(ExpertLoraError, match=r"quantized or sharded.*selection.ranks"):
        apply_esft(model, ExpertSelection({0: [1]}))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({0: [1]}, "is a dict. Give an ExpertSelection"),
        (ExpertSelection({"0": [1]}), "the layer '0', a str"),
        (ExpertSelection({}), "no expert"),
        (ExpertSelection({0: []}), "no expert"),
        (ExpertSelection({0: [4]}), "expert 4 in layer 0, which has the experts 0 to 3"),
        (ExpertSelection({0: [-1]}), "expert -1"),
        (ExpertSelection({0: [1, 1]}), "twice"),
        (ExpertSelection({9: [1]}), r"layer 9, but experts are in the layers \[0, 1, 2\]"),
    ],
)
def test_what_is_refused(selection, message):
    model = small_moe("mixtral")
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ExpertLoraError, match=message):
        apply_esft(model, selection)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_models_that_are_not_fit_are_refused(tmp_path):
    with pytest.raises(ExpertLoraError, match="has shared_experts, but this model has none"):
        apply_esft(small_moe("mixtral"), ExpertSelection({0: [1]}, shared_experts=True))
    with pytest.raises(ExpertLoraError, match="has an adapter of PEFT.*merge_and_unload"):
        apply_esft(with_adapter(small_moe("mixtral")), ExpertSelection({0: [1]}))
    model = apply_esft(small_moe("mixtral"), ExpertSelection({0: [1]}))
    with pytest.raises(ExpertLoraError, match=r"trained experts already.*remove_esft\(model\)"):
        apply_esft(model, ExpertSelection({0: [1]}))
    with pytest.raises(ExpertLoraError, match="has no expert_cfg.json.*PeftModel.from_pretrained"):
        load_esft(small_moe("mixtral"), tmp_path)
    with pytest.raises(ExpertLoraError, match="none to save"):
        save_esft(small_moe("mixtral"), tmp_path)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ExpertLoraError, match="'lm_head.weight'.*save_pretrained"):
        save_esft(model, tmp_path)
    model.set_experts_implementation("eager")
    with pytest.raises(ExpertLoraError, match="'eager'.*would not be trained"):
        model(ids())
