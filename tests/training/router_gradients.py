# SPDX-License-Identifier: Apache-2.0
"""
What a balance loss adds to the gradients of routers, under a Trainer in every setting that could scale or lose it;
`render` makes the table of examples/guides/balance.md from it (`python tests/guide_tables.py`).
"""

import math
import tempfile
from typing import Any

import torch
from small_models import small_moe
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_moe.training.load_balancing import LoadBalancer
from hf_moe.training.moe_callback import Attachment
from hf_moe.training.routers import find_routers


MODELS = {"Qwen3-MoE": "qwen3_moe", "Mixtral": "mixtral", "DeepSeek-V3": "deepseek_v3", "MoeLlama": "moe_llama"}
KINDS: dict[str, dict[str, Any]] = {
    "switch": {},
    "global_batch": {},
    "sequence": {},
    "device": {"num_devices": 2},
    "importance_load": {},
    "z": {},
    "entropy": {},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "accumulation 2": {"gradient_accumulation_steps": 2},
    "accumulation 4": {"gradient_accumulation_steps": 4},
    "accumulation 8": {"gradient_accumulation_steps": 8},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "`compute_loss_func`": {"compute_loss_func": True},
    "checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "all at once": {
        "gradient_accumulation_steps": 4,
        "label_smoothing_factor": 0.1,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


def rows(number: int = 2) -> list[dict[str, torch.Tensor]]:
    """Different rows of 12 tokens, every other one with three of padding on the left."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for row in range(number):
        input_ids = torch.randint(3, 96, (12,), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[: 3 * (row % 2)] = 0
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        made.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return made


class _OneTermPerStep(TrainerCallback):
    """In every optimizer step another term; takes the routers' gradients of each."""

    def __init__(self, trainer: Trainer, terms: list[LoadBalancer | None]):
        self.attachment, self.terms, self.gradients = Attachment(trainer), terms, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if (term := self.terms[state.global_step]) is not None:
            term.attach(self.attachment.hooks(model), loss_scale=self.attachment.loss_scale)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [router.module.weight.grad for router in find_routers(model).values()]
        self.gradients.append(torch.stack([whole(gradient) for gradient in gradients]))

    def on_step_end(self, args, state, control, **kwargs):
        if (term := self.terms[state.global_step - 1]) is not None:
            term.step()
            term.detach()


def gradients_of(
    model: PreTrainedModel, terms: list[LoadBalancer | None], data: list[dict[str, torch.Tensor]], **setting: Any
) -> list[torch.Tensor]:
    """
    The gradients `(layers, E, H)` of the routers in one optimizer step with each of the terms, the weights unchanged.

    The rows of `data` are what every optimizer step sees, or each of its micro-batches where they are but one.
    """
    loss_function = _mean_cross_entropy if setting.pop("compute_loss_func", False) else None
    steps = setting.get("gradient_accumulation_steps", 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            max_steps=len(terms),
            learning_rate=0.0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing="gradient_checkpointing_kwargs" in setting,
            disable_tqdm=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            **setting,
        )
        trainer = Trainer(
            model, arguments, train_dataset=data * (2 * steps * len(terms)), compute_loss_func=loss_function
        )
        per_step = _OneTermPerStep(trainer, terms)
        trainer.callback_handler.callbacks.append(per_step)
        trainer.train()
    return per_step.gradients


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A copy of all of a gradient, also where FSDP2 has sharded it."""
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().clone()


def injected_gradients(
    model: str | PreTrainedModel,
    data: list[dict[str, torch.Tensor]],
    kinds: dict[str, dict[str, Any]] = KINDS,
    **setting: Any,
) -> dict[str, torch.Tensor]:
    """What each kind of loss adds to the routers' gradients, by what there is without it."""
    terms = {name: LoadBalancer(name, coef=1.0, **options) for name, options in kinds.items()}
    # Twice: the second time with what was counted in the first step.
    for name, options in kinds.items():
        if name in ("global_batch", "sparsity") or "adaptive" in options:
            terms[f"{name}, second step"] = terms[name]
    model = trainable(model) if isinstance(model, str) else model
    without, *with_term = gradients_of(model, [None, *terms.values()], data, **setting)
    return {name: gradient - without for name, gradient in zip(terms, with_term, strict=True)}


def native_gradient(kind: str, data: list[dict[str, torch.Tensor]], **setting: Any) -> torch.Tensor:
    """What transformers' own term adds, with a coefficient of 1."""
    model = trainable(kind)
    (without,) = gradients_of(model, [None], data, **setting)
    model = trainable(kind, output_router_logits=True, router_aux_loss_coef=1.0)
    (with_term,) = gradients_of(model, [None], data, **setting)
    return with_term - without


def trainable(kind: str, **values: Any) -> PreTrainedModel:
    model = small_moe(kind, **values)
    return model.requires_grad_(True).train()


def _mean_cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def render() -> str:
    """The norm of what is added, by that with one micro-batch, for transformers' own term and hf_moe's."""
    lines = ["| | " + " | ".join(SETTINGS) + " |", "|---|" + "---|" * len(SETTINGS)]
    terms = {
        "transformers": native_gradient,
        "hf_moe": lambda *args, **setting: injected_gradients(*args, **setting)["switch"],
    }
    for name, kind in MODELS.items():
        for owner, gradient in terms.items():
            norms = []
            for setting in SETTINGS.values():
                try:
                    norms.append(gradient(kind, rows(), **setting).norm().item())
                except ValueError:
                    norms.append(math.nan)
            ratios = [f"{norm / norms[0]:.3f}" if norms[0] else "no loss" for norm in norms]
            lines.append(f"| {name}, {owner} | " + " | ".join(ratios).replace("nan", "refused") + " |")
    return "\n".join(lines)
