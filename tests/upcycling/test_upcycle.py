# SPDX-License-Identifier: Apache-2.0
"""The conversion from disk to disk: exactness against the dense model, fidelity of every field, safety of the files."""

import dataclasses
import filecmp
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    CORE_FAMILIES,
    FAMILIES,
    assert_close,
    cast,
    dense_config,
    dense_model,
    moe_model,
    randomize,
    save_tokenizer,
)
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import WeakFileLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling import methods, parity
from hf_moe.upcycling.checkpoint import read_config
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.recipe import parse_layers


NATIVE = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


def save_dense(folder: Path, family: str = "llama", head: str = "ForCausalLM", dtype=torch.float32, **values) -> Path:
    """A tiny dense model with its tokenizer, on disk."""
    save = {name: values.pop(name) for name in ("max_shard_size",) if name in values}
    dense_model(family, head, dtype, **values).save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def recipe(**values) -> UpcycleConfig:
    return UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, **values})


def ids(length: int = 40) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(2))


def load(folder: Path, **arguments) -> transformers.PreTrainedModel:
    """The model in a folder; nothing may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


def assert_same_folder(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(
    ("family", "target"), [*((family, "hf_moe") for family in FAMILIES), *((family, "native") for family in NATIVE)]
)
@torch.no_grad()
def test_copy_is_exact(family, target, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    report = upcycle(source, tmp_path / "moe", recipe(target=target))
    model = load(tmp_path / "moe")
    name = NATIVE[family] if target == "native" else f"Moe{FAMILIES[family]}"
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert_close(model(ids()).logits, load(source)(ids()).logits)
    assert report.exact
    assert report.max_relative_error <= 1e-5
    assert report.model_type == model.config.model_type
    assert report.num_parameters == model.num_parameters()
    assert report.bytes_written == 4 * report.num_parameters
    assert report.output_dir == tmp_path / "moe"
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape[0] == 4
    assert torch.equal(experts.gate_up_proj[0], experts.gate_up_proj[3])


@torch.no_grad()
def test_residual_is_exact_to_the_bit(family, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    report = upcycle(source, tmp_path / "moe", recipe(method="residual", target="hf_moe"))
    assert report.model_type == f"moe_{family}"
    # Phi-3 computes gate and up in one product, which rounds differently from two.
    bound = 1e-6 if family == "phi3" else 0.0
    assert report.max_relative_error <= bound
    model = load(tmp_path / "moe")
    assert_close(model(ids()).logits, load(source)(ids()).logits, bound)
    assert model.model.layers[0].mlp.experts.down_proj.abs().max() == 0


def test_residual_learns(tmp_path):
    moe = upcycle_model(dense_model("llama"), recipe(method="residual", target="hf_moe")).train()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        moe(ids(), labels=ids()).loss.backward()
        block = moe.model.layers[0].mlp
        gradients.append((block.gate.weight.grad.abs().max().item(), block.experts.down_proj.grad.abs().max().item()))
        optimizer.step(), optimizer.zero_grad()
    assert gradients[0][0] == 0
    assert gradients[0][1] > 0
    assert gradients[1][0] > 0


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *((family, "grouped_mm") for family in FAMILIES),
        *itertools.product(CORE_FAMILIES, ("batched_mm", "eager")),
    ],
)
@torch.no_grad()
def test_copy_is_bit_exact_in_bfloat16(family, implementation, tmp_path):
    source = save_dense(tmp_path / "dense", family, dtype=torch.bfloat16)
    report = upcycle(source, tmp_path / "moe", recipe(target="hf_moe", num_experts=5, num_experts_per_tok=3))
    assert report.parity["bfloat16"]["max_relative_error"] == 0.0
    dense, moe = (
        load(source, dtype="auto"),
        load(tmp_path / "moe", dtype="auto", experts_implementation=implementation),
    )
    assert moe.dtype == torch.bfloat16
    assert torch.equal(moe(ids()).logits, dense(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_type(dtype, tmp_path):
    upcycle(save_dense(tmp_path / "dense", dtype=dtype), tmp_path / "moe", recipe())
    assert {p.dtype for p in load(tmp_path / "moe", dtype="auto").parameters()} == {dtype}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("family", "method", "target"),
    [
        *((family, "copy", "hf_moe") for family in FAMILIES),
        *itertools.product(CORE_FAMILIES, ("copy", "residual"), ("auto",)),
    ],
)
def test_in_memory_equals_streamed(family, method, target, tmp_path):
    dense = dense_model(family, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe(method=method, target=target))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    moe = upcycle_model(dense, recipe(method=method, target=target))
    streamed = load(tmp_path / "moe", dtype="auto")
    assert type(moe) is type(streamed)
    assert moe.state_dict().keys() == streamed.state_dict().keys()
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(moe.state_dict()[name], tensor), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not moe.training
    moe.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", dtype="auto")(ids()).logits, moe(ids()).logits)


def test_shard_size_does_not_change_a_bit(tmp_path):
    source = save_dense(tmp_path / "dense", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    upcycle(source, tmp_path / "one", recipe())
    upcycle(source, tmp_path / "many", recipe(), max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_seed_changes_the_router_only():
    dense = dense_model("llama")
    one, two = (upcycle_model(dense, recipe(seed=seed)).state_dict() for seed in (0, 1))
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}
    assert changed == {f"model.layers.{index}.mlp.gate.weight" for index in range(3)}


def test_native_checkpoints_have_per_expert_keys(core_family, tmp_path):
    upcycle(save_dense(tmp_path / "dense", core_family), tmp_path / "moe", recipe(target="native"))
    with safe_open(tmp_path / "moe" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    expert = "block_sparse_moe.experts.3.w2" if NATIVE[core_family] == "Mixtral" else "mlp.experts.3.down_proj"
    assert f"model.layers.2.{expert}.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    # The same names as transformers writes.
    load(tmp_path / "moe").save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == names


def test_qwen2_moe_gets_a_silent_shared_expert(tmp_path):
    upcycle(save_dense(tmp_path / "dense", "qwen2"), tmp_path / "moe", recipe(target="native"))
    block = load(tmp_path / "moe").model.layers[0].mlp
    assert block.shared_expert.down_proj.weight.abs().max() == 0
    assert block.shared_expert_gate.weight.abs().min() > 0, "llama.cpp turns a gate of zero into NaN"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied, tmp_path):
    upcycle(save_dense(tmp_path / "dense", tie_word_embeddings=tied), tmp_path / "moe", recipe())
    model = load(tmp_path / "moe")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with safe_open(tmp_path / "moe" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("target", ["native", "hf_moe"])
@torch.no_grad()
def test_other_heads(head, target, tmp_path):
    source = save_dense(tmp_path / "dense", "qwen3", head, num_labels=3)
    report = upcycle(source, tmp_path / "moe", recipe(target=target))
    assert report.exact
    auto = getattr(transformers, f"AutoModel{head.removeprefix('Model')}")
    dense, (model, loading) = (
        auto.from_pretrained(source),
        auto.from_pretrained(tmp_path / "moe", output_loading_info=True),
    )
    assert not any(loading.values())
    field = "last_hidden_state" if head == "Model" else "logits"
    assert_close(model(ids())[field], dense(ids())[field])


@pytest.mark.parametrize(("family", "expected"), [("llama", "moe_llama"), ("qwen3", "qwen3_moe")])
@torch.no_grad()
def test_chosen_layers(family, expected, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    report = upcycle(source, tmp_path / "moe", recipe(layers=[2, 0]))
    assert report.model_type == expected
    model = load(tmp_path / "moe")
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, True]
    assert_close(model(ids()).logits, load(source)(ids()).logits)


@torch.no_grad()
def test_bin_checkpoint(tmp_path):
    dense = dense_model("llama")
    dense.config.architectures = ["LlamaForCausalLM"]
    dense.config.save_pretrained(tmp_path / "dense")
    torch.save(dense.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    assert upcycle(tmp_path / "dense", tmp_path / "moe", recipe()).exact
    assert_close(load(tmp_path / "moe")(ids()).logits, dense(ids()).logits)


def test_companions_come_along(tmp_path):
    source = save_dense(tmp_path / "dense")
    (source / "LICENSE").write_text("mine")
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.3, "do_sample": True}))
    upcycle(source, tmp_path / "moe", recipe())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer("hello").input_ids == AutoTokenizer.from_pretrained(source)("hello").input_ids
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hello"
    assert load(tmp_path / "moe").generation_config.temperature == 0.3
    assert (tmp_path / "moe" / "LICENSE").read_text() == "mine"
    assert not (tmp_path / "moe.incomplete").exists()


# Fields that a careless conversion loses, and what they should lead to.
FIELDS = [
    ("llama", {"rms_norm_eps": 1e-2}, "mixtral"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}}, "mixtral"),
    ("llama", {"head_dim": 24}, "mixtral"),
    ("llama", {"hidden_act": "gelu"}, "mixtral"),
    ("llama", {"attention_bias": True}, "granitemoe"),
    ("llama", {"attention_dropout": None, "rms_norm_eps": 1e-2}, "granitemoe"),
    ("mistral", {"sliding_window": 8}, "mixtral"),
    ("mistral", {"sliding_window": None}, "mixtral"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "qwen2_moe"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "qwen2_moe"),
    ("qwen3", {"attention_bias": True}, "qwen3_moe"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "qwen3_moe"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "mellum"),
]


@pytest.mark.parametrize(("family", "values", "expected"), FIELDS)
@torch.no_grad()
def test_every_field_arrives(family, values, expected, tmp_path):
    source = save_dense(tmp_path / "dense", family, **values)
    dense_logits = load(source)(ids()).logits
    other = dense_model(family, **({"sliding_window": 8} if values == {"sliding_window": None} else {}))
    assert not torch.allclose(dense_logits, other(ids()).logits, atol=1e-3), "the field has an effect"
    for target in ("auto", "hf_moe"):
        report = upcycle(source, tmp_path / target, recipe(target=target))
        assert report.exact
        assert_close(load(tmp_path / target)(ids()).logits, dense_logits)
        assert report.model_type == (expected if target == "auto" else f"moe_{family}")


@torch.no_grad()
def test_keys_that_the_dense_class_ignores_do_not_wake_up(tmp_path):
    # Llama has no window; Mixtral would obey this one.
    source = save_dense(tmp_path / "dense", sliding_window=8, router_jitter_noise=0.5, num_experts_per_tok=1)
    assert "sliding_window" in (source / "config.json").read_text()
    for target in ("native", "hf_moe"):
        upcycle(source, tmp_path / target, recipe(target=target))
        model = load(tmp_path / target)
        assert_close(model(ids()).logits, load(source)(ids()).logits)
        assert model.config.router_jitter_noise == 0.0
        assert model.config.num_experts_per_tok == 2


@pytest.mark.parametrize(
    ("family", "values", "options", "field"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}, "attention_bias=True"),
        ("qwen3", FIELDS[-1][1], {"method": "residual"}, "layer_types"),
        ("mistral", {"sliding_window": 8}, {"method": "residual"}, "shared expert"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"method": "residual"}, "sigmoid gate"),
        ("llama", {}, {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("llama", {}, {"layers": [0]}, "layers"),
    ],
)
def test_native_target_is_refused_with_the_name_of_the_field(family, values, options, field):
    with pytest.raises(UpcycleError, match=field):
        plan_upcycle(dense_config(family, architectures=None, **values), recipe(target="native", **options))


def test_mlp_bias_needs_our_class(tmp_path):
    with pytest.raises(UpcycleError, match="mlp_bias"):
        plan_upcycle(dense_config("llama", mlp_bias=True), recipe(target="native"))
    report = upcycle(save_dense(tmp_path / "dense", mlp_bias=True), tmp_path / "moe", recipe())
    assert (report.model_type, report.exact) == ("moe_llama", True)


def test_inexact_recipe_is_measured_and_not_refused(tmp_path):
    report = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", recipe(norm_topk_prob=False))
    assert not report.exact
    assert report.max_relative_error > 1e-3
    assert not plan_upcycle(tmp_path / "dense", recipe(norm_topk_prob=False)).exact


@pytest.mark.parametrize("verify", ["full", "layers"])
def test_one_broken_expert_fails_the_proof(verify, tmp_path, monkeypatch):
    def build(dense, context):
        spoiled = dense._replace(up_proj=dense.up_proj * 1.001)
        return methods.SparseLayer(expert=lambda index: spoiled if (context.layer_index, index) == (1, 41) else dense)

    exact = methods.METHODS["copy"]
    monkeypatch.setitem(methods.METHODS, "copy", dataclasses.replace(exact, build=build))
    source = save_dense(tmp_path / "dense")
    for _ in range(2):
        with pytest.raises(UpcycleError, match="does not compute what the dense model computes"):
            upcycle(source, tmp_path / "moe", recipe(num_experts=64, num_experts_per_tok=1, verify=verify))
        assert not (tmp_path / "moe").exists()
        with pytest.raises(UpcycleError, match="no conversion that could go on"):
            upcycle(source, tmp_path / "moe", recipe(num_experts=64, num_experts_per_tok=1, verify=verify))
        shutil.rmtree(tmp_path / "moe.incomplete")


def test_errors_that_are_not_finite_count():
    assert parity._relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert parity._relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert parity._relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    measured = {"float32": {"layers": {"0": 0.0, "1": float("inf"), "2": 0.0}, "max_relative_error": 0.0}}
    with pytest.raises(UpcycleError, match="relative difference is inf"):
        parity.check_parity(measured, Path("moe.incomplete"))


def test_overflow_in_float16_does_not_stop_an_exact_conversion(tmp_path):
    source = save_dense(tmp_path / "dense", dtype=torch.float16)
    corrupt(source / "model.safetensors", "lm_head.weight", torch.full((96, 32), 6e4, dtype=torch.float16))
    report = upcycle(source, tmp_path / "moe", recipe())
    assert report.exact
    assert report.parity["float16"]["max_relative_error"] == float("inf")
    provenance = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())
    assert provenance["parity"]["float16"]["max_relative_error"] is None


def test_silent_feed_forward_is_exact(tmp_path):
    source = save_dense(tmp_path / "dense")
    corrupt(source / "model.safetensors", "model.layers.1.mlp.down_proj.weight", torch.zeros(32, 48))
    assert upcycle(source, tmp_path / "moe", recipe(verify="layers")).max_relative_error < 1e-6


@pytest.mark.parametrize(("verify", "keys"), [("none", None), ("layers", {"layers"})])
def test_less_verification(verify, keys, tmp_path):
    report = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", recipe(verify=verify))
    assert (report.parity is None) if keys is None else (set(report.parity["float32"]) == keys)
    assert report.exact == (keys is not None)


def test_progress_bars_do_not_disturb_the_models(tmp_path, monkeypatch):
    class Bar:
        """As tqdm on a terminal: `update` returns True when it drew."""

        def __init__(self, *arguments, total, **options):
            self.left = total

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            assert self.left == 0

        def update(self, count=1):
            self.left -= count
            return True

    monkeypatch.setattr("hf_moe.upcycling.parity.tqdm", Bar)
    monkeypatch.setattr("hf_moe.upcycling.output.tqdm", Bar)
    source = save_dense(tmp_path / "dense")
    for verify in ("full", "layers"):
        assert upcycle(source, tmp_path / verify, recipe(verify=verify, layers=[0, 2])).exact


KILLED = """
import os, signal, sys
from hf_moe import UpcycleConfig, upcycle
from hf_moe.upcycling.writer import ShardWriter
count, write = 0, ShardWriter.write
def killing(self, step):
    global count
    for number in write(self, step):
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield number
ShardWriter.write = killing
upcycle(sys.argv[1], sys.argv[2], UpcycleConfig(num_experts=4), max_shard_size="40KB")
"""


def killed_run(source: Path, output: Path, pieces: int) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(source), str(output), str(pieces)], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert not output.exists()


def test_resume_after_sigkill_is_byte_identical(tmp_path):
    source = save_dense(tmp_path / "dense")
    upcycle(source, tmp_path / "whole", recipe(), max_shard_size="40KB")
    killed_run(source, tmp_path / "moe", 20)
    journal = (tmp_path / "moe.incomplete" / ".upcycle-journal.jsonl").read_text()
    assert len(journal.splitlines()) > 2
    upcycle(source, tmp_path / "moe", recipe(), max_shard_size="40KB")
    assert_same_folder(tmp_path / "whole", tmp_path / "moe")


def test_resume_does_not_trust_damaged_bytes(tmp_path):
    source = save_dense(tmp_path / "dense")
    upcycle(source, tmp_path / "whole", recipe(), max_shard_size="40KB")
    killed_run(source, tmp_path / "moe", 25)
    shard = sorted((tmp_path / "moe.incomplete").glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-40:] = bytes(40)
    shard.write_bytes(damaged)
    with (tmp_path / "moe.incomplete" / ".upcycle-journal.jsonl").open("a") as journal:
        journal.write('{"step": "model.la')  # as a kill in the middle of a line leaves it
    upcycle(source, tmp_path / "moe", recipe(), max_shard_size="40KB")
    assert_same_folder(tmp_path / "whole", tmp_path / "moe")


def test_resume_with_another_recipe_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense")
    killed_run(source, tmp_path / "moe", 20)
    with pytest.raises(UpcycleError, match="another model, or with another recipe"):
        upcycle(source, tmp_path / "moe", recipe(seed=1))
    assert upcycle(source, tmp_path / "moe", recipe(seed=1), overwrite=True).exact


LIMITED = """
import resource, sys
from hf_moe import UpcycleConfig, upcycle
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
upcycle(sys.argv[1], sys.argv[2], UpcycleConfig(num_experts=4))
"""


def test_full_disk(tmp_path):
    source = save_dense(tmp_path / "dense")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "moe")], capture_output=True, text=True
    )
    assert "goes on where it stopped" in run.stderr
    assert not (tmp_path / "moe").exists()
    assert upcycle(source, tmp_path / "moe", recipe()).exact


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UpcycleError, match="only 1,000 are free"):
        upcycle(source, tmp_path / "moe", recipe())


def test_a_folder_without_a_model_is_never_replaced(tmp_path):
    source = save_dense(tmp_path / "dense", "llama")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "important.txt").write_text("x")
    with pytest.raises(UpcycleError, match="holds no model .*so it is not replaced"):
        upcycle(source, tmp_path / "notes", recipe(), overwrite=True)
    assert (tmp_path / "notes" / "important.txt").read_text() == "x"


def test_the_card_says_why_it_is_not_exact_and_how_much_noise_there_is(tmp_path):
    source = save_dense(tmp_path / "dense", "llama")
    report = upcycle(source, tmp_path / "moe", recipe(max_kl=1e-3))
    card = " ".join((tmp_path / "moe" / "README.md").read_text().split())
    assert report.inexact_because == "noise is added to the experts, as much as max_kl=0.001 allows"
    assert f"does not compute what the dense model computes: {report.inexact_because}." in card
    assert f"with noise on the experts of {report.expert_noise:.4g} times" in card
    assert "The experts start equal" not in card
    upcycle(source, tmp_path / "equal", recipe())
    card = " ".join((tmp_path / "equal" / "README.md").read_text().split())
    assert "The experts start equal" in card
    assert "| `model.layers.1.mlp` |" in card


def test_existing_output_is_not_touched_without_overwrite(tmp_path):
    source = save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.txt").write_text("years of work")
    with pytest.raises(UpcycleError, match="exists and is not empty.*overwrite"):
        upcycle(source, tmp_path / "moe", recipe())
    assert (tmp_path / "moe" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "moe" / "config.json").write_text("{}")
    upcycle(source, tmp_path / "moe", recipe(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
    assert load(tmp_path / "moe")
    with pytest.raises(UpcycleError, match="holds the source"):
        upcycle(source, source, recipe(), overwrite=True)
    with pytest.raises(UpcycleError, match="holds the source"):
        upcycle(source, tmp_path, recipe(), overwrite=True)
    assert load(source)


def test_neighbouring_folders_are_safe(tmp_path):
    source = save_dense(tmp_path / "moe.incomplete")
    before = (source / "model.safetensors").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UpcycleError, match="holds the source"):
            upcycle(source, tmp_path / "moe", recipe(), overwrite=overwrite)
    assert (source / "model.safetensors").read_bytes() == before
    other = save_dense(tmp_path / "dense")
    for overwrite in (False, True):
        with pytest.raises(UpcycleError, match="no conversion that could go on"):
            upcycle(other, tmp_path / "moe", recipe(), overwrite=overwrite)
    assert (source / "model.safetensors").read_bytes() == before


def test_output_by_another_name(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    upcycle(source, tmp_path / "link", recipe())
    upcycle(source, tmp_path / "link", recipe(), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert upcycle(source, ".", recipe()).output_dir == Path(".")
    assert load(tmp_path / "here")


def test_two_processes_do_not_write_one_folder(tmp_path):
    source = save_dense(tmp_path / "dense")
    with WeakFileLock(tmp_path / ".moe.upcycle.lock"), pytest.raises(UpcycleError, match="Another process"):
        upcycle(source, tmp_path / "moe", recipe())
    assert upcycle(source, tmp_path / "moe", recipe()).exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


@pytest.mark.slow
def test_resume_with_another_shard_size_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense")
    killed_run(source, tmp_path / "moe", 20)
    with pytest.raises(UpcycleError, match="another model, or with another recipe"):
        upcycle(source, tmp_path / "moe", recipe())


@pytest.mark.slow
def test_resume_without_a_shard(tmp_path):
    source = save_dense(tmp_path / "dense")
    upcycle(source, tmp_path / "whole", recipe(), max_shard_size="40KB")
    killed_run(source, tmp_path / "moe", 25)
    shards = sorted((tmp_path / "moe.incomplete").glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(b"")
    upcycle(source, tmp_path / "moe", recipe(), max_shard_size="40KB")
    assert_same_folder(tmp_path / "whole", tmp_path / "moe")


def corrupt(path: Path, name: str, value: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def break_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def make_bad_source(kind: str, folder: Path) -> Path:
    sharded = {"max_shard_size": "20KB"} if kind in ("missing shard", "outside", "absolute", "wrong index") else {}
    save_dense(folder, **sharded)
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    norm = "model.norm.weight"
    match kind:
        case "missing shard":
            sorted(folder.glob("*.safetensors"))[1].unlink()
        case "outside":
            break_index(folder, lambda weight_map: weight_map.update({norm: "../secret.safetensors"}))
        case "absolute":
            break_index(folder, lambda weight_map: weight_map.update({norm: "/etc/passwd"}))
        case "wrong index":
            break_index(folder, lambda weight_map: weight_map.update({"model.more.weight": weight_map[norm]}))
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"not a model")
        case "nan":
            corrupt(weights, "model.layers.1.mlp.up_proj.weight", torch.full((48, 32), float("nan")))
        case "extra":
            corrupt(weights, "model.layers.1.mlp.up_proj.bias", torch.zeros(48))
        case "shape":
            corrupt(weights, norm, torch.zeros(31))
        case "two types":
            corrupt(weights, "model.layers.1.mlp.up_proj.weight", torch.zeros(48, 32, dtype=torch.bfloat16))
        case "index is a list":
            (folder / "model.safetensors.index.json").write_text("[1, 2]")
        case "bad config":
            config["hidden_size"] = "wide"
        case "broken bin":
            weights.rename(folder / "pytorch_model.bin")
        case "integers":
            corrupt(weights, norm, torch.zeros(32, dtype=torch.int8))
        case "no weights":
            weights.unlink()
        case "unknown":
            config["model_type"] = "no_such_model"
        case "other family":
            config = transformers.BloomConfig().to_dict()
        case "moe":
            config = transformers.MixtralConfig().to_dict()
        case "quantized":
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        case "head":
            config["architectures"] = ["LlamaForQuestionAnswering"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing shard", "names the shard 'model-00002-of-.*Download the model again"),
        ("outside", "'../secret.safetensors', which lies outside"),
        ("absolute", "'/etc/passwd', which lies outside"),
        ("wrong index", "says that .* holds 'model.more.weight', but it does not"),
        ("truncated", "no complete safetensors file.*cut short"),
        ("garbage", "no complete safetensors file"),
        ("nan", "'model.layers.1.mlp.up_proj.weight' holds NaN"),
        ("extra", "has no place for 1 tensors.*model.layers.1.mlp.up_proj.bias"),
        ("shape", "'model.norm.weight' has shape \\(31,\\), but config.json asks for \\(32,\\)"),
        ("integers", "is of type I8"),
        ("two types", "not of one data type"),
        ("index is a list", "is no index of weight files"),
        ("bad config", "hidden_size"),
        ("broken bin", "pytorch_model.bin is broken"),
        ("no weights", "holds no weights: expected one of"),
        ("unknown", "no_such_model"),
        (
            "other family",
            "model_type 'bloom' cannot be upcycled yet. Supported are \\['bert', .*'llama', 'mistral'",
        ),
        ("moe", "is a mixture of experts already \\(model_type 'mixtral', num_.*experts=8\\)"),
        ("quantized", "quantization_config"),
        ("head", "LlamaForQuestionAnswering.*LlamaForCausalLM"),
    ],
)
def test_bad_sources_are_refused(kind, message, tmp_path):
    source = make_bad_source(kind, tmp_path / "dense")
    with pytest.raises(UpcycleError, match=message):
        upcycle(source, tmp_path / "moe", recipe())
    assert not (tmp_path / "moe").exists()


def test_our_own_result_is_a_moe_already(tmp_path):
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", recipe(target="hf_moe"))
    with pytest.raises(UpcycleError, match="mixture of experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again", recipe())


def test_pickled_code_is_not_run(tmp_path):
    dense = dense_model("llama")
    dense.config.save_pretrained(tmp_path / "dense")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"model.norm.weight": Evil()}, tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(UpcycleError, match="more than tensors.*could run code"):
        upcycle(tmp_path / "dense", tmp_path / "moe", recipe())
    assert not (tmp_path / "evil").exists()


def test_hub_source(tmp_path, monkeypatch):
    commit = "a" * 40
    snapshot = save_dense(tmp_path / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\n# Dense\n")
    calls = []

    def download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision))
        return str(snapshot)

    monkeypatch.setattr("hf_moe.upcycling.checkpoint.snapshot_download", download)
    monkeypatch.setattr("hf_moe.upcycling.plan.read_config", lambda source, revision: read_config(snapshot))
    upcycle("someone/dense", tmp_path / "moe", recipe(), revision="main")
    assert calls == [("someone/dense", "main")], "safetensors are there, so no other format is asked for"
    provenance = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())
    assert provenance["parent"]["name"] == "someone/dense"
    assert provenance["parent"]["revision"] == commit
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "base_model: someone/dense" in card
    assert "license: mit" in card
    assert "- fr" in card or "language: fr" in card


def test_broken_companions_do_not_cost_the_conversion(tmp_path):
    source = save_dense(tmp_path / "dense")
    (source / "README.md").write_text("---\nlicense: [mit\n---\n")
    (source / "tokenizer.json").write_text("{}")
    report = upcycle(source, tmp_path / "moe", recipe())
    assert report.exact
    assert not report.parity["text"]


@torch.no_grad()
def test_type_comes_from_the_tensors(tmp_path):
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    report = upcycle(source, tmp_path / "moe", recipe(target="hf_moe"))
    assert report.parity["bfloat16"]["max_relative_error"] == 0.0
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "| data type | bfloat16 | bfloat16 |" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.parametrize(("window", "beyond"), [(8, True), (None, None), (4096, False)])
def test_report_says_whether_the_window_was_passed(window, beyond, tmp_path):
    source = save_dense(tmp_path / "dense", "mistral", sliding_window=window)
    assert upcycle(source, tmp_path / "moe", recipe()).parity["beyond_window"] is beyond
    assert ("within the sliding window" in (tmp_path / "moe" / "README.md").read_text()) == (beyond is False)


def test_what_is_no_model_at_all(tmp_path):
    with pytest.raises(UpcycleError, match="No configuration at"):
        upcycle(tmp_path / "nothing", tmp_path / "moe", recipe())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpcycleError, match="has no config.json"):
        upcycle(tmp_path / "empty", tmp_path / "moe", recipe())


def test_only_dense_transformers_models_in_memory():
    with pytest.raises(UpcycleError, match="mixture of experts already"):
        upcycle_model(moe_model("llama"))
    broken = dense_model("llama")
    randomize(broken)
    broken.model.norm.weight.data[0] = float("inf")
    with pytest.raises(UpcycleError, match="'model.norm.weight' holds NaN or infinite"):
        upcycle_model(broken, recipe())


def test_cast_helper_keeps_buffers():
    model = cast(dense_model("llama"), torch.bfloat16)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("options", [{}, {"method": "granular", "granularity": 2}, {"norm_topk_prob": False}])
def test_noise_up_to_a_bound_on_the_divergence(family, options, tmp_path):
    source = save_dense(tmp_path / "dense", family)
    if "norm_topk_prob" in options:
        with pytest.raises(UpcycleError, match="nats from the dense model already, more than max_kl=0.001"):
            upcycle(source, tmp_path / "moe", recipe(max_kl=1e-3, **options))
        return
    report = upcycle(source, tmp_path / "moe", recipe(max_kl=1e-3, **options))
    found = report.parity["float32"]["kl_divergence"]
    assert 0.95e-3 < found <= 1e-3
    assert json.loads((tmp_path / "moe" / "hf_moe.json").read_text())["expert_noise"] == report.expert_noise
    assert not list((tmp_path / "moe").glob(".*"))
    again = upcycle(source, tmp_path / "again", recipe(expert_noise=report.expert_noise, **options))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "moe" / "model.safetensors"
    ).read_bytes()
    assert again.parity["float32"]["kl_divergence"] == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_kl": 0.0}, "positive number of nats"),
        ({"max_kl": 0.1, "expert_noise": 0.1}, "leave `expert_noise` out"),
        ({"max_kl": 0.1, "method": "residual"}, "silent at first"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        recipe(**values)


def test_noise_needs_predictions_and_the_text_of_the_proof(tmp_path):
    source = save_dense(tmp_path / "dense", "llama", "Model")
    with pytest.raises(UpcycleError, match="compares predictions"):
        upcycle(source, tmp_path / "moe", recipe(max_kl=0.1))
    with pytest.raises(UpcycleError, match="text of the proof"):
        upcycle_model(dense_model("llama"), recipe(max_kl=0.1))


@torch.no_grad()
def test_layers_with_numbers_of_experts_of_their_own(core_family, tmp_path):
    source = save_dense(tmp_path / "dense", core_family)
    report = upcycle(source, tmp_path / "moe", recipe(layers="0,2", num_experts=[3, 6]))
    assert report.exact
    assert [len(layer.counts) for layer in report.routing.layers.values()] == [3, 6]
    moe = load(tmp_path / "moe")
    assert moe.config.mlp_layer_types == ["sparse", "dense", "sparse"]
    assert moe.config.num_experts_per_layer == [3, 0, 6]
    assert [len(moe.model.layers[index].mlp.experts.down_proj) for index in (0, 2)] == [3, 6]
    outputs = moe(ids(), labels=ids(), output_router_logits=True)
    assert_close(outputs.logits, load(source)(ids()).logits)
    per_layer = [
        load_balancing_loss_func((logits,), num_experts, 2)
        for logits, num_experts in zip(outputs.router_logits, (3, 6), strict=True)
    ]
    assert_close(outputs.aux_loss, sum(per_layer) / 2)
    for name, tensor in upcycle_model(load(source), recipe(layers="0,2", num_experts=[3, 6])).state_dict().items():
        assert torch.equal(tensor, moe.state_dict()[name]), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": [4, 8]}, "one number per converted layer \\(3\\), got 2"),
        ({"num_experts": [4, 8, 4], "target": "native"}, "all its layers have one number of experts"),
        ({"num_experts": [3, 6, 3], "method": "split"}, "experts of different sizes"),
        ({"layers": "7-9"}, "names \\[7, 8, 9\\], but the model has layers 0 to 2"),
        ({"layers": "5:"}, "names none of the model's layers 0 to 2"),
    ],
)
def test_layers_that_do_not_fit_are_refused(values, message):
    with pytest.raises(UpcycleError, match=message):
        plan_upcycle(dense_config("llama"), recipe(**values))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("4,6,8-11", [4, 6, 8, 9, 10, 11]),
        ("::2", [0, 2, 4, 6, 8, 10]),
        (":4", [0, 1, 2, 3]),
        ("-3:", [9, 10, 11]),
        ("0,-1:", [0, 11]),
        ("1::4, 2", [1, 2, 5, 9]),
    ],
)
def test_layers_as_text(text, layers):
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "1:2:3:4", "::0", "3.5"])
def test_layers_that_are_no_text_of_layers(text):
    with pytest.raises(StrictDataclassError, match="takes indices, ranges and slices"):
        recipe(layers=text)
