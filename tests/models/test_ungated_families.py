# SPDX-License-Identifier: Apache-2.0
"""GPT-2, GPT-NeoX, BERT and ViT with sparse layers: experts without a gate and with biases, and heads of every kind."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import UNGATED_FAMILIES, assert_close, dense_config, dense_model, moe_class, moe_config, moe_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.vit.modeling_vit import ViTMLP

import hf_moe
from hf_moe import RoutingRecorder, UpcycleConfig, upcycle_model
from hf_moe.models.experts import UngatedMoeExperts
from hf_moe.models.sparse_block import MoeSparseBlock


LANGUAGE_MODELS = ("gpt2", "gpt_neox")
HEADS = [(family, head) for family in UNGATED_FAMILIES for head in moe_class(family, "Config").auto_classes.values()]


@pytest.fixture(params=UNGATED_FAMILIES)
def family(request) -> str:
    return request.param


def inputs_of(family: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def output_of(model, inputs) -> torch.Tensor:
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def sparse_blocks(model) -> list[MoeSparseBlock]:
    return [module for module in model.modules() if isinstance(module, MoeSparseBlock)]


@torch.no_grad()
def test_each_expert_is_a_dense_feed_forward():
    config = moe_config("vit", hidden_act="gelu")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        config._experts_implementation = implementation
        experts = UngatedMoeExperts(config, 4)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        mlp = ViTMLP(dense_config("vit", intermediate_size=24))
        hidden_states = torch.randn(7, 32)
        for expert in range(4):
            mlp.fc1.weight.copy_(experts.up_proj[expert]), mlp.fc1.bias.copy_(experts.up_proj_bias[expert])
            mlp.fc2.weight.copy_(experts.down_proj[expert]), mlp.fc2.bias.copy_(experts.down_proj_bias[expert])
            output = experts(hidden_states, torch.full((7, 1), expert), torch.full((7, 1), 0.5))
            assert_close(output, 0.5 * mlp(hidden_states), 1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_experts_implementations_agree(family, training, batch):
    head = next(iter(moe_class(family, "Config").auto_classes.values()))
    dropouts = {name: 0.0 for name in dense_config(family).to_dict() if "drop" in name and "classifier" not in name}
    results = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = moe_model(family, head, shared_expert_intermediate_size=40, **dropouts).train(training)
        model.set_experts_implementation(implementation)
        output = output_of(model, inputs_of(family, batch))
        output.square().sum().backward()
        results[implementation] = output, {name: p.grad for name, p in model.named_parameters()}
    output, gradients = results.pop("eager")
    assert any("experts.up_proj_bias" in name for name in gradients)
    for other_output, other_gradients in results.values():
        assert_close(other_output, output)
        for name, gradient in gradients.items():
            if gradient is None:
                assert "pooler" in name
            elif not name.endswith(("key.bias", "k_proj.bias")):  # a softmax takes no notice of these
                assert gradient.abs().max() > 0, name
                assert_close(other_gradients[name], gradient, 1e-4)


def test_fresh_weights_are_initialised(family):
    torch.manual_seed(0)
    model = moe_class(family, "Model")(moe_config(family, hidden_size=64, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "experts" in name or "mlp.gate" in name:
            assert 0.2 < parameter.std() < 0.4, name


def test_classes_are_registered_and_named_in_the_auto_map(family):
    config = moe_config(family)
    for auto_class, head in config.auto_classes.items():
        model_class = moe_class(family, head)
        assert getattr(transformers, auto_class)._model_mapping[type(config)] is model_class
        assert config.auto_map[auto_class] == f"modeling_moe_{family}.{model_class.__name__}"
    assert config.auto_map["AutoConfig"] == f"configuration_moe_{family}.{type(config).__name__}"


def test_configuration_round_trip(family, tmp_path):
    config = moe_config(family, moe_intermediate_size=None, mlp_layer_types=["sparse", "dense", "sparse"])
    assert (config.hidden_size, config.intermediate_size, config.moe_intermediate_size) == (32, 48, 48)
    assert config.num_local_experts == config.num_experts == 4
    config.save_pretrained(tmp_path)
    ours, theirs = config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    for name in ("transformers_version", "_name_or_path"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


def test_gpt2_names_and_defaults_survive(tmp_path):
    config = hf_moe.MoeGPT2Config(n_embd=32, n_head=4, n_layer=3, activation_function="relu")
    assert (config.intermediate_size, config.moe_intermediate_size, config.hidden_act) == (128, 128, "relu")
    assert len(config.mlp_layer_types) == 3
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_inner"] == 128
    loaded = AutoConfig.from_pretrained(tmp_path, hidden_size=16)
    assert (loaded.n_embd, loaded.intermediate_size, loaded.hidden_act, loaded.n_layer) == (16, 128, "relu", 3)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_is_refused(family):
    with pytest.raises(StrictDataclassError, match="`add_cross_attention` is not supported"):
        moe_config(family, add_cross_attention=True)


@pytest.mark.parametrize(("family", "head"), HEADS)
@torch.no_grad()
def test_saving_and_loading(family, head, batch, tmp_path):
    model = moe_model(family, head, num_labels=3, shared_expert_intermediate_size=40, use_shared_expert_gate=True)
    expected = output_of(model, inputs_of(family, batch))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    auto_class = getattr(transformers, {head: auto for auto, head in model.config.auto_classes.items()}[head])
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    assert type(loaded.base_model) is moe_class(family, "Model")
    assert loaded.config._experts_implementation == "grouped_mm"
    assert_close(output_of(loaded, inputs_of(family, batch)), expected, 1e-6)
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    # A rounded state may be routed elsewhere, so a few tokens differ more.
    difference = output_of(half, inputs_of(family, batch)).float() - expected
    assert difference.norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_heads_are_those_of_the_dense_class(family, head):
    ours, dense = moe_model(family, head, num_labels=3), dense_model(family, head, num_labels=3)
    names = {name for name, _ in ours.named_parameters() if ".mlp." not in name}
    others = (".mlp.", ".intermediate.dense", "layer.0.output.dense", "layer.1.output.dense", "layer.2.output.dense")
    assert names == {name for name, _ in dense.named_parameters() if not any(part in name for part in others)}
    assert ours.all_tied_weights_keys == dense.all_tied_weights_keys
    assert len(sparse_blocks(ours)) == 3
    assert dense._no_split_modules <= ours._no_split_modules
    assert {type(layer).__name__ for layer in ours.base_model.get_submodule(ours.base_model.layers_path)} <= set(
        ours._no_split_modules
    )


def test_mixed_layers(family, batch):
    model = moe_model(family, "Model", mlp_layer_types=["dense", "sparse", "dense"])
    assert len(sparse_blocks(model)) == 1
    assert len(model(**inputs_of(family, batch), output_router_logits=True).router_logits) == 1


def test_layer_types_and_layers_must_fit(family, tmp_path):
    moe_model(family, "Model").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one entry per layer .2., got 3. Change both together"):
        transformers.AutoModel.from_pretrained(tmp_path, num_hidden_layers=2)


@pytest.mark.parametrize("family", ["bert", *LANGUAGE_MODELS])
@torch.no_grad()
def test_padding_is_not_attended_to(family, batch):
    model = moe_model(family, "Model")
    ids = batch["input_ids"][1:]
    positions = torch.arange(ids.shape[1])[None]
    expected = model(ids).last_hidden_state
    padding, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)
    # Padding on the right, then on the left, where absolute positions have to be given.
    right = model(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1)).last_hidden_state
    assert_close(right[:, : ids.shape[1]], expected)
    left = model(
        torch.cat([padding, ids], 1),
        attention_mask=torch.cat([padding, ones], 1),
        position_ids=torch.cat([padding, positions], 1),
    ).last_hidden_state
    assert_close(left[:, 4:], expected)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_generation(family, batch):
    model = moe_model(family, output_router_logits=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    greedy = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    cached = model.generate(**inputs, **greedy)
    assert torch.equal(model.generate(**inputs, **greedy, use_cache=False), cached)
    assert torch.equal(model.generate(batch["input_ids"][:1, 3:], **greedy), cached[:1, 3:])
    assert torch.equal(model.generate(**inputs, **greedy, cache_implementation="static", disable_compile=True), cached)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_balance_loss(family, batch):
    model = moe_model(family, router_aux_loss_coef=0.5)
    output = model(**batch, output_router_logits=True)
    assert len(output.router_logits) == 3
    assert_close(output.loss, model(**batch).loss + 0.5 * output.aux_loss)
    short = model(batch["input_ids"][:1, 3:], output_router_logits=True)
    left = {name: value[:1] for name, value in batch.items()}
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_close(model(**left, position_ids=positions, output_router_logits=True).aux_loss, short.aux_loss)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_other_heads_say_that_they_ignore_the_balance_loss(family, batch, caplog):
    transformers.utils.logging.get_logger("transformers").propagate = True
    head = "ForMaskedLM" if family == "bert" else "ForImageClassification"
    with caplog.at_level(logging.WARNING):
        model = moe_model(family, head, output_router_logits=True)
    assert f"{type(model).__name__} ignores `output_router_logits`" in caplog.text
    assert_close(
        output_of(model, inputs_of(family, batch)), output_of(moe_model(family, head), inputs_of(family, batch))
    )
    assert len(model.base_model(**inputs_of(family, batch)).router_logits) == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant, batch):
    model = moe_model(family, "Model").train()
    inputs = inputs_of(family, batch)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if family != "vit":
                model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(("family", "head"), HEADS)
@torch.no_grad()
def test_training_drops_what_the_dense_model_drops(family, head, batch):
    dense = dense_model(family, head, num_labels=3).train()
    moe = upcycle_model(dense, UpcycleConfig(num_experts=4))
    assert moe.training
    outputs = []
    for model in (dense, moe, moe):
        torch.manual_seed(len(outputs) // 2)  # the third with another seed
        outputs.append(output_of(model, inputs_of(family, batch)))
    assert_close(outputs[1], outputs[0])
    assert (outputs[2] - outputs[1]).abs().max() > 1e-3


def test_gpt2_block_drops_its_output():
    block = moe_model("gpt2", "Model", resid_pdrop=0.4).h[0].mlp
    hidden_states = torch.randn(4, 50, 32)
    kept = block(hidden_states)
    assert (kept != 0).all()
    dropped = block.train()(hidden_states)
    assert (dropped == 0).float().mean() == pytest.approx(0.4, abs=0.03)
    assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.6)


@torch.no_grad()
def test_bert_in_chunks(batch):
    whole, chunked = moe_model("bert", "Model"), moe_model("bert", "Model", chunk_size_feed_forward=1)
    calls = []
    chunked.encoder.layer[0].mlp.register_forward_hook(lambda *arguments: calls.append(1))
    assert_close(chunked(batch["input_ids"]).last_hidden_state, whole(batch["input_ids"]).last_hidden_state)
    assert len(calls) == 11


@torch.no_grad()
def test_recorder_counts_every_token(family, batch):
    model = moe_model(family, next(head for name, head in HEADS[::-1] if name == family))
    with RoutingRecorder(model) as recorder:
        model(**inputs_of(family, batch))
    tokens = 2 * 17 if family == "vit" else int(batch["attention_mask"].sum())
    assert [layer.num_tokens for layer in recorder.statistics().layers.values()] == [tokens] * 3


REMOTE = """
import json, sys
sys.modules["hf_moe"] = None  # an import of hf_moe now fails
import torch, transformers
torch.set_num_threads(1)
outputs = {}
for family, heads in json.loads(sys.argv[2]).items():
    for auto_class, head in heads.items():
        folder = f"{sys.argv[1]}/{family}/{head}"
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
        assert model.config._experts_implementation == "grouped_mm"
        inputs = torch.load(f"{sys.argv[1]}/{family}.pt")
        with torch.no_grad():
            output = model(**inputs)
        outputs[f"{family}/{head}"] = (output.logits if "logits" in output else output.last_hidden_state).tolist()
assert not [name for name in sys.modules if name.startswith("hf_moe.")]
print(json.dumps(outputs))
"""


@pytest.mark.processes
@torch.no_grad()
def test_loads_without_hf_moe(tmp_path, batch):
    heads, expected = {}, {}
    for family in UNGATED_FAMILIES:
        heads[family] = moe_class(family, "Config").auto_classes
        torch.save(inputs_of(family, batch), tmp_path / f"{family}.pt")
        for head in heads[family].values():
            model = moe_model(family, head)
            model.save_pretrained(tmp_path / family / head)
            expected[f"{family}/{head}"] = output_of(model, inputs_of(family, batch))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", REMOTE, str(tmp_path), json.dumps(heads)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outputs = json.loads(run.stdout.splitlines()[-1])
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert_close(torch.tensor(output), expected[name], 1e-6)


PARALLEL = """
import json, os, sys, torch, hf_moe, transformers
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for family in json.loads(sys.argv[3]):
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    model = transformers.AutoModel.from_pretrained(f"{folder}/{family}", distributed_config=config)
    biases = [p.to_local().shape[0] for name, p in model.named_parameters() if name.endswith("up_proj_bias")]
    inputs = {name: tensor[rank : rank + 1] for name, tensor in torch.load(f"{folder}/{family}.pt").items()}
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
    output = output.full_tensor() if hasattr(output, "full_tensor") else output
    torch.save((output, biases), f"{folder}/{family}{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""


@pytest.mark.slow
@pytest.mark.processes
@torch.no_grad()
def test_expert_parallelism(tmp_path, batch):
    expected = {}
    for family in UNGATED_FAMILIES:
        model, inputs = moe_model(family, "Model"), inputs_of(family, batch)
        model.save_pretrained(tmp_path / family)
        torch.save(inputs, tmp_path / f"{family}.pt")
        expected[family] = model(**inputs).last_hidden_state
    families = json.dumps(list(UNGATED_FAMILIES))
    command = [sys.executable, "-c", PARALLEL, str(tmp_path)]
    ranks = [subprocess.Popen([*command, rank, families], stderr=subprocess.PIPE) for rank in ("0", "1")]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    for family, output in expected.items():
        for rank in range(2):
            actual, experts_here = torch.load(tmp_path / f"{family}{rank}.pt")
            assert experts_here == [2, 2, 2]
            assert_close(actual, output[rank : rank + 1])
