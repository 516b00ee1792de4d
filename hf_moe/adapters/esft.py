# SPDX-License-Identifier: Apache-2.0
"""`apply_esft`: full fine-tuning of a few chosen experts, as ESFT does it (https://huggingface.co/papers/2407.01906)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .errors import ExpertLoraError
from .expert_scores import ExpertSelection
from .grouped_forward import IMPLEMENTATION, SLICES, Routing
from .layers import check_replaceable, experts_by_layer, projections
from .param_wrapper import restore_implementation, use_implementation


SELECTION_NAME = "expert_cfg.json"
WEIGHTS_NAME = "experts.safetensors"


class ExpertSlices(nn.Module):
    """
    The experts of a layer that are trained: parameters of their own, with the names of what they are cut out of.

    The others have no gradient, no optimizer state and no weight decay. The layer computes with its own weights, into which
    these are written before every forward pass.

    Args:
        experts (`torch.nn.Module`): The layer of experts.
        ids (`list[int]`): Which of them.
        dtype (`torch.dtype`): Type of the copies that are trained.
    """

    def __init__(self, experts: nn.Module, ids: list[int], dtype: torch.dtype):
        super().__init__()
        device = experts.down_proj.device
        self.register_buffer("ids_N", torch.tensor(ids, device=device), persistent=False)
        local_E = torch.full((experts.num_experts,), -1, device=device)
        local_E[self.ids_N] = torch.arange(len(ids), device=device)
        self.register_buffer("local_E", local_E, persistent=False)
        names = projections(experts)
        if experts.has_bias:
            names += [f"{name}_bias" for name in names]
        for name in names:
            weight = getattr(experts, name).detach()[self.ids_N].to(dtype)
            self.register_parameter(name, nn.Parameter(weight))

    @torch.no_grad()
    def write_to(self, experts: nn.Module) -> None:
        """Put the trained experts among the others."""
        for name, parameter in self.named_parameters():
            # Through `.data`, since what a pass before this one saved has the same values.
            weight = getattr(experts, name).data
            weight[self.ids_N] = parameter.to(weight.dtype)

    @torch.no_grad()
    def read_from(self, experts: nn.Module, names: list[str]) -> None:
        """Take parameters of the trained experts from among the others, after something has loaded these."""
        for name in names:
            self.get_parameter(name).copy_(getattr(experts, name)[self.ids_N])

    def pairs(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the pairs whose expert is trained: their rows, the place of the expert in here, and where these end."""
        local_S = self.local_E[routing.expert_S]
        if routing.elsewhere_S is not None:
            local_S = local_S.masked_fill(routing.elsewhere_S, -1)
        rows_C = torch.nonzero(local_S >= 0).flatten()
        local_C = local_S[rows_C]
        all_N = torch.arange(len(self.ids_N), device=rows_C.device)
        return rows_C, local_C, torch.searchsorted(local_C, all_N, right=True, out_int32=True)


def apply_esft(
    model: PreTrainedModel, selection: ExpertSelection, dtype: torch.dtype | None = torch.float32
) -> PreTrainedModel:
    """
    Train the selected experts fully and nothing else, or what else the selection says.

    `state_dict`, `save_pretrained` and the checkpoints of `Trainer` hold the whole model under its own names, with what was
    trained. [`save_esft`] writes the trained experts alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): A mixture of experts. It is changed and returned.
        selection ([`ExpertSelection`]): From [`select_experts`], or `ExpertSelection.load("expert_cfg.json")`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the copies that the optimizer works on; that of
            the model if None. The model itself keeps its type.

    Raises:
        ExpertLoraError: if the selection does not fit the model, or its experts cannot be trained in part.

    Example:

    ```python
    >>> from hf_moe import apply_esft, score_experts, select_experts

    >>> scores = score_experts(model, dataloader, kind="token", num_tokens=131072)
    >>> model = apply_esft(model, select_experts(scores, top_p=0.2))
    ```
    """
    experts = experts_by_layer(model)
    _check(model, selection, experts)
    for name, parameter in model.named_parameters():
        in_experts = any(name.startswith(f"{prefix}.") for prefix, _ in experts.values())
        trained = selection.shared_experts if _is_shared(name) else selection.non_expert_modules
        parameter.requires_grad_(trained and not in_experts)
    for layer, ids in selection.experts.items():
        if not ids:
            continue
        module = experts[layer][1]
        slices = ExpertSlices(module, sorted(ids), dtype or module.down_proj.dtype)
        module.add_module(SLICES, slices)
        use_implementation(module)
        # The model on disk is the model without slices.
        module._hf_moe_esft_handles = [
            module.register_state_dict_pre_hook(_before_state_dict),
            module.register_state_dict_post_hook(_after_state_dict),
            module.register_load_state_dict_post_hook(_after_load_state_dict),
            module.register_forward_pre_hook(_before_forward),
        ]
    return model


def remove_esft(model: PreTrainedModel) -> PreTrainedModel:
    """Leave the trained experts among the others, as an ordinary model whose experts are frozen; it is changed and returned."""
    for _, _, module, slices in _sliced(model):
        slices.write_to(module)
        for handle in module.__dict__.pop("_hf_moe_esft_handles"):
            handle.remove()
        delattr(module, SLICES)
        restore_implementation(module)
    return model


def save_esft(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Write the trained experts alone: `experts.safetensors` with their rows of the model's tensors, in its type, and
    `expert_cfg.json` with which these are.

    Args:
        model ([`~transformers.PreTrainedModel`]): After [`apply_esft`].
        folder (`str`): Where to. It is made; the two files in it are replaced.

    Raises:
        ExpertLoraError: if [`apply_esft`] was not called, or other modules are trained as well.
    """
    sliced = list(_sliced(model))
    if not sliced:
        raise ExpertLoraError("No experts of this model are trained by `apply_esft`, so that there are none to save.")
    others = [name for name, of in model.named_parameters() if of.requires_grad and f".{SLICES}." not in name]
    if others:
        raise ExpertLoraError(
            f"{others[0]!r} and {len(others) - 1} other parameters outside the experts are trained too. Save the whole model with "
            "`save_pretrained`."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors, experts = {}, {}
    for layer, name, module, slices in sliced:
        experts[layer] = slices.ids_N.tolist()
        for part, parameter in slices.named_parameters():
            tensors[f"{name}.{part}"] = parameter.detach().to(getattr(module, part).dtype).contiguous()
    save_file(tensors, Path(folder, WEIGHTS_NAME), metadata={"format": "pt"})
    ExpertSelection(experts).save(Path(folder, SELECTION_NAME))


@torch.no_grad()
def load_esft(model: PreTrainedModel, folder: str | os.PathLike) -> PreTrainedModel:
    """
    Put experts that [`save_esft`] wrote into the model that they were made for; it is changed and returned.

    Raises:
        ExpertLoraError: if a tensor is missing, left over, of another shape or not finite. The model is then as it was.
    """
    if missing := [name for name in (SELECTION_NAME, WEIGHTS_NAME) if not Path(folder, name).is_file()]:
        raise ExpertLoraError(
            f"{folder} has no {missing[0]}, so it is nothing that `save_esft` wrote. An adapter is loaded with PEFT's "
            "`PeftModel.from_pretrained`."
        )
    selection = ExpertSelection.load(Path(folder, SELECTION_NAME))
    experts = experts_by_layer(model)
    _check(model, selection, experts)
    rows = []
    with safe_open(Path(folder, WEIGHTS_NAME), framework="pt") as file:
        expected = {}
        for layer, ids in selection.experts.items():
            name, module = experts[layer]
            for part, weight in module.named_parameters(recurse=False):
                if part.removesuffix("_bias") in projections(module):
                    expected[f"{name}.{part}"] = (weight, ids)
        if wrong := sorted(set(file.keys()) ^ set(expected)):
            raise ExpertLoraError(
                f"{folder} is not of this model: {wrong[0]!r} is {'missing' if wrong[0] in expected else 'left over'}, one of "
                f"{len(wrong)} such tensors. Load the model that the experts were trained in."
            )
        for name, (weight, ids) in expected.items():
            tensor = file.get_tensor(name)
            if tensor.shape != (len(ids), *weight.shape[1:]):
                raise ExpertLoraError(
                    f"{name} in {folder} has the shape {tuple(tensor.shape)}, but {len(ids)} experts of this model have "
                    f"{(len(ids), *weight.shape[1:])}. Load the model that the experts were trained in."
                )
            if not tensor.isfinite().all():
                raise ExpertLoraError(
                    f"{name} in {folder} is not finite: its training has diverged. Take an earlier checkpoint."
                )
            rows.append((weight, ids, tensor))
    for weight, ids, tensor in rows:
        weight[ids] = tensor.to(weight.device, weight.dtype)
    return model


def _sliced(model: nn.Module) -> Iterator[tuple[int, str, nn.Module, ExpertSlices]]:
    for layer, (name, module) in experts_by_layer(model).items():
        if (slices := getattr(module, SLICES, None)) is not None:
            yield layer, name, module, slices


def _check(model: nn.Module, selection: ExpertSelection, experts: dict[int, tuple[str, Any]]) -> None:
    if not isinstance(selection, ExpertSelection):
        raise ExpertLoraError(
            f"The selection is a {type(selection).__name__}. Give an ExpertSelection: from `select_experts`, `ExpertSelection.load(path)`, "
            "or `ExpertSelection({layer: [expert, ...]})`."
        )
    if strange := [layer for layer in selection.experts if not isinstance(layer, int)]:
        raise ExpertLoraError(
            f"The selection has the layer {strange[0]!r}, a {type(strange[0]).__name__}. Layers are whole numbers."
        )
    if not any(selection.experts.values()):
        raise ExpertLoraError("The selection has no expert.")
    for layer, ids in selection.experts.items():
        if layer not in experts:
            raise ExpertLoraError(f"The selection has layer {layer}, but experts are in the layers {list(experts)}.")
        name, module = experts[layer]
        if unknown := [expert for expert in ids if not 0 <= expert < module.num_experts]:
            raise ExpertLoraError(
                f"The selection has expert {unknown[0]} in layer {layer}, which has the experts 0 to {module.num_experts - 1}."
            )
        if len(set(ids)) != len(ids):
            raise ExpertLoraError(f"The selection names an expert of layer {layer} twice: {ids}.")
        if hasattr(module, SLICES):
            raise ExpertLoraError(f"{name} has trained experts already. Call `remove_esft(model)` first.")
        check_replaceable(name, module)
        if parametrize.is_parametrized(module) or isinstance(module.down_proj, DTensor):
            raise ExpertLoraError(
                f"The weights of {name} are quantized or sharded, so that parts of them cannot be trained. Load the model in "
                "bfloat16 and train it with DDP, or use an ExpertLoraConfig with `expert_rank=selection.ranks(...)`."
            )
    if selection.shared_experts and not any(_is_shared(name) for name, _ in model.named_parameters()):
        raise ExpertLoraError("The selection has shared_experts, but this model has none. Set it to False.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ExpertLoraError(
            "The model has an adapter of PEFT. Merge or unload it first (`merge_and_unload()`, `unload()`)."
        )


def _is_shared(name: str) -> bool:
    """Whether a parameter is of what transformers calls `shared_expert`, `shared_experts` or, in Granite, `shared_mlp`."""
    return "shared_expert" in name or "shared_mlp" in name


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    getattr(module, SLICES).write_to(module)


def _after_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{SLICES}.")]:
        del state_dict[name]


def _after_load_state_dict(module: nn.Module, incompatible_keys: Any) -> None:
    slices = getattr(module, SLICES)
    missing, unexpected = incompatible_keys.missing_keys, incompatible_keys.unexpected_keys
    own = {name for name in missing if f".{SLICES}." in f".{name}"}
    # The hook is not told the module's name, but its slices' names have it in them.
    prefix = next(iter(own)).rpartition(f"{SLICES}.")[0] if own else ""
    names = [f"{prefix}{name}" for name, _ in slices.named_parameters()]
    loaded = [name for name in names if name not in missing]
    if not loaded and unexpected:
        raise ExpertLoraError(
            f"The checkpoint has other names for {names[0]!r} (such as {unexpected[0]!r}), which `load_state_dict` and the Trainer's "
            "resumption do not translate. Load it with `from_pretrained` and call `apply_esft` on that model."
        )
    missing[:] = [name for name in missing if name not in own]
    slices.read_from(module, [name.removeprefix(prefix) for name in loaded])


def _before_forward(module: Any, args: tuple) -> None:
    if module.config._experts_implementation != IMPLEMENTATION:
        raise ExpertLoraError(
            f"The experts implementation was changed to {module.config._experts_implementation!r}, with which the chosen experts "
            f"would not be trained. Call `model.set_experts_implementation({IMPLEMENTATION!r})`, or `remove_esft(model)`."
        )
