# SPDX-License-Identifier: Apache-2.0
"""
`check_adapter`, `diagnose` and `convert_adapter`: whether an adapter on disk is what PEFT will make of it on a model.

PEFT leaves out tensors whose names it does not expect, and says nothing. Here the adapter is put on the model without its
weights, and every name and shape is compared with the file before anything is loaded.
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from transformers import PreTrainedModel

from .adapter_file import AdapterFile
from .base_model import without_weights
from .checks import OK, PROBLEM, Check, check_base, check_configuration, check_layout, check_patterns, named
from .errors import ExpertLoraError
from .factors import Factors, expected_factors, read_layout, swap_all
from .grouped_lora import enable_grouped_lora, expert_wrappers
from .report import ExpertLoraReport, expert_lora_report
from .tensor_checks import check_effect, check_keys, check_shapes, check_values


@dataclass(frozen=True)
class Diagnosis:
    """
    What was found out about an adapter and a model.

    Args:
        adapter (`str`): Folder or Hub id of the adapter.
        base (`str`): That of the model.
        checks (`list[Check]`): What was looked at.
        file (`AdapterFile`): The adapter.
        report ([`ExpertLoraReport`], *optional*): What would train, if the adapter fits a mixture of experts.
        old_factors (`list[Factors]`): The factors that are in the layout of an older PEFT.
    """

    adapter: str
    base: str
    checks: list[Check]
    file: AdapterFile = field(repr=False)
    report: ExpertLoraReport | None = None
    old_factors: list[Factors] = field(default_factory=list, repr=False)

    @property
    def problems(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == PROBLEM]

    def to_dict(self) -> dict[str, Any]:
        """All of it but the tensors, for JSON."""
        return {
            "adapter": self.adapter,
            "base": self.base,
            "ok": not self.problems,
            "checks": [vars(check) for check in self.checks],
            "report": None if self.report is None else self.report.to_dict(),
        }


def check_adapter(
    adapter: str | Path, base: PreTrainedModel | str | Path, trust_remote_code: bool = False
) -> Diagnosis:
    """
    Refuse an adapter that would not do on a model what it was trained to do, before it is loaded.

    Args:
        adapter (`str` or `Path`): A LoRA adapter: a folder or a Hub id.
        base ([`~transformers.PreTrainedModel`], `str` or `Path`): The model, or its folder or Hub id. Its weights are not
            looked at.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code from the model's repository.

    Returns:
        [`Diagnosis`]

    Raises:
        ExpertLoraError: with everything that is wrong and what to do: names or shapes that are not those of the model, values
            that are not finite, the layout of an older PEFT, no effect at all.

    Example:

    ```python
    >>> from hf_moe import check_adapter, enable_grouped_lora
    >>> from peft import PeftModel

    >>> check_adapter("user/expert-lora", model)
    >>> model = enable_grouped_lora(PeftModel.from_pretrained(model, "user/expert-lora"))
    ```
    """
    diagnosis = diagnose(adapter, base, trust_remote_code)
    if diagnosis.problems:
        found = "\n".join(f"- {check.name}: {check.details}" for check in diagnosis.problems)
        raise ExpertLoraError(f"{diagnosis.adapter} cannot be used on {diagnosis.base}:\n{found}")
    return diagnosis


def diagnose(
    adapter: str | Path,
    base: PreTrainedModel | str | Path | None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Diagnosis:
    """
    The same as [`check_adapter`], with what is wrong in the checks instead of an error.

    Args:
        base ([`~transformers.PreTrainedModel`], `str` or `Path`, *optional*): The model that the adapter names if None.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar while the adapter is read.

    Raises:
        ExpertLoraError: if there is no LoRA adapter or no model.
    """
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    file = AdapterFile.read(adapter, progress)
    made_for = file.config.get("base_model_name_or_path")
    if base is None and not made_for:
        raise ExpertLoraError(f"{adapter} does not say which model it is for. Give it with `--base`.")
    base = made_for if base is None else base
    base_name = str(base.name_or_path or type(base).__name__) if isinstance(base, PreTrainedModel) else str(base)
    config = file.lora_config()
    empty = without_weights(base, config.task_type, trust_remote_code)
    checks = [
        check_configuration(file.config),
        check_base(file.config, base_name, type(empty).__module__),
        check_values(file.tensors),
    ]
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the checks find as well
            model = get_peft_model(empty, config)
    except ValueError as error:
        checks.append(
            Check(
                "targets",
                PROBLEM,
                "not in the model",
                f"PEFT cannot put the adapter on the model: {error} Is it the model that the adapter was made for{named(made_for)}?",
            )
        )
        return Diagnosis(str(adapter), base_name, checks, file)
    factors = expected_factors(model)
    if config.rank_pattern or config.alpha_pattern:
        checks.append(check_patterns(config, factors))
    layout = read_layout(factors, file.tensors, file.config.get("peft_version"))
    checks.append(check_layout(layout, factors, file.tensors))
    old_factors = []
    if layout is not None and layout.is_old:
        old_factors = [one for one in factors if one.num_experts > 1 and {one.a, one.b} <= file.tensors.keys()]
    # From here on as if it had been converted, so that everything that is wrong is found at once.
    tensors = swap_all(old_factors, file.tensors)
    try:
        as_read = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    except (ValueError, RuntimeError) as error:
        checks.append(
            Check(
                "keys",
                PROBLEM,
                "PEFT cannot join its experts",
                f"The file has tensors of single experts that do not amount to those of the model ({error}). Gate and up must "
                "both be there, for every expert. Train the adapter again, or merge it with the program that made it.",
            )
        )
        return Diagnosis(str(adapter), base_name, checks, file)
    expected = _expected_shapes(model, as_read)
    checks.append(check_keys(expected, as_read, made_for))
    checks.append(check_shapes(expected, as_read, factors, made_for))
    if any(check.status != OK for check in checks[-2:]):
        return Diagnosis(str(adapter), base_name, checks, file, None, old_factors)
    checks.append(check_effect(factors, as_read))
    return Diagnosis(str(adapter), base_name, checks, file, _report(model, factors, as_read), old_factors)


def convert_adapter(diagnosis: Diagnosis, folder: str | Path, progress: bool = False) -> None:
    """
    Write an adapter of PEFT before 0.19.1 in today's layout, into a folder that is not there yet.

    Before, random vectors are multiplied with the product of every expert's factors in both layouts, and compared.

    Args:
        diagnosis ([`Diagnosis`]): That of the adapter.
        folder (`str` or `Path`): Where to write it.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Raises:
        ExpertLoraError: if the adapter is not in the old layout, if something else is wrong with it, or if the folder is there.
    """
    if not diagnosis.old_factors:
        raise ExpertLoraError(
            f"{diagnosis.adapter} is not in the layout of an older PEFT: there is nothing to convert."
        )
    others = [check for check in diagnosis.problems if check.name not in ("layout", "effect")]
    if others:
        found = "; ".join(f"{check.name}: {check.found}" for check in others)
        raise ExpertLoraError(f"{diagnosis.adapter} has problems that converting would keep ({found}).")
    converted = diagnosis.file.converted(diagnosis.old_factors)
    for one in tqdm(
        diagnosis.old_factors, desc="Comparing layouts", unit=" targets", disable=None if progress else True
    ):
        _compare_products(one, diagnosis.file.tensors, converted.tensors)
    converted.write(Path(folder))


def _expected_shapes(model: PeftModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """What PEFT would save, and embeddings where the file has them: they are saved when the vocabulary was changed."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = model.get_base_model()
    embeddings = [layer.weight for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer]
    for name, parameter in model.named_parameters():
        if name in tensors and any(parameter is weight for weight in embeddings):
            expected[name] = parameter
    return {name: tensor.shape for name, tensor in expected.items()}


def _report(model: PeftModel, factors: list[Factors], tensors: dict[str, torch.Tensor]) -> ExpertLoraReport | None:
    """What would train if the adapter were loaded for training."""
    for one in factors:
        if one.num_experts > 1:  # of these, the values say which ranks there are
            layer: Any = model.get_submodule(one.key)
            layer.lora_A["default"].weight = nn.Parameter(tensors[one.a])
            layer.lora_B["default"].weight = nn.Parameter(tensors[one.b])
    refused = []
    if any(True for _ in expert_wrappers(model)):
        try:
            enable_grouped_lora(model)
        except ExpertLoraError as error:
            refused.append(f"hf_moe leaves the adapters of the experts to PEFT: {error}")
    try:
        report = expert_lora_report(model)
    except ExpertLoraError:
        return None  # no mixture of experts
    return replace(report, warnings=[*report.warnings, *refused])


def _compare_products(one: Factors, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Multiply random vectors with the product of the old factors and with that of the new ones, for every expert."""
    experts, rank = one.num_experts, one.rank
    vectors_IV = torch.randn(one.in_features, 4, generator=torch.Generator().manual_seed(0))
    old_a_ERO, old_b_IRE = old[one.a].reshape(experts, rank, -1).float(), old[one.b].reshape(-1, rank, experts).float()
    new_a_ERI, new_b_ORE = new[one.a].reshape(experts, rank, -1).float(), new[one.b].reshape(-1, rank, experts).float()
    before = torch.einsum("ero,erv->eov", old_a_ERO, torch.einsum("ire,iv->erv", old_b_IRE, vectors_IV))
    after = torch.einsum("ore,erv->eov", new_b_ORE, torch.einsum("eri,iv->erv", new_a_ERI, vectors_IV))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
        raise ExpertLoraError(
            f"Converting {one.name} would change what it computes. Nothing was written; please report this with the adapter."
        )
