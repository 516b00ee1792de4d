# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models of every family, offline mode, and a guard that fails on deprecation warnings of our libraries."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import copy
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_moe


# What the names of hf_moe's classes start with, behind "Moe".
FAMILIES = {
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}
# Families whose feed-forwards have no gate. Not all of them are language models, so tests of their own look at them.
UNGATED_FAMILIES = {"bert": "Bert", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "vit": "ViT"}
# The families that stand for all of them in tests of what is the same for every family.
CORE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Dense classes that are not called as ours are.
DENSE_NAMES = {"Gemma3TextForCausalLM": "Gemma3ForCausalLM", "GPT2ForCausalLM": "GPT2LMHeadModel"}

ROPE = {"rope_type": "default", "rope_theta": 5000.0}
ROPE_PER_LAYER_TYPE = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MLA = {  # multi-head latent attention, as in DeepSeek
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
}
# What each family has besides: whatever makes it special, with values that matter in a tiny model. `head_dim` is not
# hidden_size / heads where the family lets it differ.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 4.0}
TINY_OF_FAMILY = {
    "bert": {"tie_word_embeddings": True, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "gemma2": {**GEMMA, **ALTERNATING},
    "gemma3_text": {**GEMMA, **ALTERNATING, "rope_parameters": ROPE_PER_LAYER_TYPE},
    "gpt2": {"tie_word_embeddings": True, "n_inner": 48, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_neox": {
        "hidden_dropout": 0.2,
        "attention_dropout": 0.2,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "granite": {
        "head_dim": 16,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16},
    "olmo2": {"head_dim": 16},
    "olmo3": {"head_dim": 16, **ALTERNATING, "rope_parameters": ROPE_PER_LAYER_TYPE},
    "phi3": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"head_dim": 16, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    "stablelm": {
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "vit": {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
}

torch.manual_seed(0)
torch.set_num_threads(1)


def called_by_us() -> bool:
    """Whether hf_moe's own code is among the callers."""
    package = str(Path(hf_moe.__file__).parent) + os.sep
    frames = (
        frame for frame in traceback.extract_stack() if frame.name != "train_and_end"
    )  # around all of a training
    return any(frame.filename.startswith(package) for frame in frames)


class DeprecationRecorder(logging.Handler):
    """Collects what is announced as deprecated, by log or by warning, while code of hf_moe runs."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower() and called_by_us():
            self.messages.append(record.getMessage())

    def showwarning(self, message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, DeprecationWarning | FutureWarning) and called_by_us():
            self.messages.append(str(message))


@pytest.fixture(autouse=True)
def no_deprecations():
    """Fail a test in which code of hf_moe uses something that transformers, peft or another library deprecates."""
    recorder = DeprecationRecorder()
    loggers = [logging.getLogger("transformers"), logging.getLogger("peft")]
    for logger in loggers:
        logger.addHandler(recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = recorder.showwarning
        yield recorder
    for logger in loggers:
        logger.removeHandler(recorder)
    assert not recorder.messages, f"deprecation warnings: {recorder.messages}"


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Name of a dense family."""
    return request.param


@pytest.fixture(params=CORE_FAMILIES)
def core_family(request) -> str:
    """Name of one of the dense families that stand for all."""
    return request.param


def dense_class(family: str, name: str) -> type:
    """The transformers class whose counterpart is `Moe<Family><name>`."""
    name = {**FAMILIES, **UNGATED_FAMILIES}[family] + name
    return getattr(transformers, DENSE_NAMES.get(name, name))


def moe_class(family: str, name: str) -> type:
    """The class of hf_moe whose name ends in `name`."""
    return getattr(hf_moe, "Moe" + {**FAMILIES, **UNGATED_FAMILIES}[family] + name)


def dense_config(family: str, **values) -> transformers.PreTrainedConfig:
    """Configuration of a tiny dense model."""
    return dense_class(family, "Config")(**copy.deepcopy({**TINY, **TINY_OF_FAMILY[family], **values}))


def dense_model(family: str, head: str = "ForCausalLM", dtype=torch.float32, **values) -> transformers.PreTrainedModel:
    """Tiny dense model in which nothing is left at a default: norms and biases are random too."""
    model = dense_class(family, head)(dense_config(family, **values))
    randomize(model)
    return model.to(dtype).eval() if dtype == torch.float32 else cast(model, dtype)


def cast(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Parameters in `dtype`, buffers (rotary frequencies) as they are: what `from_pretrained(dtype=)` gives."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, and the biases that routers choose with, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.15 * torch.randn(buffer.shape, generator=generator))


def moe_config(family: str, **values) -> transformers.PreTrainedConfig:
    """Configuration of a tiny model of hf_moe."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return moe_class(family, "Config")(**copy.deepcopy({**TINY, **TINY_OF_FAMILY[family], **moe, **values}))


def moe_model(family: str, head: str = "ForCausalLM", **values) -> transformers.PreTrainedModel:
    """Tiny model of hf_moe with random values everywhere."""
    model = moe_class(family, head)(moe_config(family, **values))
    randomize(model)
    return model.eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the first with three columns of left padding."""
    input_ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    input_ids[0, :3] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def save_tokenizer(folder) -> None:
    """A word-level tokenizer over the tiny vocabulary, which knows single characters only."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {chr(32 + i): 4 + i for i in range(92)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """Largest difference divided by largest value within `bound`."""
    scale = expected.float().abs().max().clamp(min=1e-12)
    error = ((actual.float() - expected.float()).abs().max() / scale).item()
    assert error <= bound, f"relative error {error:.2e} > {bound:.0e}"


def force_expert(model: transformers.PreTrainedModel, expert: int) -> transformers.PreTrainedModel:
    """Every router chooses this one expert for every slot, with weights that sum to 1; a later call takes precedence."""

    def choose(module, args, output):
        logits, weights, index = output
        return logits, torch.full_like(weights, 1 / weights.shape[-1]), torch.full_like(index, expert)

    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(choose)
    return model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, for slow tests."""
    folder = os.environ.get("HF_MOE_TEST_MODEL")
    if folder is None:
        pytest.fail("HF_MOE_TEST_MODEL names no folder: run these tests with `make test-slow`.")
    return Path(folder).resolve()


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run `hf-moe` with these arguments, in this process: a new one would spend its time on imports."""

    from hf_moe.cli.main import main

    def run(*arguments) -> Run:
        monkeypatch.setattr(sys, "argv", ["hf-moe", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return Run(code, *capsys.readouterr())

    return run
