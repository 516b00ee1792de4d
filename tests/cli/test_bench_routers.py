# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench routers` on tiny blocks: every router is there, and native blocks compute what ours do."""

import json

import pytest
import torch

from hf_moe.cli import bench_routers, router_peers
from hf_moe.cli.bench_routers import SIZES, SIZES_ON_GPU, Size, in_turns, ratio, read_size
from hf_moe.models.routers import ROUTERS


TOKENS = 24
SIZE = Size(32, 16, 8, 2, TOKENS)
TINY = ["--size", "32x16x8x2", "--tokens", str(TOKENS), "--runs", "1"]
NATIVE = {
    "gshard": "NLLB-MoE",
    "switch": "Switch Transformers",
    "softmax_topk": "Mixtral",
    "softmax_topk, not normalised": "Qwen3-MoE",
    "softmax_topk, groups": "DeepSeek-V2",
    "softmax_topk, copy experts": "LongCat-Flash",
    "sigmoid_topk": "DeepSeek-V3",
    "llama4": "Llama 4",
    "modality": "ERNIE 4.5 VL",
}


def test_every_router_is_measured(run_command):
    run = run_command("bench", "routers", *TINY, "--json")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {row["router"].partition(",")[0] for row in rows} == set(ROUTERS)
    assert [row["pass"] for row in rows] == ["forward", "backward"] * (len(rows) // 2)
    assert {row["router"]: row["native"] for row in rows if row["native"]} == NATIVE
    for row in rows:
        has_gradient = row["router"] != "hash" or row["pass"] == "forward"
        assert row["block_ms"] > 0
        assert (row["router_ms"] is not None) == (row["share"] is not None) == has_gradient
        assert (row["times_router"] is not None) == (row["native"] is not None)
        # Blocks of these have other experts, or give them something else.
        assert (row["times_block"] is None) == (row["native"] in (None, "NLLB-MoE", "Switch Transformers"))
    counted = {row["router"]: (row["rows"], row["native_rows"]) for row in rows}
    assert counted["softmax_topk"] == (2 * TOKENS, 2 * TOKENS)
    assert counted["llama4"] == (TOKENS, 8 * TOKENS)
    assert counted["soft"] == (8 * TOKENS, None)
    copies = counted["softmax_topk, copy experts"]
    assert copies[0] == copies[1] < 2 * TOKENS


def test_two_routers_are_measured(run_command):
    run = run_command(
        "bench",
        "routers",
        *TINY,
        "--router",
        "hash",
        "--router",
        "sigmoid_topk",
        "--dtype",
        "bfloat16",
        "--threads",
        1,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2 + 4 + 1, "the head, two passes of each, the machine"
    assert (
        "CPU, 1 threads, bfloat16, 1 runs; 32x16x8x2: hidden size 32, 8 experts of 16, 2 per token, 24 tokens"
        in run.stdout
    )


@pytest.mark.parametrize("name", NATIVE)
def test_blocks_that_differ_are_not_measured(name):
    case = router_peers.make_cases(SIZE)[name]
    config = router_peers.make_config(case, SIZE)
    torch.manual_seed(0)
    modality_T = torch.arange(TOKENS) % 2
    ours = router_peers.hf_moe(config, modality_T, torch.arange(TOKENS), torch.float32)
    native = case.peer(ours.block, config, modality_T)
    hidden = torch.randn(1, TOKENS, SIZE.hidden, requires_grad=True)
    router_peers.compare(ours, native, hidden)
    if native.run is not None:
        down_proj = ours.block.experts.down_proj
        down_proj.data = down_proj.data.flip(0)
        with pytest.raises(RuntimeError, match="outputs of our block"):
            router_peers.compare(ours, native, hidden)
    ours.block.gate.weight.data = ours.block.gate.weight.data.flip(0)
    with pytest.raises(RuntimeError, match=f"routing weights of our block and of {native.name}'s differ"):
        router_peers.compare(ours, native, hidden)


def test_sizes():
    assert read_size("large", None, on_gpu=False) == SIZES["large"]
    assert read_size("large", None, on_gpu=True) == SIZES_ON_GPU["large"]
    assert read_size("small", 7, on_gpu=False).tokens == 7
    assert read_size("32x16x8x2", TOKENS, on_gpu=False) == SIZE
    assert read_size("32x16x8x2", None, on_gpu=True).tokens == 16384


def test_times_of_what_has_no_gradient():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(8))
    with_gradient, without = in_turns(
        [(lambda hidden: [hidden * weight], [weight]), (lambda hidden: [hidden.detach()], [weight])], hidden, 3
    )
    assert with_gradient["forward"] > 0
    assert with_gradient["backward"] > 0
    assert without["backward"] is None
    assert ratio(without["backward"], with_gradient["backward"]) is None
    assert ratio(1.0, 4.0) == 0.25
    assert hidden.grad is None


def test_long_passes_are_measured_once(monkeypatch):
    monkeypatch.setattr(bench_routers, "LIMIT", 0)
    passes = []
    in_turns([(lambda hidden: passes.append(1) or [hidden], [])], torch.ones(1, requires_grad=True), 9)
    assert len(passes) == bench_routers.WARM_UP + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--router", "best"], "no router 'best'. Choose from soft"),
        (["--size", "huge"], "no size 'huge'. Choose from small, large"),
        (["--size", "1x2x3"], "no size '1x2x3'"),
        (["--size", "1x2xax4"], "no size '1x2xax4'"),
        (["--device", "cuda"], "there is none here"),
        (["--dtype", "int8"], "Choose float32 or bfloat16"),
    ],
)
def test_what_is_refused(run_command, arguments, message):
    run = run_command("bench", "routers", *arguments)
    assert run.returncode == 1
    assert message in run.stderr
