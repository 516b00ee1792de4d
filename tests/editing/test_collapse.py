# SPDX-License-Identifier: Apache-2.0
"""Back to a dense model: bit for bit while nothing was trained, measured afterwards, refused where there is none."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    CORE_FAMILIES,
    FAMILIES,
    UNGATED_FAMILIES,
    assert_close,
    dense_class,
    dense_model,
    moe_model,
    save_tokenizer,
)
from small_moes import assert_same_bits, change_json, change_tensors, load, logits, save_moe, tensors
from transformers import AutoTokenizer

from hf_moe import UpcycleConfig, collapse, expand_experts, prune_experts, upcycle, upcycle_model
from hf_moe.editing.dense_parent import names_on_disk
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.feed_forward import FeedForward, FeedForwardNames


def save_dense(folder: Path, family: str = "llama", dtype=torch.bfloat16, head: str = "ForCausalLM", **values) -> Path:
    """A tiny dense model with its tokenizer, some of whose weights are negative zeros."""
    model = dense_model(family, head, dtype, **values)
    for parameter in model.parameters():
        parameter.data.view(-1)[:3] = -0.0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def recipe(**values) -> UpcycleConfig:
    return UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "verify": "none", **values})


def assert_same_model(one: Path, other: Path) -> None:
    """Same tensors to the bit, same configuration, same tokenizer."""
    assert_same_bits(one, other)
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    for path in one.glob("*token*"):
        assert path.read_bytes() == (other / path.name).read_bytes()


METHODS = {
    "copy": {},
    "residual": {},
    "residual of parts": {"method": "residual", "granularity": 2},
    "granular": {"granularity": 2, "num_experts": 8, "num_experts_per_tok": 4},
    "granular on down": {"method": "granular", "granularity": 2, "num_experts": 8, "scale_on": "down"},
    "split": {},
    "drop": {"reinit_ratio": 0.0},
    "copy, not normalised": {"method": "copy", "norm_topk_prob": False, "router_init": "zero"},
    "drop, not normalised": {"method": "drop", "norm_topk_prob": False, "router_init": "zero", "reinit_ratio": 0.0},
    "granular, not normalised": {
        **{"method": "granular", "norm_topk_prob": False, "router_init": "zero"},
        **{"granularity": 2, "num_experts": 16, "num_experts_per_tok": 4},
    },
    "split, not normalised": {"method": "split", "norm_topk_prob": False, "router_init": "zero"},
}


HEADS = {"bert": "ForMaskedLM", "vit": "ForImageClassification"}
TIED = ("bert", "gemma2", "gpt2", "granite")
CASES = [
    (family, native, tied)
    for family in [*FAMILIES, *UNGATED_FAMILIES]
    for native in (
        [False, True] if family in CORE_FAMILIES else [False]
    )  # the others' native classes have their own test
    for tied in ([False, True] if family in CORE_FAMILIES else [family in TIED])
]


@pytest.mark.parametrize(("family", "native", "tied"), CASES)
def test_collapsing_gives_every_family_back_to_the_bit(family, native, tied, tmp_path):
    head = HEADS.get(family, "ForCausalLM")
    values = {} if family == "vit" else {"tie_word_embeddings": tied}
    source = save_dense(tmp_path / "dense", family, head=head, **values)
    upcycle(source, tmp_path / "moe", recipe(target="native" if native else "hf_moe"), progress=False)
    report = collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert_same_model(source, tmp_path / "back")
    model = dense_class(family, head).from_pretrained(tmp_path / "back")
    assert report.exact
    assert (report.num_experts, report.num_experts_per_tok) == (None, None)
    assert report.num_parameters == report.num_active_parameters == model.num_parameters()
    assert not tied or not any("lm_head" in name for name in tensors(tmp_path / "back"))


@pytest.mark.parametrize(
    ("family", "target", "method"),
    [("llama", "hf_moe", method) for method in METHODS]
    + [
        ("qwen2", "native", method) for method in METHODS if "residual" not in method
    ],  # it has no shared expert without gate
)
def test_collapsing_undoes_every_method_to_the_bit(family, target, method, tmp_path):
    source = save_dense(tmp_path / "dense", family, intermediate_size=64)
    values = {"method": method, **METHODS[method]}
    upcycle(source, tmp_path / "moe", recipe(target=target, **values), progress=False)
    report = collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert_same_model(source, tmp_path / "back")
    # Parts of the neurons do not compute what all of them do, although all of them are there.
    assert report.exact == (not method.startswith("split"))


@pytest.mark.parametrize(("dtype", "expert"), [(torch.float32, "mean"), (torch.float32, 3), (torch.float16, 0)])
def test_types_and_single_experts(dtype, expert, tmp_path):
    source = save_dense(tmp_path / "dense", "qwen2", dtype)
    upcycle(source, tmp_path / "moe", recipe(), progress=False)
    assert collapse(tmp_path / "moe", tmp_path / "back", expert=expert, progress=False).exact
    assert_same_model(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}, "rms_norm_eps": 1e-2},
        ),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_every_field_comes_back(family, values, tmp_path):
    source = save_dense(tmp_path / "dense", family, intermediate_size=64, **values)
    upcycle(source, tmp_path / "moe", recipe(method="split" if "mlp_bias" in values else "copy"), progress=False)
    collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert_same_model(source, tmp_path / "back")


def test_keys_that_the_dense_class_ignores_come_back(tmp_path):
    source = save_dense(tmp_path / "dense", sliding_window=8, note="mine")
    upcycle(source, tmp_path / "moe", recipe(), progress=False)
    collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["note"] == "mine"
    assert_same_model(source, tmp_path / "back")


@pytest.mark.parametrize("values", [{"layers": [2, 0]}, {"layers": [2, 0], "num_experts": [4, 6]}])
def test_chosen_layers_and_numbers_of_experts(values, tmp_path):
    source = save_dense(tmp_path / "dense")
    for method in ("copy", "residual"):
        upcycle(source, tmp_path / method, recipe(method=method, **values), progress=False)
        assert collapse(tmp_path / method, tmp_path / f"{method} back", progress=False).exact
        assert_same_model(source, tmp_path / f"{method} back")


def test_copies_without_normalisation_know_their_number_of_experts(tmp_path):
    source = save_dense(tmp_path / "dense")
    values = {"layers": [0, 2], "num_experts": [4, 8], "norm_topk_prob": False, "router_init": "zero"}
    upcycle(source, tmp_path / "moe", recipe(**values), progress=False)
    assert collapse(tmp_path / "moe", tmp_path / "back", progress=False).exact
    assert_same_model(source, tmp_path / "back")


def test_a_factor_that_is_no_power_of_two(tmp_path):
    source = save_dense(tmp_path / "dense", dtype=torch.float32)
    values = {"method": "granular", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 3}
    upcycle(source, tmp_path / "moe", recipe(**values), progress=False)
    assert collapse(tmp_path / "moe", tmp_path / "back", progress=False).exact
    expected, actual = tensors(source), tensors(tmp_path / "back")
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, 2e-7)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("target", ["native", "hf_moe"])
def test_other_heads(head, target, tmp_path):
    source = save_dense(tmp_path / "dense", "qwen3", head=head, **{} if head == "Model" else {"num_labels": 3})
    upcycle(source, tmp_path / "moe", recipe(target=target), progress=False)
    assert collapse(tmp_path / "moe", tmp_path / "back", progress=False).exact
    assert_same_model(source, tmp_path / "back")


@pytest.mark.parametrize(("target", "method"), [("native", "copy"), ("hf_moe", "residual")])
def test_without_provenance(core_family, target, method, tmp_path):
    window = {"mistral": {"sliding_window": 8}, "llama": {"tie_word_embeddings": True}}.get(core_family, {})
    dense = dense_model(core_family, dtype=torch.bfloat16, **window)
    dense.save_pretrained(tmp_path / "dense")
    upcycle_model(dense, recipe(method=method, target=target)).save_pretrained(tmp_path / "moe")
    assert not (tmp_path / "moe" / "hf_moe.json").exists()
    assert collapse(tmp_path / "moe", tmp_path / "back", progress=False).exact
    assert_same_model(tmp_path / "dense", tmp_path / "back")


def test_edits_in_between(tmp_path):
    source = save_dense(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", recipe(), progress=False)
    expand_experts(tmp_path / "moe", tmp_path / "more", verify=False, progress=False)
    prune_experts(tmp_path / "more", tmp_path / "less", drop=[0, 5, 6], verify=False, progress=False)
    assert collapse(tmp_path / "less", tmp_path / "back", progress=False).exact
    assert_same_model(source, tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    for phrase in [
        "less, collapse\n",
        "none, it is dense",
        "upcycled by method `copy` from `dense`",
        "`prune` from `more`",
    ]:
        assert phrase in card
    assert "mixture-of-experts\n" not in card.partition("# less")[0]
    again = upcycle(tmp_path / "back", tmp_path / "again", recipe(verify="full"), progress=False)
    assert again.exact


def trained(folder: Path, change) -> dict[str, torch.Tensor]:
    """Let `change` stand in for training; returns the tensors after it."""
    change_tensors(folder, change)
    return tensors(folder)


def test_trained_copies_give_their_mean_or_one_of_them(tmp_path):
    upcycle(save_dense(tmp_path / "dense", dtype=torch.float32), tmp_path / "moe", recipe(), progress=False)
    experts = "model.layers.1.block_sparse_moe.experts"

    def change(found):
        for name in found:
            if name.startswith(experts):
                found[name] += 0.1 * torch.randn(found[name].shape)

    now = trained(tmp_path / "moe", change)
    report = collapse(tmp_path / "moe", tmp_path / "mean", progress=False)
    assert not report.exact
    assert report.max_relative_error > 1e-4
    because = json.loads((tmp_path / "mean" / "hf_moe.json").read_text())["inexact_because"]
    assert because == "the experts of layer 1 differ"
    expected = torch.stack([now[f"{experts}.{index}.w2.weight"] for index in range(4)]).mean(0)
    assert_close(tensors(tmp_path / "mean")["model.layers.1.mlp.down_proj.weight"], expected, 1e-6)
    collapse(tmp_path / "moe", tmp_path / "one", expert=2, progress=False)
    assert torch.equal(tensors(tmp_path / "one")["model.layers.1.mlp.up_proj.weight"], now[f"{experts}.2.w3.weight"])


def test_trained_residual_experts_add_to_the_shared_one(tmp_path):
    values = {"method": "residual", "target": "hf_moe"}
    upcycle(save_dense(tmp_path / "dense", dtype=torch.float32), tmp_path / "moe", recipe(**values), progress=False)
    name = "model.layers.1.mlp.experts.down_proj"
    before = collapse(tmp_path / "moe", tmp_path / "untrained", progress=False)
    assert before.max_relative_error == 0.0
    now = trained(tmp_path / "moe", lambda found: found[name].copy_(0.02 * torch.randn(found[name].shape)))
    report = collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert not report.exact
    expected = now["model.layers.1.mlp.shared_expert.down_proj.weight"] + now[name].mean(0)
    assert_close(tensors(tmp_path / "back")["model.layers.1.mlp.down_proj.weight"], expected, 1e-6)
    # Where all experts have learned the same, the mean is what they compute.
    trained(tmp_path / "moe", lambda found: found[name].copy_(found[name][:1].expand(4, -1, -1)))
    assert collapse(tmp_path / "moe", tmp_path / "same", progress=False).exact


def test_each_composed_expert_can_be_taken_out_again(tmp_path):
    base = save_dense(tmp_path / "base")
    tuned = save_dense(tmp_path / "tuned")
    change_tensors(tuned, lambda found: [found[name].mul_(0.5) for name in found if ".mlp." in name])
    experts = {"method": "compose", "experts": ["base", str(tuned)], "num_experts": 2}
    upcycle(base, tmp_path / "moe", UpcycleConfig(**experts, verify="none"), progress=False)
    collapse(tmp_path / "moe", tmp_path / "back", expert=1, progress=False)
    assert_same_bits(tuned, tmp_path / "back")
    collapse(tmp_path / "moe", tmp_path / "mean", progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert_close(tensors(tmp_path / "mean")[name], 0.75 * tensors(base)[name].float(), 4e-3)


def test_a_grown_vocabulary_stays(tmp_path):
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", recipe(), progress=False)
    model = load(tmp_path / "moe", dtype="auto")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "moe")
    collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    assert load(tmp_path / "back").config.vocab_size == 100
    assert logits(tmp_path / "back").shape[-1] == 100


def test_a_mixture_that_hf_moe_did_not_make(tmp_path):
    source = save_moe(tmp_path / "moe", "mixtral", sliding_window=8)
    report = collapse(source, tmp_path / "back", expert=1, progress=False)
    assert report.model_type == "mistral", "Llama has no window"
    assert not report.exact
    model, dense = load(source), load(tmp_path / "back")
    assert dense.config.sliding_window == 8
    assert torch.equal(dense.model.layers[2].mlp.down_proj.weight, model.model.layers[2].mlp.experts.down_proj[1])


def test_a_trained_shared_expert_behind_a_gate_is_left_out(tmp_path):
    upcycle(save_dense(tmp_path / "dense", "qwen2"), tmp_path / "moe", recipe(target="native"), progress=False)
    name = "model.layers.2.mlp.shared_expert.down_proj.weight"
    change_tensors(tmp_path / "moe", lambda found: found[name].fill_(0.1))
    collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    because = json.loads((tmp_path / "back" / "hf_moe.json").read_text())["inexact_because"]
    assert because.startswith("the shared expert of layer 2")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "gate_proj.weight gate_proj.bias up_proj.weight up_proj.bias down_proj.weight down_proj.bias"),
        ({"gate": None, "transposed": True}, "up_proj.weight up_proj.bias down_proj.weight down_proj.bias"),
        ({"gate": None, "fused": True}, "up_proj.weight up_proj.bias down_proj.weight down_proj.bias"),
    ],
)
def test_names_write_what_they_read(values, field):
    names = FeedForwardNames(**{"gate": "gate_proj", "up": "up_proj", "down": "down_proj", **values})
    gated = names.gate is not None or names.fused
    random = [torch.randn(*shape) for shape in [(6, 4), (6, 4), (4, 6), (6,), (6,), (4,)]]
    feed_forward = FeedForward(*random) if gated else FeedForward(None, *random[1:3], None, *random[4:])
    written = {name: torch.cat(parts) for name, parts in names.write("layers.0.", feed_forward)}
    assert sorted(written) == sorted(f"layers.0.{name}" for name in field.split())
    assert sorted(names.tensors("layers.0.", written)) == sorted(written)
    if names.transposed:
        assert written["layers.0.up_proj.weight"].shape == (4, 6)
    for before, after in zip(feed_forward, names.read("layers.0.", written), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_names_on_disk_are_those_of_save_pretrained(tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert set(tensors(tmp_path)) <= set(names_on_disk(model).values())
    assert names_on_disk(model)["lm_head.weight"] == "embed_out.weight"


def bad_source(kind: str, folder: Path) -> Path:
    dense = save_dense(folder / "dense", intermediate_size=64)
    moe = folder / "moe"
    match kind:
        case "olmoe":
            save_moe(moe, "olmoe")
        case "wide":
            model = moe_model("llama", mlp_layer_types=["sparse", "dense", "sparse"])
            model.save_pretrained(moe)
        case "gate":
            save_moe(moe, "qwen2_moe")
        case "filtered":
            save_moe(moe, "moe_llama", use_localized_filtering=True)
        case "qwen":
            upcycle(dense, moe, recipe(method="qwen", granularity=2, verify="none"), progress=False)
        case "edited":
            upcycle(dense, folder / "first", recipe(method="split"), progress=False)
            expand_experts(folder / "first", moe, verify=False, progress=False)
        case "residual":
            upcycle(dense, moe, recipe(method="residual"), progress=False)
        case _:
            upcycle(dense, moe, recipe(), progress=False)
    provenance = moe / "hf_moe.json"
    match kind:
        case "unknown recipe":
            change_json(provenance, recipe={"method": "copy", "magic": 3})
        case "wrong recipe":
            change_json(provenance, recipe=recipe(method="residual").to_dict())
        case "wrong configuration":
            parent = json.loads(provenance.read_text())["parent"]
            change_json(provenance, parent={**parent, "config": {"hidden_size": "wide", "mlp_bias": "maybe"}})
    return moe


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("plain", {"expert": "median"}, "`expert` must be 'mean' or the index of an expert, got 'median'"),
        ("plain", {"expert": -1}, "`expert` must be 'mean' or the index of an expert, got -1"),
        ("plain", {"expert": 4}, "expert=4: layer 0 has experts 0 to 3"),
        ("residual", {"expert": 1}, "no expert of method 'residual' is a feed-forward of its own"),
        ("olmoe", {}, "No dense class is known for model_type 'olmoe'.*'mixtral'.*'moe_llama'"),
        ("wide", {}, "needs 'model.layers.1.mlp.gate_proj.weight' with shape \\(24, 32\\), but .* \\(48, 32\\)"),
        ("filtered", {}, "No dense class of transformers filters queries and keys"),
        ("gate", {}, "shared expert is scaled by a gate, which no dense feed-forward has"),
        ("qwen", {}, "Experts of method 'qwen' hold no feed-forward to go back to"),
        ("edited", {}, "parts of one feed-forward, but experts were added or removed since"),
        ("unknown recipe", {}, "the recipe in hf_moe.json is not one of this version.*magic"),
        ("wrong recipe", {}, "made by method 'residual', but layer 0 has no shared expert"),
        ("wrong configuration", {}, "Llama: the dense configuration cannot be restored: .*hidden_size"),
    ],
)
def test_what_cannot_be_collapsed(kind, arguments, message, tmp_path):
    source = bad_source(kind, tmp_path)
    with pytest.raises(UpcycleError, match=message):
        collapse(source, tmp_path / "back", progress=False, **arguments)
    assert not (tmp_path / "back").exists()


def test_the_tokenizer_works(tmp_path):
    upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", recipe(), progress=False)
    collapse(tmp_path / "moe", tmp_path / "back", progress=False)
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("hello").input_ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "dense")("hello").input_ids
