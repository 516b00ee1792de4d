# SPDX-License-Identifier: Apache-2.0
"""Each router beside closed forms and loops; what all have in common is in `test_router_universals.py`."""

import guide_tables
import pytest
import torch
import transformers
from conftest import assert_close, moe_config, moe_model
from router_cases import build_block, build_router, router_config

from hf_moe import MoeBertModel
from hf_moe.models import losses
from hf_moe.models.routers import ROUTERS, MoeRouter
from hf_moe.models.routers_fixed import draw_expert_table
from hf_moe.models.routing_context import RoutingContext, Tokens


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_topk_in_closed_form(norm_topk_prob):
    router = ROUTERS["softmax_topk"](moe_config("llama", norm_topk_prob=norm_topk_prob), 4)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    hidden_states = torch.zeros(1, 32)
    hidden_states[0, 0] = 1.0
    _, weights, index = router(hidden_states)
    assert index.tolist() == [[3, 2]]
    exponentials = torch.exp(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    expected = exponentials[[3, 2]] / (exponentials[[3, 2]].sum() if norm_topk_prob else exponentials.sum())
    torch.testing.assert_close(weights[0], expected)


def test_all_experts_chosen_is_the_soft_mixture():
    router = ROUTERS["softmax_topk"](moe_config("llama", num_experts_per_tok=4, norm_topk_prob=False), 4)
    torch.nn.init.normal_(router.weight)
    hidden_states = torch.randn(6, 32)
    logits, weights, index = router(hidden_states)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, index))


def test_the_bias_chooses_and_does_not_weigh():
    """Beside DeepSeek-V3's way to choose, with softmax for sigmoid and no groups."""
    config = moe_config("llama", use_expert_bias=True, norm_topk_prob=False)
    router = ROUTERS["softmax_topk"](config, 4)
    torch.nn.init.normal_(router.weight)
    hidden_states = torch.randn(50, 32)
    router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    logits, weights, index = router(hidden_states)
    scores = logits.softmax(-1)
    for token in range(50):
        expected = sorted(
            range(4), key=lambda expert: -(scores[token, expert] + router.e_score_correction_bias[expert])
        )[:2]
        assert index[token].tolist() == expected
        torch.testing.assert_close(weights[token], scores[token, expected])


def test_a_bias_of_zero_changes_nothing_and_is_saved_in_float32(tmp_path, batch):
    plain = moe_model("llama")
    plain.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", use_expert_bias=True, dtype=torch.bfloat16
    )
    gates = [module for module in loaded.modules() if isinstance(module, MoeRouter)]
    assert {gate.e_score_correction_bias.dtype for gate in gates} == {torch.float32}
    assert not any(gate.e_score_correction_bias.any() for gate in gates)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(loaded(**batch).logits, expected(**batch).logits)
    gates[0].e_score_correction_bias.fill_(0.123)
    loaded.save_pretrained(tmp_path / "biased")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "biased", dtype=torch.bfloat16)
    assert torch.equal(
        next(m for m in again.modules() if isinstance(m, MoeRouter)).e_score_correction_bias,
        gates[0].e_score_correction_bias,
    )


def hidden(num_tokens: int = 40, seed: int = 5) -> torch.Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


# --- Jacobs et al. 1991 ----------------------------------------------------------------------------------------------


def test_the_soft_mixture_in_closed_form():
    """y = sum_i softmax(W x)_i E_i(x), one token and expert after the other."""
    block = build_block(router_config("soft"))
    states = hidden(6)
    output_TH = block(states[None])[0]
    for x_H, y_H in zip(states, output_TH, strict=True):
        score_E = torch.exp(block.gate.weight @ x_H)
        expected = torch.zeros(32)
        for expert in range(8):
            gate_I, up_I = (block.experts.gate_up_proj[expert] @ x_H).chunk(2)
            hidden_I = torch.nn.functional.silu(gate_I) * up_I
            expected = expected + score_E[expert] / score_E.sum() * (block.experts.down_proj[expert] @ hidden_I)
        assert_close(y_H, expected, 1e-5)


# --- Grok-1 ----------------------------------------------------------------------------------------------------------


def test_a_router_of_zeros_gives_every_expert_an_eighth():
    """Grok-1 does not divide the two weights by their sum."""
    router = build_router(router_config("softmax_topk", norm_topk_prob=False, router_dtype="float32"))
    with torch.no_grad():
        router.weight.zero_()
    assert (router(hidden())[1] == 1 / 8).all()


# --- Skywork ---------------------------------------------------------------------------------------------------------


def test_normalized_logits_are_invariant_and_have_their_scale():
    """Equation 6: shifted and stretched logits give the same scores, and the logits' deviation is lambda."""
    router = build_router(router_config("normalized_logits", router_logit_scale=2.0))
    logits_TE, weights_TK, index_TK = router(hidden())
    assert_close(logits_TE.std(-1), torch.full((40,), 2.0), 1e-6)
    assert logits_TE.mean(-1).abs().max() < 1e-6
    linear = router.linear
    router.linear = lambda states, weight: 3.7 * linear(states, weight) + 11
    again = router(hidden())
    assert torch.equal(again[2], index_TK)
    assert_close(again[1], weights_TK, 1e-5)


def test_a_larger_scale_lets_the_best_expert_stand_out():
    gaps = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        router = build_router(router_config("normalized_logits", router_logit_scale=scale, norm_topk_prob=False))
        weights_TK = router(hidden())[1]
        gaps.append((weights_TK[:, 0] / weights_TK[:, 1]).mean())
    assert gaps == sorted(gaps)


def test_equal_logits_are_not_divided_by_zero():
    """Nor do they get a gradient that is out of all proportion."""
    router = build_router(router_config("normalized_logits", norm_topk_prob=False))
    norms = []
    for scale in (1.0, 0.0):
        router.weight.grad = None
        with torch.no_grad():
            router.weight.mul_(scale)
        outputs = router(hidden())
        assert all(tensor.isfinite().all() for tensor in outputs)
        outputs[1][:, 0].sum().backward()
        norms.append(router.weight.grad.norm())
    assert norms[1] < 10 * norms[0]


# --- Top-p -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.4, 0.9])
def test_top_p_takes_the_smallest_prefix_that_exceeds_it(top_p):
    router = build_router(router_config("top_p", router_top_p=top_p))
    logits_TE, _, index_TE = router(hidden())
    for scores_E, index_E in zip(logits_TE.softmax(-1), index_TE.tolist(), strict=True):
        chosen = [expert for expert in index_E if expert < 8]
        order = scores_E.argsort(descending=True).tolist()
        assert chosen == order[: len(chosen)]
        assert scores_E[chosen].sum() > top_p
        assert not chosen[:-1] or scores_E[chosen[:-1]].sum() <= top_p
    assert top_p > 0 or ((index_TE < 8).sum(-1) == 1).all(), "p = 0 is top-1"


# --- Groups ----------------------------------------------------------------------------------------------------------


def test_a_single_prototype_is_switch():
    prototypes = build_router(router_config("prototypes", num_experts_per_tok=1))
    switch = build_router(router_config("switch"))
    switch.load_state_dict(prototypes.state_dict())
    ours, theirs = prototypes(hidden()), switch(hidden())
    assert torch.equal(ours[2], theirs[2])
    assert_close(ours[1], theirs[1], 1e-6)


def test_prototypes_are_separate_top_1_routers():
    router = build_router(router_config("prototypes", num_experts_per_tok=4))
    _, weights_TK, index_TK = router(hidden())
    for place in range(4):
        scores_TM = (hidden() @ router.weight[2 * place : 2 * place + 2].T).softmax(-1)
        weight_T, index_T = scores_TM.max(-1)
        assert torch.equal(index_TK[:, place], index_T + 2 * place)
        assert_close(weights_TK[:, place], weight_T, 1e-6)


@pytest.mark.parametrize("use_expert_bias", [False, True])
def test_every_group_of_moge_has_the_same_load(use_expert_bias):
    """Pangu's imbalance score is exactly 0, whatever the tokens are."""
    router = build_router(router_config("grouped", n_group=4, num_experts_per_tok=4, use_expert_bias=use_expert_bias))
    index_TK = router(hidden() + 3.0)[2]
    load_G = torch.bincount((index_TK // 2).flatten(), minlength=4)
    assert (load_G.max() - load_G.min()) / len(index_TK) == 0


@pytest.mark.parametrize(("topk_group", "norm_topk_prob"), [(1, False), (2, False), (2, True)])
def test_hierarchical_beside_a_loop_and_both_stages_learn(topk_group, norm_topk_prob):
    router = build_router(
        router_config("hierarchical", n_group=4, topk_group=topk_group, norm_topk_prob=norm_topk_prob)
    )
    _, weights_TK, index_TK = router(hidden())
    for x_H, weights_K, index_K in zip(hidden(), weights_TK, index_TK.tolist(), strict=True):
        group_G = (router.group_weight @ x_H).softmax(-1)
        expected = {}
        for group in group_G.topk(topk_group).indices.tolist():
            rows = slice(2 * group, 2 * group + 2)
            in_group_M = (router.weight[rows] @ x_H).softmax(-1)
            for place in in_group_M.topk(2 // topk_group).indices.tolist():
                expected[2 * group + place] = group_G[group] * in_group_M[place]
        total = sum(expected.values()) if norm_topk_prob else 1.0
        assert set(index_K) == set(expected)
        for weight, expert in zip(weights_K, index_K, strict=True):
            assert_close(weight, expected[expert] / total, 1e-5)
    weights_TK.square().sum().backward()
    assert router.group_weight.grad.abs().max() > 1e-4
    assert router.weight.grad.abs().max() > 1e-4


def test_a_single_group_must_keep_its_probability():
    with pytest.raises(Exception, match="norm_topk_prob=False"):
        router_config("hierarchical", norm_topk_prob=True)


def test_hierarchical_noisy_topk_beside_a_loop():
    router = build_router(router_config("hierarchical_noisy_topk"))
    _, weights_TK, index_TK = router(hidden())
    for x_H, weights_K, index_K in zip(hidden(), weights_TK, index_TK.tolist(), strict=True):
        group_G = router.group_weight @ x_H
        best = group_G.topk(2)
        expected = {}
        for group, of_group in zip(best.indices.tolist(), best.values.softmax(-1), strict=True):
            in_group_M = (router.weight[2 * group : 2 * group + 2] @ x_H).softmax(-1)
            expected |= {2 * group + place: of_group * in_group_M[place] for place in range(2)}
        assert set(index_K) == set(expected)
        for weight, expert in zip(weights_K, index_K, strict=True):
            assert_close(weight, expected[expert], 1e-5)


def test_hierarchical_load_is_that_of_the_groups_times_that_inside():
    """Where a group's experts are as good, in the closed form of the groups alone."""
    router = build_router(router_config("hierarchical_noisy_topk", topk_group=1, num_experts_per_tok=1)).train()
    with torch.no_grad():
        router.weight.zero_(), router.noise_weight.zero_()
    states = hidden(20000) + 0.5
    torch.manual_seed(0)
    loss = router.smooth_load_loss(states, states, None)
    torch.manual_seed(0)
    clean_TG = states @ router.group_weight.T
    std_TG = router.noise_std(states, router.group_noise_weight)
    noisy_TG = clean_TG + torch.randn_like(clean_TG) * std_TG
    expected = losses.load_loss(clean_TG, 1, std_TG, noisy_logits_TE=noisy_TG)
    assert expected > 0.01
    assert_close(loss, expected, 0.05)


# --- Noise -----------------------------------------------------------------------------------------------------------


def test_noise_starts_even_and_reaches_every_expert():
    """Weights of 0, as in the paper: evaluation would tie, and the noise of training spreads the tokens."""
    config = router_config("noisy_topk")
    router = ROUTERS["noisy_topk"](config, 8)
    router.init_weights(0.02)
    torch.manual_seed(0)
    index_TK = router.train()(hidden(4000))[2]
    share_E = torch.bincount(index_TK.flatten(), minlength=8) / index_TK.numel()
    assert (share_E - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_the_second_expert_of_gshard(policy):
    router = build_router(router_config("gshard", second_expert_policy=policy))
    states = hidden(1).expand(20000, 32)
    scores_E = router(states[:1])[0].softmax(-1)[0]
    first, second = scores_E.topk(2).indices.tolist()
    torch.manual_seed(0)
    index_TK = router.train()(states)[2]
    assert (index_TK[:, 0] == first).all()
    if policy == "random":
        kept = (index_TK[:, 1] == second).float().mean()
        assert kept == pytest.approx(float((2 * scores_E[second]).clamp(max=1)), abs=0.02)
        assert ((index_TK[:, 1] == second) | (index_TK[:, 1] == 8)).all()
    else:
        share_E = torch.bincount(index_TK[:, 1], minlength=8) / len(index_TK)
        expected_E = scores_E.clone()
        expected_E[first] = 0
        assert_close(share_E, expected_E / expected_E.sum(), 0.05)


@pytest.mark.parametrize("before_dropping", [False, True])
def test_gshard_without_a_capacity_is_mixtrals_router(before_dropping):
    """Top-2 of a softmax, divided by the sum of the two, whenever that is done."""
    values = {"capacity_policy": "none", "normalize_router_prob_before_dropping": before_dropping}
    block = build_block(router_config("gshard", **values))
    mixtral = build_block(router_config("softmax_topk"))
    mixtral.load_state_dict(block.state_dict())
    assert_close(block.train()(hidden()[None]), mixtral(hidden()[None]), 1e-6)


def test_switch_starts_truncated_and_routes_in_float32():
    config = router_config("switch", hidden_size=4096, num_experts=64)
    router = ROUTERS["switch"](config, 64)
    router.init_weights(0.02)
    std = (0.1 / 4096) ** 0.5
    assert router.weight.abs().max() <= 2 * std
    assert float(router.weight.detach().std()) == pytest.approx(
        0.88 * std, rel=0.02
    )  # of a normal cut at two deviations
    states = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    router = router.bfloat16()
    expected = (states.float() @ router.weight.float().T).softmax(-1)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert_close(router(states)[1][:, 0], expected.max(-1).values, 1e-6)


def test_jitter_of_switch_leaves_the_experts_alone():
    block = build_block(router_config("switch", router_jitter_noise=0.3, capacity_policy="none")).train()
    seen = []
    block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = hidden().view(2, 20, 32)
    block(states)
    assert torch.equal(seen[0], states.view(40, 32))


# --- Expert choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["sequence", "batch", 10])
def test_expert_choice_beside_a_loop(group):
    router = build_router(router_config("expert_choice", capacity_group=group))
    mask_T = torch.ones(40, dtype=torch.bool)
    mask_T[:3] = False
    logits_TE, weights_TE, index_TE = router(hidden(), Tokens(batch_size=2, mask_T=mask_T))
    size = {"sequence": 20, "batch": 40, 10: 10}[group]
    scores_TE, expected_TE = logits_TE.softmax(-1), torch.zeros(40, 8)
    for start in range(0, 40, size):
        real = [token for token in range(start, start + size) if mask_T[token]]
        room = -(-len(real) * 2 // 8)
        for expert in range(8):
            for token in sorted(real, key=lambda token: -float(scores_TE[token, expert]))[:room]:
                expected_TE[token, expert] = scores_TE[token, expert]
    assert_close(weights_TE, expected_TE, 1e-6)
    assert torch.equal(index_TE < 8, expected_TE > 0)
    if group == "batch":
        assert set((index_TE < 8).sum(0).tolist()) == {10}, "every expert has exactly the same load"


def test_expert_choice_is_for_encoders():
    with pytest.raises(Exception, match="later tokens decide.*allow_causal_expert_choice"):
        moe_config("llama", router_type="expert_choice")
    config = moe_config("bert", router_type="expert_choice")
    assert MoeBertModel(config)(torch.tensor([[5, 6, 7]])).last_hidden_state.isfinite().all()


# --- Hash ------------------------------------------------------------------------------------------------------------


def test_the_table_is_even_and_deterministic():
    table = draw_expert_table(2, 1003, 3, 16, torch.Generator().manual_seed(1))
    assert torch.equal(table, draw_expert_table(2, 1003, 3, 16, torch.Generator().manual_seed(1)))
    assert not torch.equal(table, draw_expert_table(2, 1003, 3, 16, torch.Generator().manual_seed(2)))
    for domain in range(2):
        counts = torch.bincount(table[domain].flatten(), minlength=16)
        own = slice(8 * domain, 8 * domain + 8)
        assert counts[own].sum() == 3 * 1003
        assert counts[own].max() - counts[own].min() <= 3  # once for each of the three
    assert all(len(set(row)) == 3 for row in table.flatten(0, 1).tolist())


def test_random_token_ids_load_all_experts_alike():
    """Chi-square of 8 experts: 24.3 is exceeded by chance once in a thousand."""
    table = draw_expert_table(1, 1000, 1, 8, torch.Generator().manual_seed(1))
    ids = torch.randint(0, 1000, (20000,), generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(table[0, ids, 0], minlength=8)
    assert ((counts - 2500).square() / 2500).sum() < 24.3


def test_layers_have_tables_of_their_own():
    made = moe_model("llama", router_type="hash", num_experts=8)
    tables = [gate.expert_of_token for gate in made.modules() if isinstance(gate, MoeRouter)]
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])
    assert all(table.max() == 7 and table.min() == 0 for table in tables)


def test_domains_must_be_given():
    block = build_block(router_config("hash"))
    ids = torch.zeros(2, 5, dtype=torch.long)
    for context, message in (
        (RoutingContext(), "input_ids"),
        (RoutingContext(input_ids=ids), "domain_ids"),
        (RoutingContext(input_ids=ids, domain_ids=torch.zeros(3)), "one domain per sequence"),
    ):
        block.routing = context
        with pytest.raises(ValueError, match=message):
            block(torch.randn(2, 5, 32))


# --- Modality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router_type", ["softmax_topk", "sigmoid_topk", "llama4", "relu", "top_p", "switch", "gshard"]
)
def test_modalities_share_no_expert_whatever_the_router(router_type):
    values = {"num_experts_per_modality": [5, 3]}
    if router_type in ("softmax_topk", "sigmoid_topk", "llama4"):
        values["use_expert_bias"] = True
    router = build_router(router_config(router_type, n_group=1, topk_group=1, **values))
    modality_T = torch.arange(40) % 3  # the last one is video, which has the experts of images
    index_TK = router(hidden(), Tokens(batch_size=1, modality_T=modality_T))[2]
    for index_K, modality in zip(index_TK.tolist(), modality_T.tolist(), strict=True):
        assert all(expert == 8 or (expert < 5) == (modality == 0) for expert in index_K)


@pytest.mark.parametrize("router_type", ["llama4", "softmax_topk", "sigmoid_topk"])
def test_logits_of_zero_are_not_those_of_other_modalities(router_type):
    """A router of zeros, and a selection bias that prefers the other modality."""
    values = {"num_experts_per_modality": [5, 3], "use_expert_bias": True, "n_group": 1, "topk_group": 1}
    router = build_router(router_config(router_type, **values))
    with torch.no_grad():
        router.weight.zero_(), router.e_score_correction_bias.copy_(torch.tensor([0.0] * 5 + [9.0] * 3))
    assert (router(hidden())[2] < 5).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"router_type": "softmax_topk", "n_group": 2, "num_experts_per_modality": [4, 4]},
            "n_group` cannot go together",
        ),
        ({"router_residual": True, "num_experts_per_modality": [4, 4]}, "router_residual` cannot go together"),
        (
            {"router_type": "hash", "num_hash_domains": 4, "num_experts_per_layer": [8, 6, 8]},
            r"every layer \(6\) must be a multiple",
        ),
        (
            {"router_type": "prototypes", "num_experts_per_tok": 4, "num_experts_per_layer": [8, 6, 8]},
            r"\(6\) must be a multiple",
        ),
    ],
)
def test_configurations_that_are_refused(values, message):
    with pytest.raises(Exception, match=message):
        moe_config("llama", **{"num_experts": 8, **values})


def test_another_router_brings_its_own_capacity(tmp_path):
    """What was not chosen is not kept, when a checkpoint is loaded with another router."""
    moe_model("llama", router_type="switch", num_experts_per_tok=1).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, router_type="softmax_topk", num_experts_per_tok=2)
    assert not config.has_capacity
    assert transformers.AutoConfig.from_pretrained(tmp_path).has_capacity


@pytest.mark.parametrize(
    "values",
    [{"zero_expert_tau": 0.5}, {"capacity_group": "sequence"}, {"capacity_factor": 2.0}, {"router_top_p": 0.5}],
)
def test_options_without_effect_are_refused(values):
    with pytest.raises(Exception, match="has no effect"):
        moe_config("llama", **values)


def test_inputs_that_no_router_reads_are_refused(batch):
    with pytest.raises(ValueError, match="`domain_ids` has no effect"):
        moe_model("llama")(**batch, domain_ids=torch.zeros(2))
    for head in ("Model", "ForSequenceClassification"):
        switch = moe_model("llama", head, router_type="switch", num_experts_per_tok=1)
        with pytest.raises(ValueError, match="`domain_ids` has no effect"):
            switch(batch["input_ids"][1:], domain_ids=torch.zeros(1))
    made = moe_model("llama", router_type="modality", num_experts_per_modality=[2, 2])
    with pytest.raises(ValueError, match="mm_token_type_ids.*must be of shape"):
        made(**batch, mm_token_type_ids=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name, (guide, _) in guide_tables.TABLES.items() if guide == "routers.md"])
def test_the_guide_prints_what_the_classes_declare(name):
    assert guide_tables.place(name)[1] == guide_tables.TABLES[name][1](), "run `python tests/guide_tables.py`"


def test_contracts_say_what_the_classes_do():
    for name, router in ROUTERS.items():
        contract = router.contract
        assert (contract.balance.startswith("none")) == (not router.has_balance_loss), name
        assert ("INPUT" in contract.weight) == router.weighs_input, name
        built = build_router(router_config(name))
        has_more = {n for n, _ in built.named_parameters()} - {"weight"}
        assert all(f"`{parameter}`" in contract.state for parameter in has_more), name
