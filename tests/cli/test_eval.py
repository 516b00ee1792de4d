# SPDX-License-Identifier: Apache-2.0
"""`hf-moe eval`: perplexity and routing per domain, and the hand-over to lm-eval."""

import json
import sys
import types

import pytest
import torch
from conftest import dense_model, moe_model, save_tokenizer
from transformers import AutoTokenizer

from hf_moe import RoutingRecorder, RoutingStatistics, extract_domain, perplexity
from hf_moe.training.specialization import ExpertSpecialization


TEXTS = {"code": "def f(x): return x + 1\n" * 12, "legal": "Nothing in this licence shall limit liability. " * 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a dense model and of a mixture of experts, with texts beside them."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("dense", dense_model("llama")), ("moe", moe_model("llama"))):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def domains(models) -> list[str]:
    return [argument for name in TEXTS for argument in ("--text", f"{name}={models / name}.txt")]


def test_mixture_of_experts(run_command, models, tmp_path):
    run = run_command(
        *("eval", models / "moe", *domains(models), "--length", 64, "--max-tokens", 200, "--batch-size", 2),
        *("--output", tmp_path / "new" / "report.json", "--json"),
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert (report["model"], report["length"]) == (str(models / "moe"), 64)
    model, tokenizer, statistics = moe_model("llama"), AutoTokenizer.from_pretrained(models / "moe"), {}
    for name, text in TEXTS.items():
        expected = perplexity(model, tokenizer, text[:200], 64)
        found = report["domains"][name]
        assert found["loss"] == pytest.approx(expected.loss)
        assert (found["num_tokens"], found["num_bytes"]) == (196, 196)
        with RoutingRecorder(model) as recorder, torch.no_grad():
            for window in tokenizer(text[:200], return_tensors="pt")["input_ids"].split(64, dim=1):
                model(window)
        statistics[name] = recorder.statistics()
        assert RoutingStatistics.from_dict(found["routing"]).to_dict() == statistics[name].to_dict()
    assert report["specialization"] == ExpertSpecialization(statistics).to_dict()


def test_tables(run_command, models):
    run = run_command("eval", models / "moe", *domains(models), "--format", "human")
    assert run.returncode == 0, run.stderr
    header, _, code, legal, _, title, *_ = run.stdout.splitlines()
    assert header.split() == [
        "DOMAIN",
        "TOKENS",
        "PERPLEXITY",
        "BITS_PER_BYTE",
        "ENTROPY",
        "MAX_VIOLATION",
        "CV",
        "DEAD",
    ]
    assert (code.split()[:2], legal.split()[:2]) == (["code", "275"], ["legal", "281"])
    assert title == "Experts that stand out"
    assert "Specialisation 0." in run.stderr
    run = run_command("eval", models / "moe", *domains(models), "--quiet")
    assert [float(line) > 1 for line in run.stdout.splitlines()] == [True, True]
    assert run.stderr == ""


def test_dense_model_and_files_of_one_domain(run_command, models):
    files = [f"all={models / name}.txt" for name in TEXTS]
    run = run_command("eval", models / "dense", "--text", files[0], "--text", files[1], "--json")
    report = json.loads(run.stdout)
    expected = perplexity(dense_model("llama"), AutoTokenizer.from_pretrained(models / "dense"), list(TEXTS.values()))
    assert report["domains"] == {"all": pytest.approx(expected.to_dict())}
    assert "specialization" not in report
    run = run_command("eval", models / "dense", "--text", files[0], "--format", "human")
    assert run.stdout.split()[:4] == ["DOMAIN", "TOKENS", "PERPLEXITY", "BITS_PER_BYTE"]
    assert "ENTROPY" not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text DOMAIN=FILE, --tasks NAMES, or both"),
        (["--text", "code.txt"], "--text takes DOMAIN=FILE, such as code=code.txt, got 'code.txt'"),
        (["--text", "=code.txt"], "got '=code.txt'"),
        (["--text", "code=missing.txt"], "there is no file missing.txt"),
        (
            ["--text", "code={models}/code.txt", "--length", "513"],
            "code: length is 513, but the model has 512 positions",
        ),
        (["--text", "void={models}/void.txt"], "void: There is nothing to predict"),
        (["--text", "code={models}/code.txt", "--limit", "3"], "--include-path and --limit are for --tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused(run_command, models, arguments, message):
    (models / "void.txt").write_text("")
    run = run_command("eval", models / "moe", *(argument.format(models=models) for argument in arguments))
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_folder_that_is_not_there(run_command, models):
    run = run_command("eval", models / "nowhere", *domains(models))
    assert "There is no folder" in run.stderr


def test_without_lm_eval(run_command, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    run = run_command("eval", models / "moe", "--tasks", "arc_easy")
    assert run.returncode == 1
    assert "`pip install lm-eval`, or `pip install hf-moe[eval]`" in run.stderr


@pytest.fixture
def fake_lm_eval(monkeypatch):
    """Modules that stand for lm-eval: they know two tasks, and note what they are called with."""
    calls = {}

    class TaskManager:
        def __init__(self, include_path=None):
            calls["include_path"] = include_path

        def match_tasks(self, names):
            return [task for task in ("arc_easy", "hellaswag") if task in names or names == ["*"]]

    def simple_evaluate(**arguments):
        calls.update(arguments)
        return {
            "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01, "word,flex": 3}}
        }

    def hflm(**arguments):
        calls["hflm"] = arguments
        return "harness model"

    for name, contents in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": hflm},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_are_handed_over(run_command, models, fake_lm_eval, tmp_path):
    arguments = ("--tasks", "arc_easy, hellaswag", "--include-path", tmp_path, "--limit", 7, "--batch-size", 3)
    run = run_command("eval", models / "moe", *domains(models), *arguments, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert set(report["domains"]) == set(TEXTS)
    assert report["tasks"]["arc_easy"]["acc,none"] == 0.25
    assert (fake_lm_eval["tasks"], fake_lm_eval["limit"]) == (["arc_easy", "hellaswag"], 7)
    assert (fake_lm_eval["model"], fake_lm_eval["include_path"]) == ("harness model", str(tmp_path))
    assert type(fake_lm_eval["hflm"]["pretrained"]).__name__ == "MoeLlamaForCausalLM"
    assert fake_lm_eval["hflm"]["batch_size"] == 3
    run = run_command("eval", models / "moe", "--tasks", "*", "--format", "human")
    assert [line.split() for line in run.stdout.splitlines()[2:]] == [
        ["arc_easy", "acc", "0.250", "0.010"],
        ["arc_easy", "word", "(flex)", "3.000"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_easy,arc_hasy"], "lm-eval has no task arc_hasy. `lm-eval ls tasks` lists them"),
        (["--tasks", " , "], "give the names of tasks"),
        (["--tasks", "arc_easy", "--include-path", "missing"], "--include-path: there is no folder missing"),
    ],
)
def test_tasks_that_are_not_there(run_command, models, fake_lm_eval, arguments, message):
    run = run_command("eval", models / "moe", *arguments)
    assert run.returncode == 1
    assert message in run.stderr


def test_a_task_of_ones_own_in_lm_eval_itself(run_command, models, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()))
    (tmp_path / "own.yaml").write_text(
        f"task: own_text\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/documents.jsonl\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    run = run_command("eval", models / "moe", "--tasks", "own_text", "--include-path", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["tasks"]["own_text"]["bits_per_byte,none"]
    # lm-eval predicts the first token as well, from the begin-of-text token.
    model, tokenizer = moe_model("llama"), AutoTokenizer.from_pretrained(models / "moe")
    nats = 0.0
    for text in TEXTS.values():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found == pytest.approx(nats / torch.tensor(2.0).log().item() / sum(map(len, TEXTS.values())), rel=1e-4)


def test_models_with_experts_by_domain(run_command, models, tmp_path):
    """Both commands need to be told of which domain the texts are, and measure what the model gives for it."""
    model = moe_model("llama", router_type="hash", num_experts=4, num_hash_domains=2)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    texts = ("--text", f"code={models / 'code.txt'}", "--length", 64, "--max-tokens", 200, "--json")
    run = run_command("eval", tmp_path, *texts, "--domain", 1)
    assert run.returncode == 0, run.stderr
    found, tokenizer = json.loads(run.stdout)["domains"]["code"], AutoTokenizer.from_pretrained(tmp_path)
    expected = perplexity(extract_domain(model, 1), tokenizer, TEXTS["code"][:200], 64)
    assert found["loss"] == pytest.approx(expected.loss)
    inspected = ("inspect", tmp_path, "--text", models / "code.txt", "--html", tmp_path / "tokens.html", "--json")
    (tmp_path / "README.md").write_text("# A model\n")
    run = run_command(*inspected, "--card", "--domain", 1)
    assert run.returncode == 0, run.stderr
    assert all(layer["counts"][:2] == [0, 0] for layer in json.loads(run.stdout)["layers"].values())
    assert "\nAll texts are taken as of domain 1: the experts" in (tmp_path / "README.md").read_text()
    for arguments in (inspected, ("eval", tmp_path, *texts)):
        for more in ((), ("--domain", 2)):
            run = run_command(*arguments, *more)
            assert run.returncode == 1
            assert "has experts for 2 domains: say with --domain 0 to --domain 1" in run.stderr
        run = run_command(arguments[0], models / "moe", *arguments[2:], "--domain", 0)
        assert run.returncode == 1
        assert "--domain 0 has no effect" in run.stderr


def test_tokens_are_taken_as_text(run_command, models, tmp_path):
    moe_model("llama", num_experts=4, num_experts_per_modality=[2, 2]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "README.md").write_text("# A model\n")
    run = run_command("inspect", tmp_path, "--text", models / "code.txt", "--card")
    assert run.returncode == 0, run.stderr
    for place in (run.stdout + run.stderr, (tmp_path / "README.md").read_text()):
        assert "All tokens are taken as text: of the experts [2, 2]" in place
