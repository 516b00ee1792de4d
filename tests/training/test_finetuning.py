# SPDX-License-Identifier: Apache-2.0
"""The classes under the tools that people train with: Trainer, and PEFT on the experts."""

import peft
import pytest
import torch
from conftest import moe_model
from datasets import Dataset
from transformers import Trainer, TrainingArguments


@pytest.fixture
def dataset():
    ids = torch.randint(3, 96, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train(model, dataset, folder, **arguments):
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=12,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=dataset,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_trainer(arguments, dataset, tmp_path):
    model = moe_model(
        "qwen2", output_router_logits=True, shared_expert_intermediate_size=24, use_shared_expert_gate=True
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = train(model, dataset, tmp_path, **arguments)
    assert losses[-1] < losses[0] - 0.1
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == []


def test_peft_on_the_experts(dataset, tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_dropout=0.0,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = peft.get_peft_model(moe_model("llama"), config)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # gate_up_proj is registered first, so PEFT wraps it inside: the file format implies the order.
    assert any("mlp.experts.base_layer.lora_A" in name for name in names)
    losses = train(model, dataset, tmp_path)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(moe_model("llama"), tmp_path / "adapter")
    ids = torch.tensor(dataset["input_ids"][:2])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
