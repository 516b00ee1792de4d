# SPDX-License-Identifier: Apache-2.0
"""Of every mixture of experts in transformers, what hf_moe takes for the routers' choice is what the experts are given."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_moe import RoutingRecorder
from hf_moe.models import losses
from hf_moe.training.load_balancing import LoadBalancer
from hf_moe.training.routers import find_routers, has_routers


MODELS = sorted(
    path.parent.name
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    if '"router_logits"' in path.read_text()
)
WITHOUT_SCORE = ("dbrx", "jetmoe", "phimoe")  # return no weights, or weights of masked logits
UNREADABLE = ("doge", "nllb_moe")
# Experts that are not called with the choice: they run all tokens, or take them sorted.
TELLS_NOTHING = ("jetmoe", "llama4")
# Whatever of these a configuration has, under the many names of the same thing.
TINY = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "bos_token_id", "encoder_sparse_step"), 1),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "index_head_dim", "d_kv"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "sliding_window"), 16),
    **{
        "vocab_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "index_topk": 8,
        "decoder_sparse_step": 1,
    },
    **{"pad_token_id": 0, "eos_token_id": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 10},
}
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm4_moe_lite", "glm5_next")
LATENT += (
    "glm_moe_dsa",
    "kimi_linear",
    "mistral4",
    "mistral_large4",
)  # attention whose head_dim follows from the others
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FIELDS = {
    **{"beam": SPARSE, "deepseek_ocr2": SPARSE, "step3p7": SPARSE},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 3},
    "dbrx": {
        **{"n_layers": 2, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "kimi_linear": {"layer_types": ["full_attention"] * 3},
    "glm5_next": {**SPARSE, "layer_types": ["indexed_attention"] * 3, "index_kpool": 4, "qk_rope_head_dim": 0},
    "doge": {"is_moe": True},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24], "rope_parameters": MROPE},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 0},
    "glm4v_moe": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    "granitemoehybrid": {"layer_types": ["attention"] * 3, "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["full_attention"] * 3},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "zero_expert_num": 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(name: str) -> PreTrainedModel:
    """A small model of a folder of transformers, from the first of its classes that takes the values above."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    classes = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    classes = [kind for kind in classes if issubclass(kind, PreTrainedModel)]
    reasons = []
    for ending in ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForTokenClassification"):
        for kind in (kind for kind in classes if kind.__name__.endswith(ending)):
            config_class = getattr(kind.config_class, "sub_configs", {}).get("text_config", kind.config_class)
            known = inspect.signature(config_class.__init__).parameters
            values = {key: value for key, value in TINY.items() if key in known}
            if name in LATENT:
                values.pop("head_dim", None)
                values["num_key_value_heads"] = values["num_attention_heads"]
            try:
                model = kind(config_class(**{**values, **FIELDS.get(name, {})})).float().eval()
            except Exception as error:  # whatever a class says of values that it does not take
                reasons.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                continue
            if has_routers(model):
                return model
            reasons.append(f"{kind.__name__} has no router.")
    pytest.fail(f"No class of {name} takes the values above; give FIELDS some for it. {'; '.join(reasons)}")


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_seen_is_refused(name):
    model = tiny_model(name)
    with pytest.raises(ValueError, match="cannot be seen"):
        find_routers(model)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*UNREADABLE, *TELLS_NOTHING)])
def test_the_choice_is_what_the_experts_get(name):
    model = randomized(tiny_model(name))
    given = {}

    def keep_choice(path: str, values: tuple) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                given[path] = value

    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: keep_choice(path, (*args, *kwargs.values())), with_kwargs=True
            )
    with torch.no_grad():
        outputs = router_outputs(model)

    assert outputs
    for path, (router, output) in outputs.items():
        block = path.rpartition(".")[0]
        (expected,) = [index for owner, index in given.items() if owner.startswith((f"{block}.", f"{path}."))]
        index_TK = router.top_k_index(output)
        if name == "switch_transformers":  # a mask
            expected = torch.where(expected.any(-1), expected.argmax(-1), expected.shape[-1])
        if name == "zaya":  # the first expert with a weight of 0 stands for none
            index_TK = index_TK.masked_fill(index_TK == 4, 0)
        expected = expected.reshape(index_TK.shape)
        assert torch.equal(index_TK.sort(-1).values, expected.sort(-1).values.long()), path
        if name in WITHOUT_SCORE:
            with pytest.raises(ValueError, match="Say with `score`"):
                router.find_score(output)
        else:
            assert router.find_score(output) == (expected_score(router.module), True), path


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNREADABLE])
def test_a_balance_loss_is_added_as_if_it_were_in_the_loss(name):
    model = randomized(tiny_model(name)).requires_grad_(True).train()
    score = "softmax" if name in WITHOUT_SCORE else None

    def gradients(balancer: LoadBalancer | None, in_the_loss: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        if balancer is not None:
            balancer.attach(model)
        outputs = router_outputs(model)
        loss = outputs.pop("loss")
        if in_the_loss:
            for router, output in outputs.values():
                logits_TE, index_TK = router.logits(output).float(), router.top_k_index(output)
                scores_TE = losses.scores_of(logits_TE, score or expected_score(router.module))
                loss = loss + losses.switch_loss(scores_TE, losses.count_choices(index_TK, scores_TE.shape[-1]))
        loss.backward()
        if balancer is not None:
            balancer.detach()
        return {
            f"{path}.{key}": parameter.grad.clone()
            for path, router in find_routers(model).items()
            for key, parameter in router.module.named_parameters()
            if parameter.grad is not None
        }

    expected, found, without = gradients(None, True), gradients(LoadBalancer(coef=1.0, score=score)), gradients(None)
    size = max(gradient.abs().max() for gradient in expected.values())
    assert max((expected[key] - without[key]).abs().max() for key in without) > 1e-3
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() < 1e-5 * size, key


def test_padding_where_a_router_sees_a_part_of_the_tokens(caplog):
    """Ernie's text experts do not see images: which of their tokens are padding cannot be told, and that is said."""
    model = randomized(tiny_model("ernie4_5_vl_moe"))
    is_image = torch.zeros(2, 7, dtype=torch.int)
    is_image[:, 2:4] = 1
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    arguments = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    with RoutingRecorder(model) as recorder, torch.no_grad(), caplog.at_level("WARNING"):
        model(**arguments, moe_mm_token_type_ids=is_image)
    assert {layer.num_tokens for name, layer in recorder.statistics().layers.items() if "text_moe" in name} == {10}
    assert {layer.num_tokens for name, layer in recorder.statistics().layers.items() if "vision_moe" in name} == {4}
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(**arguments)
    assert {layer.num_tokens for layer in recorder.statistics().layers.values()} == {12}
    LoadBalancer("sequence", 1.0).attach(model.train().requires_grad_(True))
    with pytest.raises(ValueError, match="sees a part of the tokens, so that sequences cannot be told apart"):
        model(**arguments, moe_mm_token_type_ids=is_image)


def test_a_token_that_skips_the_experts():
    """Zaya's router gives the first expert with a weight of 0 where its last logit wins."""
    model = randomized(tiny_model("zaya"))
    path, router = next(iter(find_routers(model).items()))
    router.module.balancing_biases[:] = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0])
    with torch.no_grad():
        output = router_outputs(model)[path][1]
    assert output[2].tolist() == [[0]] * 14
    assert router.top_k_index(output).tolist() == [[4]] * 14
    router.module.balancing_biases[:] = torch.tensor([10.0, 0.0, 0.0, 0.0, 0.0])
    with torch.no_grad():
        output = router_outputs(model)[path][1]
    assert router.top_k_index(output).tolist() == [[0]] * 14


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.15)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.normal_()
    return model


def router_outputs(model: PreTrainedModel) -> dict:
    """`(router, output)` of each router in a forward pass, and a loss of it."""
    outputs, handles = {}, []
    for path, router in find_routers(model).items():
        handles.append(
            router.module.register_forward_hook(
                lambda module, args, output, path=path, router=router: outputs.update({path: (router, output)})
            )
        )
    input_ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    arguments = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    result = model(input_ids=input_ids, use_cache=False, **arguments)
    for handle in handles:
        handle.remove()
    if torch.is_grad_enabled():
        outputs["loss"] = result[0].float().square().mean()
    return outputs


def expected_score(router: nn.Module) -> str:
    """What the source of a router's forward pass says."""
    if "Gemma" in type(router).__name__:
        return "identity"  # returns probabilities for logits
    if (function := getattr(router, "score_fn", None)) is not None:
        return "sigmoid" if isinstance(function, nn.Sigmoid) else "sqrtsoftplus"
    if (function := getattr(router, "expert_selection_fn", None)) is not None:
        return function
    return "sigmoid" if "sigmoid" in inspect.getsource(type(router)) else "softmax"
