# SPDX-License-Identifier: Apache-2.0
"""Files of older versions of PEFT, as these wrote them, are recognised and converted; the logits are those they gave."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_close
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from small_adapters import FILES, change, with_adapter
from small_models import small_moe

from hf_moe import check_adapter, enable_grouped_lora
from hf_moe.adapters.doctor import Diagnosis, convert_adapter, diagnose
from hf_moe.adapters.errors import ExpertLoraError
from hf_moe.adapters.factors import swapped


GOLDEN = Path(__file__).parent.parent / "golden"


def layout(diagnosis: Diagnosis) -> str:
    return next(check.details for check in diagnosis.checks if check.name == "layout")


def golden(case: str, folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """The model of a recorded case, its adapter in `folder` as PEFT wrote it, and all tensors."""
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    config = transformers.AutoConfig.for_model(**json.loads(metadata["config"]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict({name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")})
    folder.mkdir(parents=True)
    (folder / FILES[0]).write_text(metadata["adapter_config"])
    own = {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
    save_file(own, folder / FILES[1])
    return model, tensors


@pytest.mark.parametrize("case", ["peft_0.18.1_mixtral", "peft_0.18.1_mixtral_gate_up", "peft_0.19.0_gpt_oss"])
@torch.no_grad()
def test_files_of_older_peft_are_recognised_and_converted(case, tmp_path):
    model, recorded = golden(case, tmp_path / "old")
    with pytest.raises(ExpertLoraError, match="layout: The file is in the layout of PEFT 0.18.*--fix OUTPUT"):
        check_adapter(tmp_path / "old", model)
    before = {name: (tmp_path / "old" / name).read_bytes() for name in FILES}
    convert_adapter(diagnose(tmp_path / "old", model), tmp_path / "new")
    assert before == {name: (tmp_path / "old" / name).read_bytes() for name in FILES}
    check_adapter(tmp_path / "new", model)
    vanilla = PeftModel.from_pretrained(model, tmp_path / "new").eval()
    assert_close(vanilla(recorded["ids"]).logits, recorded["logits"], 1e-6)
    assert_close(enable_grouped_lora(vanilla)(recorded["ids"]).logits, recorded["logits"], 1e-6)


@torch.no_grad()
def test_where_shapes_cannot_tell_the_version_does(tmp_path):
    """PEFT loads such a file without a word, transposed."""
    model, recorded = golden("peft_0.18.1_mixtral_gate_up", tmp_path / "old")
    because = layout(diagnose(tmp_path / "old", model))
    assert "peft_version 0.18.1 in adapter_config.json, since the matrices are square" in because
    change(tmp_path / "old", peft_version=None)
    assert "no peft_version as before PEFT 0.18" in layout(diagnose(tmp_path / "old", model))
    change(tmp_path / "old", peft_version="0.19.1")
    assert not diagnose(tmp_path / "old", model).problems
    change(tmp_path / "old", peft_version="new")
    with pytest.raises(ExpertLoraError, match="peft_version in adapter_config.json is 'new', which is no version"):
        diagnose(tmp_path / "old", model)
    loaded = PeftModel.from_pretrained(model, tmp_path / "old").eval()
    assert (loaded(recorded["ids"]).logits - recorded["logits"]).abs().max() > 0.1


def test_square_matrices_of_transposed_experts(tmp_path):
    """PEFT 0.18 was right about these, 0.19.0 was not."""
    base = small_moe("gpt_oss", hidden_size=32, intermediate_size=32, num_attention_heads=4)
    with_adapter(base, target_parameters=["mlp.experts.down_proj"]).save_pretrained(tmp_path)
    for version, is_old in ((None, False), ("0.17.1", False), ("0.18.1", False), ("0.19.0", True), ("0.19.1", False)):
        change(tmp_path, peft_version=version)
        diagnosis = diagnose(
            tmp_path, small_moe("gpt_oss", hidden_size=32, intermediate_size=32, num_attention_heads=4)
        )
        assert bool(diagnosis.old_factors) is is_old


def test_what_cannot_be_converted(tmp_path):
    with_adapter(small_moe("mixtral")).save_pretrained(tmp_path / "today")
    with pytest.raises(ExpertLoraError, match="not in the layout of an older PEFT: there is nothing to convert"):
        convert_adapter(diagnose(tmp_path / "today", small_moe("mixtral")), tmp_path / "new")
    model, _ = golden("peft_0.18.1_mixtral", tmp_path / "old")
    (tmp_path / "new").mkdir()
    with pytest.raises(ExpertLoraError, match="new is there already"):
        convert_adapter(diagnose(tmp_path / "old", model), tmp_path / "new")
    change(tmp_path / "old", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    with pytest.raises(ExpertLoraError, match=r"problems that converting would keep \(values: NaN"):
        convert_adapter(diagnose(tmp_path / "old", model), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_conversion_that_changes_something_is_not_written(tmp_path, monkeypatch):
    model, _ = golden("peft_0.18.1_mixtral", tmp_path / "old")

    def wrong(a, b, num_experts):
        new_a, new_b = swapped(a, b, num_experts)
        return new_a, new_b.flip(1)

    diagnosis = diagnose(tmp_path / "old", model)
    monkeypatch.setattr("hf_moe.adapters.factors.swapped", wrong)
    with pytest.raises(
        ExpertLoraError, match=r"Converting model\.layers\.0\.mlp\.experts\.\w+ would change what it computes"
    ):
        convert_adapter(diagnosis, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
