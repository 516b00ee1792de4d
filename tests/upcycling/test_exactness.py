# SPDX-License-Identifier: Apache-2.0
"""Every method, normalisation, family and data type against the exactness matrix, beside the dense transformers class."""

import functools
from contextlib import ExitStack

import pytest
import torch
from conftest import FAMILIES, UNGATED_FAMILIES, cast, dense_model
from exactness_matrix import CASES, ROUTERS
from guide_tables import TABLES, place

from hf_moe import UpcycleConfig, plan_upcycle, upcycle_model
from hf_moe.upcycling import families


INTERMEDIATE = 384


@functools.cache
def dense_and_blocks(family: str, dtype: torch.dtype):
    """A dense model with weights of one type, and what went into and came out of each feed-forward in float32."""
    head, values = DEFAULT_HEADS.get(family, "ForCausalLM"), ACTIVATIONS.get(family, {})
    size = "n_inner" if family == "gpt2" else "intermediate_size"
    dense = dense_model(family, head, **{size: INTERMEDIATE, **values})
    with_unit_pre_activations(dense)
    dense = cast(dense, dtype)
    computed = type(dense)(dense.config).eval()
    computed.load_state_dict({name: tensor.float() for name, tensor in dense.state_dict().items()})
    return dense, run(computed)


def run(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each layer's feed-forward."""
    entry, seen = families.FAMILIES[model.config.model_type], []
    with ExitStack() as stack:
        for layer in model.base_model.get_submodule(entry.layers):
            inputs = []
            up, down = (layer.get_submodule(name) for name in (entry.feed_forward.up, entry.feed_forward.down))
            hook = up.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
            stack.callback(hook.remove)
            hook = down.register_forward_hook(lambda module, args, out, inputs=inputs: seen.append((inputs[0], out)))
            stack.callback(hook.remove)
        with torch.no_grad():
            model(**sample(model.config))
    return seen


@torch.no_grad()
def with_unit_pre_activations(dense) -> None:
    """Scale what goes into the activation to a standard deviation of 1, as in the matrix's own measurements."""
    entry = families.FAMILIES[dense.config.model_type]
    for layer, (inputs, _) in zip(dense.base_model.get_submodule(entry.layers), run(dense), strict=True):
        feed_forward = entry.feed_forward.read("", layer.state_dict())
        rows = feed_forward.up_proj if feed_forward.gate_proj is None else feed_forward.gate_proj
        rows /= (inputs @ rows.T).std()


def sample(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if hasattr(config, "image_size"):
        size = config.image_size
        return {"pixel_values": torch.randn(16, config.num_channels, size, size, generator=generator)}
    return {"input_ids": torch.randint(3, config.vocab_size, (4, 64), generator=generator)}


DEFAULT_HEADS = {"bert": "Model", "vit": "Model"}
# The matrix's numbers for gated feed-forwards are those of SiLU.
ACTIVATIONS = dict.fromkeys(("gemma2", "gemma3_text"), {"hidden_activation": "silu"})


def sparse_output(layer, target, block_input: torch.Tensor) -> torch.Tensor:
    """What a sparse block gives, and a shared expert that the class keeps beside it."""
    output = layer.get_submodule(target.block)(block_input)
    if target.shared_expert is not None:
        module = target.shared_expert.names.up.split(".")[0]
        if module != target.block and hasattr(layer, module):
            output = output + layer.get_submodule(module)(block_input)
    return output


# With norms before, behind, and on both sides of the feed-forward, with and without gates and biases. The others differ in
# their attention, and `make test-slow` runs them.
KINDS_OF_FAMILIES = ("llama", "olmo2", "gemma2", "granite", "gpt2", "bert", "vit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, marks=[] if family in KINDS_OF_FAMILIES else [pytest.mark.slow])
        for case in CASES
        for family in (FAMILIES if case.gated_only else [*FAMILIES, *UNGATED_FAMILIES])
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}, normalised: {value.normalised}",
)
def test_matrix(case, family, dtype):
    dense, seen = dense_and_blocks(family, dtype)
    recipe = UpcycleConfig(**{"num_experts": 8, "num_experts_per_tok": 2, **case.recipe})
    plan = plan_upcycle(dense.config, recipe)
    is_exact = case.error == 0 and (dtype == torch.float32 or case.is_exact_in_16_bits)
    assert plan.exact == is_exact
    moe = upcycle_model(dense, recipe).float()
    layers = moe.base_model.get_submodule(families.FAMILIES[dense.config.model_type].layers)
    squared_error, squared_output = 0.0, 0.0
    for layer, (block_input, expected) in zip(layers, seen, strict=True):
        with torch.no_grad():
            actual = sparse_output(layer, plan.target, block_input)
        if is_exact:
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        squared_error += (actual - expected).square().sum().item()
        squared_output += expected.square().sum().item()
    error = (squared_error / squared_output) ** 0.5
    if case.error:
        assert error == pytest.approx(case.error, rel=0.2)
    elif not is_exact:
        assert 0 < error < 0.01


@pytest.mark.parametrize(("family", "prefix"), ROUTERS.values(), ids=ROUTERS)
def test_the_matrix_covers_every_router_whose_weights_sum_to_1(family, prefix):
    for method in ("copy", "drop"):
        plan = plan_upcycle(dense_and_blocks(family, torch.float32)[0].config, UpcycleConfig(method=method))
        assert plan.architecture == f"{prefix}ForCausalLM"


@pytest.mark.parametrize("name", [name for name, (guide, _) in TABLES.items() if guide == "upcycling.md"])
def test_the_guide_prints_what_the_tests_hold(name):
    assert place(name)[1] == TABLES[name][1](), "run `python tests/guide_tables.py`"
