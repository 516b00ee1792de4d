# SPDX-License-Identifier: Apache-2.0
"""LoRA of experts on activations beside PEFT's own computation: outputs, gradients, files, and everything adapters can do."""

import copy

import pytest
import torch
from conftest import assert_close, randomize
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from small_adapters import Dequantized, fill, ids, loss_and_gradients, targets, with_adapter
from small_models import ALL, small_moe
from torch.nn.utils import parametrize
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

from hf_moe import ExpertLoraConfig, ExpertSelection, apply_esft
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.grouped_lora import GroupedParamWrapper, disable_grouped_lora, enable_grouped_lora


layouts = pytest.mark.parametrize("kind", ALL)


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, bound)


def assert_same_step(model: torch.nn.Module, vanilla: torch.nn.Module, bound: float = 1e-5) -> None:
    """Loss and gradients of one batch."""
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(vanilla)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected, bound)


@layouts
def test_loss_and_gradients_are_those_of_peft(kind):
    vanilla = with_adapter(small_moe(kind))
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    assert_same_step(model, vanilla)
    assert_same_step(disable_grouped_lora(model), vanilla)


@layouts
def test_twenty_steps_of_training_are_those_of_peft(kind):
    losses = []
    vanilla = with_adapter(small_moe(kind), init_lora_weights=True)
    for model in (vanilla, enable_grouped_lora(copy.deepcopy(vanilla))):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        losses.append([])
        torch.manual_seed(0)  # GPT-2 has dropout
        for _ in range(20):
            loss, _ = loss_and_gradients(model.train())
            losses[-1].append(loss)
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.01


@layouts
def test_the_router_and_the_base_can_be_trained_too(kind):
    vanilla = with_adapter(small_moe(kind))
    for parameter in vanilla.parameters():
        parameter.requires_grad_(True)
    # The gradient of gpt-oss's router bias is a sum that nearly cancels: PEFT's own is 2e-5 from that in float64.
    assert_same_step(enable_grouped_lora(copy.deepcopy(vanilla)), vanilla, bound=5e-5 if kind == "gpt_oss" else 1e-5)


def test_experts_with_a_norm_behind_them():
    """Muse Spark's, which are part of no model for text alone."""
    config = MuseSparkTextConfig(
        hidden_size=32,
        num_attention_heads=4,
        moe_hidden_size=16,
        moe_intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "grouped_mm"
    vanilla = torch.nn.Module()
    vanilla.experts = MuseSparkExperts(config)
    randomize(vanilla)
    vanilla.requires_grad_(False)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=3, target_parameters=names, init_lora_weights=False), vanilla)
    for name, parameter in vanilla.named_parameters():
        parameter.requires_grad_("norm" in name or "lora" in name)
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    hidden = torch.randn(6, 16, requires_grad=True)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, requires_grad=True)
    found, expected = (gradients_of_layer(of, hidden, index, weights) for of in (model, vanilla))
    assert any("norm" in name for name in expected)
    assert_same_gradients(found, expected)


def gradients_of_layer(model: torch.nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of a layer of experts, and the gradients of all that has one."""
    output = model.experts(*inputs)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= {str(place): tensor for place, tensor in enumerate(inputs) if tensor.requires_grad}
    gradients = torch.autograd.grad(output.square().sum(), list(trained.values()))
    return {"output": output.detach(), **dict(zip(trained, gradients, strict=True))}


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_tensors_can_be_copied(rank, dtype):
    """As programs do that move them to another device between the passes."""
    model = enable_grouped_lora(with_adapter(small_moe("mixtral"), r=rank)).to(dtype)
    _, expected = loss_and_gradients(model)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor):
        _, found = loss_and_gradients(model)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_few_tokens_and_many_experts(kind, length):
    """Where laying out the factors of all experts is avoided."""
    vanilla = with_adapter(small_moe(kind, num_local_experts=32))
    vanilla.add_adapter("other", LoraConfig(r=5, target_parameters=targets(small_moe(kind))))
    fill(vanilla, 1).base_model.set_adapter(["default", "other"])
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    tokens = ids(1, length)
    found, expected = (of(input_ids=tokens).logits for of in (model, vanilla))
    assert_close(found, expected)
    gradients = []
    for of, logits in ((model, found), (vanilla, expected)):
        of.zero_grad()
        logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in of.named_parameters() if p.grad is not None})
    assert_same_gradients(*gradients)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wrapper, of_peft = (next(m for m in of.modules() if isinstance(m, ParamWrapper)) for of in (model, vanilla))
        inputs = (torch.randn(length, 32), torch.randint(32, (length, 2)), torch.rand(length, 2))
        output = wrapper(*inputs)
    with torch.no_grad():
        assert_close(output, of_peft(*inputs))


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_every_rank(rank):
    vanilla = with_adapter(small_moe("mixtral"), r=rank, use_rslora=True)
    assert_same_step(enable_grouped_lora(copy.deepcopy(vanilla)), vanilla)


@pytest.mark.parametrize("rank", [1, 8])
@torch.no_grad()
def test_in_bfloat16(rank):
    exact = with_adapter(small_moe("mixtral", num_experts_per_tok=4), r=rank)
    vanilla = copy.deepcopy(exact).to(torch.bfloat16)
    expected, theirs = exact(ids()).logits, vanilla(ids()).logits
    ours = enable_grouped_lora(vanilla)(ids()).logits
    assert (ours - expected).abs().mean() < 1.2 * (theirs - expected).abs().mean()


@layouts
def test_several_adapters_at_once(kind):
    vanilla = with_adapter(small_moe(kind))
    vanilla.add_adapter("other", LoraConfig(r=5, lora_alpha=3, target_parameters=targets(small_moe(kind))))
    fill(vanilla, 1)
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    for active in ("default", "other", ["default", "other"]):
        for of in (model, vanilla):
            of.base_model.set_adapter(active)
        assert_same_step(model, vanilla)


def test_adapters_can_be_added_removed_and_switched_off():
    model, vanilla = (with_adapter(small_moe("mixtral")) for _ in range(2))
    enable_grouped_lora(model)
    base = small_moe("mixtral")(ids()).logits
    config = LoraConfig(r=4, target_parameters=targets(small_moe("mixtral")))
    for of in (model, vanilla):
        torch.manual_seed(4)
        of.add_adapter("late", config)
        fill(of, 3).set_adapter("late")
    assert_same_step(model, vanilla)
    with model.disable_adapter():
        assert_close(model(ids()).logits, base)
    for of in (model, vanilla):
        of.delete_adapter("late")
        of.set_adapter("default")
    assert_same_step(model, vanilla)
    assert_close(model.unload()(ids()).logits, base)


@layouts
def test_merging(kind):
    model = enable_grouped_lora(with_adapter(small_moe(kind)))
    expected = model(ids()).logits
    model.merge_adapter()
    assert_close(model(ids()).logits, expected)
    model.unmerge_adapter()
    assert_close(model(ids()).logits, expected)
    assert_close(model.merge_and_unload()(ids()).logits, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    vanilla = with_adapter(small_moe("qwen3_moe")).train()
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_step(model, vanilla)


def test_files_are_interchangeable(tmp_path):
    model = enable_grouped_lora(with_adapter(small_moe("gpt_oss")))
    model.save_pretrained(tmp_path / "ours")
    disable_grouped_lora(model).save_pretrained(tmp_path / "theirs")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    vanilla = PeftModel.from_pretrained(small_moe("gpt_oss"), tmp_path / "ours")
    grouped = enable_grouped_lora(PeftModel.from_pretrained(small_moe("gpt_oss"), tmp_path / "theirs"))
    assert type(next(m for m in vanilla.modules() if isinstance(m, ParamWrapper))) is ParamWrapper
    assert_close(grouped(ids()).logits, vanilla(ids()).logits)
    native = small_moe("gpt_oss")
    native.load_adapter(tmp_path / "theirs")
    assert_close(enable_grouped_lora(native)(ids()).logits, vanilla(ids()).logits)


def test_mixed_batches_that_cannot_be_run():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")).eval())
    with pytest.raises(ExpertLoraError, match="5 names, which cannot be those of 48 tokens"):
        model(ids(4), adapter_names=["default"] * 5)
    model.merge_adapter()
    with pytest.raises(ExpertLoraError, match=r"while \['default'\] are merged.*unmerge_adapter"):
        model(ids(4), adapter_names=["default"] * 4)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_batch_can_mix_adapters(kind):
    model = with_adapter(small_moe(kind)).eval()
    model.add_adapter("other", LoraConfig(r=4, target_parameters=targets(small_moe(kind))))
    fill(model, 1)
    enable_grouped_lora(model)
    names = ["other", "__base__", "default", "other"]
    mixed = model(ids(4), adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids(4)).logits
        else:
            model.set_adapter(name)
            alone = model(ids(4)).logits
        assert_close(mixed[row], alone[row])


def test_enabling_twice_is_enabling_once():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    expected = model(ids()).logits
    assert enable_grouped_lora(model) is model
    assert_close(model(ids()).logits, expected)
    disable_grouped_lora(disable_grouped_lora(model))
    assert not [module for module in model.modules() if type(module) is GroupedParamWrapper]
    assert model.config._experts_implementation != "lora_grouped_mm"


def test_the_configuration_is_saved_as_it_was():
    model = with_adapter(small_moe("mixtral"))
    expected = model.config.to_dict()
    assert enable_grouped_lora(model).config.to_dict() == expected
    assert disable_grouped_lora(model).config.to_dict() == expected


def test_weights_of_all_experts_are_never_built():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    size = model.get_base_model().model.layers[0].mlp.experts.base_layer.base_layer.down_proj.numel()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids(1, 4)).logits.sum().backward()
    assert max(saved) < size


@pytest.mark.parametrize("implementation", ["sonicmoe", "deepgemm", "deepgemm_megamoe", "scattermoe"])
def test_kernels_without_a_place_for_lora_are_refused(implementation):
    for use in (enable_grouped_lora, ExpertLoraConfig(r=2).for_model):
        model = with_adapter(small_moe("mixtral")) if use is enable_grouped_lora else small_moe("mixtral")
        model.config._experts_implementation = implementation
        with pytest.raises(ExpertLoraError, match=f"{implementation}.*experts_implementation='grouped_mm'"):
            use(model)


def test_experts_that_cannot_be_adapted_are_refused():
    model = small_moe("mixtral")
    experts = model.model.layers[1].mlp.experts

    def forward(*args):
        return args[0]

    forward.__module__ = "axolotl.monkeypatch.moe"
    experts.forward = forward
    with pytest.raises(ExpertLoraError, match="layers.1.mlp.experts was changed by 'axolotl"):
        ExpertLoraConfig(r=2).for_model(model)
    del experts.forward
    experts._is_expert_parallel = True
    with pytest.raises(ExpertLoraError, match="expert parallelism.*without `ep_size`"):
        ExpertLoraConfig(r=2).for_model(model)
    experts._is_expert_parallel = False
    apply_esft(model, ExpertSelection({0: [1]}))
    with pytest.raises(ExpertLoraError, match=r"fine-tuned by `apply_esft`.*remove_esft\(model\)"):
        ExpertLoraConfig(r=2).for_model(model)


def test_dropout_keeps_the_expectation():
    model = enable_grouped_lora(with_adapter(small_moe("mixtral"))).train()
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    inputs = (torch.randn(4, 32), torch.randint(4, (4, 2)), torch.rand(4, 2))
    with torch.no_grad():
        expected = wrapper(*inputs)
        # Of the second projection alone, in whose mask the output is linear.
        assert wrapper.parameter_name == "down_proj"
        wrapper.lora_dropout["default"] = torch.nn.Dropout(0.3)
        mean = sum(wrapper(*inputs) for _ in range(1000)) / 1000
    assert_close(mean, expected, 0.02)


def test_models_without_expert_adapters_are_refused():
    model = get_peft_model(small_moe("mixtral"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ExpertLoraError, match="No adapter of this model is on the parameters of experts"):
        enable_grouped_lora(model)


def test_patched_wrappers_are_refused(monkeypatch):
    model = with_adapter(small_moe("mixtral"))

    def forward(self, x, *args, **kwargs):
        return x

    forward.__module__ = "unsloth_zoo.temporary_patches.moe_utils"
    monkeypatch.setattr(ParamWrapper, "forward", forward)
    with pytest.raises(ExpertLoraError, match="ParamWrapper.forward was changed by 'unsloth_zoo"):
        enable_grouped_lora(model)


def test_weights_that_are_computed_when_asked_for():
    """Where PEFT adds its product once more in every pass, since it does not find its own parametrization again."""
    vanilla = with_adapter(small_moe("mixtral"))
    expected_loss, expected = loss_and_gradients(vanilla)
    model = enable_grouped_lora(copy.deepcopy(vanilla))
    for module in list(model.modules()):
        if isinstance(module, ParamWrapper):
            experts = module.get_base_layer()
            if not parametrize.is_parametrized(experts, module.parameter_name):
                parametrize.register_parametrization(experts, module.parameter_name, Dequantized())
                experts.parametrizations[module.parameter_name].original.requires_grad_(False)
    for _ in range(3):
        loss, gradients = loss_and_gradients(model)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_dropout_is_on_the_activations(kind):
    """Not in evaluation; with one mask, gradients are those of finite differences."""
    model = enable_grouped_lora(with_adapter(small_moe(kind))).train()
    without = model(ids()).logits.detach()
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.lora_dropout["default"] = torch.nn.Dropout(0.3)
    with torch.no_grad():
        torch.manual_seed(0)
        one, other = model(ids()).logits, model(ids()).logits
    assert (one - other).abs().max() > 1e-3
    model.eval()
    assert_close(model(ids()).logits, without)

    model.train()
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    weight = wrapper.lora_A["default"].weight
    torch.manual_seed(1)
    loss = model(input_ids=ids(), labels=ids()).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn_like(weight) * gradient.abs().max() / gradient.norm()
    step, losses = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            torch.manual_seed(1)
            losses.append(model(input_ids=ids(), labels=ids()).loss.double())
            weight.sub_(sign * step * direction)
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=0.02)


@pytest.fixture
def nan_in_new_memory():
    """What PyTorch's functions leave undefined is NaN instead of what the memory held before, mostly zeros."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
def test_experts_of_another_device_add_nothing():
    """Expert parallelism names them by an index behind the last, with a weight of zero."""
    model = enable_grouped_lora(with_adapter(small_moe("mixtral")))
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    wrapper.get_base_layer()._is_expert_parallel = True
    hidden = torch.randn(6, 32, requires_grad=True)
    index = torch.tensor([[0, 4], [4, 1], [2, 3], [4, 4], [1, 0], [3, 4]])
    weights = torch.rand(6, 2).masked_fill(index == 4, 0.0).requires_grad_()
    output = wrapper(hidden, index, weights)
    gradients = torch.autograd.grad(output.square().sum(), (hidden, weights))
    kept = index.clamp(max=3)
    expected = wrapper(hidden, kept, weights)
    expected_gradients = torch.autograd.grad(expected.square().sum(), (hidden, weights))
    assert_close(output, expected)
    assert_close(gradients[0], expected_gradients[0])
    assert_close(gradients[1], expected_gradients[1].masked_fill(index == 4, 0.0))
    assert not output[3].any()
