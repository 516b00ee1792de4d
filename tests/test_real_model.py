# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M end to end: the figures of the README and of the benchmarks. Run by `make test-slow`."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe import UpcycleConfig, upcycle
from hf_moe.upcycling.sample import TEXT


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "target"), [("copy", "hf_moe"), ("copy", "native"), ("residual", "auto")])
@torch.no_grad()
def test_parity(smollm2, dtype, method, target, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4, method=method, target=target))
    assert report.parity["text"]
    assert report.exact
    name = str(dtype).removeprefix("torch.")
    print(f"\n{method} to {report.model_type} in {name}: {report.parity[name]['max_relative_error']:.1e}")

    # The report's figures come from streamed weights; the loaded model, on another implementation, must bear them out.
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=dtype)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    if dtype == torch.bfloat16:
        assert torch.equal(moe(ids).logits, dense(ids).logits)
        assert report.parity["bfloat16"]["max_relative_error"] == 0.0
    else:
        assert_close(moe(ids).logits, dense(ids).logits)


def peak_mib(source: Path, output: Path, num_experts: int) -> int:
    # Not ru_maxrss: that of a child starts with the memory of the process that started it.
    code = (
        "import re, sys; from pathlib import Path; from hf_moe import UpcycleConfig, upcycle\n"
        "upcycle(sys.argv[1], sys.argv[2], UpcycleConfig(num_experts=int(sys.argv[3])))\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024)"
    )
    command = [sys.executable, "-c", code, str(source), str(output), str(num_experts)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_experts(smollm2, tmp_path):
    few, many = peak_mib(smollm2, tmp_path / "4", 4), peak_mib(smollm2, tmp_path / "32", 32)
    print(f"\npeak memory: {few} MiB with 4 experts, {many} MiB with 32")
    assert many <= 1.15 * few


def test_readme(smollm2, tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", readme, flags=re.DOTALL).groups()
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id in code
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code.replace(hub_id, str(smollm2)), "README.md", "exec"), {})
    assert output.getvalue() == printed


def test_interrupted_conversion_of_a_real_model(smollm2, tmp_path):
    upcycle(smollm2, tmp_path / "whole", UpcycleConfig(num_experts=4, verify="none"))
    code = (
        "import os, signal, sys; from hf_moe import UpcycleConfig, upcycle; from hf_moe.upcycling.writer import ShardWriter\n"
        "write, count = ShardWriter.write, [0]\n"
        "def killing(self, step):\n"
        "    for number in write(self, step):\n"
        "        count[0] += number\n"
        "        if count[0] > 400e6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield number\n"
        "ShardWriter.write = killing\n"
        "upcycle(sys.argv[1], sys.argv[2], UpcycleConfig(num_experts=4, verify='none'))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(smollm2), str(tmp_path / "moe")]).returncode == -9
    upcycle(smollm2, tmp_path / "moe", UpcycleConfig(num_experts=4, verify="none"))
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "moe" / path.name).read_bytes(), path.name
    assert json.loads((tmp_path / "moe" / "hf_moe.json").read_text())["parity"] is None
