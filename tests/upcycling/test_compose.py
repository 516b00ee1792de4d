# SPDX-License-Identifier: Apache-2.0
"""Experts from several checkpoints: each is its parent, the rest is the base's or the mean, and what does not fit is refused."""

import dataclasses
import filecmp
import json
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, assert_close, cast, dense_config, dense_model, force_expert, randomize, save_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling import methods
from hf_moe.upcycling.checkpoint import Checkpoint, read_config
from hf_moe.upcycling.errors import UpcycleError


NATIVE = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


def trained(base: transformers.PreTrainedModel, seed: int, frozen: bool = True) -> transformers.PreTrainedModel:
    """A model that differs from the base in its feed-forwards, or everywhere."""
    model = type(base)(base.config)
    randomize(model, seed)
    state_dict = base.state_dict()
    if frozen:
        model.load_state_dict({name: value for name, value in state_dict.items() if ".mlp." not in name}, strict=False)
    return cast(model, base.dtype)


def save(model: transformers.PreTrainedModel, folder: Path, **options) -> str:
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return str(folder)


def add_tokens(folder: str, *tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def make_family(folder: Path, family: str = "llama", frozen: bool = True, dtype=torch.float32, **values) -> list[str]:
    """Folders of a base and of two models made from it."""
    base = dense_model(family, dtype=dtype, **values)
    models = {"base": base, "code": trained(base, 1, frozen), "law": trained(base, 2, frozen)}
    return [save(model, folder / name) for name, model in models.items()]


def recipe(*experts: str, **values) -> UpcycleConfig:
    return UpcycleConfig(method="compose", experts=list(experts), **values)


def ids(vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))


def load(folder, **arguments) -> transformers.PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("target", ["native", "hf_moe"])
@torch.no_grad()
def test_each_expert_alone_is_its_parent(core_family, target, tmp_path):
    base, code, law = make_family(tmp_path, core_family)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, "base", code, target=target))
    name = NATIVE[core_family] if target == "native" else f"Moe{FAMILIES[core_family]}"
    assert type(load(tmp_path / "moe")).__name__ == f"{name}ForCausalLM"
    for index, parent in enumerate((code, law, base, code)):
        assert_close(force_expert(load(tmp_path / "moe"), index)(ids()).logits, load(parent)(ids()).logits)
    assert report.expert_errors.keys() == {code, law, "base"}
    assert max(report.expert_errors.values()) <= 1e-5
    assert [row["experts"] for row in report.parity["per_expert"]] == [[0, 3], [1], [2]]
    assert all(row["inexact_because"] is None for row in report.parity["per_expert"])
    assert not report.exact
    assert report.max_relative_error > 0.1, "the routed model is not the base"


@torch.no_grad()
def test_biased_feed_forwards(tmp_path):
    base, code, law = make_family(tmp_path, mlp_bias=True)
    upcycle(base, tmp_path / "moe", recipe(code, law))
    assert_close(force_expert(load(tmp_path / "moe"), 1)(ids()).logits, load(law)(ids()).logits)


@torch.no_grad()
def test_chosen_layers(tmp_path):
    base, code, law = make_family(tmp_path)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, layers=[1]))
    moe, dense = load(tmp_path / "moe"), load(base)
    assert torch.equal(moe.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(moe.model.layers[1].mlp.experts.down_proj[1], load(law).model.layers[1].mlp.down_proj.weight)
    # Six matrices of the layers that stay dense are the base's.
    assert [row["num_differing_tensors"] for row in report.parity["per_expert"]] == [6, 6]
    dense.model.layers[1].mlp = load(law).model.layers[1].mlp
    assert_close(force_expert(moe, 1)(ids()).logits, dense(ids()).logits)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_other_heads(head, tmp_path):
    base = dense_model("qwen3", head)
    folders = [save(model, tmp_path / str(seed)) for seed, model in enumerate((base, trained(base, 1)))]
    report = upcycle(folders[0], tmp_path / "moe", recipe("base", folders[1]))
    assert max(report.expert_errors.values()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_the_rest(dtype, tmp_path):
    base, code, law = make_family(tmp_path, frozen=False, dtype=dtype)
    upcycle(base, tmp_path / "moe", recipe(code, law, law, "base", compose_rest="mean", verify="none"))
    moe = load(tmp_path / "moe", dtype="auto").state_dict()
    models = [load(folder, dtype="auto").state_dict() for folder in (code, law, base)]
    compared = [name for name in models[0] if ".mlp." not in name]
    assert len(compared) == 21
    for name in compared:
        assert torch.equal(moe[name], torch.stack([model[name].double() for model in models]).mean(0).to(dtype)), name
    assert torch.equal(
        moe["model.layers.0.mlp.experts.down_proj"][3], models[2]["model.layers.0.mlp.down_proj.weight"]
    )


def test_mean_without_the_base(tmp_path):
    base, code, law = make_family(tmp_path, frozen=False)
    upcycle(base, tmp_path / "moe", recipe(code, law, compose_rest="mean", verify="none"))
    norm = "model.norm.weight"
    models = [load(folder).state_dict()[norm].double() for folder in (code, law)]
    assert torch.equal(load(tmp_path / "moe").state_dict()[norm], ((models[0] + models[1]) / 2).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_what_was_frozen_is_what_was_frozen(dtype, tmp_path):
    base, code, law = make_family(tmp_path, dtype=dtype)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, "base", compose_rest="mean", verify="per_expert"))
    assert [row["num_differing_tensors"] for row in report.parity["per_expert"]] == [0, 0, 0]
    upcycle(base, tmp_path / "other", recipe(code, law, "base", verify="none"))
    assert (tmp_path / "moe" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("rest", "target"), [("base", "auto"), ("mean", "hf_moe")])
def test_in_memory_equals_streamed(family, rest, target, tmp_path):
    folders = make_family(tmp_path, family, frozen=False, dtype=torch.bfloat16)
    models = [load(folder, dtype="auto") for folder in folders]
    upcycle(
        folders[0], tmp_path / "moe", recipe(*folders[1:], "base", compose_rest=rest, target=target, verify="none")
    )
    names = recipe("code", "law", "base", compose_rest=rest, target=target)
    moe = upcycle_model(models[0], names, experts={"code": models[1], "law": models[2]})
    streamed = load(tmp_path / "moe", dtype="auto")
    assert type(moe) is type(streamed)
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(moe.state_dict()[name], tensor), name


def test_models_in_memory_must_be_those_of_the_recipe():
    base = dense_model("llama")
    with pytest.raises(UpcycleError, match=r"a model for each entry.*see to \['law'\]"):
        upcycle_model(base, recipe("code", "law"), experts={"code": trained(base, 1)})
    with pytest.raises(UpcycleError, match=r"no other; see to \['code'\]"):
        upcycle_model(base, UpcycleConfig(num_experts=4), experts={"code": trained(base, 1)})
    broken = trained(base, 1)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UpcycleError, match="Expert 'code': Tensor 'model.norm.weight' holds NaN"):
        upcycle_model(base, recipe("code", "base"), experts={"code": broken})


# --- Where the weights come from -------------------------------------------------------------------------------------


@torch.no_grad()
def test_sharded_and_pickled_checkpoints(tmp_path):
    base = dense_model("llama")
    code, law = trained(base, 1), trained(base, 2)
    save(base, tmp_path / "base")
    save(code, tmp_path / "code", max_shard_size="20KB")
    assert len(list((tmp_path / "code").glob("*.safetensors"))) > 2
    law.config.save_pretrained(tmp_path / "law")
    torch.save(law.state_dict(), tmp_path / "law" / "pytorch_model.bin")
    entries = [str(tmp_path / "code"), str(tmp_path / "law")]
    report = upcycle(tmp_path / "base", tmp_path / "moe", recipe(*entries))
    assert max(report.expert_errors.values()) <= 1e-5
    upcycle(tmp_path / "base", tmp_path / "many", recipe(*entries, verify="none"), max_shard_size="30KB")
    one, many = load(tmp_path / "moe").state_dict(), load(tmp_path / "many").state_dict()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_hub_checkpoints_and_licences(tmp_path, monkeypatch):
    folders = {"me/base": "a" * 40, "me/code": "b" * 40, "you/law": "c" * 40}
    for (name, commit), folder in zip(list(folders.items()), make_family(tmp_path / "made"), strict=True):
        folders[name] = str(Path(folder).rename(tmp_path / commit))
    (tmp_path / ("a" * 40) / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\n")
    (tmp_path / ("a" * 40) / "LICENSE").write_text("the base's")
    (tmp_path / ("c" * 40) / "README.md").write_text("---\nlicense: other\nlicense_name: law-only\n---\n")
    asked = []

    def download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        return folders[repo_id]

    monkeypatch.setattr("hf_moe.upcycling.checkpoint.snapshot_download", download)
    for module in ("plan", "compose"):
        monkeypatch.setattr(
            f"hf_moe.upcycling.{module}.read_config", lambda source, revision: read_config(folders[source])
        )
    upcycle("me/base", tmp_path / "moe", recipe("me/code@main", "you/law", "base"))
    assert asked == [("me/base", None), ("me/code", "main"), ("you/law", None)]
    provenance = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())
    assert provenance["recipe"]["experts"] == ["me/code@" + "b" * 40, "you/law@" + "c" * 40, "base"]
    assert [expert["name"] for expert in provenance["experts"]] == ["me/code", "you/law", "me/base"]
    assert len({expert["sha256"]["model.safetensors"] for expert in provenance["experts"]}) == 3
    data = ModelCard.load(tmp_path / "moe" / "README.md").data
    assert data.base_model == ["me/base", "me/code", "you/law"]
    assert data.base_model_relation == "merge"
    assert (data.license, data.license_name) == ("other", "several")
    card = (tmp_path / "moe" / "README.md").read_text()
    for phrase in ("| not stated |", "| law-only |", "| mit |", "The licences differ", "everything else is equal"):
        assert phrase in card, phrase
    assert (tmp_path / "moe" / "LICENSE").read_text() == "the base's"


def test_card_of_local_folders(tmp_path):
    base, code, law = make_family(tmp_path, frozen=False)
    upcycle(base, tmp_path / "moe", recipe(code, law, "base", verify="layers"))
    card = (tmp_path / "moe" / "README.md").read_text()
    for phrase in ("# base, 3 experts", "| 1 | `law` |", "- expert 2, `model.safetensors`", "21 tensors outside"):
        assert phrase in card, phrase
    for phrase in (str(tmp_path), "base_model", "None", "same top token", "The licences differ"):
        assert phrase not in card, phrase


def test_memory_does_not_grow_with_the_experts(tmp_path, monkeypatch):
    base, code, law = make_family(tmp_path)
    alive: set[int] = set()
    most = []
    read = Checkpoint.read

    def counting(self, name, check_finite=True):
        tensor = read(self, name, check_finite)
        number = len(most)
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    peaks = []
    for rest in ("base", "mean"):
        for experts in ([code, law], [code, law, "base", law, code, base]):
            most.clear()
            upcycle(base, tmp_path / f"{rest}{len(experts)}", recipe(*experts, compose_rest=rest, verify="none"))
            peaks.append(max(most))
    assert peaks[0] == peaks[1] <= 8
    assert peaks[2] == peaks[3] <= 8


# --- Types and vocabularies ------------------------------------------------------------------------------------------


def test_other_types_are_rounded_and_said_so(tmp_path, caplog):
    base, code, law = make_family(tmp_path)
    half = save(cast(load(base), torch.bfloat16), tmp_path / "half")
    report = upcycle(half, tmp_path / "moe", recipe(code, "base"))
    assert f"Expert {code!r} is of type torch.float32; its weights are rounded" in caplog.text
    moe = load(tmp_path / "moe", dtype="auto")
    expected = load(code).model.layers[0].mlp.down_proj.weight.to(torch.bfloat16)
    assert torch.equal(moe.model.layers[0].mlp.experts.down_proj[0], expected)
    rows = report.parity["per_expert"]
    assert rows[0]["inexact_because"] == "its weights were rounded from float32"
    assert 1e-4 < report.expert_errors[code] < 0.1
    assert report.expert_errors["base"] <= 1e-5

    caplog.clear()
    report = upcycle(base, tmp_path / "wide", recipe(half, "base", verify="layers"))
    assert "rounded" not in caplog.text
    assert max(max(row["layers"].values()) for row in report.parity["per_expert"]) <= 1e-5


def test_values_beyond_the_base_type_are_refused(tmp_path):
    base = dense_model("llama")
    neuron, norm = trained(base, 1), trained(base, 1)
    neuron.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    norm.model.norm.weight.data[0] = 1e6
    save(cast(base, torch.float16), tmp_path / "base")
    folders = [save(model, tmp_path / name) for name, model in (("neuron", neuron), ("norm", norm))]
    with pytest.raises(
        UpcycleError,
        match="neuron': Tensor 'model.layers.1.mlp.up_proj.weight' holds .* beyond the range of torch.float16",
    ):
        upcycle(tmp_path / "base", tmp_path / "moe", recipe(folders[0], "base"))
    with pytest.raises(UpcycleError, match="Tensor 'model.norm.weight' holds values beyond the range"):
        upcycle(tmp_path / "base", tmp_path / "mean", recipe(folders[1], "base", compose_rest="mean"))
    assert not (tmp_path / "moe").exists()
    assert upcycle(tmp_path / "base", tmp_path / "kept", recipe(folders[1], "base", verify="none"))


def with_more_tokens(folder: str, target: Path, *tokens: str, rows: int) -> str:
    """The model with larger embeddings and a tokenizer that knows more."""
    model = load(folder)
    model.resize_token_embeddings(rows)
    torch.manual_seed(rows)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[96:] = torch.randn(rows - 96, weight.shape[1])
    save(model, target)
    add_tokens(str(target), *tokens)
    return str(target)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_base_keeps_its_vocabulary(tied, tmp_path, caplog):
    base, code, law = make_family(tmp_path, tie_word_embeddings=tied)
    chat = with_more_tokens(law, tmp_path / "chat", "<a>", "<b>", rows=99)
    report = upcycle(base, tmp_path / "moe", recipe(code, chat))
    assert "has 99 tokens, the base 96" in caplog.text
    assert "3 rows of its embeddings are ignored" in caplog.text
    moe = load(tmp_path / "moe")
    assert moe.config.vocab_size == 96
    assert len(AutoTokenizer.from_pretrained(tmp_path / "moe")) == 96
    assert report.parity["per_expert"][1]["inexact_because"] is None, "what both have is equal"
    assert report.expert_errors[chat] <= 1e-5
    assert_close(force_expert(moe, 1)(ids()).logits, load(chat)(ids()).logits[..., :96])


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_mean_has_every_row(tied, tmp_path):
    base, code, law = make_family(tmp_path, frozen=False, tie_word_embeddings=tied)
    code = with_more_tokens(code, tmp_path / "few", "<a>", rows=97)
    law = with_more_tokens(law, tmp_path / "many", "<a>", "<b>", rows=99)
    report = upcycle(base, tmp_path / "moe", recipe("base", code, law, compose_rest="mean", verify="layers"))
    moe = load(tmp_path / "moe")
    tables = [load(folder).get_input_embeddings().weight.double() for folder in (base, code, law)]
    merged = moe.get_input_embeddings().weight
    assert (
        merged.shape[0]
        == moe.config.vocab_size
        == plan_upcycle(base, recipe(code, law, compose_rest="mean")).config.vocab_size
        == 99
    )
    assert torch.equal(merged[:96], (sum(table[:96] for table in tables) / 3).float())
    assert torch.equal(merged[96], ((tables[1][96] + tables[2][96]) / 2).float())
    assert torch.equal(merged[97:], tables[2][97:].float())
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").convert_tokens_to_ids("<b>") == 97
    assert all(max(row["layers"].values()) <= 1e-5 for row in report.parity["per_expert"])


@torch.no_grad()
def test_mean_keeps_the_base_rows_that_no_expert_has(tmp_path):
    base, code, law = make_family(tmp_path, frozen=False)
    for folder in (code, law):
        small = load(folder)
        small.resize_token_embeddings(90)
        small.save_pretrained(folder)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, compose_rest="mean"))
    merged = load(tmp_path / "moe").get_input_embeddings().weight
    assert torch.equal(merged[90:], load(base).get_input_embeddings().weight[90:])
    assert not torch.equal(merged[89], load(base).get_input_embeddings().weight[89])
    assert all(max(row["layers"].values()) <= 1e-5 for row in report.parity["per_expert"])


def test_tokenizers_that_disagree(tmp_path, caplog):
    base, code, law = make_family(tmp_path)
    code = with_more_tokens(code, tmp_path / "one", "<a>", rows=98)
    law = with_more_tokens(law, tmp_path / "two", "<b>", rows=98)
    with pytest.raises(UpcycleError, match=r"token 96 is '<b>' in .*two' and '<a>' in .*one'.*compose_rest='base'"):
        upcycle(base, tmp_path / "moe", recipe(code, law, compose_rest="mean"))
    shutil.copy(Path(base) / "tokenizer.json", law)
    tokens = json.loads((Path(law) / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["ä"] = tokens["model"]["vocab"].pop("a")
    (Path(law) / "tokenizer.json").write_text(json.dumps(tokens))
    upcycle(base, tmp_path / "moe", recipe(code, law))
    assert "trained with other tokens than the base for 1 ids, e.g. 69: 'ä' instead of 'a'" in caplog.text


def test_tokenizer_that_does_not_load(tmp_path, caplog):
    base, code, law = make_family(tmp_path)
    (Path(code) / "tokenizer.json").write_text("{}")
    assert upcycle(base, tmp_path / "moe", recipe(code, law)).expert_errors[law] <= 1e-5
    assert "does not load" in caplog.text


def test_heads_of_other_sizes_cannot_be_averaged(tmp_path):
    folders = []
    for seed, num_labels in enumerate((3, 4)):
        model = dense_model("llama", "ForSequenceClassification", num_labels=num_labels)
        folders.append(save(model, tmp_path / str(seed)))
    with pytest.raises(UpcycleError, match=r"cannot average 'score.weight', whose shapes are \{'base': \(3, 32\)"):
        upcycle(folders[0], tmp_path / "moe", recipe("base", folders[1], compose_rest="mean"))
    assert upcycle(folders[0], tmp_path / "moe", recipe("base", folders[1])).parity["per_expert"]


# --- The proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "keys", "compared"),
    [
        ("full", {"float32", "routing", "per_expert"}, True),
        ("per_expert", {"per_expert"}, True),
        ("layers", {"per_expert"}, False),
    ],
)
def test_what_is_compared(verify, keys, compared, tmp_path):
    base, code, law = make_family(tmp_path, frozen=False)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, verify=verify))
    assert report.parity.keys() == {"num_tokens", "text", "in_each_of", "beyond_window"} | keys
    assert all(("max_relative_error" in row) == compared for row in report.parity["per_expert"])
    assert (report.max_relative_error is None) == (verify != "full")
    assert all((error > 1e-3) == compared for error in report.expert_errors.values())
    assert all(row["num_differing_tensors"] == 21 for row in report.parity["per_expert"])


def test_nothing_is_compared(tmp_path):
    base, code, law = make_family(tmp_path)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, verify="none"))
    assert (report.parity, report.expert_errors, report.max_relative_error) == (None, None, None)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("verify", "index"), [("per_expert", 1), ("layers", 2)])
def test_one_broken_expert_fails_the_proof(frozen, verify, index, tmp_path, monkeypatch):
    def build(dense, context):
        spoil = (lambda expert: expert._replace(up_proj=expert.up_proj * 1.001)) if context.layer_index == 1 else None
        return methods.SparseLayer(
            expert=lambda e: spoil(context.composed(e)) if spoil and e == index else context.composed(e)
        )

    monkeypatch.setitem(methods.METHODS, "compose", dataclasses.replace(methods.METHODS["compose"], build=build))
    base, code, law = make_family(tmp_path, frozen=frozen)
    with pytest.raises(UpcycleError, match=f"Experts .*{index}.* do not compute what .*law' computes"):
        upcycle(base, tmp_path / "moe", recipe(code, law, law, verify=verify))
    assert not (tmp_path / "moe").exists()
    with pytest.raises(UpcycleError, match="no conversion that could go on"):
        upcycle(base, tmp_path / "moe", recipe(code, law, law, verify=verify))


def test_broken_logits_fail_only_where_the_rest_is_equal(tmp_path, monkeypatch):
    # With the differences hidden, the logits of models that were trained as a whole cannot pass.
    base, code, law = make_family(tmp_path, frozen=False)
    assert upcycle(base, tmp_path / "moe", recipe(code, law, verify="per_expert")).expert_errors[code] > 0.1
    monkeypatch.setattr("hf_moe.upcycling.expert_parity._differing_tensors", lambda parent, result: [])
    with pytest.raises(UpcycleError, match=r"Experts \[0\] do not compute what"):
        upcycle(base, tmp_path / "again", recipe(code, law, verify="per_expert"))


def test_noise_is_reported_and_not_refused(tmp_path):
    base, code, law = make_family(tmp_path)
    report = upcycle(base, tmp_path / "moe", recipe(code, law, expert_noise=0.01, verify="per_expert"))
    assert all(1e-4 < error < 0.2 for error in report.expert_errors.values())
    assert report.parity["per_expert"][0]["inexact_because"] == "noise was added (expert_noise=0.01)"


# --- Safety of the files ---------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from hf_moe import UpcycleConfig, upcycle
from hf_moe.upcycling.writer import ShardWriter
count, write = 0, ShardWriter.write
def killing(self, step):
    global count
    for number in write(self, step):
        count += 1
        if count == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield number
ShardWriter.write = killing
experts = sys.argv[3:]
upcycle(sys.argv[1], sys.argv[2], UpcycleConfig(method="compose", experts=experts, compose_rest="mean"), max_shard_size="40KB")
"""


@pytest.mark.processes
def test_resume_is_byte_identical_and_knows_its_parents(tmp_path):
    base, code, law = make_family(tmp_path, frozen=False)
    options = {"max_shard_size": "40KB"}
    upcycle(base, tmp_path / "whole", recipe(code, law, compose_rest="mean"), **options)
    run = subprocess.run([sys.executable, "-c", KILLED, base, tmp_path / "moe", code, law], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    randomize(other := load(law), seed=5)
    shutil.copytree(law, tmp_path / "kept")
    other.save_pretrained(law)
    with pytest.raises(UpcycleError, match="another model, or with another recipe"):
        upcycle(base, tmp_path / "moe", recipe(code, law, compose_rest="mean"), **options)
    shutil.rmtree(law)
    (tmp_path / "kept").rename(law)
    upcycle(base, tmp_path / "moe", recipe(code, law, compose_rest="mean"), **options)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "moe", names, shallow=False) == (names, [], [])


def test_no_parent_is_overwritten(tmp_path):
    base, code, law = make_family(tmp_path)
    for target in (Path(law), tmp_path):
        with pytest.raises(UpcycleError, match=f"holds the source {law if target != tmp_path else base}"):
            upcycle(base, target, recipe(code, law), overwrite=True)
    assert load(law)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": None}, "needs `experts`: folders or Hub ids.*got None"),
        ({"experts": ["base", "base"]}, r"needs `experts`.*got \['base', 'base'\]"),
        ({"experts": ["a", "b"], "norm_topk_prob": False}, "'compose' needs `norm_topk_prob`"),
        ({"experts": ["a"]}, "`num_experts` must be at least 2, got 1"),
        ({"experts": ["a", "b"], "num_experts": 3}, r"one expert of each of the 2 entries.*\(got 3\)"),
        ({"experts": ["a", "b"], "num_experts": [2, 2, 2]}, r"in every layer.*got \[2, 2, 2\]"),
        ({"experts": ["a", "b"], "num_experts_per_tok": 3}, "between 1 and `num_experts`"),
        ({"experts": ["a", "b"], "compose_rest": "median"}, "compose_rest"),
        ({"experts": ["a", "b"], "granularity": 2}, "`granularity`=2 has no effect on method 'compose'"),
        ({"experts": "a"}, "experts"),
        ({"experts": ["a", "b"], "method": "copy"}, "`experts`=.* has no effect on method 'copy'"),
        ({"compose_rest": "mean", "method": "copy"}, "`compose_rest`='mean' has no effect"),
        ({"verify": "per_expert", "method": "copy"}, "'per_expert' is for method 'compose'"),
    ],
)
def test_bad_recipes_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        UpcycleConfig(**{"method": "compose", **values})


def test_number_of_experts_may_be_left_out():
    assert recipe("a", "b", "base").num_experts == 3
    assert recipe("a", "b", num_experts=2) == recipe("a", "b")
    assert UpcycleConfig().num_experts == 8


@pytest.mark.parametrize(
    ("family", "values", "field"),
    [
        ("mistral", {}, "its model_type is 'mistral', the base's is 'llama'"),
        ("llama", {"hidden_size": 64}, "its hidden_size is 64, the base's is 32"),
        ("llama", {"intermediate_size": 64}, "its intermediate_size is 64"),
        ("llama", {"num_hidden_layers": 2}, "its num_hidden_layers is 2, the base's is 3"),
        ("llama", {"num_attention_heads": 8}, "its num_attention_heads is 8"),
        ("llama", {"num_key_value_heads": 4}, "its num_key_value_heads is 4"),
        ("llama", {"head_dim": 8}, "its head_dim is 8"),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ("llama", {"rms_norm_eps": 1e-3}, "its rms_norm_eps is 0.001"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "its rope_parameters is"),
        ("llama", {"attention_bias": True}, "its attention_bias is True"),
        ("llama", {"tie_word_embeddings": True}, "its tie_word_embeddings is True"),
        ("llama", {"architectures": ["LlamaModel"]}, "its architectures is"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(family, values, field, tmp_path):
    base = dense_config("llama", architectures=["LlamaForCausalLM"])
    dense_config(family, **values).save_pretrained(tmp_path / "other")
    entry = str(tmp_path / "other")
    with pytest.raises(UpcycleError, match=f"Expert '{entry}' .*{field}"):
        plan_upcycle(base, recipe("base", entry))


def test_mixtures_of_experts_do_not_fit(tmp_path):
    MixtralConfig().save_pretrained(tmp_path)
    with pytest.raises(UpcycleError, match="its model_type is 'mixtral'"):
        plan_upcycle(dense_config("llama"), recipe("base", str(tmp_path)))


def test_positions_matter_where_rope_computes_with_them(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    dense_config("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "longer")
    dense_config("llama", max_position_embeddings=1024, rope_parameters=dynamic).save_pretrained(tmp_path / "dynamic")
    assert plan_upcycle(dense_config("llama"), recipe("base", str(tmp_path / "longer")))
    with pytest.raises(UpcycleError, match="its max_position_embeddings is 1024, the base's is 512"):
        plan_upcycle(dense_config("llama", rope_parameters=dynamic), recipe("base", str(tmp_path / "dynamic")))


def test_fields_without_effect_may_differ(tmp_path):
    config = dense_config("llama", attention_dropout=0.1, eos_token_id=5, use_cache=False, initializer_range=0.5)
    config.save_pretrained(tmp_path)
    assert plan_upcycle(dense_config("llama"), recipe("base", str(tmp_path)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "Expert .*code': .* holds no weights"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"no model"),
            "Expert .*code': model.safetensors is no",
        ),
        (lambda folder: drop(folder, "model.norm.weight"), "Expert .*code': The checkpoint lacks 1 of the tensors"),
        (lambda folder: drop(folder, "model.layers.0.mlp.up_proj.weight"), "Expert .*code': The checkpoint lacks 1"),
        (lambda folder: spoil_values(folder), "Expert .*code': .*'model.layers.0.mlp.up_proj.weight' holds NaN"),
        (lambda folder: make_adapter(folder), "is an adapter.*merge_and_unload"),
        (lambda folder: shutil.rmtree(folder), "No configuration at .*code"),
    ],
)
def test_bad_checkpoints_are_refused(spoil, message, tmp_path):
    base, code, law = make_family(tmp_path)
    spoil(Path(code))
    with pytest.raises(UpcycleError, match=message):
        upcycle(base, tmp_path / "moe", recipe(code, law))
    assert not (tmp_path / "moe").exists()


def change(folder: Path, edit) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path, name: str) -> None:
    change(folder, lambda tensors: tensors.pop(name))


def spoil_values(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))


def make_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


# --- The plan and the entries ----------------------------------------------------------------------------------------


def test_plan_reads_configurations_only(tmp_path):
    base, code, law = make_family(tmp_path)
    for folder in (base, code, law):
        (Path(folder) / "model.safetensors").unlink()
    plan = plan_upcycle(base, recipe(code, law, "base", "base"))
    assert not plan.exact
    assert "the experts differ" in plan.inexact_because
    copied = plan_upcycle(base, UpcycleConfig(num_experts=4))
    assert (plan.num_parameters, plan.bytes) == (copied.num_parameters, copied.bytes)


def test_folder_named_base_and_folder_with_an_at_sign(tmp_path, monkeypatch):
    base, code, law = make_family(tmp_path)
    Path(code).rename(tmp_path / "code@2")
    monkeypatch.chdir(tmp_path)
    report = upcycle(base, tmp_path / "moe", recipe("code@2", "./base", "base", verify="per_expert"))
    assert [row["name"] for row in report.parity["per_expert"]] == ["code@2", "base", "base"]
    assert max(report.expert_errors.values()) <= 1e-5


def test_recipe_as_yaml(tmp_path):
    given = recipe("code", "law@main", compose_rest="mean")
    (tmp_path / "recipe.yml").write_text(given.to_yaml())
    assert UpcycleConfig.from_yaml(tmp_path / "recipe.yml") == given
    (tmp_path / "recipe.yml").write_text("method: compose\nexperts: [a, b, base]\n")
    assert UpcycleConfig.from_yaml(tmp_path / "recipe.yml").num_experts == 3
