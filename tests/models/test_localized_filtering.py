# SPDX-License-Identifier: Apache-2.0
"""Localized filtering against Yuan's recorded tensors and a loop over positions, in training, caches, padding and PEFT."""

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import FAMILIES, UNGATED_FAMILIES, assert_close, moe_class, moe_config, moe_model, randomize
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from test_modeling_moe import run_without_hf_moe
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_moe.models.localized_filtering import LocalizedFiltering
from hf_moe.models.routing_context import RoutingContext


GOLDEN = Path(__file__).parent.parent / "golden" / "yuan_lfa.safetensors"
REFUSED = (StrictDataclassError, ValueError)
FILTERING = [family for family in FAMILIES if family != "phi3"]


@pytest.fixture(params=FILTERING)
def family(request) -> str:
    """Name of a dense family whose queries and keys can be filtered."""
    return request.param


def filtering_model(family: str = "llama", **values):
    return moe_model(family, use_localized_filtering=True, **values)


def filter_of(hidden_size: int) -> LocalizedFiltering:
    return LocalizedFiltering(SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=1)).double()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def position_by_position(module: LocalizedFiltering, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the filter should be, written as a loop over sequences and positions."""
    outputs = torch.zeros_like(hidden_states)
    for sequence, (rows, is_token) in enumerate(zip(hidden_states, mask.bool(), strict=True)):
        values = rows
        for convolution in (module.conv1, module.conv2):
            before, here = convolution.weight[:, :, 0, 0], convolution.weight[:, :, 1, 0]
            results = []
            for position, row in enumerate(values):
                result = here @ row + convolution.bias
                if position > 0 and is_token[position - 1]:
                    result = result + before @ values[position - 1]
                results.append(result)
            values = torch.stack(results)
        total = values + rows
        scale = (total.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        outputs[sequence] = module.output_layernorm.weight * total * scale
    return outputs


def test_recorded_tensors_of_yuan():
    golden = load_file(GOLDEN)
    module = filter_of(golden["x"].shape[-1])
    module.load_state_dict({name[2:]: tensor for name, tensor in golden.items() if name.startswith("w.")})
    assert (module(golden["x"]) - golden["y"]).abs().max() < 1e-6


@pytest.mark.parametrize("padding", ["none", "left", "middle", "right", "all"])
def test_equals_a_loop_over_positions(padding):
    module = filter_of(6)
    randomize(module)
    hidden_states = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.long)
    columns = {"none": [], "left": [0, 1], "middle": [3], "right": [5, 6], "all": range(7)}[padding]
    mask[1, list(columns)] = 0
    actual = module(hidden_states, RoutingContext(attention_mask=mask))
    assert_close(actual, position_by_position(module, hidden_states, mask), 1e-12)
    if padding == "none":
        assert_close(module(hidden_states), actual, 1e-12)


def test_padding_may_hold_anything():
    module = filter_of(6)
    randomize(module)
    hidden_states = torch.randn(1, 4, 6, dtype=torch.float64)
    expected = module(hidden_states[:, 2:])
    hidden_states[:, :2] = torch.nan
    routing = RoutingContext(attention_mask=torch.tensor([[0, 0, 1, 1]]))
    assert_close(module(hidden_states, routing)[:, 2:], expected, 1e-12)


@torch.no_grad()
def test_queries_and_keys_are_filtered_and_values_are_not(family, batch):
    model = filtering_model(family)
    seen = {}
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).register_forward_pre_hook(
                lambda module, args, key=(layer, name): seen.__setitem__(key, args[0])
            )
        attention.lfa.register_forward_pre_hook(
            lambda module, args, key=(layer, "raw"): seen.__setitem__(key, args[0])
        )
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for layer, block in enumerate(model.model.layers):
        raw = seen[layer, "raw"]
        expected = position_by_position(block.self_attn.lfa, raw, batch["attention_mask"])
        assert torch.equal(seen[layer, "v_proj"], raw)
        assert torch.equal(seen[layer, "q_proj"], seen[layer, "k_proj"])
        assert_close(seen[layer, "q_proj"], expected)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 2, 3])
@pytest.mark.parametrize("with_config", [True, False])
def test_cache_equals_full_pass(family, batch, prefill, with_config):
    model = filtering_model(family)
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    begin = 0
    for end in (prefill, 4, 5, 6, 9, 10, 11):
        end = max(end, begin + 1)
        step = {"input_ids": input_ids[:, begin:end], "attention_mask": mask[:, :end], "past_key_values": cache}
        actual = model(**step, position_ids=torch.arange(begin, end)[None]).logits
        kept = mask[:, begin:end].bool()
        assert_close(actual[kept], expected[:, begin:end][kept])
        begin = end
    assert begin == 11


@torch.no_grad()
def test_model_makes_a_cache_of_its_own(family):
    model = filtering_model(family)
    input_ids = tokens(2, 7)
    first = model(input_ids[:, :4], use_cache=True)
    second = model(input_ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(second.logits, model(input_ids).logits[:, 4:])


@torch.no_grad()
def test_padding_leaks_nothing(family):
    model = filtering_model(family)
    input_ids = tokens(1, 6)
    expected = model(input_ids).logits
    left = {"input_ids": torch.cat([tokens(1, 3, seed=1), input_ids], dim=1), "attention_mask": torch.ones(1, 9)}
    left["attention_mask"][:, :3] = 0
    left["position_ids"] = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    assert_close(model(**left).logits[:, 3:], expected)
    right = {"input_ids": torch.cat([input_ids, tokens(1, 3, seed=1)], dim=1), "attention_mask": torch.ones(1, 9)}
    right["attention_mask"][:, 6:] = 0
    assert_close(model(**right).logits[:, :6], expected)


@torch.no_grad()
def test_tokens_behind_padding_do_not_see_it(family):
    model = filtering_model(family)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    first, second = tokens(1, 8), tokens(1, 8)
    second[mask == 0] = tokens(2, seed=1)
    kept = mask.bool()
    expected = model(input_ids=first, attention_mask=mask).logits[kept]
    assert_close(model(input_ids=second, attention_mask=mask).logits[kept], expected)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(family):
    model = filtering_model(family)
    first, second = tokens(1, 4), tokens(1, 5, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    apart = [model(sequence, use_cache=False).logits for sequence in (first, second)]
    assert_close(packed, torch.cat(apart, dim=1))


GENERATE = {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 3}],
    ids=["greedy", "beams", "returned", "chunks"],
)
def test_generates_in_a_batch_what_it_does_one_by_one(family, batch, options):
    model = filtering_model(family)
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    together = model.generate(input_ids=input_ids, attention_mask=mask, **GENERATE, **options)[:, input_ids.shape[1] :]
    for use_cache in (True, False) if "prefill_chunk_size" not in options else (True,):
        apart = [
            model.generate(row[keep.bool()][None], use_cache=use_cache, **GENERATE, **options)[:, int(keep.sum()) :]
            for row, keep in zip(input_ids, mask, strict=True)
        ]
        assert torch.equal(together, torch.cat(apart))


@torch.no_grad()
def test_assisted_generation(family):
    model, assistant = filtering_model(family), filtering_model(family)
    randomize(assistant.model.layers[2], seed=3)
    input_ids = tokens(1, 4).repeat(1, 3)
    expected = model.generate(input_ids, **GENERATE)
    assert torch.equal(model.generate(input_ids, prompt_lookup_num_tokens=3, **GENERATE), expected)
    assert torch.equal(model.generate(input_ids, assistant_model=assistant, **GENERATE), expected)


@torch.no_grad()
def test_cache_can_be_cropped_selected_and_repeated():
    model = filtering_model()
    input_ids = tokens(3, 9)
    expected = model(input_ids).logits
    cache = model(input_ids[:, :5], use_cache=True).past_key_values
    assert cache.get_max_length() == -1
    cache.activate_past_recording()
    model(tokens(3, 4, seed=1), past_key_values=cache)
    cache.crop(-4)
    assert_close(model(input_ids[:, 5:7], past_key_values=cache).logits, expected[:, 5:7])
    cache.crop(0)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    assert_close(model(input_ids[[0, 0, 2, 2], 7:8], past_key_values=cache).logits, expected[[0, 0, 2, 2], 7:8])
    cache.reorder_cache(torch.tensor([2, 2, 1, 0]))
    assert_close(model(input_ids[[2, 2, 0, 0], 8:], past_key_values=cache).logits, expected[[2, 2, 0, 0], 8:])
    cache.reset()
    assert_close(model(input_ids, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_crop_beyond_what_was_kept_is_refused():
    model = filtering_model()
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="keys of 4 tokens, but localized filtering has seen 6"):
        model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_caches_without_a_place_for_it_are_refused():
    model, other = filtering_model(), moe_model("llama")
    filled = other(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="keys of 4 tokens, but localized filtering has seen 0"):
        model(tokens(1, 1), past_key_values=filled)
    static = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match=r"needs a `DynamicCache` of 3 layers, got a `StaticCache` .*'StaticLayer'"):
        model(tokens(1, 4), past_key_values=static)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens(1, 4), cache_implementation="static", **GENERATE)
    with pytest.raises(ValueError, match="generate_batch"):
        model.model(tokens(1, 4), cache=object(), use_cache=False)
    with pytest.raises(ValueError, match="`attention_mask` must be of shape"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_reach_everything_also_with_checkpointing(family, batch, use_reentrant):
    model = filtering_model(family).train()
    expected = gradients(model, batch)
    assert all(grad.abs().max() > 0 for name, grad in expected.items() if ".self_attn." in name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, grad in gradients(model, batch).items():
        assert_close(grad, expected[name])


def test_gradients_are_those_of_finite_differences():
    module = filter_of(4)
    randomize(module)
    routing = RoutingContext(attention_mask=torch.tensor([[0, 1, 1, 0, 1]]))
    hidden_states = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    values = [parameter for _, parameter in sorted(module.named_parameters())]
    names = sorted(name for name, _ in module.named_parameters())

    def run(hidden_states, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden_states, routing))

    assert torch.autograd.gradcheck(run, (hidden_states, *values))


@torch.no_grad()
def test_compiled_model_equals_itself(batch):
    model = filtering_model()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(**batch).logits, model(**batch).logits)
    torch.compiler.reset()


def lora(**values) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **values)


@torch.no_grad()
def test_lora_equals_itself_when_merged(family, batch):
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = batch["attention_mask"].bool()
    plain = filtering_model(family)
    expected = plain(**batch).logits[kept]  # before it is wrapped
    model = peft.get_peft_model(plain, lora()).eval()
    adapted = model(**batch).logits[kept]
    assert (adapted - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits[kept], expected)
    merged = model.merge_and_unload()
    assert_close(merged(**batch).logits[kept], adapted)


def test_lora_of_the_values_sees_the_raw_input(batch):
    model = peft.get_peft_model(filtering_model(), lora())
    attention, seen = model.base_model.model.model.layers[0].self_attn, {}
    for name, module in (
        ("raw", attention.lfa),
        ("wrapper", attention.v_proj),
        ("base", attention.v_proj.base_layer),
        ("lora", attention.v_proj.lora_A["default"]),
        ("query", attention.q_proj.lora_A["default"]),
    ):
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    model(**batch).loss.backward()
    for name in ("wrapper", "base", "lora"):
        assert torch.equal(seen[name], seen["raw"])
    assert not torch.equal(seen["query"], seen["raw"])
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_filter_is_trained_whole_beside_lora(batch, tmp_path):
    model = peft.get_peft_model(filtering_model(), lora(modules_to_save=["lfa"]))
    expected = filtering_model()(**batch)
    with model.disable_adapter():
        kept = batch["attention_mask"].bool()
        assert torch.equal(model(**batch).logits[kept], expected.logits[kept])
    model(**batch).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lfa.modules_to_save.default.conv1.weight" in name for name in trained)
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapted = model.eval()(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(filtering_model(), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits[kept], adapted[kept])


@torch.no_grad()
def test_values_trained_whole_see_the_raw_input(batch):
    plain = filtering_model()
    expected = plain(**batch).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["v_proj"])
    model = peft.get_peft_model(plain, config).eval()
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_copy_of_the_attention_sees_the_padding(batch):
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], modules_to_save=["self_attn"])
    model = peft.get_peft_model(filtering_model(), config).eval()
    assert torch.equal(model(**batch).logits, filtering_model()(**batch).logits)


def test_attention_without_its_layer_is_refused():
    attention = filtering_model().model.layers[0].self_attn
    with pytest.raises(ValueError, match="not called by its layer"):
        attention(hidden_states=torch.randn(1, 3, 32))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("phi3", "one matrix makes query, key and value"),
        ("gpt2", "one matrix makes query, key and value"),
        ("gpt_neox", "one matrix makes query, key and value"),
        ("bert", "its attention sees later tokens"),
        ("vit", "its attention sees later tokens"),
    ],
)
def test_families_that_cannot_say_why(family, reason):
    with pytest.raises(REFUSED, match=f"`use_localized_filtering` is not possible with .*{reason}"):
        moe_config(family, use_localized_filtering=True)
    assert not moe_config(family).use_localized_filtering


def test_every_family_is_tested_or_refuses():
    assert {*FILTERING, "phi3", "gpt2", "gpt_neox", "bert", "vit"} == {*FAMILIES, *UNGATED_FAMILIES}


def test_configurations_that_cannot_say_why():
    with pytest.raises(REFUSED, match="later tokens"):
        moe_config("gemma2", use_localized_filtering=True, use_bidirectional_attention=True)
    with pytest.raises(REFUSED, match="`hidden_size` must be even"):
        moe_config("llama", use_localized_filtering=True, hidden_size=33, num_attention_heads=3, num_key_value_heads=3)


def test_fresh_weights_are_initialised(family):
    torch.manual_seed(0)
    config = moe_config(family, use_localized_filtering=True, hidden_size=64, initializer_range=0.3)
    for layer in moe_class(family, "ForCausalLM")(config).model.layers:
        for convolution in (layer.self_attn.lfa.conv1, layer.self_attn.lfa.conv2):
            assert 0.25 < convolution.weight.std() < 0.35
            assert not convolution.bias.any()
        assert (layer.self_attn.lfa.output_layernorm.weight == 1).all()


@torch.no_grad()
def test_saving_and_loading(family, batch, tmp_path):
    model = filtering_model(family)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert f"model.layers.{model.config.num_hidden_layers - 1}.self_attn.lfa.conv2.bias" in expected
    assert_close(loaded(**batch).logits, model(**batch).logits, 1e-6)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert_close(offloaded(**batch).logits, model(**batch).logits)


REMOTE = """
import json, sys
from pathlib import Path
sys.modules["hf_moe"] = None  # an import of hf_moe now fails
import torch, transformers
ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
mask = (ids != 0).long()
results = {}
for folder in map(Path, sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=True).model.layers[1].self_attn.lfa
    started = [fresh.conv1.weight.std().item(), *fresh.conv1.bias.tolist(), *(fresh.output_layernorm.weight - 1).tolist()]
    results[folder.name] = {"logits": logits.tolist(), "generated": generated.tolist(), "started": started}
print(json.dumps(results))
"""


@pytest.mark.processes
@torch.no_grad()
def test_loads_without_hf_moe(tmp_path):
    models = {family: filtering_model(family, initializer_range=0.3) for family in ("llama", "gemma2")}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
    results = run_without_hf_moe(REMOTE, [tmp_path / name for name in models], tmp_path)
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    mask = (ids != 0).long()
    for family, model in models.items():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert_close(torch.tensor(results[family]["logits"]), expected, 1e-6)
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5)
        assert results[family]["generated"] == generated.tolist()
        deviation, *rest = results[family]["started"]
        assert 0.25 < deviation < 0.35
        assert not any(rest)
