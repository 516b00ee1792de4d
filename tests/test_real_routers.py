# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M upcycled to every router: the exactness that is promised, generation, a step of training. `make test-slow`."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe import RoutingRecorder, UpcycleConfig, plan_upcycle, upcycle
from hf_moe.models.routers import MoeRouter
from hf_moe.upcycling.sample import TEXT


sys.path.append(str(Path(__file__).parent / "models"))
from router_cases import ROUTER_CASES


pytestmark = pytest.mark.slow
LAYERS = "0,14,29"


def recipe(router_type: str, **values) -> UpcycleConfig:
    options = copy.deepcopy(ROUTER_CASES[router_type])
    own = {name: options.pop(name) for name in ("num_experts_per_tok", "norm_topk_prob") if name in options}
    fields = {"num_experts": 8, "layers": LAYERS, "router_type": router_type, "router_options": options, **own}
    return UpcycleConfig(**{"target": "hf_moe", **fields, **values})


@pytest.mark.parametrize("router_init", ["normal", "zero"])
@pytest.mark.parametrize("router_type", ROUTER_CASES)
def test_copy_is_as_exact_as_promised(router_type, router_init, smollm2, tmp_path):
    if router_init == "zero" and router_type in ("hash", "relu"):  # which have no rows, or would choose nothing
        return
    config = recipe(router_type, router_init=router_init)
    plan, report = plan_upcycle(smollm2, config), upcycle(smollm2, tmp_path / "moe", config, progress=False)
    print(f"\n{router_type}, {router_init}: promised {plan.exact}, error {report.max_relative_error:.1e}")
    assert report.exact == plan.exact
    assert plan.exact or report.max_relative_error > 1e-3


@pytest.mark.parametrize("router_type", ROUTER_CASES)
def test_residual_generates_what_the_dense_model_does_and_trains(router_type, smollm2, tmp_path):
    upcycle(smollm2, tmp_path / "moe", recipe(router_type, method="residual"), progress=False)
    dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    prompts = tokenizer(["The capital of France is", "def add(a, b):\n    return"], return_tensors="pt", padding=True)
    more = {"domain_ids": torch.tensor([0, 1])} if router_type == "hash" else {}
    with RoutingRecorder(moe) as recorder:
        generated = moe.generate(**prompts, **more, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated, dense.generate(**prompts, max_new_tokens=12, do_sample=False))
    summary = recorder.statistics().summary()
    print(f"\n{router_type}: {summary}")

    inputs = tokenizer([TEXT, TEXT[::-1]], return_tensors="pt", padding=True, truncation=True, max_length=128)
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        output = moe.train()(**inputs, **more, labels=labels, output_router_logits=True)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item() - moe.config.router_aux_loss_coef * float(output.aux_loss))
        gates = [module for module in moe.modules() if isinstance(module, MoeRouter)]
        assert all(parameter.grad.isfinite().all() for gate in gates for parameter in gate.parameters())
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_every_router_in_bfloat16(smollm2, tmp_path):
    """Routing weights stay float32 until the combine, so that copies whose weights sum to 1 are exact to the bit."""
    for router_type in ("softmax_topk", "sigmoid_topk", "normalized_logits", "attention", "gshard", "noisy_topk"):
        config = recipe(router_type)
        if router_type == "sigmoid_topk":
            config.router_options["routed_scaling_factor"] = 1.0
        report = upcycle(smollm2, tmp_path / router_type, config, progress=False)
        print(f"\n{router_type} in bfloat16: {report.parity['bfloat16']['max_relative_error']:.1e}")
        assert report.parity["bfloat16"]["max_relative_error"] == 0.0
