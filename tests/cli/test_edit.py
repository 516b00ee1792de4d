# SPDX-License-Identifier: Apache-2.0
"""The commands that change mixtures of experts, run as a user runs them."""

import json

import pytest
from conftest import dense_model, moe_model, save_tokenizer


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    moe_model("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def printed(run_command):
    """What a command prints as JSON."""

    def printed(*arguments) -> dict:
        run = run_command(*arguments, "--json")
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    return printed


def test_expand_and_merge(moe, printed, tmp_path):
    report = printed("expand", moe, tmp_path / "more", "--factor", 2)
    assert (report["num_experts"], report["num_experts_per_tok"], report["exact"]) == (8, 4, True)
    report = printed("merge", tmp_path / "more", tmp_path / "less", "--num-experts", 4, "--top-k", 2)
    assert (report["num_experts"], report["num_experts_per_tok"], report["exact"]) == (4, 2, True)
    assert (report["top1_agreement"], report["model_type"]) == (1.0, "moe_llama")


def test_inspect_and_prune(moe, run_command, printed, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    run = run_command(
        "inspect", moe, "--text", tmp_path / "text.txt", "--output", tmp_path / "statistics.json", "--quiet"
    )
    assert run.returncode == 0, run.stderr
    report = printed(
        *("prune", moe, tmp_path / "less", "--keep", 3, "--statistics", tmp_path / "statistics.json", "--no-verify")
    )
    assert (report["num_experts"], report["max_relative_error"], report["exact"]) == (3, None, None)


def test_extract_drop_and_insert(moe, printed, tmp_path):
    report = printed("extract", moe, tmp_path / "expert.safetensors", "--expert", 1)
    assert report["bytes_written"] == (tmp_path / "expert.safetensors").stat().st_size
    assert (report["layers"], report["hidden_size"], report["intermediate_size"]) == (3, 32, 24)
    printed("prune", moe, tmp_path / "less", "--drop", 1)
    report = printed("insert", tmp_path / "less", tmp_path / "expert.safetensors", tmp_path / "back", "--position", 1)
    assert report["num_experts"] == 4


def test_collapse(moe, printed, tmp_path):
    report = printed("collapse", moe, tmp_path / "dense", "--expert", 2)
    assert report["model_type"] == "llama"
    assert report["num_parameters"] == report["num_active_parameters"]
    assert "num_experts" not in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["expand", "{moe}", "{out}", "--factor", "1"], "`factor` must be at least 2"),
        (["prune", "{moe}", "{out}", "--keep", "2"], "`keep` needs `statistics`"),
        (["merge", "{moe}", "{out}", "--num-experts", "9"], "`num_experts` must lie between 1 and 3"),
        (["collapse", "{moe}", "{out}", "--expert", "best"], "`expert` must be 'mean' or the index"),
        (["extract", "{moe}", "{out}", "--expert", "7"], "There is no expert 7"),
        (["insert", "{moe}", "missing.safetensors", "{out}"], "There is no file missing.safetensors"),
        (["expand", "{dense}", "{out}"], "is no mixture of experts"),
    ],
)
def test_errors_are_one_message_without_traceback(moe, run_command, arguments, message, tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    places = {"moe": moe, "out": tmp_path / "out", "dense": tmp_path / "dense"}
    run = run_command(*(argument.format(**places) for argument in arguments))
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_interrupt_says_how_to_go_on(moe, run_command, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_moe.editing.expand.expand_experts", interrupted)
    run = run_command("expand", moe, tmp_path / "more")
    assert run.returncode == 130
    assert "Run the same command again" in run.stderr


def test_help_names_every_command(run_command):
    run = run_command("--help")
    assert all(name in run.stdout for name in ("expand", "prune", "merge", "collapse", "extract", "insert"))
