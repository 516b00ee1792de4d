# SPDX-License-Identifier: Apache-2.0
"""The model classes beside transformers' native ones, and everything a transformers user expects of a class."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    TINY_OF_FAMILY,
    assert_close,
    dense_class,
    dense_config,
    moe_class,
    moe_config,
    moe_model,
    randomize,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moe.models.sparse_block import MoeSparseBlock


NATIVE = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


def native_twin(family: str, **values) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """A native model and ours, of one configuration and with the same weights."""
    if family == "qwen2":
        values = {"shared_expert_intermediate_size": 40, "use_shared_expert_gate": True, **values}
    ours = moe_model(family, **values)
    fields = ours.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "mlp_layer_types"):
        fields.pop(name)
    fields["num_local_experts"] = fields.pop("num_experts")
    if NATIVE[family] == "Mixtral":
        fields["intermediate_size"] = fields["moe_intermediate_size"]
    else:
        fields["num_experts"] = fields.pop("num_local_experts")
    native = getattr(transformers, f"{NATIVE[family]}ForCausalLM")(
        getattr(transformers, f"{NATIVE[family]}Config")(**fields)
    )
    native.load_state_dict(ours.state_dict())
    return native.eval(), ours


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_native_class(core_family, batch, training):
    # Mixtral always normalises; Qwen-MoE is compared in its other mode.
    normalise = {} if NATIVE[core_family] == "Mixtral" else {"norm_topk_prob": False}
    native, ours = native_twin(core_family, router_aux_loss_coef=0.1, **normalise)
    native.train(training), ours.train(training)
    expected, actual = (model(**batch, output_router_logits=True) for model in (native, ours))
    for field in ("logits", "loss", "aux_loss"):
        assert_close(actual[field], expected[field])
    assert len(actual.router_logits) == 3
    for a, b in zip(actual.router_logits, expected.router_logits, strict=True):
        assert_close(a, b)
    expected.loss.backward(), actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in native.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name])
        assert parameter.grad.abs().max() > 0, name


def test_jitter_is_mixtrals(batch):
    native, ours = native_twin("llama", router_jitter_noise=0.3)
    native.train(), ours.train()
    torch.manual_seed(3)
    expected = native(**batch).loss
    torch.manual_seed(3)
    assert_close(ours(**batch).loss, expected)
    ours.eval()
    with torch.no_grad():
        assert abs(ours(**batch).loss - expected) > 1e-4


def test_recorded_mixtral_block():
    golden = load_file(Path(__file__).parent.parent / "golden" / "mixtral.safetensors")
    config = moe_config("llama", hidden_size=16, num_experts=8, moe_intermediate_size=24)
    config._experts_implementation = "grouped_mm"
    block = MoeSparseBlock(config, config.num_experts)
    experts = range(8)
    with torch.no_grad():
        block.gate.weight.copy_(golden["w.gate.weight"])
        block.experts.gate_up_proj.copy_(
            torch.stack(
                [torch.cat([golden[f"w.experts.{e}.w1.weight"], golden[f"w.experts.{e}.w3.weight"]]) for e in experts]
            )
        )
        block.experts.down_proj.copy_(torch.stack([golden[f"w.experts.{e}.w2.weight"] for e in experts]))
        assert_close(block(golden["x"][None])[0], golden["y"], 1e-6)


def test_experts_implementations_agree(core_family, batch):
    results = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = moe_model(core_family, shared_expert_intermediate_size=40)
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        output = model(**batch, output_router_logits=True)
        output.loss.backward()
        results[implementation] = output.logits, {name: p.grad for name, p in model.named_parameters()}
    logits, gradients = results.pop("eager")
    for other_logits, other_gradients in results.values():
        assert_close(other_logits, logits)
        for name, gradient in gradients.items():
            assert_close(other_gradients[name], gradient)


def test_loaded_model_runs_grouped_mm(family, tmp_path, monkeypatch, batch):
    moe_model(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is moe_class(family, "ForCausalLM")
    assert model.config._experts_implementation == "grouped_mm"
    calls = []
    functions = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    original = functions["grouped_mm"]
    monkeypatch.setitem(functions._global_mapping, "grouped_mm", lambda *args: calls.append(1) or original(*args))
    model(**batch)
    assert len(calls) == 3


def test_mixed_layers(family, batch):
    model = moe_model(family, mlp_layer_types=["dense", "sparse", "dense"])
    assert [isinstance(layer.mlp, MoeSparseBlock) for layer in model.model.layers] == [False, True, False]
    assert len(model(**batch, output_router_logits=True).router_logits) == 1
    assert len(model.model(batch["input_ids"], output_router_logits=True).router_logits) == 1


def test_padding_does_not_count_in_the_balance_loss(batch):
    model = moe_model("llama")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    short = model(ids[:1, 3:], output_router_logits=True)
    padded = model(ids[:1], attention_mask=mask[:1], output_router_logits=True)
    assert_close(padded.aux_loss, short.aux_loss)
    assert_close(padded.logits[:, 3:], short.logits)


@torch.no_grad()
def test_generation(family, batch):
    model = moe_model(family, output_router_logits=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    greedy = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    cached = model.generate(**inputs, **greedy)
    assert torch.equal(model.generate(**inputs, **greedy, use_cache=False), cached)
    assert torch.equal(model.generate(batch["input_ids"][:1, 3:], **greedy), cached[:1, 3:])
    assert model.generate(**inputs, **greedy, num_beams=3).shape == (2, 19)
    layer_types = {"layer_types": ["full_attention"]} if "layer_types" in TINY_OF_FAMILY[family] else {}
    assistant = moe_model(family, num_hidden_layers=1, **layer_types)
    one = {name: value[1:] for name, value in inputs.items()}
    assert torch.equal(model.generate(**one, **greedy, assistant_model=assistant), cached[1:])
    static = model.generate(**inputs, **greedy, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, cached)


@torch.no_grad()
def test_attention_implementations_agree(family, batch):
    model = moe_model(family)
    if not dense_class(family, "ForCausalLM")._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            model.set_attn_implementation("sdpa")
        return
    model.set_attn_implementation("eager")
    eager = model(**batch).logits
    model.set_attn_implementation("sdpa")
    kept = batch["attention_mask"].bool()
    assert_close(model(**batch).logits[kept], eager[kept])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, batch, use_reentrant):
    model = moe_model(family).train()
    batch = {**batch, "output_router_logits": not use_reentrant}
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])


@torch.no_grad()
def test_copy_of_a_block_sees_the_padding(batch):
    """PEFT wraps what it trains whole, and the wrapper passes on hidden states alone."""
    values = {"router_type": "gshard", "capacity_factor": 0.5, "min_capacity": 0}
    model = moe_model("llama", **values).train()
    expected = model(**batch).logits
    model = peft.get_peft_model(
        moe_model("llama", **values), peft.LoraConfig(target_modules=["lm_head"], modules_to_save=["mlp"])
    ).train()
    assert torch.equal(model(**batch).logits, expected)


def test_dense_layers_need_no_place_for_the_routing():
    model = moe_model("bert", "ForMaskedLM", router_type="gshard", mlp_layer_types=["sparse", "dense", "sparse"])
    assert model(torch.randint(3, 96, (2, 5))).logits.shape == (2, 5, 96)


def test_balance_loss_without_gradient_is_refused(batch):
    model = moe_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**batch, output_router_logits=True)


def test_frozen_backbone_trains_with_the_balance_loss_on(batch):
    model = moe_model("llama").train()
    model.model.requires_grad_(False)
    model(**batch, output_router_logits=True).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_layer_types_and_layers_must_fit(tmp_path):
    moe_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one entry per layer .2., got 3. Change both together"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)


@torch.no_grad()
def test_saving_and_loading(family, batch, tmp_path):
    # Each token takes every expert: in bfloat16 it could choose others.
    values = {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 40, "use_shared_expert_gate": True}
    model = moe_model(family, **values)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_close(loaded(**batch).logits, expected, 1e-6)
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert_close(placed(**batch).logits, expected, 1e-6)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert_close(offloaded(**batch).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(**batch).logits.dtype == torch.bfloat16
    assert (half(**batch).logits - expected).norm() < 0.1 * expected.norm()


def test_meta_initialisation(family):
    with torch.device("meta"):
        model = moe_class(family, "ForCausalLM")(moe_config(family))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_fresh_weights_are_initialised(family):
    torch.manual_seed(0)
    model = moe_class(family, "ForCausalLM")(moe_config(family, hidden_size=64, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if "experts" in name or "mlp.gate" in name:
            assert 0.2 < parameter.std() < 0.4, name


def test_tied_embeddings_and_resizing(family, batch, tmp_path):
    model = moe_model(family, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(101)
    assert model(**batch).logits.shape[-1] == 101
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(loaded(**batch).logits, model(**batch).logits, 1e-6)


# Compiled, grouped products exist in bfloat16 alone; transformers replaces those of other types.
@pytest.mark.parametrize(("implementation", "dtype"), [("grouped_mm", torch.bfloat16), ("batched_mm", torch.float32)])
def test_block_compiles_without_graph_break(implementation, dtype):
    model = moe_model("llama", shared_expert_intermediate_size=40, use_shared_expert_gate=True).to(dtype)
    model.set_experts_implementation(implementation)
    block = model.model.layers[0].mlp
    hidden_states = torch.randn(2, 5, 32, dtype=dtype)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(compiled(hidden_states), block(hidden_states))
    torch.compiler.reset()


def test_forward_compiles(batch):
    model = moe_model("llama")
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(**batch).logits, model(**batch).logits)
    torch.compiler.reset()


CLASSIFIERS = [
    (family, head)
    for family in FAMILIES
    for head in ("ForSequenceClassification", "ForTokenClassification")
    if head in moe_class(family, "Config").auto_classes.values()
]


@pytest.mark.parametrize(("family", "head"), CLASSIFIERS)
def test_classification_heads(family, head, batch):
    model = moe_model(family, head, num_labels=3)
    dense = copy.deepcopy(model)
    labels = torch.tensor([0, 2]) if "Sequence" in head else batch["input_ids"] % 3
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    assert output.logits.shape[-1] == 3
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    hidden_states = dense.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = dense.score(hidden_states)
    assert_close(output.logits, expected[:, -1] if "Sequence" in head else expected)


def test_parallel_plans_are_those_of_the_native_classes(core_family):
    ours, native = moe_model(core_family), native_twin(core_family)[0]
    for plan in ("_tp_plan", "_ep_plan"):
        expected = {name: style for name, style in getattr(native, plan).items() if "experts" in name}
        assert expected.items() <= getattr(ours, plan).items()
    assert ours._fsdp_plan == native._fsdp_plan
    assert ours._no_split_modules == {f"{FAMILIES[core_family]}DecoderLayer"}


def test_parallel_plans_keep_what_is_dense(family):
    ours = moe_model(family, mlp_layer_types=["sparse", "dense", "sparse"])
    dense = dense_class(family, "ForCausalLM")(dense_config(family))
    assert dense._tp_plan.items() <= ours._tp_plan.items()
    assert bool(dense._tp_plan) == bool(ours._tp_plan)
    assert ours._fsdp_plan == dense._fsdp_plan
    assert ours._no_split_modules == dense._no_split_modules


def test_parallel_plans_of_biased_experts_are_gpt_oss():
    ours = moe_config("granite", mlp_bias=True)
    assert ours.base_model_ep_plan == transformers.GptOssConfig.base_model_ep_plan
    assert not [rule for rule in ours.base_model_tp_plan if ".experts" in rule]
    assert "layers.*.mlp.shared_expert.down_proj" in ours.base_model_tp_plan


REMOTE = """
import json, sys
from pathlib import Path
sys.modules["hf_moe"] = None  # an import of hf_moe now fails
import torch, transformers
ids = torch.tensor([[5, 6, 7, 8]])
results = {}
for folder in map(Path, sys.argv[1:]):
    heads = [name for name in json.loads((folder / "config.json").read_text())["auto_map"] if name != "AutoConfig"]
    models = {
        head: getattr(transformers, head).from_pretrained(folder, trust_remote_code=True) for head in heads
    }
    assert models["AutoModelForCausalLM"].config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        outputs = {head: model(ids)[0] for head, model in models.items()}
    results[folder.name] = {head: output.shape if "Class" in head else output.tolist() for head, output in outputs.items()}
    models["AutoModelForCausalLM"].save_pretrained(folder.with_name(folder.name + "-again"))
assert not [name for name in sys.modules if name.startswith("hf_moe.")]
print(json.dumps(results))
"""


@pytest.mark.processes
@torch.no_grad()
def test_loads_without_hf_moe(tmp_path):
    models = {family: moe_model(family, shared_expert_intermediate_size=40) for family in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
    results = run_without_hf_moe(REMOTE, [tmp_path / name for name in FAMILIES], tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    for family, model in models.items():
        assert results[family].keys() == model.config.auto_classes.keys()
        assert_close(torch.tensor(results[family]["AutoModelForCausalLM"]), model(ids).logits, 1e-6)
        assert_close(torch.tensor(results[family]["AutoModel"]), model.model(ids).last_hidden_state, 1e-6)
        for folder in (tmp_path / family, tmp_path / f"{family}-again"):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            assert type(loaded) is type(model)
            assert_close(loaded(ids).logits, model(ids).logits, 1e-6)
            assert type(AutoModel.from_pretrained(folder)) is type(model.model)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    assert type(loaded.model) is type(models["llama"].model)


PARALLEL = """
import os, sys, torch, hf_moe
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
parent, rank, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
torch.distributed.init_process_group("gloo", init_method=f"file://{parent}/rendezvous", rank=rank, world_size=2)
ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
for folder in map(parent.joinpath, sys.argv[4:]):
    if kind == "expert":
        config = DistributedConfig(fsdp_size=2, ep_size=2)
    else:
        config = DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    with torch.no_grad():
        logits = model(ids[rank : rank + 1] if kind == "expert" else ids).logits
    torch.save(logits.full_tensor() if hasattr(logits, "full_tensor") else logits, folder / f"logits{rank}.pt")
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    torch.save(list((weight.to_local() if hasattr(weight, "to_local") else weight).shape), folder / f"shape{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""


def run_on_two_processes(folder, kind: str, models) -> None:
    """`PARALLEL` for the models that were saved in `folder` by these names."""
    command = [sys.executable, "-c", PARALLEL, str(folder)]
    ranks = [subprocess.Popen([*command, rank, kind, *models], stderr=subprocess.PIPE) for rank in ("0", "1")]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors


def run_without_hf_moe(code: str, folders, working_folder) -> dict:
    """What a script prints as JSON, in a process in which hf_moe is not installed."""
    environment = {
        "HF_HOME": str(working_folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", code, *map(str, folders)]
    run = subprocess.run(command, env=environment, cwd=working_folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # `test_routers_elsewhere.py` runs Llama
@pytest.mark.processes
@pytest.mark.parametrize("families", [["llama"], list(FAMILIES)], ids=len)
@pytest.mark.parametrize(("kind", "local_shape"), [("expert", [2, 48, 32]), ("tensor", [4, 24, 32])])
def test_parallel_equals_one_process(kind, local_shape, families, tmp_path):
    values = {"shared_expert_intermediate_size": 40, "mlp_layer_types": ["sparse", "dense", "sparse"]}
    models = {family: moe_model(family, **values) for family in families}
    if kind == "tensor":
        models = {family: model for family, model in models.items() if model.supports_tp_plan}
    models["biased"] = moe_model("granite", mlp_bias=True, **values)
    models["filtered"] = moe_model("llama", use_localized_filtering=True, **values)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_on_two_processes(tmp_path, kind, models)
    for name, model in models.items():
        with torch.no_grad():
            expected = model(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits
        whole = name == "biased" and kind == "tensor"
        for rank in range(2):
            actual = torch.load(tmp_path / name / f"logits{rank}.pt")
            assert_close(actual, expected[rank : rank + 1] if kind == "expert" else expected)
            assert torch.load(tmp_path / name / f"shape{rank}.pt") == ([4, 48, 32] if whole else local_shape)


def test_randomize_covers_every_parameter():
    model = moe_model("qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    randomize(model, seed=1)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
