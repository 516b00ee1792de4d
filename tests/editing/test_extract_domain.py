# SPDX-License-Identifier: Apache-2.0
"""A domain that was cut out beside the whole model, asked for that domain."""

import pytest
import torch
import transformers
from conftest import assert_close, moe_model

from hf_moe import extract_domain
from hf_moe.models.routers import MoeRouter
from hf_moe.upcycling.errors import UpcycleError


@pytest.mark.parametrize("domain", [0, 1, 2])
@pytest.mark.parametrize(
    "values", [{}, {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_layer": [0, 6, 12]}]
)
def test_it_computes_what_the_whole_model_does_for_this_domain(domain, values, batch, tmp_path):
    whole = moe_model("llama", router_type="hash", num_experts=12, num_hash_domains=3, **values)
    part = extract_domain(whole, domain)
    expected = whole(**batch, domain_ids=torch.full((2,), domain)).logits
    assert torch.equal(part(**batch).logits, expected)
    other = whole(**batch, domain_ids=torch.full((2,), (domain + 1) % 3)).logits
    assert (other - expected).abs().max() > 1e-3
    part.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_experts == 4
    assert_close(loaded(**batch).logits, expected, 1e-6)
    gates = [module for module in loaded.modules() if isinstance(module, MoeRouter)]
    assert all(gate.expert_of_token.shape[0] == 1 and gate.expert_of_token.min() >= 0 for gate in gates)


def test_masking_the_other_domains_changes_nothing(batch):
    """The experts of other domains have no part in it."""
    whole = moe_model("llama", router_type="hash", num_experts=8, num_hash_domains=2)
    expected = whole(**batch, domain_ids=torch.ones(2, dtype=torch.long)).logits
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.experts.gate_up_proj[:4], layer.mlp.experts.down_proj[:4] = torch.nan, torch.nan
    assert torch.equal(whole(**batch, domain_ids=torch.ones(2, dtype=torch.long)).logits, expected)


def test_models_without_domains_and_other_domains_are_refused():
    with pytest.raises(UpcycleError, match="router_type='softmax_topk'"):
        extract_domain(moe_model("llama"), 0)
    whole = moe_model("llama", router_type="hash", num_experts=8, num_hash_domains=2)
    for domain in (2, -1, "1", 1.0, None, True):
        with pytest.raises(UpcycleError, match=f"a whole number from 0 to 1, got {domain!r}"):
            extract_domain(whole, domain)
