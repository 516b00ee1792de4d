# SPDX-License-Identifier: Apache-2.0
"""What is special about each family, beside the dense class: logits, loss, gradients, every field, the router's input."""

import copy

import pytest
import torch
import transformers
from conftest import FAMILIES, assert_close, dense_class, dense_model, moe_class, randomize, save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_moe import UpcycleConfig, plan_upcycle, upcycle, upcycle_model
from hf_moe.upcycling.errors import UpcycleError
from hf_moe.upcycling.families import after_norm, residual_stream


# Every family, and the feed-forwards that only a flag gives it.
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("granite", {"mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("smollm3", {"mlp_bias": True}),
    ("stablelm", {"use_parallel_residual": True}),
]
HEADS = [
    (family, head)
    for family in FAMILIES
    for head in moe_class(family, "Config").auto_classes.values()
    if head != "ForCausalLM"
]
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def recipe(**values) -> UpcycleConfig:
    return UpcycleConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "target": "hf_moe", **values})


def ids(length: int = 40) -> torch.Tensor:
    """Tokens that reach far beyond the sliding window of the tiny models, which is 6."""
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(2))


def dense_gradients(moe: PreTrainedModel, dense: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients of a MoE model by the names of the dense one: those of a feed-forward are the sum over the experts."""
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    for name, _ in dense.named_parameters():
        if name not in gradients:
            layer, _, rest = name.partition(".mlp.")
            module, kind = rest.split(".")
            fused = "down_proj" if module == "down_proj" else "gate_up_proj"
            gradient = gradients[f"{layer}.mlp.experts.{fused}{'_bias' if kind == 'bias' else ''}"].sum(0)
            halves = {"gate_proj": slice(0, 48), "up_proj": slice(48, 96)}
            gradients[name] = gradient[halves.get(module, slice(None))]
    return gradients


@pytest.mark.parametrize(("family", "values"), VARIANTS)
def test_logits_loss_and_gradients_are_the_dense_ones(family, values, batch):
    dense = dense_model(family, **values).train()
    moe = upcycle_model(dense, recipe())
    assert moe.training
    expected, actual = dense(**batch), moe(**batch)
    kept = batch["attention_mask"].bool()
    assert_close(actual.logits[kept], expected.logits[kept])
    assert_close(actual.loss, expected.loss)
    expected.loss.backward(), actual.loss.backward()
    gradients = dense_gradients(moe, dense)
    for name, parameter in dense.named_parameters():
        assert_close(gradients[name], parameter.grad, 1e-4)
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_generation_is_the_dense_one(family, batch):
    dense = dense_model(family)
    moe = upcycle_model(dense, recipe())
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = dense.generate(**inputs, **greedy)
    for use_cache in (True, False):
        assert torch.equal(moe.generate(**inputs, **greedy, use_cache=use_cache), expected)


@pytest.mark.parametrize(("family", "head"), HEADS)
@torch.no_grad()
def test_other_heads_are_the_dense_ones(family, head, batch):
    dense = dense_model(family, head, num_labels=3)
    moe = upcycle_model(dense, recipe())
    assert type(moe) is moe_class(family, head)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    kept = Ellipsis if "Sequence" in head else batch["attention_mask"].bool()
    assert_close(moe(**inputs)[0][kept], dense(**inputs)[0][kept])


# Fields that a careless class or conversion loses; all have an effect on the logits.
FIELDS = [
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"sliding_window": 20}),
    ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
    ("gemma2", {"query_pre_attn_scalar": 7}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"attention_bias": True}),
    ("gemma2", {"tie_word_embeddings": True}),
    ("gemma3_text", {"final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window": 20}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
    ),
    ("gemma3_text", {"tie_word_embeddings": True}),
    ("granite", {"embedding_multiplier": 0.5}),
    ("granite", {"attention_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 4}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("olmo2", {"attention_bias": True}),
    ("olmo2", {"rms_norm_eps": 1e-2}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("olmo3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("olmo3", {"sliding_window": 20}),
    (
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                },
            }
        },
    ),
    ("phi3", {"sliding_window": 6}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}}),
    ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 64}),
    ("smollm3", {"no_rope_layers": [0, 1, 1]}),
    ("smollm3", {"use_sliding_window": False}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("stablelm", {"use_parallel_residual": True}),
    ("stablelm", {"qk_layernorm": False}),
    ("stablelm", {"use_qkv_bias": False}),
    ("stablelm", {"layer_norm_eps": 1e-1}),
    ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}}),
]


@pytest.mark.parametrize(("family", "values"), FIELDS)
@torch.no_grad()
def test_every_field_arrives(family, values, tmp_path):
    dense = dense_model(family, **values)
    expected = dense(ids()).logits
    assert not torch.allclose(expected, dense_model(family)(ids()).logits, atol=1e-3), "the field has an effect"
    dense.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    assert upcycle(tmp_path / "dense", tmp_path / "moe", recipe()).exact
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(report.values()), report
    assert_close(model(ids()).logits, expected)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == bool(values.get("tie_word_embeddings"))


@torch.no_grad()
def test_gemmas_obsolete_activation_does_not_wake_up(tmp_path):
    # Published Gemma 2 models carry both; their class reads `hidden_activation` alone.
    dense = dense_model("gemma2", hidden_act="relu")
    dense.save_pretrained(tmp_path / "dense")
    assert '"hidden_act": "relu"' in (tmp_path / "dense" / "config.json").read_text()
    assert upcycle(tmp_path / "dense", tmp_path / "moe", recipe()).exact
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids()).logits, dense(ids()).logits)
    assert_close(upcycle_model(dense, recipe())(ids()).logits, dense(ids()).logits)


@torch.no_grad()
def test_phi3_switches_to_the_long_rope_while_it_generates():
    values = {"original_max_position_embeddings": 16, "max_position_embeddings": 64, "rope_parameters": LONG_ROPE}
    dense = dense_model("phi3", **values)
    moe = upcycle_model(dense, recipe())
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = dense.generate(ids(10), **greedy)
    assert torch.equal(moe.generate(ids(10), **greedy), expected)
    # The cache of the short rope is thrown away, so the tokens after the switch are those of one pass over all.
    assert torch.equal(moe(expected[:, :-1]).logits[:, -1].argmax(-1), expected[:, -1])


@pytest.mark.parametrize(("family", "values"), VARIANTS)
@torch.no_grad()
def test_router_logits_have_the_std_asked_for(family, values):
    dense = dense_model(family, hidden_size=256, **values)
    # The norms of a layer differ in scale, so that reading the wrong one shows; what a bias adds to every state must not.
    for layer in dense.model.layers:
        norms = [module for name, module in layer.named_children() if name.endswith("layernorm")]
        for index, norm in enumerate(norms):
            norm.weight.mul_(2**index)
            if getattr(norm, "bias", None) is not None:
                norm.bias.fill_(5.0)
    for std in (0.3, 1.0):
        moe = upcycle_model(dense, recipe(num_experts=64, router_logit_std=std))
        for logits in moe(ids(), output_router_logits=True).router_logits:
            assert 0.85 * std < logits.std() < 1.15 * std


def test_a_layer_norms_bias_favours_no_expert():
    tensors = {
        "layers.1.norm.weight": torch.full((4,), 3.0),
        "layers.1.norm.bias": torch.arange(4.0),
        "layers.1.other.weight": torch.ones(4),
    }
    router_input = after_norm("missing", "norm", "other")(tensors.get, "layers.1.", 1)
    assert (router_input.hidden_size, router_input.length) == (4, 6.0)
    assert torch.equal(router_input.shift, tensors["layers.1.norm.bias"])


def test_the_residual_stream_adds_up():
    tensors = {
        "embed.weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]]),  # mean squared length 13
        "layers.0.a.weight": torch.tensor([1.0, 2.0]),  # 5
        "layers.0.f.weight": torch.tensor([2.0, 2.0]),  # 8
        "layers.1.a.weight": torch.tensor([1.0, 1.0]),  # 2
    }
    known = residual_stream("embed", "a", "f")
    first, second = (known(tensors.__getitem__, f"layers.{index}.", index) for index in range(2))
    assert first.length == pytest.approx((13 + 5) ** 0.5)
    assert second.length == pytest.approx((13 + 5 + 8 + 2) ** 0.5)
    assert first.hidden_size == second.hidden_size == 2
    tensors["embed.weight"] = torch.randn(50_000, 2)  # a part of these is looked at
    assert known(tensors.get, "layers.0.", 0).length == pytest.approx((2 + 5) ** 0.5, rel=0.02)


def test_dropout_is_the_dense_ones():
    for family, field in (("phi3", "resid_pdrop"), ("stablelm", "hidden_dropout")):
        dense = dense_model(family, **{field: 0.5}).train()
        moe = upcycle_model(dense, recipe())
        losses = []
        for model in (dense, moe):
            torch.manual_seed(0)
            losses.append(model(ids(), labels=ids()).loss)
        assert_close(losses[1], losses[0])
        assert abs(losses[0] - dense.eval()(ids(), labels=ids()).loss) > 1e-3


@torch.no_grad()
def test_gemma3_with_images_is_refused_and_its_text_model_is_not():
    # The class for images and text does not cap its logits.
    text = dense_model("gemma3_text", final_logit_softcapping=None).config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    with pytest.raises(UpcycleError, match="more than text.*'gemma3_text'.*model of its own"):
        plan_upcycle(config, recipe())
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomize(model)
    dense = dense_class("gemma3_text", "ForCausalLM")(copy.deepcopy(model.config.text_config)).eval()
    dense.model.load_state_dict(model.model.language_model.state_dict())
    dense.lm_head.load_state_dict(model.lm_head.state_dict())
    tokens = ids().clamp(min=8)
    assert_close(upcycle_model(dense, recipe())(tokens).logits, model(tokens).logits)
