# SPDX-License-Identifier: Apache-2.0
"""
What is added to the routers' gradients under DeepSpeed: what test_deepspeed.py starts a process of.

    python deepspeed_balance.py FOLDER STAGE
"""

import os
import sys

import torch
from router_gradients import rows, trainable
from transformers import Trainer, TrainingArguments

from hf_moe import LoadBalancingCallback, add_moe_callbacks
from hf_moe.training.routers import find_routers


def step(coef: float, folder: str, stage: int) -> torch.Tensor:
    """What one step of four micro-batches with SGD and a learning rate of 1 takes off the routers' weights."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=1,
        gradient_accumulation_steps=4,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        deepspeed=config,
    )
    model = trainable("mixtral")
    before = torch.stack([router.module.weight.detach().clone() for router in find_routers(model).values()])
    trainer = Trainer(model, arguments, train_dataset=rows(8))
    add_moe_callbacks(trainer, LoadBalancingCallback("switch", coef))
    trainer.train()
    return before - torch.stack([router.module.weight.detach() for router in find_routers(trainer.model).values()])


if __name__ == "__main__":
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0", DS_ACCELERATOR="cpu"
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
    with_loss, without = (step(coef, sys.argv[1], int(sys.argv[2])) for coef in (1.0, 0.0))
    torch.save(with_loss - without, f"{sys.argv[1]}/gradient.pt")
    os._exit(0)
