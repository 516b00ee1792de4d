# SPDX-License-Identifier: Apache-2.0
"""Blocks and routers beside transformers' own, output and gradients."""

import copy

import pytest
import torch
import transformers
from conftest import assert_close, moe_config, randomize
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_moe.models.routing_context import RoutingContext
from hf_moe.models.sparse_block import MoeSparseBlock


NUM_EXPERTS, HIDDEN, SIZE = 8, 32, 24  # SIZE is the intermediate size of an expert


def ours(router_type: str, family: str = "llama", **values) -> MoeSparseBlock:
    config = moe_config(family, router_type=router_type, **{"num_experts": NUM_EXPERTS, **values})
    block = MoeSparseBlock(config, config.num_experts)
    block.gate.init_weights(0.2)
    randomize(block)
    return block


def native(block_class, config, **options) -> torch.nn.Module:
    config._experts_implementation = "eager"
    return block_class(config, **options)


def mixtral():
    config = transformers.MixtralConfig(num_local_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=SIZE)
    return ours("softmax_topk"), native(MixtralSparseMoeBlock, config), {}


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=3,
        hidden_size=HIDDEN,
        moe_intermediate_size=SIZE,
        shared_expert_intermediate_size=20,
        norm_topk_prob=False,
    )
    block = ours(
        "softmax_topk",
        num_experts_per_tok=3,
        norm_topk_prob=False,
        shared_expert_intermediate_size=20,
        use_shared_expert_gate=True,
    )
    return block, native(Qwen2MoeSparseMoeBlock, config), {}


def deepseek_v2(topk_method: str):
    config = transformers.DeepseekV2Config(
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=3,
        hidden_size=HIDDEN,
        moe_intermediate_size=SIZE,
        n_shared_experts=2,
        routed_scaling_factor=1.5,
        topk_method=topk_method,
        n_group=4,
        topk_group=2,
    )
    groups = {"n_group": 4, "topk_group": 2} if topk_method != "greedy" else {}
    block = ours(
        "softmax_topk",
        num_experts_per_tok=3,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
        shared_expert_intermediate_size=2 * SIZE,
        router_dtype="float32",
        **groups,
    )
    return block, native(DeepseekV2Moe, config), {"shared_expert.": "shared_experts."}


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=3,
        hidden_size=HIDDEN,
        moe_intermediate_size=SIZE,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
    )
    block = ours(
        "sigmoid_topk",
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        use_expert_bias=True,
        shared_expert_intermediate_size=SIZE,
    )
    return block, native(DeepseekV3MoE, config), {"shared_expert.": "shared_experts."}


class Llama4Block(Llama4TextMoe):
    """With the output of a block, and experts as ours keep them."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)[0].view(hidden_states.shape)


def llama4(top_k: int):
    config = transformers.Llama4TextConfig(
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k, hidden_size=HIDDEN, intermediate_size=SIZE
    )
    block = ours("llama4", num_experts_per_tok=top_k, shared_expert_intermediate_size=SIZE)
    return block, native(Llama4Block, config), {"gate.": "router."}


class LongcatBlock(LongcatFlashMoE):
    """Its `gate_up_proj` has rows for the identity experts, which it never uses."""

    def __init__(self, config):
        super().__init__(config)
        self.experts.gate_up_proj = torch.nn.Parameter(self.experts.gate_up_proj[:NUM_EXPERTS].clone())


def longcat():
    config = transformers.LongcatFlashConfig(
        n_routed_experts=NUM_EXPERTS,
        zero_expert_num=3,
        moe_topk=4,
        hidden_size=HIDDEN,
        expert_ffn_hidden_size=SIZE,
        routed_scaling_factor=1.5,
    )
    block = ours(
        "softmax_topk",
        num_experts_per_tok=4,
        norm_topk_prob=False,
        num_copy_experts=3,
        routed_scaling_factor=1.5,
        use_expert_bias=True,
        router_dtype="float32",
    )
    return block, native(LongcatBlock, config), {"gate.weight": "router.classifier.weight", "gate.e_": "router.e_"}


PAIRS = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "deepseek_v2": lambda: deepseek_v2("greedy"),
    "deepseek_v2, groups": lambda: deepseek_v2("group_limited_greedy"),
    "deepseek_v3": deepseek_v3,
    "llama4": lambda: llama4(1),
    "llama4, top-2": lambda: llama4(2),
    "longcat_flash": longcat,
}


def hidden(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("pair", PAIRS)
def test_block_and_gradients_are_the_native_ones(pair):
    block, expected, renamed = PAIRS[pair]()
    values = {rename(name, renamed): tensor for name, tensor in block.state_dict().items()}
    transposed = pair.startswith("llama4")
    if transposed:
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            values[name] = values[name].transpose(1, 2)
    expected.load_state_dict(values)
    inputs = [hidden().requires_grad_() for _ in range(2)]
    outputs = [block.train()(inputs[0]), expected.train()(inputs[1])]
    assert_close(outputs[0], outputs[1], 1e-5)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(6))
    for output in outputs:
        (output * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-5)
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in block.named_parameters():
        gradient = gradients[rename(name, renamed)]
        is_experts = transposed and name.startswith("experts")
        assert_close(parameter.grad, gradient.transpose(1, 2) if is_experts else gradient, 1e-5)


def rename(name: str, renamed: dict[str, str]) -> str:
    for ours_, theirs in renamed.items():
        name = theirs + name.removeprefix(ours_) if name.startswith(ours_) else name
    return name


def test_llama4_runs_no_row_in_vain():
    block, expected, _ = llama4(1)
    rows = []
    block.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    expected.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    block(hidden()), expected(hidden())
    assert rows == [21, 21 * NUM_EXPERTS]


@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_switch_beside_transformers(capacity):
    """Its capacity is a number of tokens of a sequence, its experts have no gate and no biases."""
    config = transformers.SwitchTransformersConfig(
        num_experts=NUM_EXPERTS, d_model=HIDDEN, d_ff=SIZE, expert_capacity=capacity, dense_act_fn="relu"
    )
    expected = SwitchTransformersSparseMLP(config).eval()  # without jitter; it drops tokens all the same
    block = ours(
        "switch",
        "gpt2",
        hidden_act="relu",
        num_experts_per_tok=1,
        capacity_factor=capacity * NUM_EXPERTS / 7,
        min_capacity=1,
        capacity_group="sequence",
    ).train()
    with torch.no_grad():
        expected.router.classifier.weight.copy_(block.gate.weight)
        block.experts.up_proj_bias.zero_(), block.experts.down_proj_bias.zero_()
        for place, expert in enumerate(expected.experts.values()):
            expert.wi.weight.copy_(block.experts.up_proj[place])
            expert.wo.weight.copy_(block.experts.down_proj[place])
    inputs = [hidden().requires_grad_() for _ in range(2)]
    outputs = [block(inputs[0]), expected(inputs[1])]
    assert_close(outputs[0], outputs[1], 1e-5)
    is_dropped_BS = (outputs[1] == 0).all(-1)
    assert torch.equal((outputs[0] == 0).all(-1), is_dropped_BS)
    assert is_dropped_BS.any() == (capacity < 7)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(6))
    for output in outputs:
        (output * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-5)
    assert_close(block.gate.weight.grad, expected.router.classifier.weight.grad, 1e-5)
    for ours_, theirs in (("up_proj", "wi"), ("down_proj", "wo")):
        gradients = [expert.get_submodule(theirs).weight.grad for expert in expected.experts.values()]
        gradients = [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
        assert_close(block.experts.get_parameter(ours_).grad, torch.stack(torch.broadcast_tensors(*gradients)), 1e-5)


@pytest.mark.parametrize("batch_prioritized", [False, True])
@pytest.mark.parametrize("before_dropping", [False, True])
@pytest.mark.parametrize("capacity", [3, 64])
def test_gshard_beside_nllb(before_dropping, batch_prioritized, capacity):
    config = transformers.NllbMoeConfig(
        num_experts=NUM_EXPERTS,
        d_model=HIDDEN,
        expert_capacity=capacity,
        normalize_router_prob_before_dropping=before_dropping,
        batch_prioritized_routing=batch_prioritized,
    )
    expected = NllbMoeTop2Router(config).train()
    block = ours(
        "gshard",
        capacity_factor=capacity * NUM_EXPERTS / (2 * 21),
        min_capacity=1,
        normalize_router_prob_before_dropping=before_dropping,
        capacity_policy="batch_prioritized" if batch_prioritized else "position",
    ).train()
    expected.classifier.weight.data.copy_(block.gate.weight)
    inputs = [hidden().requires_grad_() for _ in range(2)]
    weights_TK, index_TK = block.route(inputs[0])
    weights_TE = torch.zeros(21, NUM_EXPERTS + 1).scatter_add(1, index_TK, weights_TK)[:, :NUM_EXPERTS]
    expected_TE = expected(inputs[1].view(-1, HIDDEN))[1]
    assert torch.equal(weights_TE > 0, expected_TE > 0)
    assert_close(weights_TE, expected_TE, 1e-5)
    direction = torch.randn(21, NUM_EXPERTS, generator=torch.Generator().manual_seed(6))
    (weights_TE * direction).sum().backward(), (expected_TE * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-5)
    assert_close(block.gate.weight.grad, expected.classifier.weight.grad, 1e-5)
    assert (capacity == 64) == bool((index_TK < NUM_EXPERTS).all())


def test_modality_beside_ernie():
    config = transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe.Ernie4_5_VLMoeTextConfig(
        num_experts=NUM_EXPERTS // 2,
        moe_k=2,
        hidden_size=HIDDEN,
        moe_intermediate_size=[SIZE, SIZE],
        moe_num_shared_experts=1,
    )
    expected = native(Ernie4_5_VLMoeMoeBlock, config)
    block = ours(
        "modality",
        num_experts_per_modality=[NUM_EXPERTS // 2, NUM_EXPERTS // 2],
        shared_expert_intermediate_size=SIZE,
        router_dtype="float32",
        use_expert_bias=True,
    )
    values = block.state_dict()
    for place, modality in enumerate(("text_moe", "vision_moe")):
        rows = slice(place * NUM_EXPERTS // 2, (place + 1) * NUM_EXPERTS // 2)
        part = expected.get_submodule(modality)
        part.gate.weight.data.copy_(values["gate.weight"][rows])
        part.gate.moe_statics.e_score_correction_bias.data.copy_(values["gate.e_score_correction_bias"][None, rows])
        part.experts.gate_up_proj.data.copy_(values["experts.gate_up_proj"][rows])
        part.experts.down_proj.data.copy_(values["experts.down_proj"][rows])
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected.shared_experts.get_submodule(name).weight.data.copy_(values[f"shared_expert.{name}.weight"])
    modality_BS = torch.tensor([[0, 0, 1, 1, 2, 0, 0], [1] * 7, [0] * 7])
    inputs = [hidden().requires_grad_() for _ in range(2)]
    block.routing = RoutingContext(mm_token_type_ids=modality_BS)
    outputs = [block(inputs[0]), expected(inputs[1], modality_BS)[0]]
    assert_close(outputs[0], outputs[1], 1e-5)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(6))
    for output in outputs:
        (output * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-5)
    for place, modality in enumerate(("text_moe", "vision_moe")):
        rows = slice(place * NUM_EXPERTS // 2, (place + 1) * NUM_EXPERTS // 2)
        part = expected.get_submodule(modality)
        assert_close(block.gate.weight.grad[rows], part.gate.weight.grad, 1e-5)
        assert_close(block.experts.gate_up_proj.grad[rows], part.experts.gate_up_proj.grad, 1e-5)
        assert_close(block.experts.down_proj.grad[rows], part.experts.down_proj.grad, 1e-5)
    for name in ("gate_proj", "up_proj", "down_proj"):
        gradients = [of.get_submodule(name).weight.grad for of in (block.shared_expert, expected.shared_experts)]
        assert_close(*gradients, 1e-5)


def test_text_alone_is_a_moe_of_the_text_experts():
    block = ours("modality", num_experts_per_modality=[5, 3])
    alone = ours("softmax_topk", num_experts=5)
    values = {name: value[:5] for name, value in block.state_dict().items()}
    alone.load_state_dict(copy.deepcopy(values))
    output = block(hidden())
    assert_close(output, alone(hidden()), 1e-6)
    with torch.no_grad():
        for value in block.state_dict().values():
            value[5:] = 7.0
    assert torch.equal(block(hidden()), output), "the experts of other modalities have no part in it"
