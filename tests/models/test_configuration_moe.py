# SPDX-License-Identifier: Apache-2.0
"""Fields, validation and the auto_map."""

import pytest
import torch
import transformers
from conftest import FAMILIES, dense_config, moe_class, moe_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig


TASKS = ("CausalLM", "SequenceClassification", "TokenClassification")


def test_defaults_and_round_trip(family, tmp_path):
    config = moe_config(family, moe_intermediate_size=None, mlp_layer_types=["sparse", "dense", "sparse"])
    assert config.moe_intermediate_size == config.intermediate_size
    assert config.num_local_experts == config.num_experts == 4
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is moe_class(family, "Config")
    ours, theirs = config.to_dict(), loaded.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


def test_auto_map_names_every_class_of_the_family(family):
    name = FAMILIES[family]
    auto_classes = ["AutoModel", *(f"AutoModelFor{task}" for task in TASKS)]
    # Those in which transformers has the dense family.
    heads = {
        auto_class: auto_class.removeprefix("AutoModel") or "Model"
        for auto_class in auto_classes
        if type(dense_config(family)) in getattr(transformers, auto_class)._model_mapping
    }
    assert moe_config(family).auto_map == {
        "AutoConfig": f"configuration_moe_{family}.Moe{name}Config",
        **{auto_class: f"modeling_moe_{family}.Moe{name}{head}" for auto_class, head in heads.items()},
    }


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemmas_activation_is_the_experts(family, tmp_path):
    config = moe_config(family, hidden_activation="relu")
    config.save_pretrained(tmp_path)
    for loaded in (config, AutoConfig.from_pretrained(tmp_path)):
        assert loaded.hidden_act == loaded.hidden_activation == "relu"
        model = moe_class(family, "ForCausalLM")(loaded)
        assert isinstance(model.model.layers[0].mlp.experts.act_fn, torch.nn.ReLU)
    assert 'hidden_act"' not in (tmp_path / "config.json").read_text()


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


def test_names_that_look_misspelt_are_warned_of(caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        moe_config("llama", router_typ="switch", num_experts_per_token=1)
    for wrong, right in (("router_typ", "router_type"), ("num_experts_per_token", "num_experts_per_tok")):
        assert f"`{wrong}` is no field of this configuration and has no effect. Did you mean `{right}`?" in caplog.text


def test_other_names_are_kept_without_a_word(family, caplog):
    """Those of the dense configuration, those of ours under another name, and what somebody else's tools have put there."""
    known = {**dense_config(family).to_dict(), "num_local_experts": 4, "mood_of_the_day": "good"}
    for name in ("model_type", "architectures", "transformers_version"):
        known.pop(name, None)
    with caplog.at_level("WARNING", logger="transformers"):
        config = moe_class(family, "Config")(**{**moe_config(family).to_dict(), **known})
    assert "Did you mean" not in caplog.text
    assert config.mood_of_the_day == "good"


def test_whole_numbers_are_numbers():
    config = moe_config("llama", router_jitter_noise=0, router_aux_loss_coef=1, router_top_p=1, router_type="top_p")
    assert config.router_jitter_noise == 0
    with pytest.raises(StrictDataclassError, match="`n_group` must be at least 1, which means no groups, got 0"):
        moe_config("llama", n_group=0)
