# SPDX-License-Identifier: Apache-2.0
"""Expert LoRA under the trainers of transformers and TRL, and its adapters in PEFT afterwards."""

import pytest
import torch
from conftest import assert_close, save_tokenizer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from small_adapters import ids
from small_models import small_moe
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_moe import ExpertLoraConfig
from hf_moe.adapters.grouped_lora import expert_wrappers
from hf_moe.adapters.param_wrapper import GroupedParamWrapper


CONFIG = ExpertLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], expert_dropout=0.05)
VALUES = {
    "max_steps": 12,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
}


@pytest.mark.parametrize("trl", [False, True], ids=["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "moe_llama"])
def test_trainers(trl, kind, tmp_path):
    model = small_moe(kind)
    config = CONFIG.for_model(model)
    rows = ids(16).tolist()
    if trl:
        save_tokenizer(tmp_path)
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path), max_length=12, bf16=False, **VALUES),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(tmp_path),
            peft_config=config,
        )
    else:
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = Trainer(
            get_peft_model(model, config), TrainingArguments(str(tmp_path), **VALUES), train_dataset=data
        )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for _, wrapper in expert_wrappers(trainer.model):
        assert type(wrapper) is GroupedParamWrapper
        assert wrapper.lora_B["default"].weight.abs().max() > 0

    trainer.model.save_pretrained(tmp_path / "adapter")
    vanilla = PeftModel.from_pretrained(small_moe(kind), tmp_path / "adapter")
    with torch.no_grad():
        assert_close(trainer.model.eval()(ids()).logits, vanilla(ids()).logits)
