# SPDX-License-Identifier: Apache-2.0
"""The model that an adapter is for: its class, the model without weights, and the model with them."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .errors import ExpertLoraError


# PEFT's task types whose models are of one auto class; of the others, the configuration knows the class.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def read_base_config(base: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """
    The configuration of the model in a folder or on the Hub.

    Raises:
        ExpertLoraError: if there is no model.
    """
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ExpertLoraError(
            f"{base} is no folder with a model, and no model that can be had from the Hub."
        ) from error


def auto_class(config: PreTrainedConfig, task: str | None) -> Any:
    """The auto class of the model for a task, or of the class that the configuration names."""
    if task in TASKS:
        return getattr(transformers, TASKS[task])
    architecture = (config.architectures or ["ForCausalLM"])[0]
    head = re.search("For[A-Z][A-Za-z]*$", architecture)
    if head is None and "LMHead" not in architecture:
        return transformers.AutoModel
    head_name = head[0] if head else "ForCausalLM"
    return getattr(transformers, f"AutoModel{head_name}", transformers.AutoModelForImageTextToText)


def without_weights(base: PreTrainedModel | str | Path, task: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device: names and shapes alone."""
    with torch.device("meta"), no_init_weights():
        if isinstance(base, PreTrainedModel):
            model = type(base)(copy.deepcopy(base.config))
        else:
            config = read_base_config(base, trust_remote_code)
            model = auto_class(config, task).from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
        return model


def with_weights(base: str | Path, task: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model as it is."""
    config = read_base_config(base, trust_remote_code)
    return auto_class(config, task).from_pretrained(
        base, trust_remote_code=trust_remote_code, dtype="auto", device_map="auto"
    )
