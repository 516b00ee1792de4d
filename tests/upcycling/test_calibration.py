# SPDX-License-Identifier: Apache-2.0
"""What a recipe finds out from text: planted structure is recovered, closed forms are met, bad text is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_close, dense_model, randomize, save_tokenizer
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling import calibration as calibration_module
from hf_moe.upcycling.calibration import Calibration, calibrate, neuron_importance
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.families import FAMILIES
from hf_moe.upcycling.feed_forward import FeedForward, LayerContext
from hf_moe.upcycling.partition import SHARED, co_activation_partition, importance_partition
from hf_moe.upcycling.ridge import RidgeStatistics
from hf_moe.upcycling.router_data import with_logit_std
from hf_moe.upcycling.router_init import ROUTER_INITIALIZERS, Seen


HIDDEN = 24
TEXTS = {
    "code": "def f(x):\n    return [y for y in range(x) if y % 2 == 0]\n\nclass A:\n    pass\n" * 12,
    "prose": "The ship left the harbour at dawn, and nobody on the quay waved a hand.\n" * 14,
    "sums": "1 + 2 = 3; 4 * 5 = 20; 77 - 8 = 69; 12 / 4 = 3; 9 ^ 2 = 81; " * 14,
    "LOUD": "WHO IS THERE? STOP! DO NOT MOVE! GIVE ME THE KEYS, ALL OF THEM! NOW! " * 14,
}


def context(**values) -> LayerContext:
    recipe = UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, **values})
    return LayerContext(recipe, 1, 4)


def seen(inputs: torch.Tensor, domain: torch.Tensor, sequence=None, negative=None) -> Seen:
    count = len(inputs)
    return Seen(
        inputs,
        torch.arange(count) if sequence is None else sequence,
        domain,
        int(domain.max()) + 1,
        torch.zeros(count, dtype=torch.bool) if negative is None else negative,
    )


def planted(count: int = 400, num_domains: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of clusters of unequal size, with the large mean that hidden states have."""
    generator = torch.Generator().manual_seed(0)
    domain = torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0])[:num_domains], count, True, generator=generator)
    centers = 2 * torch.randn(num_domains, HIDDEN, generator=generator)
    mean = 20 * torch.randn(HIDDEN, generator=generator)
    return mean + centers[domain] + 0.3 * torch.randn(count, HIDDEN, generator=generator), domain


def same_partition(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two labellings differ in the names of the clusters alone: an adjusted Rand index of 1."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(one.unique()) == len(other.unique())


def spread(logits: torch.Tensor) -> float:
    return (logits - logits.mean(dim=-1, keepdim=True)).square().mean().sqrt().item()


def test_kmeans_recovers_planted_clusters():
    inputs, domain = planted()
    rows = ROUTER_INITIALIZERS["kmeans"].build(4, seen(inputs, domain), context(router_logit_std=0.7))
    logits = inputs @ rows.T
    assert same_partition(logits.argmax(dim=-1), domain)
    assert spread(logits) == pytest.approx(0.7, rel=1e-3)


def test_ridge_is_the_closed_form():
    inputs, domain = planted()
    penalty = 0.01
    rows = RidgeStatistics.of(inputs, domain, 4).solve(penalty)
    x = inputs.double().numpy()
    strength = penalty * np.trace(x.T @ x) / HIDDEN
    augmented = np.concatenate([x, np.sqrt(strength) * np.eye(HIDDEN)])
    targets = np.concatenate([np.eye(4)[domain.numpy()], np.zeros((HIDDEN, 4))])
    expected = np.linalg.lstsq(augmented, targets, rcond=None)[0].T
    assert_close(rows, torch.tensor(expected), bound=1e-6)
    rows = ROUTER_INITIALIZERS["ridge"].build(
        4, seen(inputs, domain), context(router_init="ridge", ridge_penalty=penalty)
    )
    assert_close(rows / rows.norm(), torch.tensor(expected / np.linalg.norm(expected)), bound=1e-6)
    assert ((inputs @ rows.T).argmax(dim=-1) == domain).float().mean() > 0.99


def test_a_domain_can_be_added_to_ridge_later(tmp_path):
    inputs, domain = planted()
    old = domain < 3
    RidgeStatistics.of(inputs[old], domain[old], 3).save(tmp_path, 1)
    later = context(router_init="ridge", router_statistics=str(tmp_path))
    new = seen(inputs[~old], torch.zeros(int((~old).sum()), dtype=torch.long))
    added = ROUTER_INITIALIZERS["ridge"].build(4, new, later)
    at_once = ROUTER_INITIALIZERS["ridge"].build(4, seen(inputs, domain), context(router_init="ridge"))
    assert_close(added / added.norm(), at_once / at_once.norm(), bound=1e-5)
    with pytest.raises(UpcycleError, match="one domain per row"):
        ROUTER_INITIALIZERS["ridge"].build(5, new, later)
    with pytest.raises(UpcycleError, match="no file layer-00002"):
        RidgeStatistics.load(tmp_path, 2, HIDDEN)
    with pytest.raises(UpcycleError, match="hidden size 24, but this one has 32"):
        RidgeStatistics.load(tmp_path, 1, 32)


def test_prompts_point_from_negative_to_positive():
    inputs, _ = planted(12)
    sequence = torch.arange(6).repeat_interleave(2)
    domain = torch.tensor([0, 0, 1, 1, 2, 3]).repeat_interleave(2)
    negative = torch.tensor([False, True, False, False, False, False]).repeat_interleave(2)
    rows = ROUTER_INITIALIZERS["prompts"].build(4, seen(inputs, domain, sequence, negative), context())
    means = inputs.reshape(6, 2, HIDDEN).mean(dim=1)
    expected = torch.stack(
        [means[0] - means[1], means[2:4].mean(0) - means.mean(0), means[4] - means.mean(0), means[5] - means.mean(0)]
    )
    assert_close(torch.nn.functional.normalize(rows, dim=-1), torch.nn.functional.normalize(expected, dim=-1))
    assert spread(inputs @ rows.T) == pytest.approx(1.0, rel=1e-4)


def test_experts_that_text_cannot_tell_apart_are_refused():
    inputs = torch.ones(12, HIDDEN)
    domain = torch.arange(4).repeat_interleave(3)
    with pytest.raises(UpcycleError, match="do not tell the experts apart"):
        ROUTER_INITIALIZERS["ridge"].build(4, seen(inputs, domain), context(router_init="ridge"))


def test_co_activation_recovers_planted_groups():
    # Group g of the neurons answers to tokens of kind g; two neurons of each kind of row answer to all tokens.
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(HIDDEN)[:5]
    group = torch.arange(40) % 4
    hot = torch.zeros(40, dtype=torch.bool)
    hot[:8] = True
    rows = torch.where(hot[:, None], 3 * kinds[4], 3 * kinds[group])
    rows = rows + 0.05 * torch.randn(40, HIDDEN, generator=generator)
    dense = FeedForward(rows, rows, torch.randn(HIDDEN, 40, generator=generator))
    tokens = kinds[torch.arange(400) % 4] + 1.2 * kinds[4] + 0.02 * torch.randn(400, HIDDEN, generator=generator)
    task = context(method="split", split_by="activation", num_shared_neurons=8)
    # A tenth of 40 neurons are 4 marks a token; let every token mark its 16: those of its kind and the hot ones.
    labels = co_activation_partition(dense, tokens, torch.nn.functional.silu, task, active_share=0.4)
    assert torch.equal(labels == SHARED, hot)
    assert same_partition(labels[~hot], group[~hot])
    assert labels[~hot].bincount().tolist() == [8] * 4


def test_importance_recovers_planted_groups():
    generator = torch.Generator().manual_seed(0)
    group, domain = torch.arange(40) % 4, torch.arange(12) % 4
    importance = torch.rand(12, 40, generator=generator) + 5 * (group[None] == domain[:, None])
    importance[:, :4] += 10
    labels = importance_partition(
        importance, domain, context(method="split", split_by="gradient", num_shared_neurons=4)
    )
    assert torch.where(labels == SHARED)[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(labels[4:], group[4:])


def batch(num_domains: int = 4) -> Calibration:
    ids = torch.randint(3, 96, (8, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 12:] = 0
    return Calibration(ids, mask, torch.arange(8) % num_domains, torch.zeros(8, dtype=torch.bool), num_domains)


def test_importance_is_the_gradient_of_a_gate_on_every_neuron():
    model, data = dense_model("llama"), batch()
    found = neuron_importance(model, data, FAMILIES["llama"], [0, 2], progress=False)
    for index in (0, 2):
        gates = []

        def scale(module, args, gates=gates):
            gates.append(torch.ones_like(args[0], requires_grad=True))
            return (args[0] * gates[-1],)

        handle = model.model.layers[index].mlp.down_proj.register_forward_pre_hook(scale)
        tokens = data.input_ids[3][None, :12]
        (gradient,) = torch.autograd.grad(model(tokens, labels=tokens).loss, gates)
        handle.remove()
        assert_close(found[index][3], gradient.abs().sum(dim=(0, 1)))


@pytest.mark.parametrize("router_init", ["kmeans", "ridge"])
def test_rows_come_from_what_the_router_will_see(router_init):
    dense, data = dense_model("llama"), batch()
    recipe = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, router_init=router_init, calibration_text=["unread"] * 4
    )
    plan = plan_upcycle(dense.config, recipe)
    found = calibrate(dense, data, FAMILIES["llama"], plan, recipe, lambda index: None, progress=False)
    inputs = []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    dense(input_ids=data.input_ids, attention_mask=data.attention_mask)
    mask = data.attention_mask.bool()
    for index, hidden_states in enumerate(inputs):
        logits = hidden_states[mask] @ found[index]["router_rows"].T
        assert spread(logits) == pytest.approx(1.0, rel=1e-3)


def test_domain_embedding_is_one_direction_for_all_layers():
    dense, data = dense_model("llama"), batch()
    recipe = UpcycleConfig(
        num_experts=4, num_experts_per_tok=2, router_init="domain_embedding", calibration_text=["unread"] * 4
    )
    plan = plan_upcycle(dense.config, recipe)
    found = calibrate(dense, data, FAMILIES["llama"], plan, recipe, lambda index: None, progress=False)
    with torch.no_grad():
        last = dense.model(input_ids=data.input_ids, attention_mask=data.attention_mask).last_hidden_state
    weights = data.attention_mask[..., None] / data.attention_mask.sum(dim=1)[:, None, None]
    documents = (last * weights).sum(dim=1)
    domains = torch.stack([documents[data.domain_N == domain].mean(dim=0) for domain in range(4)])
    expected = torch.nn.functional.normalize(domains - domains.mean(dim=0), dim=-1)
    inputs = []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    dense(input_ids=data.input_ids, attention_mask=data.attention_mask)
    for rows, hidden_states in zip(found.values(), inputs, strict=True):
        assert spread(hidden_states[data.attention_mask.bool()] @ rows["router_rows"].T) == pytest.approx(
            1.0, rel=1e-3
        )
        assert_close(torch.nn.functional.normalize(rows["router_rows"], dim=-1), expected)


@pytest.fixture
def dense_folder(tmp_path):
    """A tiny dense model with a tokenizer, and four texts beside it."""
    dense_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()))
    return tmp_path / "dense"


def recipes(folder) -> dict[str, dict]:
    files = [str(folder.parent / f"{name}.txt") for name in TEXTS]
    return {
        "kmeans": {"router_init": "kmeans", "calibration_text": str(folder.parent / "all.jsonl")},
        "ridge": {"router_init": "ridge", "calibration_text": files},
        "domain_embedding": {"router_init": "domain_embedding", "calibration_text": files},
        "prompts": {
            "router_init": "prompts",
            "prompts": [{"positive": [text[:60], text[60:100]], "negative": ["zzz"]} for text in TEXTS.values()],
        },
        "activation": {
            "method": "split",
            "target": "hf_moe",
            "split_by": "activation",
            "num_shared_neurons": 16,
            "calibration_text": files[0],
        },
        "gradient": {
            "method": "split",
            "target": "hf_moe",
            "split_by": "gradient",
            "num_shared_neurons": 16,
            "calibration_text": files,
        },
        "gradient, clustered": {
            "method": "split",
            "split_by": "gradient",
            "num_experts": 3,
            "router_init": "kmeans",
            "calibration_text": str(folder.parent / "all.jsonl"),
        },
        "granular": {
            "method": "granular",
            "granularity": 2,
            "num_experts": 8,
            "router_init": "kmeans",
            "calibration_text": files[1],
        },
    }


@pytest.mark.parametrize("kind", recipes(Path()))
def test_streamed_equals_in_memory(kind, dense_folder, tmp_path):
    tokens = {} if kind == "prompts" else {"calibration_tokens": 4096}
    recipe = UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, **tokens, **recipes(dense_folder)[kind]})
    report = upcycle(dense_folder, tmp_path / "moe", recipe)
    assert report.exact == (recipe.method in ("copy", "granular"))
    assert not list((tmp_path / "moe").glob(".*"))
    dense = transformers.AutoModelForCausalLM.from_pretrained(dense_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense_folder)
    moe = upcycle_model(dense, recipe, tokenizer=tokenizer)
    streamed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    for name, tensor in moe.state_dict().items():
        assert torch.equal(streamed[name], tensor), name
    if recipe.method == "split":
        experts, layer = moe.model.layers[1].mlp, dense.model.layers[1].mlp
        neurons = experts.experts.gate_up_proj.chunk(2, dim=1)[0].flatten(0, 1)
        if recipe.num_shared_neurons:
            neurons = torch.cat([neurons, experts.shared_expert.gate_proj.weight])
        assert torch.equal(neurons.sort(dim=0).values, layer.gate_proj.weight.sort(dim=0).values)
    if kind == "ridge":
        assert load_file(tmp_path / "moe" / "router_statistics" / "layer-00002.safetensors")["sums"].shape == (4, 32)


def test_all_layers_are_calibrated_in_one_pass(dense_folder):
    dense = transformers.AutoModelForCausalLM.from_pretrained(dense_folder)
    calls = []
    dense.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense_folder)
    upcycle_model(dense, UpcycleConfig(num_experts=4, **recipes(dense_folder)["kmeans"]), tokenizer=tokenizer)
    assert len(calls) == 1


def test_resuming_keeps_what_was_observed(dense_folder, tmp_path, monkeypatch):
    recipe = UpcycleConfig(num_experts=4, **recipes(dense_folder)["ridge"])
    upcycle(dense_folder, tmp_path / "undisturbed", recipe)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_moe.upcycling.output.OutputFolder.write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle(dense_folder, tmp_path / "moe", recipe)
    with monkeypatch.context() as patch:
        patch.setattr("hf_moe.upcycling.upcycle.calibrate", stop)
        upcycle(dense_folder, tmp_path / "moe", recipe)
    written = [tmp_path / name / "model.safetensors" for name in ("undisturbed", "moe")]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_init": "kmeans"}, "give `calibration_text`"),
        ({"router_init": "kmeans", "calibration_text": "missing.txt"}, "missing.txt cannot be read"),
        (
            {"router_init": "kmeans", "calibration_text": "short.txt"},
            "gives 4 tokens; each file needs at least 32. Give more text.$",
        ),
        (
            {"router_init": "kmeans", "calibration_text": "little.txt"},
            "has 40 tokens, but 4 experts need at least 32 each, 128 together. Give more text.$",
        ),
        ({"router_init": "kmeans", "calibration_text": "broken.jsonl"}, "neither UTF-8 text nor JSON lines"),
        (
            {"router_init": "ridge", "calibration_text": ["code.txt"]},
            r"one file of `calibration_text` per row of the router \(4\)",
        ),
        (
            {"router_init": "domain_embedding", "calibration_text": ["code.txt"]},
            "one file of `calibration_text` per row",
        ),
        (
            {"method": "split", "split_by": "gradient", "num_experts": 6, "calibration_text": ["code.txt"] * 3},
            r"one file of `calibration_text` per expert \(6\)",
        ),
        (
            {"method": "split", "split_by": "activation", "num_experts": 6},
            "split_by='activation' looks at text: give `calibration_text`",
        ),
        (
            {"method": "split", "split_by": "activation", "router_init": "kmeans", "num_experts": 6},
            "router_init='kmeans' and split_by='activation' look at text",
        ),
        ({"router_init": "prompts"}, r"one entry of `prompts` per row of the router \(4\), got 0"),
        ({"router_init": "prompts", "prompts": [{"positive": ["a"]}] * 3}, r"\(4\), got 3"),
        (
            {"router_init": "kmeans", "calibration_text": "code.txt", "calibration_tokens": 9},
            r"Raise `calibration_tokens` \(9\)",
        ),
        (
            {"router_init": "kmeans", "num_experts": [4, 4, 8], "calibration_text": "code.txt"},
            "the same number of experts",
        ),
    ],
)
def test_bad_calibration_is_refused_before_anything_is_written(values, message, dense_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("abcd")
    (tmp_path / "little.txt").write_text("abcdefgh" * 5)
    (tmp_path / "broken.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(UpcycleError, match=message):
        upcycle(dense_folder, tmp_path / "moe", UpcycleConfig(**{"num_experts": 4, **values}))
    assert not list(tmp_path.glob("moe*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.txt", "missing.txt cannot be read: No such file"),
        ("folder", "folder cannot be read: Is a directory"),
        ("empty.txt", "empty.txt gives 0 tokens; each file needs at least 32"),
        ("short.txt", "short.txt gives 4 tokens"),
        ("binary.txt", "neither UTF-8 text"),
    ],
)
def test_text_that_only_the_proof_reads_is_checked_as_early(text, message, dense_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcd")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 50)
    with pytest.raises(UpcycleError, match=message):
        upcycle(dense_folder, tmp_path / "moe", UpcycleConfig(num_experts=4, calibration_text=text))
    assert not list(tmp_path.glob("moe*"))


def test_text_in_the_folder_to_be_replaced_is_safe(dense_folder, tmp_path):
    upcycle(dense_folder, tmp_path / "moe", UpcycleConfig(num_experts=4, verify="none"))
    text = tmp_path / "moe" / "notes.txt"
    text.write_text("text " * 100)
    with pytest.raises(UpcycleError, match="holds the source .*notes.txt"):
        upcycle(
            dense_folder, tmp_path / "moe", UpcycleConfig(num_experts=4, calibration_text=str(text)), overwrite=True
        )
    assert text.exists()


def test_text_without_a_tokenizer_or_for_images_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("text " * 100)
    recipe = UpcycleConfig(num_experts=4, calibration_text=str(tmp_path / "text.txt"))
    dense_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UpcycleError, match="has no tokenizer that loads, so `calibration_text` cannot be read"):
        upcycle(tmp_path / "dense", tmp_path / "moe", recipe)
    with pytest.raises(UpcycleError, match="sees images, for which `calibration_text` has no use"):
        plan_upcycle(dense_model("vit", "Model").config, recipe)


def test_prompts_without_tokens_are_refused(dense_folder):
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    prompts = [{"positive": ["a"]}] * 3 + [{"positive": ["\u2603"]}]
    recipe = UpcycleConfig(num_experts=4, router_init="prompts", prompts=prompts)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2603", "removed")
    with pytest.raises(UpcycleError, match="The prompt '\u2603' of expert 3 has no tokens"):
        upcycle_model(dense_model("llama"), recipe, tokenizer=tokenizer)


def test_states_that_are_not_finite_are_refused():
    with pytest.raises(UpcycleError, match="not finite"):
        with_logit_std(torch.randn(4, 8), torch.full((3, 8), float("inf")), 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": [{"positive": ["a"]}] * 8}, "`prompts` has no effect"),
        ({"router_logit_std": 0}, "router_init='zero'"),
        ({"router_logit_std": 0.5, "router_init": "zero"}, "has no effect on router_init='zero'"),
        ({"calibration_tokens": 9}, "`calibration_tokens`=9 has no effect"),
        ({"calibration_tokens": 9, "calibration_text": "code.txt"}, "`calibration_tokens`=9 has no effect"),
        (
            {
                **{"calibration_tokens": 9, "calibration_text": "code.txt"},
                **{"router_init": "prompts", "prompts": [{"positive": ["a"]}]},
            },
            "`calibration_tokens`=9 has no effect",
        ),
        ({"verify": "none", "calibration_text": "code.txt"}, "`calibration_text` has no effect"),
        (
            {"router_init": "prompts", "prompts": [{"positive": ["a"]}], "method": "split", "split_by": "activation"},
            "would look at different text",
        ),
        ({"router_init": "kmeans", "ridge_penalty": 0.5}, "`ridge_penalty` has no effect"),
        ({"router_init": "prompts", "prompts": [{"good": ["a"]}]}, "may have 'positive' and 'negative'"),
        ({"router_init": "prompts", "prompts": [{"positive": []}]}, "at least one 'positive'"),
        ({"router_init": "prompts", "prompts": [{"positive": [" "]}]}, "none that is empty"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        UpcycleConfig(**values)


def test_prompts_without_a_tokenizer_are_refused(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    recipe = UpcycleConfig(num_experts=4, router_init="prompts", prompts=[{"positive": ["a"]}] * 4)
    with pytest.raises(UpcycleError, match="need a tokenizer"):
        upcycle(tmp_path / "dense", tmp_path / "moe", recipe)


def test_gradient_needs_a_language_model(tmp_path, dense_folder):
    model = dense_model("llama", "ForSequenceClassification")
    randomize(model)
    model.save_pretrained(tmp_path / "classifier")
    save_tokenizer(tmp_path / "classifier")
    with pytest.raises(UpcycleError, match="loss of a causal language model"):
        upcycle_model(model, UpcycleConfig(num_experts=4, **recipes(dense_folder)["gradient"]))
    with pytest.raises(UpcycleError, match="loss of a causal language model"):
        upcycle(
            tmp_path / "classifier",
            tmp_path / "moe",
            UpcycleConfig(num_experts=4, **recipes(dense_folder)["gradient"]),
        )


def test_too_few_sequences_for_clusters(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_module, "SEQUENCE_LENGTH", 4096)
    values = {**recipes(dense_folder)["gradient, clustered"], "num_experts": 6, "calibration_tokens": 2000}
    with pytest.raises(UpcycleError, match="too few to form 6 clusters"):
        upcycle(dense_folder, tmp_path / "moe", UpcycleConfig(**values))


def test_text_says_nothing_of_images():
    recipe = UpcycleConfig(num_experts=4, router_init="kmeans", calibration_text="unread")
    with pytest.raises(UpcycleError, match="ViTModel sees images"):
        plan_upcycle(dense_model("vit", "Model").config, recipe)


def test_the_proof_looks_at_the_calibration_text_of_any_recipe(dense_folder, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 400)
    report = upcycle(
        dense_folder, tmp_path / "moe", UpcycleConfig(num_experts=4, calibration_text=str(tmp_path / "a.txt"))
    )
    assert report.routing.summary()["dead_fraction"] > 0  # one letter cannot reach all experts


def test_a_changed_text_is_noticed_and_its_path_is_not_published(dense_folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXTS["code"])
    recipe = UpcycleConfig(num_experts=4, router_init="kmeans", calibration_text=str(text))

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_moe.upcycling.output.OutputFolder.write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle(dense_folder, tmp_path / "moe", recipe)
    text.write_text(TEXTS["prose"])
    with pytest.raises(UpcycleError, match="another model, or with another recipe"):
        upcycle(dense_folder, tmp_path / "moe", recipe)
    upcycle(dense_folder, tmp_path / "moe", recipe, overwrite=True)
    for name in ("hf_moe.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "moe" / name).read_text()
    provenance = json.loads((tmp_path / "moe" / "hf_moe.json").read_text())
    assert provenance["calibration_text"] == [
        {"name": "text.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    ]
