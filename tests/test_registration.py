# SPDX-License-Identifier: Apache-2.0
"""Registration with the auto classes."""

import subprocess
import sys

import pytest
import transformers
from conftest import FAMILIES, moe_config

import hf_moe
from hf_moe.registration import register


def test_every_class_is_registered_and_importable(family):
    name = FAMILIES[family]
    config_class = getattr(hf_moe, f"Moe{name}Config")
    assert transformers.CONFIG_MAPPING[f"moe_{family}"] is config_class
    for auto_class, head in config_class.auto_classes.items():
        model_class = getattr(hf_moe, f"Moe{name}{head}")
        assert getattr(transformers, auto_class)._model_mapping[config_class] is model_class
    assert type(transformers.AutoModelForCausalLM.from_config(moe_config(family))).__name__ == f"Moe{name}ForCausalLM"


def test_registering_twice_changes_nothing():
    assert register() == register() == hf_moe._MODEL_CLASSES


def test_public_names_are_importable():
    for name in hf_moe.__all__:
        assert getattr(hf_moe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_moe.__getattr__("nothing")


def test_import_brings_in_nothing_heavy():
    heavy = ["peft", "datasets", "accelerate.hooks", "matplotlib", "jinja2", "typer", "transformers.trainer"]
    code = f"import sys, torch; from transformers import LlamaForCausalLM; before = set(sys.modules); import hf_moe; print([m for m in {heavy} if m in set(sys.modules) - before])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
