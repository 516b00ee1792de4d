# SPDX-License-Identifier: Apache-2.0
"""Routers and whole blocks beside tensors that were recorded from the public reference of each system."""

from pathlib import Path

import torch
from conftest import assert_close, moe_config
from safetensors import safe_open
from safetensors.torch import load_file

from hf_moe.models.capacity import ExpertCapacity
from hf_moe.models.routers import ROUTERS, MoeRouter
from hf_moe.models.routing_context import Tokens
from hf_moe.models.sparse_block import MoeSparseBlock


GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


def config_of(router_type: str, num_experts: int, hidden_size: int = 16, **values):
    return moe_config("llama", router_type=router_type, num_experts=num_experts, hidden_size=hidden_size, **values)


def router_of(config) -> MoeRouter:
    return ROUTERS[config.router_type](config, config.num_experts).eval()


def dense_weights(weights_TK: torch.Tensor, index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`(T, E)`"""
    dense_TE = weights_TK.new_zeros(len(weights_TK), num_experts + 1)
    return dense_TE.scatter_add(1, index_TK, weights_TK)[:, :num_experts]


@torch.no_grad()
def test_deepseek_v1():
    tensors, metadata = golden("deepseek_v1_gate")
    router = router_of(
        config_of(
            "softmax_topk", 16, norm_topk_prob=False, router_dtype="float32", num_experts_per_tok=int(metadata["topk"])
        )
    )
    router.weight.copy_(tensors["weight"])
    _, weights_TK, index_TK = router(tensors["x"])
    expected_TE = dense_weights(tensors["weights"], tensors["index"], 16)
    assert_close(dense_weights(weights_TK, index_TK, 16), expected_TE, 1e-6)


@torch.no_grad()
def test_deepseek_v3():
    tensors, metadata = golden("deepseek_v3_gate")
    router = router_of(
        config_of(
            "sigmoid_topk",
            16,
            num_experts_per_tok=int(metadata["topk"]),
            n_group=int(metadata["n_group"]),
            topk_group=int(metadata["topk_group"]),
            routed_scaling_factor=float(metadata["scale"]),
            use_expert_bias=True,
        )
    )
    router.weight.copy_(tensors["weight"])
    router.e_score_correction_bias.copy_(tensors["bias"])
    _, weights_TK, index_TK = router(tensors["x"])
    expected_TE = dense_weights(tensors["weights"], tensors["index"], 16)
    assert_close(dense_weights(weights_TK, index_TK, 16), expected_TE, 1e-6)


@torch.no_grad()
def test_noisy_topk():
    tensors, metadata = golden("shazeer_noisy")
    router = router_of(config_of("noisy_topk", 8, num_experts_per_tok=int(metadata["k"])))
    router.weight.copy_(tensors["w_gate"].T)
    router.noise_weight.copy_(tensors["w_noise"].T)
    router.train()
    torch.manual_seed(0)
    drawn = torch.randn(12, 8)
    torch.manual_seed(0)
    logits_TE = router.compute_logits(tensors["x"], None)
    std_TE = router.noise_std(tensors["x"], router.noise_weight)
    assert_close(logits_TE, tensors["x"] @ tensors["w_gate"] + drawn * std_TE, 1e-6)
    noisy_TE = tensors["x"] @ tensors["w_gate"] + tensors["noise"] * std_TE
    weights_TK, index_TK = router.choose(noisy_TE, None)
    assert torch.equal(index_TK, tensors["top_idx"])
    assert_close(weights_TK, tensors["top_w"], 1e-6)
    # Of 8 experts the recorded variance is unbiased, the paper's is the population's.
    loss = router.balance_loss(tensors["x"], noisy_TE, weights_TK, index_TK, Tokens(batch_size=1))
    assert_close(loss, tensors["loss_unbiased_var"].squeeze() * 7 / 8, 1e-6)


@torch.no_grad()
def test_attention_router():
    """Yuan 2.0-M32's whole block."""
    tensors, _ = golden("yuan_moe")
    block = float64_block(config_of("attention", 8, moe_intermediate_size=12))
    block.gate.query.copy_(tensors["w.gate.query.weight"])
    block.gate.key.copy_(tensors["w.gate.key.weight"])
    block.gate.weight.copy_(tensors["w.gate.value.weight"])
    for expert in range(8):
        block.experts.gate_up_proj[expert] = tensors[f"w.experts.{expert}.w1.weight"]
        block.experts.down_proj[expert] = tensors[f"w.experts.{expert}.w2.weight"]
    assert_close(block.gate(tensors["x"])[0], tensors["router_logits"], 1e-6)
    assert_close(block(tensors["x"]), tensors["y"], 1e-6)


@torch.no_grad()
def test_llama4():
    for name in ("llama4_moe", "llama4_moe_top2"):
        tensors, metadata = golden(name)
        block = float64_block(
            config_of(
                "llama4",
                4,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_experts_per_tok=int(metadata["top_k"]),
            )
        )
        block.gate.weight.copy_(tensors["w.router_DE"].T)
        for expert in range(4):
            gate, up = tensors["w.experts.w1"][expert].T, tensors["w.experts.w3"][expert].T
            block.experts.gate_up_proj[expert] = torch.cat([gate, up])
            block.experts.down_proj[expert] = tensors["w.experts.w2"][expert].T
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            getattr(block.shared_expert, ours).weight.copy_(tensors[f"w.shared_expert.{theirs}.weight"])
        assert (block(tensors["x"]) - tensors["y"]).abs().max() < 1e-10


@torch.no_grad()
def test_top_p():
    tensors, metadata = golden("topp_dynamic_moe")
    block = float64_block(config_of("top_p", 8, moe_intermediate_size=12, router_top_p=float(metadata["top_p"])))
    block.gate.weight.copy_(tensors["w.router.weight"])
    for expert in range(8):
        names = [f"w.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (tensors[name] for name in names)
        block.experts.gate_up_proj[expert] = torch.cat([gate, up])
        block.experts.down_proj[expert] = down
    _, weights_TE, index_TE = block.gate(tensors["x"])
    assert str((index_TE < 8).sum(-1).view(2, 5).tolist()) == metadata["active"]
    assert (weights_TE.view(2, 5, 8) - tensors["sorted_weights"]).abs().max() < 1e-10
    assert (block(tensors["x"]) - tensors["y"]).abs().max() < 1e-10


@torch.no_grad()
def test_remoe():
    tensors, metadata = golden("remoe")
    router = router_of(config_of("relu", 8, num_experts_per_tok=int(metadata["topk"])))
    weights_TE, index_TE = router.choose(tensors["logits"], None)
    assert_close(weights_TE, tensors["probs"], 1e-6)
    assert torch.equal(index_TE < 8, tensors["probs"] > 0)
    loss = router.balance_loss(tensors["logits"], tensors["logits"], weights_TE, index_TE, Tokens(batch_size=1))
    assert_close(loss, tensors["l1_reg"].squeeze(), 1e-6)


@torch.no_grad()
def test_pangu_moge():
    tensors, _ = golden("pangu_moge")
    router = router_of(config_of("grouped", 32, num_experts_per_tok=8, n_group=8))
    router.router_scale.copy_(tensors["router_scale"][0])
    weights_TK, index_TK = router.choose(tensors["logits"], None)
    expected_TE = dense_weights(tensors["weights"], tensors["index"].long(), 32)
    assert_close(dense_weights(weights_TK, index_TK, 32), expected_TE, 1e-6)


def drop(config, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(T, E)` weights after the drop, and the balance loss."""
    router = router_of(config).train()
    capacity = ExpertCapacity(config, config.num_experts, router.score, router.queues_by_choice).train()
    tokens = Tokens(batch_size=1)
    weights_TK, index_TK = router.choose(logits_TE, tokens)
    loss = router.balance_loss(logits_TE, logits_TE, weights_TK, index_TK, tokens)
    weights_TK, index_TK = capacity(logits_TE, weights_TK, index_TK, tokens)
    if router.divides_after_dropping:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    return dense_weights(weights_TK, index_TK, config.num_experts), loss


def test_gshard():
    tensors, metadata = golden("gshard_top2_det")
    config = config_of(
        "gshard", 4, capacity_factor=float(metadata["capacity_factor"]), min_capacity=int(metadata["min_capacity"])
    )
    weights_TE, loss = drop(config, tensors["logits"])
    assert_close(weights_TE, tensors["combine"].sum(-1), 1e-6)
    assert_close(loss, tensors["l_aux"].squeeze(), 1e-6)


def test_switch():
    """Which of the tokens too many were dropped is arbitrary in the reference: of an expert, the weights that are left count."""
    tensors, metadata = golden("switch_top1_det")
    config = config_of(
        "switch",
        4,
        num_experts_per_tok=1,
        capacity_factor=float(metadata["capacity_factor"]),
        min_capacity=int(metadata["min_capacity"]),
    )
    weights_TE, loss = drop(config, tensors["logits"])
    expected_TE = tensors["combine"].sum(-1)
    assert torch.equal((weights_TE > 0).sum(0), (expected_TE > 0).sum(0))
    scores_TE, first_T = tensors["logits"].softmax(-1), tensors["logits"].argmax(-1)
    assert torch.equal(first_T.bincount(minlength=4), tensors["counts"])
    for dense_TE in (weights_TE, expected_TE):
        kept_TE = dense_TE > 0
        assert_close(dense_TE[kept_TE], scores_TE[kept_TE], 1e-6)
        assert torch.equal(kept_TE.nonzero()[:, 1], first_T[kept_TE.any(-1)])
    assert_close(loss, tensors["l_aux"].squeeze(), 1e-6)


def test_drop_policies():
    """DeepSpeed's top-k divides the weights that are left by their sum."""
    for name, policy in (("topk_drop_position", "position"), ("topk_drop_probs", "probability")):
        tensors, metadata = golden(name)
        top_k, room = int(metadata["k"]), tensors["combine"].shape[-1]
        config = config_of(
            "softmax_topk",
            4,
            num_experts_per_tok=top_k,
            norm_topk_prob=False,
            capacity_policy=policy,
            capacity_factor=room * 4 / (top_k * 32),
        )
        weights_TE, _ = drop(config, tensors["logits"])
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True).clamp(min=1e-9)
        assert_close(weights_TE, tensors["combine"].sum(-1), 1e-6)


@torch.no_grad()
def test_moepp():
    """The reference's feed-forwards are `tanh(A x)`; with up and down matrices for one of ours: `I tanh(A x)`."""
    tensors, _ = golden("moepp")
    config = config_of(
        "softmax_topk",
        4,
        num_constant_experts=2,
        num_copy_experts=1,
        num_zero_experts=1,
        router_residual=True,
        moe_intermediate_size=16,
        hidden_act="tanh",
    )
    block = MoeSparseBlock(config, 4, layer_index=1).eval()
    block.experts.config._experts_implementation = "eager"
    block.experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].tanh()
    block.gate.weight.copy_(tensors["w.moe.gate.wg.weight"])
    block.gate.residual_weight.copy_(tensors["w.moe.gate.gate_map.weight"])
    experts = "w.moe.experts.experts"
    for expert in range(4):
        block.experts.gate_up_proj[expert, :16] = tensors[f"{experts}.{expert}.a.weight"]
        block.experts.down_proj[expert] = torch.eye(16)
    for place in range(2):
        block.zero_experts.constant[place] = tensors[f"{experts}.{4 + place}.constant"]
        block.zero_experts.constant_gate[place] = tensors[f"{experts}.{4 + place}.wg.weight"]
    tokens = Tokens(batch_size=2, previous_logits_TE=tensors["gate_residual"])
    hidden_TH = tensors["x"].reshape(-1, 16)
    logits_TE, weights_TK, index_TK = block.gate(hidden_TH, tokens)
    assert_close(logits_TE, tensors["logits"], 2e-6)
    assert_close(block._run_experts(hidden_TH, index_TK, weights_TK).view(2, 5, 16), tensors["y"], 2e-6)


def float64_block(config) -> MoeSparseBlock:
    block = MoeSparseBlock(config, config.num_experts).double().eval()
    block.experts.config._experts_implementation = "eager"
    return block
