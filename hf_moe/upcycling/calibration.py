# SPDX-License-Identifier: Apache-2.0
"""
One pass of calibration text through the dense model, for all that a recipe wants to know of its hidden states.

`read_calibration` turns text files or prompts into tokens; `calibrate` runs them and gives, per layer, the rows of the
router and the experts of the neurons, where the recipe lets data decide.
"""

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from .errors import UpcycleError
from .families import Family
from .feed_forward import FeedForward, LayerContext
from .partition import NEURON_EXPERT, co_activation_partition, importance_partition
from .plan import UpcyclePlan
from .recipe import UpcycleConfig
from .router_data import cluster_sequences, with_logit_std
from .router_init import ROUTER_INITIALIZERS, ROUTER_ROWS, Seen


SEQUENCE_LENGTH = 512
MIN_TOKENS_PER_ROW = 32
TOKENS_KEPT_PER_LAYER = 512
Observations = dict[int, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Calibration:
    """
    Tokenised text: N sequences of at most S tokens.

    Args:
        input_ids (`torch.Tensor` of shape `(N, S)`), attention_mask (`torch.Tensor` of shape `(N, S)`): The sequences.
        domain_N (`torch.Tensor` of shape `(N,)`): Which text file, or which expert's prompts, each belongs to.
        is_negative_N (`torch.Tensor` of shape `(N,)`): Whether it is a negative prompt.
        num_domains (`int`): Number of text files, or of experts with prompts.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    domain_N: torch.Tensor
    is_negative_N: torch.Tensor
    num_domains: int

    def seen(self, hidden_states_NSH: torch.Tensor, folder: Path | None) -> Seen:
        """What an initialiser sees of hidden states of these sequences."""
        mask_NS = self.attention_mask.bool()
        sequence_NS = torch.arange(len(mask_NS))[:, None].expand_as(mask_NS)
        sequence_T = sequence_NS[mask_NS]
        return Seen(
            hidden_states_NSH.detach().float().cpu()[mask_NS],
            sequence_T,
            self.domain_N[sequence_T],
            self.num_domains,
            self.is_negative_N[sequence_T],
            folder,
        )


def read_calibration(
    recipe: UpcycleConfig, plan: UpcyclePlan, tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> Calibration:
    """
    Tokenise the recipe's `calibration_text`, or its `prompts`.

    Raises:
        UpcycleError: if there is no tokenizer, if a file cannot be read or is too short, or if a prompt has no tokens.
    """
    if tokenizer is None:
        raise UpcycleError(
            "Calibration text and prompts need a tokenizer, and the dense model has none that loads. Save it into the "
            "model's folder, or use router_init='normal' and a `split_by` without data."
        )
    num_rows = max(plan.experts_in_layer.values()) // plan.sizes.experts_per_copy
    if recipe.learns_from_text:
        length = min(max_length, SEQUENCE_LENGTH)
        return _read_texts(recipe, tokenizer, length, [Path(file) for file in recipe.calibration_files], num_rows)
    return _read_prompts(recipe, tokenizer, max_length)


def calibrate(
    model: PreTrainedModel,
    calibration: Calibration,
    family: Family,
    plan: UpcyclePlan,
    recipe: UpcycleConfig,
    read_feed_forward: Callable[[int], FeedForward],
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> Observations:
    """
    Run the calibration text through the dense model once, and let every converted layer decide what it must.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model, in memory or streamed. `split_by="gradient"` takes
            gradients, and so needs a causal language model in memory, and a second pass.
        read_feed_forward (`Callable`): From the index of a layer to its dense feed-forward.
        folder (`Path`, *optional*): Where initialisers keep what is needed to go on from the result later.

    Returns:
        `dict[int, dict[str, torch.Tensor]]`: by layer, `router_rows` `(R, H)` and `neuron_expert` `(I,)`, as far as the
        recipe lets data decide them.
    """
    observations: Observations = {index: {} for index in plan.experts_in_layer}
    contexts = {index: LayerContext(recipe, index, count) for index, count in plan.experts_in_layer.items()}
    initializer = ROUTER_INITIALIZERS[recipe.router_init]
    split_by = recipe.split_by if recipe.method == "split" else None
    some_inputs: dict[int, torch.Tensor] = {}

    def observe(index: int, hidden_states: torch.Tensor) -> None:
        seen, context = calibration.seen(hidden_states, folder), contexts[index]
        if not initializer.of_layer:
            some_inputs[index] = seen.inputs_TH[:: math.ceil(len(seen.inputs_TH) / TOKENS_KEPT_PER_LAYER)].clone()
        if initializer.needs is not None and initializer.of_layer:
            observations[index][ROUTER_ROWS] = initializer.build(plan.num_router_rows(index), seen, context)
        if split_by == "activation":
            observations[index][NEURON_EXPERT] = co_activation_partition(
                read_feed_forward(index), seen.inputs_TH, ACT2FN[plan.config.hidden_act], context
            )

    last_hidden_state = _observed_pass(model, calibration, family, list(contexts), observe, progress)
    if initializer.needs is not None and not initializer.of_layer:
        seen = calibration.seen(last_hidden_state, None)
        for index, context in contexts.items():
            directions = initializer.build(plan.num_router_rows(index), seen, context)
            rows = with_logit_std(directions, some_inputs[index], recipe.router_logit_std)
            observations[index][ROUTER_ROWS] = rows
    if split_by == "gradient":
        importance = neuron_importance(model, calibration, family, list(contexts), progress)
        for index, context in contexts.items():
            domain_N = calibration.domain_N
            if calibration.num_domains != context.num_experts:
                domain_N = cluster_sequences(calibration.seen(last_hidden_state, None), context)
            observations[index][NEURON_EXPERT] = importance_partition(importance[index], domain_N, context)
    return observations


def _observed_pass(
    model: PreTrainedModel,
    calibration: Calibration,
    family: Family,
    indices: list[int],
    observe: Callable[[int, torch.Tensor], None],
    progress: bool,
) -> torch.Tensor:
    """One forward pass in which `observe` gets what goes into the feed-forward of each layer; returns the last states."""
    layers = model.base_model.get_submodule(family.layers)
    inputs = {"input_ids": calibration.input_ids, "attention_mask": calibration.attention_mask}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(layers), desc="Calibrating", unit=" layers", disable=None if progress else True)
        )
        for index, layer in enumerate(layers):
            if index in indices:
                module = layer.get_submodule(family.feed_forward.up)
                hook = module.register_forward_pre_hook(
                    lambda module, args, index=index: observe(index, args[0].reshape(*calibration.input_ids.shape, -1))
                )
                stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(lambda *_: bar.update() and None).remove)
        # A streamed model says "meta", and takes its inputs on the CPU.
        device = "cpu" if model.device.type == "meta" else model.device
        with torch.no_grad():
            return model.base_model(**{name: ids.to(device) for name, ids in inputs.items()}).last_hidden_state


def neuron_importance(
    model: PreTrainedModel, calibration: Calibration, family: Family, indices: list[int], progress: bool
) -> dict[int, torch.Tensor]:
    """
    How much the loss of each sequence would change without each neuron, to first order: `|h * dL/dh|`, summed over tokens.

    Returns:
        `dict[int, torch.Tensor]`: `(N, I)` by layer, for N sequences and I neurons.
    """
    layers = model.base_model.get_submodule(family.layers)
    captured: dict[int, torch.Tensor] = {}
    importance: dict[int, list[torch.Tensor]] = {index: [] for index in indices}
    with ExitStack() as stack:
        for index in indices:
            module = layers[index].get_submodule(family.feed_forward.down)

            def capture(module: torch.nn.Module, args: tuple, index: int = index) -> None:
                captured[index] = args[0]

            stack.callback(module.register_forward_pre_hook(capture).remove)
        for ids, mask in tqdm(
            zip(calibration.input_ids, calibration.attention_mask, strict=True),
            total=len(calibration.input_ids),
            desc="Gradients",
            unit=" sequences",
            disable=None if progress else True,
        ):
            tokens = ids[mask.bool()][None].to(model.device)
            embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
            with torch.enable_grad():
                loss = model(inputs_embeds=embeddings, labels=tokens).loss
                gradients = torch.autograd.grad(loss, [captured[index] for index in indices])
            for index, gradient in zip(indices, gradients, strict=True):
                effect = (captured[index].detach() * gradient).float().abs()
                importance[index].append(effect.reshape(-1, effect.shape[-1]).sum(dim=0).cpu())
    return {index: torch.stack(per_sequence) for index, per_sequence in importance.items()}


def _read_texts(
    recipe: UpcycleConfig, tokenizer: PreTrainedTokenizerBase, length: int, files: list[Path], num_rows: int
) -> Calibration:
    sequences, domains, is_cut = [], [], False
    per_file = max(recipe.calibration_tokens // len(files), 1)
    for domain, path in enumerate(files):
        whole = tokenizer(read_text(path), truncation=False, verbose=False)["input_ids"]
        ids, is_cut = whole[:per_file], is_cut or len(whole) > per_file
        if len(ids) < MIN_TOKENS_PER_ROW:
            raise UpcycleError(
                f"The calibration text {path} gives {len(ids)} tokens; each file needs at least {MIN_TOKENS_PER_ROW}. "
                f"{_how_to_get_more(recipe, is_cut)}"
            )
        blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
        sequences += blocks
        domains += [domain] * len(blocks)
    total = sum(map(len, sequences))
    if total < MIN_TOKENS_PER_ROW * num_rows:
        raise UpcycleError(
            f"The calibration text has {total} tokens, but {num_rows} experts need at least {MIN_TOKENS_PER_ROW} each, "
            f"{MIN_TOKENS_PER_ROW * num_rows} together. {_how_to_get_more(recipe, is_cut)}"
        )
    return _padded(sequences, domains, [False] * len(sequences), len(files))


def _how_to_get_more(recipe: UpcycleConfig, is_cut: bool) -> str:
    return f"Raise `calibration_tokens` ({recipe.calibration_tokens})." if is_cut else "Give more text."


def read_text(path: Path) -> str:
    """The text of a file; of a `.jsonl` file the field `text` of every line."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return content
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    except OSError as error:
        raise UpcycleError(f"The calibration text {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UpcycleError(
            f"The calibration text {path} is neither UTF-8 text nor JSON lines with a field 'text': {error!r}."
        ) from error


def _read_prompts(recipe: UpcycleConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration:
    entries = recipe.prompts or []
    sequences, domains, is_negative = [], [], []
    for expert_index, entry in enumerate(entries):
        for kind in ("positive", "negative"):
            for prompt in entry.get(kind, []):
                sequences.append(tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"])
                if not sequences[-1]:
                    raise UpcycleError(f"The prompt {prompt!r} of expert {expert_index} has no tokens.")
                domains.append(expert_index)
                is_negative.append(kind == "negative")
    return _padded(sequences, domains, is_negative, len(entries))


def _padded(sequences: list[list[int]], domains: list[int], is_negative: list[bool], num_domains: int) -> Calibration:
    length = max(map(len, sequences))
    # Masked positions are never looked at, so any token will do.
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return Calibration(input_ids, attention_mask, torch.tensor(domains), torch.tensor(is_negative), num_domains)
