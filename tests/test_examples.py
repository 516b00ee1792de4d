# SPDX-License-Identifier: Apache-2.0
"""The examples that need no download run to the end on a tiny model."""

import runpy
import sys
from pathlib import Path

from conftest import dense_model, save_tokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_upcycle(tmp_path, monkeypatch, capsys):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    arguments = [tmp_path / "dense", tmp_path / "moe", "--num-experts", 4, "--top-k", 2]
    monkeypatch.setattr(sys, "argv", ["01_upcycle.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "01_upcycle.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "MixtralForCausalLM, exact: True" in printed
    assert "same top token 100.0%" in printed


def test_compare_methods(tmp_path, monkeypatch, capsys):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    options = ["--dense-steps", 4, "--batch-size", 2, "--length", 16, "--points", 2, "--eval-blocks", 1]
    arguments = ["03_compare_methods.py", tmp_path / "dense", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "03_compare_methods.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("copy", "residual", "drop", "dense"))
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
