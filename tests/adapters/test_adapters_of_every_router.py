# SPDX-License-Identifier: Apache-2.0
"""Expert LoRA and ESFT on models with every router of hf_moe, whose experts get whole tokens, filled slots or weighted inputs."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from peft import PeftModel, get_peft_model
from small_adapters import fill

from hf_moe import ExpertLoraConfig, ExpertSelection, apply_esft, enable_grouped_lora, score_experts, select_experts
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.grouped_lora import expert_wrappers
from hf_moe.models.routers import ROUTERS


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import ALL_CASES, build_model, with_routing_inputs


@pytest.fixture(params=ALL_CASES)
def case(request) -> str:
    return request.param


def has_rows(case: str) -> bool:
    return ROUTERS[ALL_CASES[case]["router_type"]].has_rows


def loss_of(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a training step; what is random in it is the same in each."""
    torch.manual_seed(3)
    return model.train()(**given).loss


def test_expert_lora_learns_merges_and_travels(case, batch, tmp_path):
    made = build_model(case)
    given = with_routing_inputs(batch, made)
    expected = loss_of(copy.deepcopy(made), given)
    num_matrices = sum(parameter.ndim == 2 for parameter in made.model.layers[1].mlp.gate.parameters())
    if not has_rows(case):
        with pytest.raises(ExpertLoraError, match="is no matrix called `weight`.*Leave train_router at False"):
            ExpertLoraConfig(r=2, train_router=True).for_model(made)
    config = ExpertLoraConfig(r=2, lora_alpha=4, train_router=has_rows(case)).for_model(made)
    model = get_peft_model(made, config)
    loss = loss_of(model, given)
    assert_close(loss, expected, 1e-6)  # B is zero
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and parameter.grad.isfinite().all() for name, parameter in trained.items())
    assert sum("layers.1.mlp.gate." in name for name in trained) == 2 * num_matrices
    assert (num_matrices > 0) == has_rows(case)
    assert all(p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    torch.optim.SGD(trained.values(), lr=1e-2).step()
    assert loss_of(model, given) < loss

    fill(model, 1).eval().save_pretrained(tmp_path)
    logits = model(**given).logits
    loaded = enable_grouped_lora(PeftModel.from_pretrained(build_model(case), tmp_path).eval())
    assert_close(loaded(**given).logits, logits, 1e-6)
    assert_close(model.merge_and_unload()(**given).logits, logits, 1e-4)


def test_a_batch_mixes_adapters_or_is_refused(case, batch):
    """Where experts get filled slots alone, a row does not say of which sequence it is."""
    made = build_model(case)
    given = {name: value for name, value in with_routing_inputs(batch, made).items() if name != "labels"}
    config = ExpertLoraConfig(r=2)
    model = get_peft_model(made, config.for_model(made))
    model.add_adapter("other", config.for_model(model))
    fill(model, 1).eval()
    if made.model.layers[0].mlp.has_empty_slots:
        with pytest.raises(ExpertLoraError, match="slots may be empty.*`set_adapter`"):
            model(**given, adapter_names=["other", "default"])
        return
    mixed = model(**given, adapter_names=["other", "default"]).logits
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        is_token_S = batch["attention_mask"][row].bool()
        assert_close(mixed[row, is_token_S], model(**given).logits[row, is_token_S], 1e-5)


def test_esft_trains_the_chosen_rows_alone(case, batch):
    made = build_model(case)
    given = with_routing_inputs(batch, made)
    reference = copy.deepcopy(made)
    loss_of(reference, given).backward()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    chosen = {0: [2, 5], 2: [0]}
    model = apply_esft(made, ExpertSelection(chosen))
    loss_of(model, given).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=1.0).step()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, tensor in model.state_dict().items():
        layer = int(name.split("layers.")[1][0]) if ".experts." in name else None
        expected = before[name].clone()
        for row in chosen.get(layer, ()):
            expected[row] -= gradients[name][row]
            assert not torch.equal(tensor[row], before[name][row]) or not gradients[name][row].any()
        assert_close(tensor, expected, 1e-5)


def test_layers_with_different_numbers_of_experts(batch):
    """From scores over a selection to ranks of LoRA, each layer with its own number."""
    counts = {0: 4, 1: 8, 2: 6}
    made = build_model("softmax_topk", num_experts_per_layer=[*counts.values()])
    given = with_routing_inputs(batch, made)
    scores = score_experts(made, [given])
    assert {layer: len(scores_E) for layer, scores_E in scores.layers.items()} == counts
    selection = select_experts(scores, top_p=0.3)
    with pytest.raises(ExpertLoraError, match=r"num_experts has the layers \[0\].*layer 1"):
        selection.ranks({0: 4}, hot=2)
    with pytest.raises(ExpertLoraError, match="8 ranks for layer 0, but there are 4 experts.*dictionary"):
        ExpertLoraConfig(expert_rank=[2] * 8).for_model(made)
    with pytest.raises(ExpertLoraError, match="'r//num_experts', which is not known of this model"):
        ExpertLoraConfig(expert_rank="r//num_experts").for_model(made)
    model = get_peft_model(made, ExpertLoraConfig(expert_rank=selection.ranks(counts, hot=2)).for_model(made))
    loss_of(model, given).backward()
    for _, wrapper in expert_wrappers(model):
        gradient = wrapper.lora_B["default"].weight.grad.view(-1, 2, counts[wrapper.layer])
        trained = gradient.abs().amax((0, 1)).nonzero().flatten().tolist()
        assert trained == sorted(selection.experts[wrapper.layer])
