# SPDX-License-Identifier: Apache-2.0
"""
What is added to the routers' gradients under DDP and FSDP2: what test_distributed_balance.py starts one or two processes of.

    python distributed_balance.py FOLDER RANK WORLD_SIZE
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from router_gradients import KINDS, MODELS, injected_gradients, native_gradient, rows, trainable, whole
from test_callbacks import make_trainer
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from hf_moe import (
    BiasBalancingCallback,
    ExpertCollapseCallback,
    LoadBalancingCallback,
    RouterStatisticsCallback,
    RoutingHistory,
)
from hf_moe.training.load_balancing import LoadBalancer
from hf_moe.training.routers import find_routers


sys.path.append(str(Path(__file__).parents[1] / "models"))
from router_cases import build_model, with_routing_inputs


# Qwen3-MoE's routers are Mixtral's, but for what they return.
KINDS_OF_MODELS = [kind for kind in MODELS.values() if kind != "qwen3_moe"]
# Routers with more parameters and buffers than a weight, in which every one has to get a gradient.
MORE_STATE = (
    "zero-computation experts",
    "attention",
    "hierarchical_noisy_topk",
    "grouped",
    "sigmoid_topk",
    "modality",
)
DDP_SETTINGS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, accumulation 2": {"gradient_accumulation_steps": 2},
    "DDP, reentrant checkpointing": {
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,
    },
}

SAVES = ("steps", "epoch", "best")  # when there is a checkpoint: the last after an evaluation
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
FSDP_SETTINGS: dict[str, dict[str, Any]] = {
    "FSDP2 in a Trainer": FSDP2,
    "FSDP2 in a Trainer, accumulation 2": {**FSDP2, "gradient_accumulation_steps": 2},
}


@contextmanager
def fsdp_without_accelerator() -> Iterator[None]:
    """accelerate shards on accelerators only: let it take the processes for some."""
    original = AcceleratorState.__init__

    def initialize(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
        original(self, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", initialize), patch.dict(os.environ):
        yield


def sharded_gradients(model_kind: str, rank: int, use_reentrant: bool | None) -> dict[str, torch.Tensor]:
    """What is added under FSDP2, of which every process sees two rows of its own."""
    model = trainable(model_kind)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    mine = rows(4)[2 * rank : 2 * rank + 2]
    batch = {key: torch.stack([row[key] for row in mine]) for key in ("input_ids", "attention_mask")}
    found = {}
    for kind, options in KINDS.items():
        balancer = LoadBalancer(kind, coef=1.0, **options).attach(model)
        for step in range(2 if kind == "global_batch" else 1):
            model.zero_grad()
            (model(**batch).logits.sum() * 0).backward()
            balancer.step()
            name = f"{kind}, second step" if step else kind
            found[name] = torch.stack([whole(router.module.weight.grad) for router in find_routers(model).values()])
        balancer.detach()
    return found


def watched(folder: Path, steps_per_update: int, save: str) -> dict[str, Any]:
    """What the callbacks know after two optimizer steps of four rows, with a checkpoint before anything is logged."""
    statistics, bias = RouterStatisticsCallback(folder=str(folder / "routing")), BiasBalancingCallback(0.01)
    balance, collapse = LoadBalancingCallback("global_batch", adaptive=True), ExpertCollapseCallback(2)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"} if save == "best" else {}
    trainer = make_trainer(
        trainable("deepseek_v3"),
        folder,
        statistics,
        bias,
        balance,
        collapse,
        data=rows(8),
        max_steps=2,
        gradient_accumulation_steps=steps_per_update,
        learning_rate=0.0,
        save_strategy=save,
        save_steps=1,
        logging_steps=100 if save == "epoch" else 2,
        **evaluation,
    )
    trainer.train()
    checkpoint = "checkpoint-2" if save == "epoch" else "checkpoint-1"
    saved = TrainerState.load_from_json(str(folder / checkpoint / "trainer_state.json")).stateful_callbacks
    lines = RoutingHistory.load(folder / "routing").statistics
    return {
        "counts": [{name: layer.counts.tolist() for name, layer in line.layers.items()} for line in lines],
        "saved": saved["RouterStatisticsCallback"]["state"]["counts"],
        "collapse": [counts for counts in saved["ExpertCollapseCallback"]["state"]["counts"].values() if any(counts)],
        "balance": saved["LoadBalancingCallback"]["state"],
        "logged": {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("moe/")},
        "bias": bias.save_state(),
    }


def gradients_of_rank(case: str, rank: int, is_parallel: bool) -> dict[str, torch.Tensor | None]:
    """Of all parameters, from the row of a process, or from those of both by DDP."""
    model = build_model(case).train()
    batch = {key: value[None] for key, value in rows(2)[rank].items()}
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(model) if is_parallel else model
    wrapped(**with_routing_inputs(batch, model)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main(folder: str, rank: int, world_size: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = {}
    for model_kind in KINDS_OF_MODELS:
        for name, setting in DDP_SETTINGS.items():
            results[model_kind, f"{name}, all alike"] = injected_gradients(model_kind, rows(), **setting)
        assert AcceleratorState().distributed_type == DistributedType.MULTI_CPU
        if world_size == 1:
            continue
        with fsdp_without_accelerator():
            for name, setting in FSDP_SETTINGS.items():
                results[model_kind, f"{name}, all alike"] = injected_gradients(model_kind, rows(), **setting)
            assert AcceleratorState().is_fsdp2
        results[model_kind, "DDP, all different"] = injected_gradients(model_kind, rows(4))
        for use_reentrant in (None, True):
            results[model_kind, f"FSDP2, {use_reentrant=}"] = sharded_gradients(model_kind, rank, use_reentrant)
        if model_kind != "moe_llama":
            results[model_kind, "transformers"] = {"native": native_gradient(model_kind, rows())}
    for case in MORE_STATE if world_size > 1 else ():
        results["routers", case] = gradients_of_rank(case, rank, is_parallel=True)
    for save in SAVES if world_size > 1 else ():
        results["deepseek_v3", f"callbacks, {save}"] = watched(Path(folder, save), 1, save)
    torch.save(results, f"{folder}/gradients{rank}.pt")
    distributed.barrier()


def run_processes(folder: Path, world_size: int) -> list[dict[tuple[str, str], dict[str, torch.Tensor]]]:
    """What each process found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(world_size)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(errors))
    return [torch.load(folder / f"gradients{rank}.pt") for rank in range(world_size)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # gloo's threads sometimes abort an orderly exit
