# SPDX-License-Identifier: Apache-2.0
"""
Record what older versions of PEFT write and compute: a tiny model, an adapter on its experts, and the logits of the two.

Run with the version that is to be recorded, beside transformers 5 (tried with 5.22.2):

    pip install peft==0.18.1 torch==2.13.0 "transformers<5.23"
    python tests/golden/record_peft.py mixtral mixtral_gate_up
    pip install peft==0.19.0
    python tests/golden/record_peft.py gpt_oss

`mixtral_gate_up` adapts one projection whose matrices are square, so that shapes do not tell the layout of its factors.
"""

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Prefix of the class, what its configuration has besides, and what is adapted.
CASES = {
    "mixtral": ("Mixtral", {"intermediate_size": 8}, ["gate_up_proj", "down_proj"]),
    "mixtral_gate_up": ("Mixtral", {"intermediate_size": 8}, ["gate_up_proj"]),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "head_dim": 8, "rope_parameters": {"rope_type": "default"}}, None),
}


def record(case: str) -> None:
    """Write `peft_<version>_<case>.safetensors` beside this file."""
    prefix, fields, projections = CASES[case]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    base = {f"base.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [f"mlp.experts.{name}" for name in projections or ("gate_up_proj", "down_proj")]
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 8))
    with torch.no_grad():
        logits = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter = load_file(Path(folder, "adapter_model.safetensors"))
        adapter_config = Path(folder, "adapter_config.json").read_text()
    tensors = {**base, **{f"adapter.{name}": tensor for name, tensor in adapter.items()}, "ids": ids, "logits": logits}
    metadata = {"config": json.dumps(config.to_diff_dict()), "adapter_config": adapter_config}
    path = Path(__file__).with_name(f"peft_{peft.__version__}_{case}.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        record(case)
