# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts on disk, of transformers and of hf_moe, and how to compare them."""

import json
from pathlib import Path

import torch
import transformers
from conftest import MLA, TINY, cast, moe_model, randomize, save_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


NATIVE = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "norm_topk_prob": True, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", {"num_experts": 4, "norm_topk_prob": False}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
    "granitemoeshared": ("GraniteMoeShared", {"num_local_experts": 4, "shared_intermediate_size": 40}),
    "granitemoe_swa": ("GraniteMoeSWA", {"num_local_experts": 4, "shared_intermediate_size": 40}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
            **MLA,
        },
    ),
}
OWN = ("llama", "mistral", "qwen2", "qwen3")
# All of which know exactly what a duplicated expert is worth.
SOFTMAX_KINDS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "granitemoe_swa",
    "moe_llama",
    "moe_qwen2",
]


def small_moe(kind: str, dtype: torch.dtype = torch.float32, **values) -> transformers.PreTrainedModel:
    """A tiny model with four experts, top-2, random values everywhere and a selection bias where there is one."""
    if kind.startswith("moe_"):
        model = moe_model(kind.removeprefix("moe_"), **values)
    else:
        prefix, fields = NATIVE[kind]
        fields = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, **TINY, **fields, **values}
        model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields))
        randomize(model)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.tensor([0.3, -0.2, 0.1, -0.4]))
    return cast(model, dtype)


def save_moe(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **values) -> Path:
    """[`small_moe`] with its tokenizer, on disk."""
    save = {name: values.pop(name) for name in ("max_shard_size", "save_original_format") if name in values}
    small_moe(kind, dtype, **values).save_pretrained(folder, **save)
    save_tokenizer(folder)
    return folder


def sparse_block(layer: torch.nn.Module) -> torch.nn.Module:
    """The experts and the router of a decoder layer."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def load(folder: Path, **arguments) -> transformers.PreTrainedModel:
    """The model in a folder; nothing may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What the model in a folder computes for two sequences of 40 tokens."""
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    return load(folder)(ids).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors on disk."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found |= {name: file.get_tensor(name) for name in names}
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    """The two folders hold the same tensors: names, types and every bit, the sign of a zero included."""
    expected, actual = tensors(one), tensors(other)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        bits = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
        assert torch.equal(actual[name].view(bits), tensor.view(bits)), name


def change_tensors(folder: Path, change) -> None:
    """Let `change` alter the dictionary of tensors of a model in one file."""
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def change_json(path: Path, **values) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def record(folder: Path):
    """Routing statistics of a model on random tokens."""
    from hf_moe import RoutingRecorder

    model = load(folder)
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(5))
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(ids)
    return recorder.statistics()
