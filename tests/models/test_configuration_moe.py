# SPDX-License-Identifier: Apache-2.0
"""Fields, validation and the auto_map."""

import pytest
from conftest import FAMILIES, moe_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import hf_moe


def test_defaults_and_round_trip(family, tmp_path):
    config = moe_config(family, moe_intermediate_size=None, mlp_layer_types=["sparse", "dense", "sparse"])
    assert config.moe_intermediate_size == config.intermediate_size
    assert config.num_local_experts == config.num_experts == 4
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is getattr(hf_moe, f"Moe{FAMILIES[family]}Config")
    ours, theirs = config.to_dict(), loaded.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


def test_auto_map_names_every_class_of_the_family(family):
    name = FAMILIES[family]
    assert moe_config(family).auto_map == {
        "AutoConfig": f"configuration_moe_{family}.Moe{name}Config",
        "AutoModel": f"modeling_moe_{family}.Moe{name}Model",
        "AutoModelForCausalLM": f"modeling_moe_{family}.Moe{name}ForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_moe_{family}.Moe{name}ForSequenceClassification",
        "AutoModelForTokenClassification": f"modeling_moe_{family}.Moe{name}ForTokenClassification",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 5}, "between 1 and `num_experts` \\(4\\), got 5"),
        ({"num_experts_per_tok": 0}, "between 1 and"),
        ({"router_type": "magic"}, "softmax_topk"),
        ({"mlp_layer_types": ["sparse"]}, "one entry per layer \\(3\\), got 1"),
        ({"mlp_layer_types": ["sparse", "dense", "soft"]}, "soft"),
        ({"mlp_layer_types": ["dense"] * 3}, "use its dense class"),
        ({"use_shared_expert_gate": True}, "shared_expert_intermediate_size"),
        ({"num_experts": 4, "num_experts_per_layer": [4, 2]}, "one entry per layer"),
        ({"num_experts": 4, "num_experts_per_layer": [4, 0, 2]}, "0 for dense layers"),
        ({"num_experts": 4, "num_experts_per_layer": [4, 1, 2]}, "at least `num_experts_per_tok`"),
        ({"num_experts": 8, "num_experts_per_layer": [4, 3, 2]}, "the largest"),
        ({"num_experts": "four"}, "num_experts"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        moe_config("llama", **values)
