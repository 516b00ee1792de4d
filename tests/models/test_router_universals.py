# SPDX-License-Identifier: Apache-2.0
"""What holds for every router: each test runs over `ALL_CASES`, the routers and the options of the block."""

import copy

import pytest
import torch
import transformers
from conftest import assert_close
from router_cases import (
    ALL_CASES,
    NUM_EXPERTS,
    ROUTER_CASES,
    build_block,
    build_model,
    build_router,
    loop_over_slots,
    router_config,
    with_routing_inputs,
)

from hf_moe.models.routers import ROUTERS, MoeRouter
from hf_moe.models.routing_context import RoutingContext, Tokens


VOCABULARY = 96
DROPPING = [name for name, values in ALL_CASES.items() if "capacity_policy" in values]


def test_every_router_has_a_case():
    assert set(ROUTER_CASES) == set(ROUTERS)
    assert {values["router_type"] for values in ALL_CASES.values()} == set(ROUTERS)


def hidden(batch: int = 3, length: int = 8, seed: int = 5, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing(batch: int = 3, length: int = 8, **values) -> RoutingContext:
    """All that any router may ask for."""
    generator = torch.Generator().manual_seed(7)
    return RoutingContext(
        input_ids=torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        mm_token_type_ids=torch.randint(0, 2, (batch, length), generator=generator),
        domain_ids=torch.arange(batch) % 2,
        **values,
    )


def tokens(block, hidden_states: torch.Tensor, **values) -> Tokens:
    context = routing(*hidden_states.shape[:2], **values)
    return context.tokens(hidden_states, block.layer_index, block.needs)


def run(block, hidden_states: torch.Tensor, **values) -> torch.Tensor:
    block.routing = routing(*hidden_states.shape[:2], **values)
    return block(hidden_states)


@pytest.fixture(params=ALL_CASES)
def case(request) -> str:
    return request.param


def test_contract(case):
    config = router_config(case)
    block = build_block(config)
    gate = block.gate.to(torch.bfloat16)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    states = hidden(dtype=torch.bfloat16)
    logits_TE, weights_TK, index_TK = gate(states, tokens(block, states))
    num_choices = NUM_EXPERTS + config.num_zero_computation_experts
    assert isinstance(gate, MoeRouter)
    assert logits_TE.shape == (24, num_choices)
    assert weights_TK.shape == index_TK.shape == (24, num_choices if gate.has_variable_top_k else gate.top_k)
    assert weights_TK.dtype == torch.float32, "weights are rounded at the combine, not before"
    assert not index_TK.is_floating_point()
    assert ((index_TK >= 0) & (index_TK <= num_choices)).all()
    assert (weights_TK[index_TK == num_choices] == 0).all(), "a slot without an expert has no weight"
    for row in index_TK.tolist():
        chosen = [expert for expert in row if expert < num_choices]
        assert len(set(chosen)) == len(chosen), "no expert twice"


IN_FLOAT32 = [name for name in ALL_CASES if build_block(router_config(name)).gate.float32_logits]


@pytest.mark.parametrize("case", IN_FLOAT32)
def test_float32_under_autocast(case):
    """Neither logits nor weights are rounded where the model computes in bfloat16."""
    block = build_block(router_config(case))
    states = hidden()
    expected = block.gate(states, tokens(block, states))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = block.gate(states, tokens(block, states))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


def naive(block, hidden_states: torch.Tensor) -> torch.Tensor:
    """The block, one slot of one token after the other."""
    known = tokens(block, hidden_states)
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE, weights_TK, index_TK = block.gate(hidden_TH, known)
    if block.capacity is not None:
        weights_TK, index_TK = block.capacity(logits_TE, weights_TK, index_TK, known)
    if block.divides_after_dropping:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    slots = [zip(row.tolist(), weights_K, strict=True) for row, weights_K in zip(index_TK, weights_TK, strict=True)]
    return loop_over_slots(block, hidden_TH, slots).view(hidden_states.shape)


def in_float64(block) -> torch.nn.Module:
    block.experts.config._experts_implementation = "eager"
    return block.double()


def is_deterministic_in_training(case: str) -> bool:
    return ROUTERS[ALL_CASES[case]["router_type"]].contract.training_differs == "no"


def test_output_and_gradients_are_those_of_a_loop_over_tokens(case):
    block = in_float64(build_block(router_config(case)))
    block.train(case in DROPPING)  # where it drops tokens
    expected_block = copy.deepcopy(block)
    inputs = [hidden(dtype=torch.float64).requires_grad_() for _ in range(2)]
    outputs = [run(block, inputs[0]), naive(expected_block, inputs[1])]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6 * outputs[1].abs().max()
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(6))
    for output in outputs:
        (output * direction).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, 1e-6)
    for (name, parameter), expected in zip(block.named_parameters(), expected_block.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, expected.grad, 1e-6)


def test_the_choice_learns(case, batch):
    """Every parameter gets a gradient, as DDP wants it, and the routers' are not zero."""
    made = build_model(case).train()
    made(**with_routing_inputs(batch, made)).logits.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert ".gate." not in name or parameter.grad.abs().max() > 0, name


# At K = E: what the weights are then, from the logits that a router returns.
ALL_CHOSEN = {
    "soft": {},
    "noisy_topk": {"num_experts_per_tok": 8},
    "hierarchical_noisy_topk": {"num_experts_per_tok": 8, "topk_group": 4},
    "softmax_topk": {"num_experts_per_tok": 8, "norm_topk_prob": False},
    "attention": {"num_experts_per_tok": 8},
    "normalized_logits": {"num_experts_per_tok": 8},
    "expert_choice": {"num_experts_per_tok": 8},
    "top_p": {"router_top_p": 1.0},
    "grouped": {"num_experts_per_tok": 8},
    "hierarchical": {"num_experts_per_tok": 8, "topk_group": 4},
    "prototypes": {"num_experts_per_tok": 8},
    "a selection bias": {"num_experts_per_tok": 8},
    "zero-computation experts": {"num_experts_per_tok": 12},
}
NOT_A_MIXTURE = {
    "gshard": "two experts",
    "switch": "one expert",
    "sigmoid_topk": "sigmoid scores",
    "llama4": "weights on the input",
    "relu": "weights that are the logits",
    "hash": "no scores",
    "modality": "the experts of one modality",
}


def test_every_router_is_a_mixture_or_none():
    assert set(ROUTER_CASES) == (set(ALL_CHOSEN) & set(ROUTER_CASES)) | set(NOT_A_MIXTURE)
    assert not set(ALL_CHOSEN) & set(NOT_A_MIXTURE)


@pytest.mark.parametrize("name", ALL_CHOSEN)
def test_with_all_experts_chosen_it_is_the_soft_mixture(name):
    config = router_config(name, **ALL_CHOSEN[name])
    zero = {
        field: getattr(config, field) for field in ("num_constant_experts", "num_copy_experts", "num_zero_experts")
    }
    block = in_float64(build_block(config))
    soft = in_float64(build_block(router_config("soft", num_experts_per_tok=NUM_EXPERTS + sum(zero.values()), **zero)))
    soft.experts.load_state_dict(block.experts.state_dict())
    if block.zero_experts is not None:
        soft.zero_experts.load_state_dict(block.zero_experts.state_dict())
    states = hidden(dtype=torch.float64)
    if name == "grouped":
        block.gate.router_scale.data.fill_(1.0)
    logits_TE, weights_TK, index_TK = block.gate(states.view(-1, 32), tokens(block, states))
    soft.gate.compute_logits = lambda hidden_states, known: logits_TE
    factor = 8 if name == "prototypes" else 1  # of which each has one expert, with weight 1
    assert_close(block(states), factor * soft(states), 1e-6)


def flipped(block, config):
    """The same block with its experts in the opposite order, groups and modalities among themselves."""
    other = copy.deepcopy(block)
    parts = config.num_experts_per_modality or [NUM_EXPERTS]
    order_E = torch.cat([torch.arange(NUM_EXPERTS).split(parts)[place].flip(0) for place in range(len(parts))])
    with_others_E = torch.cat([order_E, torch.arange(NUM_EXPERTS, block.gate.num_experts)])
    with torch.no_grad():
        for tensor in other.experts.parameters():
            tensor.copy_(tensor[order_E])
        for name, tensor in [*other.gate.named_parameters(), *other.gate.named_buffers()]:
            if name == "residual_weight":
                tensor.copy_(tensor[with_others_E][:, with_others_E])
            elif name.startswith("group_"):
                tensor.copy_(tensor.flip(0))
            elif name == "expert_of_token":
                tensor.copy_(NUM_EXPERTS - 1 - tensor)
            else:
                tensor.copy_(tensor[with_others_E])
    return other


def test_permuting_experts_permutes_the_choice_and_not_the_output(case):
    config = router_config(case)
    block = in_float64(build_block(config))
    block.train(case in DROPPING)
    other = flipped(block, config)
    states = hidden(dtype=torch.float64)
    assert_close(run(other, states), run(block, states), 1e-6)
    ours = block.gate(states, tokens(block, states))
    theirs = other.gate(states, tokens(block, states))
    assert case == "soft" or not torch.equal(ours[2], theirs[2])
    assert_close(theirs[0].sort(-1).values.clamp(min=-1e9), ours[0].sort(-1).values.clamp(min=-1e9), 1e-6)


TRAINING_DIFFERS = {
    "noisy_topk": {},
    "hierarchical_noisy_topk": {},
    "gshard": {"second_expert_policy": "random"},
    "switch": {"router_jitter_noise": 0.5},
    **{name: {} for name in DROPPING},
}


def test_training_differs_only_where_the_contract_says_so(case):
    """And dropout and jitter of the block, which are off by default."""
    block = build_block(router_config(case, **TRAINING_DIFFERS.get(case, {})))
    states = hidden()
    evaluated, again = run(block.eval(), states), run(block.eval(), states)
    assert torch.equal(evaluated, again)
    torch.manual_seed(0)
    is_same = torch.equal(run(block.train(), states), evaluated)
    assert is_same == (case not in TRAINING_DIFFERS)
    if case in ROUTER_CASES:
        assert is_same == is_deterministic_in_training(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_and_loaded_bit_by_bit(case, dtype, tmp_path, batch):
    made = build_model(case)
    made.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    loaded.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=dtype)
    values, others = loaded.state_dict(), again.state_dict()
    assert values.keys() == others.keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        is_master = name.endswith("e_score_correction_bias") or not value.is_floating_point()
        expected = value if is_master else value.to(dtype)
        assert torch.equal(values[name], expected), name
        assert values[name].dtype == expected.dtype, name
        assert torch.equal(others[name], expected), name
    if dtype == torch.float32:
        given = with_routing_inputs(batch, made)
        # Where a tensor lies in memory can decide about the last bit of a product.
        assert_close(loaded(**given).logits, made(**given).logits, 1e-6)
        assert_close(again(**given).logits, made(**given).logits, 1e-6)


@pytest.mark.parametrize("is_training", [False, True])
def test_padding_influences_nothing(case, is_training, batch):
    """Neither what stands in it nor that it is there, in outputs and in the balance loss."""
    made = build_model(case).train(is_training)
    is_token = batch["attention_mask"].bool()
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(~is_token, 77)}

    def run_model(given):
        torch.manual_seed(0)
        return made(**with_routing_inputs(given, made), output_router_logits=True)

    first, second = run_model(batch), run_model(other)
    assert_close(second.logits[is_token], first.logits[is_token], 1e-6)
    assert_close(second.aux_loss, first.aux_loss, 1e-6)
    if is_training and not is_deterministic_in_training(case) and case not in ("gshard", "switch"):
        return  # the noise of a shorter batch is another one
    alone = {name: value[:1, 3:] for name, value in batch.items()}
    rows = {name: value[:1] for name, value in batch.items()}
    padded, short = run_model(rows), run_model(alone)
    assert_close(padded.logits[:, 3:], short.logits, 1e-5)
    assert_close(padded.aux_loss, short.aux_loss, 1e-5)


def test_an_all_padding_row_and_a_single_token(case, batch):
    made = build_model(case).train()
    batch["attention_mask"][0] = 0
    output = made(**with_routing_inputs(batch, made), output_router_logits=True)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert output.loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.parameters())
    one = {name: value[1:, -1:] for name, value in batch.items()}
    assert made.eval()(**with_routing_inputs(one, made)).logits.isfinite().all()


def test_nothing_but_padding(case):
    made = build_model(case).train()
    ids = torch.zeros(2, 5, dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    output = made(**with_routing_inputs(given, made), output_router_logits=True)
    assert output.logits.isfinite().all()
    assert output.aux_loss.isfinite() or made.config.uses_mixtral_balance_loss  # that is transformers' own
    output.logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.parameters())


def test_an_expert_without_a_token(case):
    """More experts than a single token can get."""
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        config = router_config(case)
        config._experts_implementation = implementation
        block = build_block(config)
        states = hidden(1, 1).requires_grad_()
        output = run(block, states)
        output.sum().backward()
        assert output.isfinite().all()
        assert states.grad.isfinite().all()
        assert_close(output, naive(block, states), 1e-5)


def test_experts_implementations_agree(case, batch):
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        made = build_model(case)
        made.set_experts_implementation(implementation)
        made.train(case in DROPPING)
        output = made(**with_routing_inputs(batch, made))
        output.loss.backward()
        results.append((output.logits, {name: parameter.grad for name, parameter in made.named_parameters()}))
    for logits, gradients in results[1:]:
        assert_close(logits, results[0][0])
        for name, gradient in gradients.items():
            assert (gradient is None) == (results[0][1][name] is None)
            if gradient is not None:
                assert_close(gradient, results[0][1][name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(case, use_reentrant, batch):
    gradients = []
    for checkpointing in (False, True):
        made = build_model(case).train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        output = made(**with_routing_inputs(batch, made))
        if checkpointing and use_reentrant and made.config.router_residual:
            with pytest.raises(ValueError, match="use_reentrant"):
                output.loss.backward()
            return
        output.loss.backward()
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-5)


def test_the_balance_loss_is_in_the_loss(case, batch):
    made = build_model(case, router_aux_loss_coef=0.5).train()
    if not made.config.router_class.has_balance_loss:
        assert made(**with_routing_inputs(batch, made), output_router_logits=True).aux_loss == 0
        return
    with_balance = made(**with_routing_inputs(batch, made), output_router_logits=True)
    assert len(with_balance.router_logits) == 3
    of_language = made.loss_function(with_balance.logits, batch["labels"], vocab_size=VOCABULARY)
    assert_close(with_balance.loss, of_language + 0.5 * with_balance.aux_loss, 1e-5)
    with_balance.aux_loss.backward()
    assert all(gate.weight.grad.abs().max() > 0 for name, gate in made.named_modules() if isinstance(gate, MoeRouter))


# Those that choose a fixed number of experts and drop nothing.
COMPILED = [
    name
    for name, values in ALL_CASES.items()
    if not ROUTERS[values["router_type"]].has_variable_top_k
    and values["router_type"] not in ("gshard", "switch")
    and not {"capacity_policy", "num_copy_experts"} & set(values)
]


@pytest.mark.parametrize("case", [*COMPILED, "a gating residual"])
def test_compiled_blocks(case):
    """Without a break, forward and backward."""
    config = router_config(case) if case in COMPILED else router_config("softmax_topk", router_residual=True)
    config._experts_implementation = "batched_mm"
    block = build_block(config)
    before_TE = hidden()[..., :NUM_EXPERTS].reshape(-1, NUM_EXPERTS)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        block.zero_grad()
        states = hidden().requires_grad_()
        if block.needs:
            block.routing = routing()
            block.routing.keep_logits(0, before_TE)
        output = function(states)
        output.square().sum().backward()
        results.append([output, states.grad, *(parameter.grad for parameter in block.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected, 1e-5)


# What surrounds the blocks is the same for routers that need the same of their tokens.
IN_MODELS = ["softmax_topk", "hash", "modality"]


@pytest.mark.parametrize(
    "name", [*IN_MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED if name not in IN_MODELS)]
)
def test_compiled_models(name, batch):
    options = {"router_residual": True} if name == "softmax_topk" else {}
    made = build_model(name, num_hidden_layers=2, **options)
    given = with_routing_inputs(batch, made)
    expected = made(**given).logits
    made.set_experts_implementation("batched_mm")
    torch.compiler.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_close(compiled(**given).logits, expected, 1e-5)


# A router that sees later tokens cannot, and is refused in causal models for this reason.
GENERATING = [name for name, values in ALL_CASES.items() if values["router_type"] != "expert_choice"]


@pytest.mark.parametrize("case", GENERATING)
def test_generation_with_a_cache_is_a_full_pass(case, batch):
    made = build_model(case)
    given = with_routing_inputs(batch, made)
    given.pop("labels"), given.pop("position_ids")
    ids = made.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, ids.shape[1] - 11), value=1)
    whole = {"input_ids": ids, "attention_mask": mask}
    whole = with_routing_inputs(whole, made)
    if made.config.num_experts_per_modality:
        whole["mm_token_type_ids"][:, 11:] = 0  # what is generated is text
    logits = made(**whole).logits
    for step in range(11, ids.shape[1]):
        is_going_on = ~(ids[:, 11:step] == 2).any(-1)
        assert torch.equal(logits[:, step - 1].argmax(-1)[is_going_on], ids[:, step][is_going_on])


def test_a_static_cache_gives_the_same(case, batch):
    """Where padding decides about nothing; else it is refused."""
    made = build_model(case)
    given = with_routing_inputs(batch, made)
    given.pop("labels"), given.pop("position_ids")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    static = {"cache_implementation": "static", "disable_compile": True}
    if ALL_CASES[case]["router_type"] == "expert_choice":
        with pytest.raises(ValueError, match="static cache makes masks of another shape"):
            made.generate(**given, **options, **static)
        return
    assert torch.equal(made.generate(**given, **options, **static), made.generate(**given, **options))


def test_router_alone_needs_no_block(case):
    """With the arguments of a router of transformers, where it asks for nothing else."""
    config = router_config(case)
    if config.routing_needs & {"input_ids_T"}:
        with pytest.raises(ValueError, match="input_ids"):
            build_router(config)(hidden())
        return
    logits_TE, weights_TK, index_TK = build_router(config)(hidden())
    assert len(logits_TE) == len(weights_TK) == len(index_TK) == 24


def test_models_are_copied_and_pickled(tmp_path, batch):
    """Their layers have a class of their own, which has no name to be found by."""
    made = build_model("capacity by position")
    expected = made(**with_routing_inputs(batch, made)).logits
    torch.save(made, tmp_path / "model.pt")
    for other in (copy.deepcopy(made), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(**with_routing_inputs(batch, other)).logits, expected)
        assert type(other.model.layers[0]) is type(made.model.layers[0])
        assert other.model.layers[0].mlp.capacity is not made.model.layers[0].mlp.capacity
