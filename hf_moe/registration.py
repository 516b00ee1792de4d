# SPDX-License-Identifier: Apache-2.0
"""The one table of what hf_moe registers with transformers, and `register()`, which `import hf_moe` calls."""

import importlib

import transformers


FAMILIES = (
    "bert",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "vit",
)


def register() -> dict[str, type]:
    """
    Register every MoE class with its auto class; calling it again changes nothing.

    Returns:
        `dict[str, type]`: the registered classes by name.
    """
    classes = {}
    for family in FAMILIES:
        configuration = importlib.import_module(f"hf_moe.models.configuration_moe_{family}")
        modeling = importlib.import_module(f"hf_moe.models.modeling_moe_{family}")
        (config_name,) = configuration.__all__
        config_class = getattr(configuration, config_name)
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        classes[config_name] = config_class
        for auto_name, reference in config_class.auto_class_references().items():
            if auto_name == "AutoConfig":
                continue
            model_class = getattr(modeling, reference.rpartition(".")[2])
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_name)
            classes[model_class.__name__] = model_class
    return classes
