# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench routers`: the time of every router, alone and in its block, beside the router of its kind in transformers."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from huggingface_hub.cli import out
from huggingface_hub.utils import tqdm


@dataclass(frozen=True)
class Size:
    """
    The size of a block.

    Args:
        hidden (`int`): Hidden size.
        intermediate (`int`): Intermediate size of one expert.
        num_experts (`int`): Number of experts.
        top_k (`int`): Experts per token.
        tokens (`int`): Tokens of a pass.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: int


# Hidden sizes of SmolLM2-135M and OLMoE-1B-7B. Experts of the latter are 1024 wide, for which a CPU takes too long.
SIZES = {"small": Size(576, 256, 16, 2, 1024), "large": Size(2048, 256, 64, 8, 512)}
SIZES_ON_GPU = {"small": Size(576, 256, 16, 2, 16384), "large": Size(2048, 1024, 64, 8, 16384)}
WARM_UP = 1  # rounds that are not counted: memory is fetched and kernels are chosen
LIMIT = 10  # seconds after which no further round begins; some native blocks take many for one
ROUTER_RUNS = 10  # rounds of the routers for each of the blocks, which take longer


def routers(
    router: Annotated[
        list[str] | None, typer.Option(help="A `router_type`. Can be given several times (default all).")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="small, large, or the hidden size, the width of an expert, experts, and experts per token, such as 1024x512x32x4. Can "
            "be given several times (default small and large)."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a pass (512 or 1024 on CPU, 16384 on GPU).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default cuda if there is one).")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of the CPU (default all). With 1 the time of the processor is measured."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default on CPU) or bfloat16 (default on GPU).")] = None,
    runs: Annotated[
        int,
        typer.Option(
            min=1, help="Passes of each block, in turns, less if they take long; of each router 10 times that."
        ),
    ] = 5,
) -> None:
    """
    Forward and backward of every router in training, alone and in its block, beside the native router of its kind.

    What counts as the router is all that comes before the experts: the gate, and the capacity where its paper has one. "share" is
    its time by that of the block, "rows" how many pairs of a token and an expert the block computes; "times_router" and
    "times_block" are our times by those of the native one. Both sides have the same weights and tokens, and it is an error if
    they do not compute the same.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda")
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and there is none here. Leave it out.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}. Choose float32 or bfloat16.")
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {name: read_size(name, tokens, on_gpu) for name in size or SIZES}
    todo = [(name, *case) for name, one in sizes.items() for case in choose_cases(one, router).items()]
    rows = []
    for size_name, name, case in tqdm(todo, desc="Routers", unit=" blocks", disable=True if out.is_quiet() else None):
        measured = measure(case, sizes[size_name], getattr(torch, dtype), device, runs)
        rows += [{"size": size_name, "router": name, **row} for row in measured]
    out.table(rows)
    machine = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    said = "; ".join(
        f"{name}: hidden size {one.hidden}, {one.num_experts} experts of {one.intermediate}, {one.top_k} per token, "
        f"{one.tokens} tokens"
        for name, one in sizes.items()
    )
    out.text(f"{machine}, {dtype}, {runs} runs; {said}")


def read_size(name: str, tokens: int | None, on_gpu: bool) -> Size:
    """A size by its name or its four numbers, with so many tokens or what is usual."""
    sizes = SIZES_ON_GPU if on_gpu else SIZES
    if name in sizes:
        return replace(sizes[name], tokens=tokens or sizes[name].tokens)
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*){3}", name):
        raise ValueError(f"There is no size {name!r}. Choose from {', '.join(SIZES)}, or give numbers: 1024x512x32x4.")
    hidden, intermediate, num_experts, top_k = map(int, name.split("x"))
    return Size(hidden, intermediate, num_experts, top_k, tokens or sizes["small"].tokens)


def choose_cases(size: Size, router_types: list[str] | None) -> dict[str, Any]:
    """The [`~router_peers.Case`] of each router, or of some."""
    from ..models.routers import ROUTERS
    from .router_peers import make_cases

    if unknown := sorted(set(router_types or []) - set(ROUTERS)):
        raise ValueError(f"There is no router {unknown[0]!r}. Choose from {', '.join(ROUTERS)}.")
    return {name: case for name, case in make_cases(size).items() if case.router_type in (router_types or ROUTERS)}


def measure(case: Any, size: Size, dtype: Any, device: str, runs: int) -> list[dict[str, Any]]:
    """Two rows, of the forward and of the backward pass."""
    import torch

    from .router_peers import compare, computed_rows, hf_moe, make_config

    torch.manual_seed(0)
    config = make_config(case, size)
    hidden = torch.randn(1, size.tokens, size.hidden, device=device).to(dtype).requires_grad_()
    modality = torch.arange(size.tokens, device=device) % 2
    ours = hf_moe(config, modality, torch.randint(config.vocab_size, (size.tokens,), device=device), dtype)
    native = None if case.peer is None else case.peer(ours.block, config, modality)
    if native is not None:
        compare(ours, native, hidden)
    sides = [ours] if native is None else [ours, native]
    routed = in_turns([side.route_step() for side in sides], hidden, ROUTER_RUNS * runs)
    ran = in_turns([side.block_step() for side in sides if side.run is not None], hidden, runs)
    rows = [computed_rows(side, hidden) for side in sides]
    measured = []
    for name in ("forward", "backward"):
        router, native_router = [*(of[name] for of in routed), None][:2]
        block, native_block = [*(of[name] for of in ran), None][:2]
        measured.append(
            {
                "pass": name,
                "router_ms": router and round(router, 3),
                "block_ms": block and round(block, 2),
                "share": ratio(router, block),
                "rows": rows[0],
                "native": native and native.name,
                "native_router_ms": native_router and round(native_router, 3),
                "times_router": ratio(router, native_router),
                "native_block_ms": native_block and round(native_block, 2),
                "times_block": ratio(block, native_block),
                "native_rows": [*rows, None][1],
            }
        )
    return measured


def ratio(ours: float | None, other: float | None) -> float | None:
    """None if there is nothing to divide."""
    return None if ours is None or other is None else round(ours / other, 3)


def in_turns(steps: list[tuple[Any, list[Any]]], hidden: Any, runs: int) -> list[dict[str, float | None]]:
    """
    What forward and backward of each step take, medians in milliseconds; the steps take turns.

    Args:
        steps: For each a function from hidden states to the tensors through which a gradient comes, and the parameters that get one.
        hidden (`torch.Tensor`): The hidden states, which get one too.
        runs (`int`): Rounds that are counted, less if they take long.
    """
    import torch

    # What else runs on the processor does not count, as far as it can be told apart.
    clock = time.perf_counter if hidden.is_cuda or torch.get_num_threads() > 1 else time.process_time

    def timed(function: Callable, *arguments: Any) -> tuple[float, Any]:
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        started = clock()
        returned = function(*arguments)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        return 1000 * (clock() - started), returned

    def backward(outputs: list[Any], gradients: list[Any], parameters: list[Any]) -> None:
        torch.autograd.grad(outputs, [hidden, *parameters], gradients, allow_unused=True)

    taken: list[dict[str, list[float]]] = [{"forward": [], "backward": []} for _ in steps]
    began = time.perf_counter()
    for number in range(WARM_UP + runs):
        if number > WARM_UP and time.perf_counter() - began > LIMIT:
            break
        for (forward, parameters), of in zip(steps, taken, strict=True):
            milliseconds, outputs = timed(forward, hidden)
            of["forward"].append(milliseconds)
            outputs = [
                output for output in outputs if output.requires_grad
            ]  # the weights of a router may be constants
            if outputs:
                gradients = [torch.randn_like(output) for output in outputs]
                milliseconds, _ = timed(backward, outputs, gradients, parameters)
                of["backward"].append(milliseconds)
            del outputs
    return [
        {name: statistics.median(values[WARM_UP:]) if values else None for name, values in of.items()} for of in taken
    ]
