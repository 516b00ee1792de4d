# SPDX-License-Identifier: Apache-2.0
"""The checks of an adapter's tensors: their names, shapes and values, and whether they have an effect."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

import torch

from .checks import OK, PROBLEM, SINGLE_EXPERT, WARNING, Check, named, some_of
from .factors import Factors
from .layers import layer_index, name_in_layer, number_ranges


def check_keys(expected: Collection[str], found: Collection[str], made_for: str | None) -> Check:
    """Whether every tensor has a place, and every place a tensor."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if not missing and not unexpected:
        return Check("keys", OK, f"{len(expected)} tensors, each with its place in the model")
    details = []
    if unexpected:
        details.append(
            f"{len(unexpected)} of {len(found)} tensors have no place in the model: {some_of(unexpected)}. PEFT would leave them out "
            "without an error."
        )
    if missing:
        details.append(
            f"{len(missing)} of {len(expected)} tensors are missing in the file: {some_of(missing)}. PEFT would keep the initial "
            "values."
        )
    if any(SINGLE_EXPERT.search(name) for name in unexpected):
        details.append(
            "Some are of single experts, as in classes where every expert is a module (transformers 4). PEFT joins these for "
            "a few classes only. Merge the adapter into the model that it was made on, or train it again."
        )
    elif any(".default." in name for name in unexpected):
        details.append(
            "The names have an adapter's name in them: save with `save_pretrained` instead of `state_dict`."
        )
    elif not unexpected and _layers(found) == _layers(expected):
        details.append(
            "Save or download the adapter again, or take out of adapter_config.json what was not trained: `target_modules`, "
            "`target_parameters`, `modules_to_save`."
        )
    elif _layers(found) == _layers(expected) and len(missing) + len(unexpected) <= len(expected) // 4:
        details.append(
            "All others fit, so that these were renamed, added or left out after the training: save or download the adapter again."
        )
    else:
        if _layers(found) != _layers(expected):
            details.append(f"The file has layers {_layers(found)}, and {_layers(expected)} are expected.")
        details.append(
            f"The adapter is of another base model or class{named(made_for)}, or was saved by another program."
        )
    counts = [f"{len(missing)} missing"] if missing else []
    counts += [f"{len(unexpected)} without a place"] if unexpected else []
    return Check("keys", PROBLEM, ", ".join(counts), " ".join(details))


def check_shapes(
    expected: dict[str, torch.Size], tensors: dict[str, torch.Tensor], factors: list[Factors], made_for: str | None
) -> Check:
    """Whether the tensors are as large as the model and the configuration have it."""
    common = expected.keys() & tensors.keys()
    wrong = sorted(name for name in common if tensors[name].shape != expected[name])
    if not wrong:
        return Check(
            "shapes",
            OK,
            f"as in the model, of the {len(common)} tensors that have a place in it"
            if common
            else "there is nothing to compare",
        )
    described: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    only_ranks, is_damaged = True, False
    for one in factors:
        if not {one.a, one.b} & set(wrong):
            continue
        a, b = tensors.get(one.a), tensors.get(one.b)
        is_damaged = is_damaged or (a is not None and b is not None and len(a) != b.shape[1])
        fits = (a is None or a.shape[-1] == one.in_features) and (b is None or b.shape[0] == one.out_features)
        only_ranks = only_ranks and fits
        described[name_in_layer(one.name), _compare(one, a, b)].append(layer_index(one.name))
    explained = {name for one in factors for name in (one.a, one.b)}
    facts = [
        f"{name} ({comparison}; layer {number_ranges(layers)})" for (name, comparison), layers in described.items()
    ]
    facts += [
        f"{name} is {tuple(tensors[name].shape)}, in the model {tuple(expected[name])}"
        for name in wrong
        if name not in explained
    ]
    of_modules = [one for one in factors if one.num_experts == 1 and {one.a, one.b} & set(wrong)]
    if is_damaged:
        cause = "Two factors of one target have not the same rank, so the file is damaged: save or download the adapter again."
    elif only_ranks and of_modules:
        cause = "The ranks are not those of adapter_config.json: correct `r` and `rank_pattern` there, if the file is the right one."
    elif only_ranks and described:
        cause = (
            f"Either the adapter is of a base model with another number of experts{named(made_for)}, or its rank is not that of "
            "adapter_config.json (`r`, `rank_pattern`)."
        )
    else:
        cause = f"The adapter is of another base model{named(made_for)}."
    return Check("shapes", PROBLEM, f"{len(wrong)} tensors of other sizes", f"{'; '.join(facts[:6])}. {cause}")


def _compare(one: Factors, a: torch.Tensor | None, b: torch.Tensor | None) -> str:
    """What the file has, and what the model."""
    parts = []
    if a is not None and len(a) != one.rank * one.num_experts:
        if one.num_experts == 1:
            parts.append(f"rank {len(a)} instead of {one.rank}")
        else:
            readings = [f"{len(a) // one.rank} experts of rank {one.rank}"] if len(a) % one.rank == 0 else []
            if len(a) % one.num_experts == 0:
                readings.append(f"{one.num_experts} experts of rank {len(a) // one.num_experts}")
            found = " or ".join(readings) or f"{len(a)} rows"
            parts.append(f"{found} instead of {one.num_experts} experts of rank {one.rank}")
    if a is not None and a.shape[-1] != one.in_features:
        parts.append(f"input {a.shape[-1]} instead of {one.in_features}")
    if b is not None and len(b) != one.out_features:
        parts.append(f"output {len(b)} instead of {one.out_features}")
    return ", ".join(parts) or "its two factors do not fit each other"


def check_values(tensors: dict[str, torch.Tensor]) -> Check:
    """Whether all numbers are finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not broken:
        return Check("values", OK, f"all finite ({sum(tensor.numel() for tensor in tensors.values()):,} numbers)")
    return Check(
        "values",
        PROBLEM,
        f"NaN or infinite in {len(broken)} of {len(tensors)} tensors",
        f"{some_of(broken)}: values that are NaN or infinite, so that the model would give nothing else. The training diverged or "
        "the file is damaged: take an earlier checkpoint.",
    )


def check_effect(factors: list[Factors], tensors: dict[str, torch.Tensor]) -> Check:
    """Whether the products of the factors are other than zero."""
    silent: dict[str, list[int | None]] = defaultdict(list)
    silent_experts: dict[str, list[str]] = defaultdict(list)
    num_silent = num_experts = 0
    for one in factors:
        a_is_zero, b_is_zero = _zero_experts(one, tensors)
        if (a_is_zero | b_is_zero).all():
            silent[name_in_layer(one.name)].append(layer_index(one.name))
        elif one.num_experts > 1:
            num_experts += one.num_experts
            ids = (b_is_zero & ~a_is_zero).nonzero().flatten().tolist()  # where both are zero, the expert got no rank
            num_silent += len(ids)
            if ids:
                silent_experts[name_in_layer(one.name)].append(f"layer {layer_index(one.name)}: {number_ranges(ids)}")
    others = len(tensors) - 2 * len(factors)
    if sum(map(len, silent.values())) == len(factors) and not others:
        return Check(
            "effect",
            PROBLEM,
            "none: lora_B is zero everywhere",
            "lora_B is zero everywhere, as before the first training step, so that the adapter changes nothing. Save the model that "
            "was trained. If it is that, its adapters got no gradient; the gradient checks of `hf-moe doctor --run` show which.",
        )
    if silent:
        places = "; ".join(f"{name} in layer {number_ranges(layers)}" for name, layers in silent.items())
        return Check(
            "effect",
            WARNING,
            f"none in {sum(map(len, silent.values()))} of {len(factors)} targets",
            f"Without effect, since a factor is zero: {places}. Were they meant to train?",
        )
    if silent_experts:
        places = "; ".join(f"{name} in {', '.join(layers)}" for name, layers in silent_experts.items())
        return Check(
            "effect",
            WARNING,
            f"none in {num_silent} of {num_experts} factor pairs of experts",
            f"{num_silent} of {num_experts} factor pairs of experts have a lora_B of zero, so that no token reached them in training, or "
            f"they were left out: {places}.",
        )
    return Check("effect", OK, f"none of {len(factors)} targets is without")


def _zero_experts(one: Factors, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per expert whether each of its factors is zero."""
    a_E = tensors[one.a].reshape(one.num_experts, -1).eq(0).all(-1)
    b_E = tensors[one.b].reshape(-1, one.num_experts).eq(0).all(0)
    return a_E, b_E


def _layers(names: Iterable[str]) -> str:
    return number_ranges({int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}) or "none"
