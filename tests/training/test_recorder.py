# SPDX-License-Identifier: Apache-2.0
"""The recorder's counts beside those of the routers' own outputs, on models of several kinds."""

import subprocess
import sys

import peft
import pytest
import torch
import transformers
from conftest import TINY, moe_model, randomize

from hf_moe import LoadBalancer, RoutingRecorder
from hf_moe.training.routers import find_routers


def native(name: str) -> transformers.PreTrainedModel:
    """A tiny native MoE of transformers."""
    size = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
    fields = {
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "Qwen3Moe": {"num_experts": 4, "head_dim": 16, **size},
        "DeepseekV3": {
            **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **size},
            **{
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
            },
        },
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "MiniMax": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "Llama4": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    }[name]
    config_name = "Llama4TextConfig" if name == "Llama4" else f"{name}Config"
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    config = getattr(transformers, config_name)(**{**TINY, **rope, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model)
    return model.eval()


def counts_by_hand(model, batch) -> list[torch.Tensor]:
    """Counts per layer from what the experts are asked to do, padding left out."""
    mask, counts = batch["attention_mask"].bool().reshape(-1), []

    def hook(module, args):
        index = args[1].reshape(len(mask), -1)[mask]
        counts.append(torch.bincount(index.reshape(-1), minlength=module.num_experts))

    experts = [
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    ]
    handles = [module.register_forward_pre_hook(hook) for module in experts]
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("name", ["ours", "Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "MiniMax"])
def test_counts_on_any_model(name, batch):
    model = moe_model("qwen2") if name == "ours" else native(name)
    expected = counts_by_hand(model, batch)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        model(batch["input_ids"], batch["attention_mask"])
        model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    statistics = recorder.statistics()
    assert len(statistics.layers) == len(expected) == (2 if name == "DeepseekV3" else 3)
    for layer, counts in zip(statistics.layers.values(), expected, strict=True):
        assert layer.counts.tolist() == (3 * counts).tolist()
        assert layer.num_tokens == 3 * int(batch["attention_mask"].sum())
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    model(batch["input_ids"])
    assert recorder.statistics().to_dict() == statistics.to_dict()


@pytest.mark.parametrize("decoder_is_padded", [False, True])
def test_encoder_and_decoder_have_their_own_padding_and_drop_tokens(decoder_is_padded):
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = transformers.SwitchTransformersConfig(
        vocab_size=96,
        num_experts=3,
        expert_capacity=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        **sizes,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    randomize(model)
    masks = {"encoder": torch.ones(2, 9, dtype=torch.long), "decoder": torch.ones(2, 5, dtype=torch.long)}
    masks["encoder"][1, 4:] = 0
    inputs = {"attention_mask": masks["encoder"]}
    if decoder_is_padded:
        masks["decoder"][0, 3:] = 0
        inputs["decoder_attention_mask"] = masks["decoder"]
    served = {}  # a mask (T, 1, E) is what these experts are given
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: served.update({name: args[1][:, 0]}))
    with RoutingRecorder(model) as recorder, torch.no_grad():
        input_ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
        model(input_ids, decoder_input_ids=input_ids[:, :5], **inputs)
    layers = recorder.statistics().layers
    assert {name.split(".")[0] for name in layers} == {"encoder", "decoder"}
    for name, layer in layers.items():
        mask_T = masks[name.split(".")[0]].reshape(-1, 1)
        assert layer.counts.tolist() == (served[name.replace("router", "experts")] * mask_T).sum(0).tolist()
        assert layer.num_tokens == mask_T.sum()
    assert any(layer.counts.sum() < layer.num_tokens for layer in layers.values())  # some are dropped


def choices_by_hand(model, batch) -> list[torch.Tensor]:
    """`(tokens, K)` per layer from what the experts are asked to do, padding left out."""
    mask, choices = batch["attention_mask"].bool().reshape(-1), []
    handles = [
        module.register_forward_pre_hook(lambda module, args: choices.append(args[1].reshape(len(mask), -1)[mask]))
        for module in model.modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    ]
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return choices


@pytest.mark.parametrize("name", ["ours", "Mixtral", "DeepseekV3", "GptOss"])
def test_choices_token_by_token(name, batch):
    model = moe_model("qwen2") if name == "ours" else native(name)
    expected = choices_by_hand(model, batch)
    with RoutingRecorder(model, keep_choices=True) as recorder, torch.no_grad():
        for _ in range(2):
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    choices = recorder.choices()
    assert list(choices) == list(recorder.statistics().layers)
    for (layer, chosen_TK), expected_TK in zip(choices.items(), expected, strict=True):
        assert chosen_TK.dtype == torch.int64
        assert chosen_TK.sort(-1).values.tolist() == expected_TK.sort(-1).values.tolist() * 2
        assert recorder.statistics()[layer].counts.sum() == chosen_TK.numel()
    recorder.reset()
    with pytest.raises(ValueError, match="No router has run"):
        recorder.choices()


def test_first_choice_has_the_largest_logit_and_none_is_last(batch):
    model = moe_model("llama")
    model.set_experts_implementation("eager")  # grouped_mm leaves what is skipped uninitialised

    def shuffle(module, args, output):
        logits_TE, weights_TK, index_TK = output
        index_TK = logits_TE.topk(3, largest=True).indices[:, [2, 0, 1]]  # not in the order of the logits
        index_TK[:, 1] = module.num_experts  # the largest is skipped
        return logits_TE, weights_TK.new_zeros(index_TK.shape), index_TK

    logits = []
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.register_forward_hook(shuffle)
            module.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    with RoutingRecorder(model, keep_choices=True) as recorder, torch.no_grad():
        model(batch["input_ids"])
    for chosen_TK, logits_TE in zip(recorder.choices().values(), logits, strict=True):
        order_TE = logits_TE.argsort(-1, descending=True)
        assert chosen_TK.tolist() == [[*row[1:3], -1] for row in order_TE.tolist()]


def test_choices_are_kept_only_if_asked(batch):
    model = moe_model("llama")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(batch["input_ids"])
    with pytest.raises(ValueError, match="keep_choices=True"):
        recorder.choices()


def test_router_that_hides_its_choice(batch):
    # Llama 4 returns scores and logits only; its block masks all but the largest.
    model = native("Llama4")
    chosen = []
    for layer in model.model.layers:
        layer.feed_forward.router.register_forward_hook(lambda module, args, output: chosen.append(output[0] > 0))
    wrapped = torch.nn.ModuleDict({"inner": model})
    with RoutingRecorder(wrapped) as recorder, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool().reshape(-1)
    for layer, scores in zip(recorder.statistics().layers.values(), chosen, strict=True):
        assert layer.counts.tolist() == scores[mask].sum(0).tolist()


@pytest.mark.parametrize("reason", ["chooses with a bias", "not how many"])
def test_router_whose_choice_is_unknown_is_refused(batch, reason, monkeypatch):
    model = native("Mixtral")
    for layer in model.model.layers:
        if reason == "chooses with a bias":
            layer.mlp.gate.register_buffer("e_score_correction_bias", torch.zeros(4))
        layer.mlp.gate.register_forward_hook(lambda module, args, output: output[0])
    if reason == "not how many":
        monkeypatch.setattr("hf_moe.training.routers.TOP_K_FIELDS", ("of_another_model",))
    with RoutingRecorder(model), pytest.raises(ValueError, match=f"MixtralTopKRouter does not say which.*{reason}"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])


def test_padding_columns_with_a_cache(batch):
    model = moe_model("llama")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with RoutingRecorder(model) as recorder:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    tokens = int(batch["attention_mask"].sum()) + 2 * 3
    assert {layer.num_tokens for layer in recorder.statistics().layers.values()} == {tokens}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_is_not_counted_twice(batch, use_reentrant):
    model = moe_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with RoutingRecorder(model) as recorder:
        model(**batch).loss.backward()
    for layer, counts in zip(recorder.statistics().layers.values(), counts_by_hand(model.eval(), batch), strict=True):
        assert layer.counts.tolist() == counts.tolist()


def test_a_mask_of_other_tokens_is_not_used(batch, caplog):
    """As where a router sees more than the text that the mask is of."""
    model = native("Mixtral")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]], dim=1),))
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.chunk(2, dim=1)[0])
    with RoutingRecorder(model) as recorder, torch.no_grad(), caplog.at_level("WARNING"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    tokens = [layer.num_tokens for layer in recorder.statistics().layers.values()]
    assert tokens == [
        int(batch["attention_mask"].sum()),
        2 * batch["input_ids"].numel(),
        int(batch["attention_mask"].sum()),
    ]
    assert "model.layers.1.mlp.gate sees 44 tokens, and the attention mask is (2, 11)" in caplog.text


def test_coactivation(batch):
    model = native("DeepseekV3")
    chosen = []
    for router in find_routers(model).values():
        router.module.register_forward_hook(lambda m, a, output: chosen.append(output[2]))
    with RoutingRecorder(model, coactivation=True) as recorder, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"].bool().flatten()
    for (name, together), index in zip(recorder.coactivation().items(), chosen, strict=True):
        expected = torch.zeros(8, 8, dtype=torch.long)
        for pair in index[mask].tolist():
            for one in pair:
                for other in pair:
                    expected[one, other] += 1
        assert torch.equal(together, expected)
        assert torch.equal(together.diagonal(), recorder.statistics()[name].counts)
    with pytest.raises(ValueError, match="coactivation=True"):
        RoutingRecorder(model).coactivation()


def test_inside_peft(batch):
    model = moe_model("llama")
    expected = counts_by_hand(model, batch)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with RoutingRecorder(wrapped) as recorder, torch.no_grad():
        wrapped(**batch)
    actual = [layer.counts.tolist() for layer in recorder.statistics().layers.values()]
    assert actual == [counts.tolist() for counts in expected]


def test_reset_and_exceptions(batch):
    model = moe_model("llama")
    recorder = RoutingRecorder(model)
    with pytest.raises(ValueError, match="No router has run"):
        recorder.statistics()
    with pytest.raises(ValueError, match="exactly one"), recorder:
        model(**batch) and model()
    with recorder, pytest.raises(RuntimeError, match="recording already"):
        recorder.__enter__()
    assert not any(module._forward_hooks for module in model.modules())
    recorder.reset()
    with pytest.raises(ValueError, match="No router has run"):
        recorder.statistics()


def test_a_failing_forward_leaves_no_mask_behind(batch):
    model = moe_model("llama")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        with pytest.raises(ValueError, match="exactly one"):
            model(attention_mask=batch["attention_mask"])
        model(batch["input_ids"])
    assert recorder.statistics()["model.layers.0.mlp.gate"].num_tokens == batch["input_ids"].numel()


def test_dense_model_is_refused():
    with pytest.raises(ValueError, match="declares no router"):
        RoutingRecorder(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)))


DISTRIBUTED = """
import os, sys, torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from hf_moe import LoadBalancer, RoutingRecorder
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=rank, world_size=2)
model = DistributedDataParallel(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
ids = torch.arange(5, 5 + 24).reshape(2, 12)[rank : rank + 1]
with RoutingRecorder(model) as recorder:
    model(ids, labels=ids).loss.backward()
recorder.statistics(reduce_over_ranks=True).save(f"{sys.argv[1]}/statistics{rank}.json")
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""


@pytest.mark.processes
def test_reduction_over_ranks(tmp_path):
    model = moe_model("llama")
    model.save_pretrained(tmp_path)
    ranks = [subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(tmp_path), rank]) for rank in ("0", "1")]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(torch.arange(5, 5 + 24).reshape(2, 12))
    recorder.statistics().save(tmp_path / "expected.json")
    expected = (tmp_path / "expected.json").read_text()
    for rank in range(2):
        assert (tmp_path / f"statistics{rank}.json").read_text().replace("module.", "") == expected


def test_processes_agree_on_lengths_once_beside_routers_that_peft_replaced(batch, monkeypatch):
    """Those never run in training, and would otherwise be waited for in every step."""
    model = peft.get_peft_model(
        native("Mixtral"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    )
    reductions = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, *args: reductions.append(tensor.dtype))
    balancer = LoadBalancer("global_batch", 1.0).attach(model.train())
    for _ in range(3):
        model(**batch)
        balancer.step()
    assert reductions == [torch.int64, *[torch.float32] * 3]
