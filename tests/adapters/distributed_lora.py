# SPDX-License-Identifier: Apache-2.0
"""
Training with expert LoRA under DDP and FSDP2, and with ESFT under DDP: what test_distributed_lora.py starts two processes of.

    python distributed_lora.py FOLDER RANK
"""

import os
import sys
from collections.abc import Iterator

import torch
from peft import PeftModel
from small_adapters import ids, with_adapter
from small_models import small_moe
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe import ExpertSelection, apply_esft
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.grouped_lora import disable_grouped_lora, enable_grouped_lora


ESFT = "mixtral, ESFT"
RANKS = {"mixtral": 4, "gpt_oss": 3}  # of which the latter is filled up with zeros in grouped products
NUM_STEPS, ROWS = 5, 4
State = tuple[list[float], dict[str, torch.Tensor]]


def model_of(kind: str) -> torch.nn.Module:
    if kind == ESFT:
        selection = ExpertSelection({0: [1, 2], 1: [0]})
        return apply_esft(small_moe("mixtral", num_hidden_layers=2), selection).train()
    model = small_moe(kind, num_hidden_layers=2)
    return with_adapter(model, r=RANKS[kind], target_modules=["q_proj", "v_proj"]).train()


def trained_parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole factors, or experts, by their names in the model that was wrapped."""
    whole = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trained_experts" in name:
            tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            whole[name.removeprefix("module.")] = tensor.detach().clone()
    return whole


def train(model: torch.nn.Module, rows: slice = slice(None)) -> State:
    """The losses of a few steps on these rows of every batch, and what was trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches, losses = ids(NUM_STEPS * ROWS).split(ROWS), []
    for batch in batches:
        loss = model(input_ids=batch[rows], labels=batch[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained_parts(model)


def train_with_trainer(model: PeftModel, folder: str, batch_size: int) -> State:
    """The same by the Trainer, which gives every process its rows."""
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-5,  # or AdamW makes whole steps of gradients that are rounding alone
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids(NUM_STEPS * ROWS)]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trained_parts(model)


def checkpointed(model: PeftModel, use_reentrant: bool | None) -> PeftModel:
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def sharded(model: PeftModel, unit: str, reshard: bool = True) -> PeftModel:
    """The model under FSDP2, whose units are its decoder layers, and within them what `unit` says."""
    for layer in model.get_base_model().model.layers:
        if unit == "experts":
            fully_shard(layer.mlp.experts.get_base_layer(), reshard_after_forward=reshard)
        elif unit == "adapters":
            fully_shard(layer.mlp.experts, reshard_after_forward=reshard)
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


def ways_to_train() -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Layout, description and model of every way in which two processes train."""
    for kind in RANKS:
        for use_reentrant in (None, False, True):
            model = enable_grouped_lora(checkpointed(model_of(kind), use_reentrant))
            yield kind, f"DDP, {use_reentrant=}", DistributedDataParallel(model)
            for unit in ("layer", "experts"):
                for reshard in (True, False):
                    model = enable_grouped_lora(checkpointed(model_of(kind), use_reentrant))
                    yield kind, f"FSDP2, {unit=}, {reshard=}, {use_reentrant=}", sharded(model, unit, reshard)
        yield kind, "FSDP2, unit='adapters'", sharded(enable_grouped_lora(model_of(kind)), "adapters")
        yield kind, "FSDP2, enabled later", enable_grouped_lora(sharded(model_of(kind), "experts"))
    yield ESFT, "DDP", DistributedDataParallel(model_of(ESFT))


def refusals(folder: str) -> Iterator[str]:
    """The messages of what cannot be done."""
    model = sharded(enable_grouped_lora(model_of("mixtral")), "adapters")
    for function, of in (
        (disable_grouped_lora, model),
        (enable_grouped_lora, sharded(model_of("mixtral"), "adapters")),
    ):
        try:
            function(of)
        except ExpertLoraError as error:
            yield str(error)
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", distributed_config=config)
    try:
        enable_grouped_lora(PeftModel.from_pretrained(base, f"{folder}/adapter"))
    except (ExpertLoraError, RuntimeError) as error:
        yield str(error)


def main(folder: str, rank: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    results = {(kind, way): train(model, half) for kind, way, model in ways_to_train()}
    of_trainer = train_with_trainer(enable_grouped_lora(model_of("mixtral")), folder, ROWS // 2)
    torch.save((results, of_trainer, list(refusals(folder))), f"{folder}/results{rank}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)  # gloo's threads sometimes abort an orderly exit
