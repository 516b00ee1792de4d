# SPDX-License-Identifier: Apache-2.0
"""Routers in every family, as remote code, and on several processes."""

import json

import peft
import pytest
import torch
from conftest import FAMILIES, UNGATED_FAMILIES, assert_close, moe_model
from router_cases import ALL_CASES, build_model, with_routing_inputs
from test_modeling_moe import run_on_two_processes, run_without_hf_moe


HEADS = {"bert": "Model", "vit": "Model"}
# A capacity counts tokens without padding, the residual needs the layer before, modalities come through the model's inputs.
MANY_NEEDS = {
    "router_type": "softmax_topk",
    "num_experts": 6,
    "num_copy_experts": 2,
    "router_residual": True,
    "capacity_policy": "batch_prioritized",
    "capacity_group": "sequence",
    "capacity_factor": 0.8,
    "min_capacity": 1,
}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "gpt_neox", "bert"])
def test_every_family_tells_its_blocks_what_is_padding(family, batch):
    model = moe_model(family, HEADS.get(family, "ForCausalLM"), **MANY_NEEDS).eval()
    for module in model.modules():
        if hasattr(module, "capacity") and module.capacity is not None:
            module.capacity.eval_factor = 0.8  # drops, and dropout does not disturb
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    is_token = batch["attention_mask"].bool()
    other = {**given, "input_ids": given["input_ids"].masked_fill(~is_token, 77)}
    outputs = [model(**values, position_ids=positions)[0] for values in (given, other)]
    assert_close(outputs[1][is_token], outputs[0][is_token], 1e-5)
    alone = model(input_ids=given["input_ids"][:1, 3:], attention_mask=given["attention_mask"][:1, 3:])[0]
    assert_close(outputs[0][:1, 3:], alone, 1e-4)
    seen = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    gates[1].register_forward_hook(lambda module, args, output: seen.append(args[1]))
    model(**given, position_ids=positions)
    assert seen[0].previous_logits_TE.shape == (22, 8)
    assert seen[0].mask_T.sum() == is_token.sum()


def test_images_have_no_padding():
    model = moe_model("vit", "Model", **MANY_NEEDS).train()
    output = model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    output.last_hidden_state.sum().backward()
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert all(gate.weight.grad.isfinite().all() for gate in gates)


@pytest.mark.parametrize("kind", ["target_parameters", "modules_to_save"])
@pytest.mark.parametrize(
    "case", ["softmax_topk", "noisy_topk", "gshard", "switch", "attention", "zero-computation experts"]
)
def test_routers_that_peft_wraps(case, kind, batch):
    """The same at first; then the loss and the balance loss train what was added."""
    base = build_model(case, router_aux_loss_coef=1.0)
    given = with_routing_inputs(batch, base)
    expected = base(**given, output_router_logits=True)
    names = {"target_parameters": ["mlp.gate.weight"], "modules_to_save": ["gate"]}[kind]
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], **{kind: names})
    model = peft.get_peft_model(build_model(case, router_aux_loss_coef=1.0), config)
    actual = model.eval()(**given, output_router_logits=True)
    assert_close(actual.logits, expected.logits, 1e-6)
    assert_close(actual.aux_loss, expected.aux_loss, 1e-6)
    model.train()(**given, output_router_logits=True).aux_loss.backward()
    trained = {
        name: parameter for name, parameter in model.named_parameters() if ".gate." in name and parameter.requires_grad
    }
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_experts_choose_in_encoders(family, batch):
    model = moe_model(family, "Model", router_type="expert_choice", num_experts=4, num_experts_per_tok=2)
    loads = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda m, a, output: loads.append((output[2] < 4).sum(0)))
    if family == "vit":
        model(torch.randn(2, 3, 16, 16))
    else:
        model(batch["input_ids"], batch["attention_mask"])
    assert len(loads) == 3
    assert all(len(set(load.tolist())) == 1 for load in loads), "all experts have the same load"


@pytest.mark.parametrize("family", UNGATED_FAMILIES)
@pytest.mark.parametrize("router_type", ["llama4", "top_p", "switch"])
def test_experts_without_a_gate(family, router_type):
    """Beside the same block, one expert after the other."""
    values = {"router_type": router_type, "num_experts_per_tok": 1 if router_type == "switch" else 2}
    model = moe_model(family, "Model" if family in HEADS else "ForCausalLM", **values)
    block = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    _, weights_TK, index_TK = block.gate(states)
    expected = torch.zeros(10, 32)
    for token, state in enumerate(states.view(10, 32)):
        for weight, expert in zip(weights_TK[token], index_TK[token].tolist(), strict=True):
            if expert < 4:
                inner = weight * state if block.weighs_input else state
                hidden = block.experts.act_fn(
                    block.experts.up_proj[expert] @ inner + block.experts.up_proj_bias[expert]
                )
                output = block.experts.down_proj[expert] @ hidden + block.experts.down_proj_bias[expert]
                expected[token] += output if block.weighs_input else weight * output
    assert_close(block(states).view(10, 32), expected, 1e-5)


REMOTE = """
import json, sys
from pathlib import Path
sys.modules["hf_moe"] = None  # an import of hf_moe now fails
import torch, transformers
results = {}
for folder in map(Path, sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    given = {name: torch.tensor(value) for name, value in json.loads((folder / "inputs.json").read_text()).items()}
    results[folder.name] = model(**given).logits.tolist()
assert not [name for name in sys.modules if name.startswith("hf_moe.")]
print(json.dumps(results))
"""


@pytest.mark.processes
@torch.no_grad()
def test_every_router_travels_with_the_checkpoint(batch, tmp_path):
    models = {f"case{place}": build_model(case) for place, case in enumerate(ALL_CASES)}
    given = {name: with_routing_inputs(batch, model) for name, model in models.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        text = json.dumps({key: value.tolist() for key, value in given[name].items()})
        (tmp_path / name / "inputs.json").write_text(text)
    results = run_without_hf_moe(REMOTE, [tmp_path / name for name in models], tmp_path)
    for name, model in models.items():
        assert_close(torch.tensor(results[name]), model(**given[name]).logits, 1e-6)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["expert", "tensor"])
def test_routers_on_two_processes(kind, tmp_path):
    """Experts on two devices, or cut in two; what the router does is the same on both."""
    names = ["switch", "llama4", "top_p", "attention", "hierarchical", "zero-computation experts"]
    models = {f"case{place}": build_model(case) for place, case in enumerate(names)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_on_two_processes(tmp_path, kind, models)
    for name, model in models.items():
        with torch.no_grad():
            expected = model(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits
        for rank in range(2):
            actual = torch.load(tmp_path / name / f"logits{rank}.pt")
            assert_close(actual, expected[rank : rank + 1] if kind == "expert" else expected)
