# SPDX-License-Identifier: Apache-2.0
"""The examples that need no download run to the end on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
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


@pytest.mark.slow
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


def test_balance(tmp_path, monkeypatch, capsys):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    (tmp_path / "texts" / "letters").mkdir(parents=True)
    for number in range(40):
        (tmp_path / "texts" / "letters" / f"{number}.txt").write_text(f"letter {number} " * 80)
    options = [
        "--texts",
        tmp_path / "texts",
        "--steps",
        2,
        "--points",
        1,
        "--length",
        16,
        "--eval-blocks",
        1,
        "--layers",
        "::2",
    ]
    arguments = ["05_balance.py", tmp_path / "dense", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "05_balance.py"), run_name="__main__")
    sys.modules.pop("domain_texts")  # which has one more domain now
    printed = capsys.readouterr().out
    for name in ("start", "nothing", "nothing, other order", "switch 0.1", "global_batch 0.1", "bias"):
        assert f"| {name} |" in printed
    assert (tmp_path / "out" / "balance.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "bias" / "routing" / "load_over_steps.png").is_file()
    rows = json.loads((tmp_path / "out" / "balance.json").read_text())["bias"]
    assert [row["step"] for row in rows] == [0, 2]
    assert "letters" in rows[0]
