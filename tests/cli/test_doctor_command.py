# SPDX-License-Identifier: Apache-2.0
"""`hf-moe doctor`, run as a user runs it."""

import json

import pytest
from conftest import moe_model, save_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_moe import ExpertLoraConfig


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "moe"
    moe_model("llama").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(moe, tmp_path):
    """An adapter of this model whose factors all have values."""
    model = moe_model("llama")
    model.name_or_path = str(moe)
    config = ExpertLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False).for_model(model)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_fits(run_command, moe, adapter):
    run = run_command("doctor", adapter, "--base", moe, "--format", "human", "--no-truncate")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert lines[0] == f"{adapter} on {moe}"
    assert "keys ok 18 tensors, each with its place in the model" in lines
    assert "layout ok that of PEFT 0.19.1 and later, by the shapes of the factors" in lines
    assert "mlp.experts.gate_up_proj all 3 LoRA 4 of 4 2 4 1,920 hf_moe" in lines
    assert "mlp.gate all 3 frozen 0" in lines


def test_the_base_is_that_of_the_adapter(run_command, moe, adapter):
    assert run_command("doctor", adapter).stdout == run_command("doctor", adapter, "--base", moe).stdout
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run = run_command("doctor", adapter)
    assert run.returncode == 1
    assert "does not say which model it is for. Give it with `--base`." in run.stderr


def test_json_and_quiet(run_command, moe, adapter):
    run = run_command("doctor", adapter, "--base", moe, "--json")
    found = json.loads(run.stdout)
    assert (found["ok"], found["adapter"], found["base"]) == (True, str(adapter), str(moe))
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert found["report"]["num_trainable_parameters"] > 0
    run = run_command("doctor", adapter, "--base", moe, "--quiet")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_run(run_command, moe, adapter, tmp_path):
    run = run_command("doctor", adapter, "--base", moe, "--run", "--json")
    assert run.returncode == 0, run.stderr
    found = {check["name"]: check["found"] for check in json.loads(run.stdout)["checks"]}
    assert found["expert gradients"] == "in 24 of 24 factor pairs of experts"
    assert found["other gradients"] == "in 3 modules"
    assert "of the largest" in found["logits"]
    (tmp_path / "text.txt").write_text("a")
    run = run_command("doctor", adapter, "--base", moe, "--run", "--text", tmp_path / "text.txt", "--json")
    assert run.returncode == 0
    assert "Warning: expert gradients: No token came to some experts" in run.stderr
    (tmp_path / "text.txt").write_text("the quick brown fox " * 40)
    run = run_command("doctor", adapter, "--base", moe, "--run", "--text", tmp_path / "text.txt", "--max-tokens", 300)
    assert "Warning" not in run.stderr


def test_what_is_wrong_ends_with_status_1(run_command, moe, adapter):
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(max(tensors))
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    for arguments in ([], ["--quiet"], ["--json"], ["--run"]):
        run = run_command("doctor", adapter, "--base", moe, *arguments)
        assert run.returncode == 1
        assert "Error: keys: 1 of 18 tensors are missing in the file" in run.stderr
        assert "Error: values: " in run.stderr
        assert "Traceback" not in run.stderr
    assert "the problems above come first" in run.stdout


def test_files_of_peft_018_are_fixed(run_command, moe, adapter, tmp_path):
    """The factors of experts, written the way PEFT 0.18 did it: `tests/golden` has real ones."""
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        tensors[name.replace("lora_A", "lora_B")] = a.view(4, 2, -1).permute(2, 1, 0).flatten(1).contiguous()
        tensors[name] = b.view(-1, 2, 4).permute(2, 1, 0).flatten(0, 1).contiguous()
    save_file(tensors, tmp_path / "old.safetensors")
    expected = (adapter / WEIGHTS).read_bytes()
    (tmp_path / "old.safetensors").replace(adapter / WEIGHTS)

    run = run_command("doctor", adapter, "--base", moe)
    assert run.returncode == 1
    assert "Error: layout: The file is in the layout of PEFT 0.18" in run.stderr
    run = run_command("doctor", adapter, "--base", moe, "--fix", tmp_path / "new", "--run", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["ok"]
    assert f"Wrote {tmp_path / 'new'}" in run.stderr
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == expected
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "hf_moe.json",
        "README.md",
    }
    run = run_command("doctor", adapter, "--base", moe, "--fix", tmp_path / "new")
    assert "is there already" in run.stderr
    run = run_command("doctor", tmp_path / "new", "--base", moe, "--fix", tmp_path / "newer")
    assert "there is nothing to convert" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "--base", "{moe}"], "it has no adapter_config.json"),
        (["{adapter}", "--base", "{tmp}/gone"], "is no folder with a model"),
        (["{adapter}", "--base", "{moe}", "--text", "a.txt"], "--text is for --run"),
        (["{adapter}", "--base", "{moe}", "--run", "--text", "a.txt"], "there is no file a.txt"),
        (["{adapter}", "--base", "{moe}", "--fix", "{adapter}"], "is there already"),
    ],
)
def test_errors_are_one_message_without_traceback(run_command, moe, adapter, arguments, message, tmp_path):
    places = {"moe": moe, "adapter": adapter, "tmp": tmp_path}
    run = run_command("doctor", *(argument.format(**places) for argument in arguments))
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_ordinary_adapters(run_command, moe, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(moe_model("llama"), config).save_pretrained(tmp_path)
    run = run_command("doctor", tmp_path, "--base", moe, "--run", "--format", "human")
    assert run.returncode == 0
    assert "NOT ADAPTED" in run.stdout
    assert "no experts are adapted" in run.stdout
