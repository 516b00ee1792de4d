# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench lora`: a training step of expert LoRA beside the same experts frozen and beside PEFT's own computation."""

import importlib
import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.cli import out
from huggingface_hub.utils import tqdm


@dataclass(frozen=True)
class Shape:
    """
    A layer of experts as a published model has it.

    Args:
        experts (`str`): The module and the class of its experts in `transformers.models`.
        config (`str`): The class of its configuration.
        hidden (`int`): Hidden size.
        intermediate (`int`): Intermediate size of one expert.
        num_experts (`int`): Number of experts.
        top_k (`int`): Experts per token.
    """

    experts: str
    config: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


SHAPES = {
    "qwen3-30b-a3b": Shape("qwen3_moe.Qwen3MoeExperts", "Qwen3MoeConfig", 2048, 768, 128, 8),
    "mixtral-8x7b": Shape("mixtral.MixtralExperts", "MixtralConfig", 4096, 14336, 8, 2),
    "gpt-oss-20b": Shape("gpt_oss.GptOssExperts", "GptOssConfig", 2880, 2880, 32, 4),
}
FROZEN, OURS, PEFT = "frozen experts", "hf_moe", "PEFT"


def lora(
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Can be given several times (default all): {', '.join(SHAPES)}.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="What hidden and intermediate size are multiplied with (default 1, halved until it fits)."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    tokens: Annotated[int | None, typer.Option(help="Tokens per step (512 on CPU, 4096 on GPU).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default on CPU) or bfloat16 (default on GPU).")] = None,
    checkpointing: Annotated[bool, typer.Option(help="With gradient checkpointing.")] = False,
    runs: Annotated[int, typer.Option(help="Steps of each, in turns.")] = 21,
) -> None:
    """
    Time and memory of forward and backward through a layer of experts: frozen, with hf_moe's LoRA, with PEFT's.

    The frozen layer is the limit: the gradient of its input has to be computed in any case. "operations" are the
    multiplications beside its, "saved" is what autograd keeps from forward to backward beside the parameters, "peak" what is
    allocated beside them at most.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    tokens = tokens if tokens is not None else (4096 if on_gpu else 512)
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if unknown := sorted(set(shape or []) - set(SHAPES)):
        raise ValueError(f"There is no shape {unknown[0]!r}. Choose from {', '.join(SHAPES)}.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}. Choose float32 or bfloat16.")
    for option, value, least in (("rank", rank, 1), ("tokens", tokens, 1), ("runs", runs, 1), ("scale", scale, 0)):
        if value is not None and value < least or value == 0:
            raise ValueError(f"--{option} is {value}. Give at least 1, for --scale more than 0.")
    rows = []
    for name in shape or SHAPES:
        fitting = scale or _fitting_scale(SHAPES[name], getattr(torch, dtype), on_gpu)
        layers = make_layers(SHAPES[name], fitting, rank, getattr(torch, dtype), device)
        step = Step(SHAPES[name], layers[FROZEN], tokens, checkpointing)
        rows += [{"shape": name, "scale": fitting, **row} for row in _measure(name, layers, step, runs)]
        del layers, step
    out.table(rows)
    out.text(
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {dtype}, {tokens} tokens, rank {rank}, {runs} rounds in turns"
        + (", gradient checkpointing" if checkpointing else "")
    )


def _fitting_scale(shape: Shape, dtype: Any, on_gpu: bool) -> float:
    """1, halved until what PEFT needs (weights, these with the adapter, their gradient, and room) fits into the memory."""
    import torch

    memory = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 6 * 3 * shape.num_experts * shape.hidden * shape.intermediate * dtype.itemsize
    scale = 1.0
    while scale**2 * needed > memory:
        scale /= 2
    return scale


def _scaled(size: int, scale: float) -> int:
    """A size of which rows of any type start where grouped products want it."""
    return max(16, round(size * scale / 16) * 16)


def make_layers(shape: Shape, scale: float, rank: int, dtype: Any, device: str) -> dict[str, Any]:
    """The same layer three times, on the same weights; `frozen experts` has no adapter."""
    import torch
    import transformers
    from peft import LoraConfig, inject_adapter_in_model

    from ..adapters.grouped_lora import enable_grouped_lora

    module, class_name = shape.experts.split(".")
    experts_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), class_name)
    sizes = {"hidden_size": _scaled(shape.hidden, scale), "num_experts_per_tok": shape.top_k}
    for field in ("intermediate_size", "moe_intermediate_size"):
        sizes[field] = _scaled(shape.intermediate, scale)
    for field in ("num_experts", "num_local_experts"):
        sizes[field] = shape.num_experts
    layers = {}
    weights: dict[str, torch.Tensor] = {}
    for name in (FROZEN, PEFT, OURS):
        config = getattr(transformers, shape.config)(**sizes)
        config._experts_implementation = "grouped_mm"
        layer = torch.nn.Module()
        with torch.device("meta"):
            layer.experts = experts_class(config)
        if not weights:
            torch.manual_seed(0)
            for key, parameter in layer.experts.named_parameters():
                weights[key] = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)
        layer.experts.load_state_dict(weights, assign=True)
        layer.requires_grad_(False)
        if name != FROZEN:
            torch.manual_seed(1)
            targets = ["experts.gate_up_proj", "experts.down_proj"]
            lora_config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=targets, init_lora_weights=False)
            inject_adapter_in_model(lora_config, layer)
        layers[name] = enable_grouped_lora(layer) if name == OURS else layer
    return layers


class Step:
    """One training step of a layer: forward, backward, and the gradients taken away again."""

    def __init__(self, shape: Shape, layer: Any, tokens: int, checkpointing: bool):
        import torch

        parameter = next(layer.parameters())
        hidden = layer.experts.config.hidden_size
        generator = torch.Generator(parameter.device).manual_seed(2)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, device=parameter.device)

        self.hidden = random(tokens, hidden).to(parameter.dtype).requires_grad_()
        weights, self.index = random(tokens, shape.num_experts).softmax(-1).topk(shape.top_k, dim=-1)
        self.weights = weights.to(parameter.dtype).requires_grad_()
        self.gradient = random(tokens, hidden).to(parameter.dtype)
        self.checkpointing = checkpointing

    def forward(self, layer: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        if self.checkpointing:
            return checkpoint(layer.experts, self.hidden, self.index, self.weights, use_reentrant=False)
        return layer.experts(self.hidden, self.index, self.weights)

    def __call__(self, layer: Any) -> None:
        self.forward(layer).backward(self.gradient)
        self.hidden.grad = self.weights.grad = None
        layer.zero_grad()


def _measure(name: str, layers: dict[str, Any], step: Step, runs: int) -> list[dict[str, Any]]:
    import torch

    on_gpu = step.hidden.is_cuda
    seconds: dict[str, list[float]] = {variant: [] for variant in layers}
    # The first rounds are not counted: memory is fetched and kernels are chosen.
    for number in tqdm(range(runs + 2), desc=name, unit=" rounds", disable=True if out.is_quiet() else None):
        for variant, layer in layers.items():
            started = time.perf_counter()
            step(layer)
            if on_gpu:
                torch.cuda.synchronize()
            if number >= 2:
                seconds[variant].append(time.perf_counter() - started)
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    saved = {variant: saved_bytes(layer, step) for variant, layer in layers.items()}
    peak = {variant: peak_bytes(layer, step) for variant, layer in layers.items()}
    operations = {variant: multiplications(layer, variant) for variant, layer in layers.items()}
    return [
        {
            "experts": variant,
            "median_ms": round(1000 * median[variant], 2),
            "min_ms": round(1000 * min(seconds[variant]), 2),
            "max_ms": round(1000 * max(seconds[variant]), 2),
            "operations": round(operations[variant] / operations[FROZEN], 3),
            "times_frozen": round(median[variant] / median[FROZEN], 3),
            "times_peft": round(median[variant] / median[PEFT], 3),
            "saved_mib": round(saved[variant] / 2**20, 1),
            # With checkpointing nothing is saved but the inputs.
            "saved_times_frozen": round(saved[variant] / saved[FROZEN], 2) if saved[FROZEN] else None,
            "peak_mib": round(peak[variant] / 2**20, 1),
        }
        for variant in (FROZEN, OURS, PEFT)
    ]


def multiplications(layer: Any, variant: str) -> int:
    """Of one pair of a token and an expert, forward and backward; PEFT's products of factors alone are left out."""
    weights = factors = 0
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3:
            weights += parameter.shape[1] * parameter.shape[2]
        elif "lora_" in name:
            factors += parameter.numel() // layer.experts.num_experts
    # Twice what is frozen, three times what has a gradient of its own: with PEFT, that is the weights.
    return {FROZEN: 2 * weights, OURS: 2 * weights + 3 * factors, PEFT: 3 * weights}[variant]


def saved_bytes(layer: Any, step: Step) -> int:
    """Bytes that autograd keeps for the backward pass beside the parameters and the inputs, each storage counted once."""
    import torch

    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), step.hidden, step.weights, step.index)
    }
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no later one takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = step.forward(layer)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(layer: Any, step: Step) -> int:
    """Bytes that a step allocates at most beside what is there before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if step.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(layer)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(itertools.accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))
