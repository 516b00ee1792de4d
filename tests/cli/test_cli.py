# SPDX-License-Identifier: Apache-2.0
"""The commands, run as a user runs them."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import dense_model, moe_model, save_tokenizer

from hf_moe import RoutingStatistics, UpcycleConfig, plan_upcycle
from hf_moe.cli.inspect import _row
from hf_moe.training.statistics import LayerRouting


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense_model("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_help_names_every_command(run_command):
    run = run_command("--help")
    assert run.returncode == 0
    assert all(name in run.stdout for name in ("plan", "upcycle", "inspect"))


def test_any_field_can_be_set(run_command, dense):
    run = run_command(
        "plan",
        dense,
        "--method",
        "granular",
        "--set",
        "granularity=2",
        "--set",
        "num_experts=[4, 8]",
        "--layers",
        "0-1",
        "--json",
    )
    plan = json.loads(run.stdout)
    assert plan["model_type"] == "moe_llama"
    for argument, message in (("granularit=2", "--set takes field=value with a field of"), ("seed", "got 'seed'")):
        run = run_command("plan", dense, "--set", argument)
        assert run.returncode == 1
        assert message in run.stderr


def test_plan_with_advice(run_command, dense):
    run = run_command("plan", dense, "--num-experts", 4, "--tokens", "50B", "--json")
    plan = json.loads(run.stdout)
    assert plan["advised_method"] == "copy"
    assert "2603.13364" in plan["evidence"][0]["source"]
    assert plan["bytes_to_train"] == 16 * plan["num_parameters"]
    assert "2603.13364" in run_command("plan", dense, "--tokens", "50B").stdout


def test_plan(run_command, dense):
    run = run_command("plan", dense, "--num-experts", 4, "--layers", "0-1", "--json")
    plan = json.loads(run.stdout)
    expected = plan_upcycle(dense, UpcycleConfig(num_experts=4, layers=[0, 1]))
    assert plan["num_parameters"] == expected.num_parameters
    assert plan["model_type"] == "moe_llama"
    assert plan["exact"] is True


def test_upcycle_and_inspect(run_command, dense, tmp_path):
    (tmp_path / "recipe.yml").write_text("num_experts: 6\nseed: 3\nmethod: residual\n")
    run = run_command(
        "upcycle", dense, tmp_path / "moe", "--recipe", tmp_path / "recipe.yml", "--method", "copy", "--json"
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["exact"] is True
    provenance = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())
    recipe = provenance["recipe"]
    assert (recipe["num_experts"], recipe["seed"], recipe["method"]) == (6, 3, "copy")

    (tmp_path / "text.txt").write_text("the quick brown fox " * 40)
    run = run_command(
        *("inspect", tmp_path / "moe", "--text", tmp_path / "text.txt", "--length", 64, "--json"),
        *("--plot", tmp_path / "load.png", "--output", tmp_path / "statistics.json", "--max-tokens", 300),
    )
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert list(printed["layers"]) == [f"model.layers.{index}.mlp.gate" for index in range(3)]
    assert (tmp_path / "load.png").stat().st_size > 1000
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics == printed
    assert statistics["layers"]["model.layers.0.mlp.gate"]["num_tokens"] == 300
    assert "300 tokens" in run.stderr


def test_compose(run_command, dense, tmp_path):
    (tmp_path / "recipe.yml").write_text("method: compose\nexperts: [base, gone]\ncompose_rest: mean\nseed: 3\n")
    arguments = ("upcycle", dense, tmp_path / "moe", "--recipe", tmp_path / "recipe.yml", "--verify", "per_expert")
    run = run_command(*arguments, "--expert", dense, "--expert", "base", "--expert", dense, "--json")
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout)["expert_errors"]
    assert list(errors) == [str(dense), "base"]
    assert max(errors.values()) < 1e-5
    recipe = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())["recipe"]
    assert recipe["experts"] == [dense.name, "base", dense.name]
    assert (recipe["num_experts"], recipe["compose_rest"], recipe["seed"]) == (3, "mean", 3)
    run = run_command(*arguments, "--expert", dense, "--expert", "base", "--overwrite", "--format", "human")
    assert f"e-07 ({dense})" in run.stdout
    run = run_command("plan", dense, "--method", "compose", "--expert", "base", "--expert", tmp_path / "gone")
    assert "No configuration at" in run.stderr
    assert run.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "9"], "num_experts_per_tok"),
        (["--method", "magic"], "copy"),
        (["--layers", "a-b"], "4,6,8-11"),
        (["--layers", "7"], "layers 0 to 2"),
        (["--recipe", "missing.yml"], "There is no recipe file missing.yml"),
        (["--target", "native", "--method", "residual", "--layers", "0"], "shared expert"),
    ],
)
def test_errors_are_one_message_without_traceback(run_command, dense, arguments, message):
    run = run_command("plan", dense, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_inspect_draws(run_command, tmp_path):
    moe_model("llama").save_pretrained(tmp_path / "moe")
    save_tokenizer(tmp_path / "moe")
    texts = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text of some length" * 9)
        texts += ["--text", tmp_path / f"{name}.txt"]
    pictures = {
        "--plot": "a.png",
        "--plot-domains": "b.png",
        "--plot-pairs": "c.png",
        "--html": "d.html",
        "--output": "e.json",
    }
    arguments = [value for option, name in pictures.items() for value in (option, tmp_path / "new" / name)]
    run = run_command("inspect", tmp_path / "moe", *texts, *arguments, "--length", 50, "--json")
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(pictures.values())
    # What was counted is the sum of both texts.
    statistics = RoutingStatistics.from_dict(json.loads(run.stdout))
    assert {layer.num_tokens for layer in statistics.layers.values()} == {9 * 2 * 23}
    # The same figures in the card.
    (tmp_path / "moe" / "README.md").write_text("# A model\n")
    run = run_command("inspect", tmp_path / "moe", *texts, "--length", 50, "--card")
    assert run.returncode == 0, run.stderr
    card = (tmp_path / "moe" / "README.md").read_text()
    assert card.startswith("# A model\n\n<!-- routing: begin -->")
    assert "| one | 207 |" in card
    assert (tmp_path / "moe" / "routing" / "domains.png").is_file()
    run = run_command("inspect", tmp_path / "moe", *texts, "--history", tmp_path)
    assert "--history is for the card. Give --card too." in run.stderr
    run = run_command("inspect", tmp_path / "moe", *texts, "--card", "--history", tmp_path)
    assert "has no routing_history.jsonl" in run.stderr
    run = run_command("inspect", "owner/model", *texts, "--card")
    assert "--card writes into the folder of a model, and owner/model is none." in run.stderr
    run = run_command("inspect", tmp_path / "moe", *texts[:2], "--plot-domains", tmp_path / "b.png")
    assert "--plot-domains compares texts. Give --text at least twice, with different files." in run.stderr


def test_inspect_marks_experts_that_compute_nothing():
    layer = LayerRouting(torch.tensor([4, 2, 2]), 4, num_zero_computation_experts=1)
    row = _row("layers.0.mlp", layer, shows_slots=False)
    assert (row["load"], row["no computation"]) == ("0.50 0.25 | 0.25", "25.0%")


def test_inspect_refuses_what_it_cannot_show(run_command, dense, tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    run = run_command("inspect", dense, "--text", tmp_path / "text.txt")
    assert run.returncode == 1
    assert "declares no router" in run.stderr
    (tmp_path / "text.txt").write_text("")
    run = run_command("inspect", dense, "--text", tmp_path / "text.txt")
    assert "no text" in run.stderr
    run = run_command("inspect", dense, "--text", tmp_path / "missing.txt")
    assert "--text: there is no file" in run.stderr
    run = run_command("inspect", tmp_path / "nowhere", "--text", tmp_path / "text.txt")
    assert "There is no folder" in run.stderr
    run = run_command("inspect", dense, "--text", tmp_path / "text.txt", "--plot", tmp_path / "load.txt")
    assert "is no name of a picture. End it with .png, .pdf or .svg." in run.stderr
    run = run_command("inspect", dense, "--text", tmp_path / "text.txt", "--html", tmp_path)
    assert "is a folder. Give a file to write." in run.stderr
    texts = ["--text", tmp_path / "text.txt", "--text", tmp_path / "text.txt"]
    run = run_command("inspect", dense, *texts, "--max-tokens", 1)
    assert "--max-tokens is 1, which is less than a token for each of 2 texts." in run.stderr
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    run = run_command("inspect", dense, "--text", tmp_path / "text.txt")
    assert "text.txt is no text in UTF-8" in run.stderr


def test_interrupt_says_how_to_go_on(dense, tmp_path):
    code = (
        "import hf_moe.upcycling.upcycle as module\n"
        "def interrupted(*arguments, **options): raise KeyboardInterrupt\n"
        "module.upcycle = interrupted\n"
        "from hf_moe.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "upcycle", str(dense), str(tmp_path / "moe")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 130
    assert "Run the same command again" in run.stderr


def test_recipe_file_with_a_typo_is_refused(run_command, dense, tmp_path):
    (tmp_path / "recipe.yml").write_text("num_expert: 6\n")
    run = run_command("plan", dense, "--recipe", tmp_path / "recipe.yml")
    assert "num_expert" in run.stderr
    assert "num_experts_per_tok" in run.stderr, "the fields that exist are listed"
    (tmp_path / "recipe.yml").write_text("num_experts: four\n")
    run = run_command("plan", dense, "--recipe", tmp_path / "recipe.yml")
    assert "recipe.yml" in run.stderr
    assert "validator" not in run.stderr


def test_bench(run_command, dense, tmp_path, monkeypatch):
    mergekit = tmp_path / "mergekit-moe"
    mergekit.write_text(f'#!/bin/sh -e\ntest $(grep -c "source_model: {dense}" $1) = 4\ncp -r {dense} $2\n')
    mergekit.chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = run_command("bench", "upcycle", dense, "--num-experts", 4, "--runs", 1, "--mergekit", mergekit, "--json")
    assert run.returncode == 0, run.stderr
    rows = {row["command"]: row for row in json.loads(run.stdout)}
    assert list(rows) == ["mergekit-moe", "upcycle", "upcycle, no proof", "process start", "cp", "conversion"]
    assert rows["cp"]["times_cp"] == 1.0
    assert 0 < rows["conversion"]["median_s"] < rows["upcycle, no proof"]["median_s"]
    assert rows["upcycle"]["peak_mib"] > 100
    assert all(row["median_s"] > 0 for row in rows.values())
    assert list((tmp_path / "work").iterdir()) == []
    run = run_command("bench", "upcycle", dense, "--runs", 1, "--mergekit", mergekit, "--num-experts", 2)
    assert run.returncode == 1
    assert "mergekit-2.yml" in run.stderr
    assert "ended with 1" in run.stderr
