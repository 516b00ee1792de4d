# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe[plots]"]
# ///
"""
Upcycling methods beside continued dense training, at equal operations: held-out loss against tokens.

    python examples/03_compare_methods.py HuggingFaceTB/SmolLM2-135M-Instruct outputs/compare

Every model is trained on the same stream of code and licence texts with the same learning rate. The dense model gets
`--dense-steps` steps, the others as many as cost the same number of operations, which is what "equal" means here: an
expert model does more per token, and so sees fewer tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from domain_texts import DOMAINS, token_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_moe import UpcycleConfig, plan_upcycle, upcycle_model


RECIPES = {
    "copy": UpcycleConfig(method="copy", num_experts=4, num_experts_per_tok=2),
    "residual": UpcycleConfig(method="residual", granularity=2, num_experts=8, num_experts_per_tok=2),
    "drop": UpcycleConfig(method="drop", num_experts=4, num_experts_per_tok=2),
}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Cross-entropy of the language model alone, in nats per token."""
    model.eval()
    arguments = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    losses = [model(batch, labels=batch, **arguments).loss.item() for batch in blocks.to(model.device).split(4)]
    model.train()
    return sum(losses) / len(losses)


class Curve(TrainerCallback):
    """Measures the held-out loss at even distances, the first time before any step."""

    def __init__(self, validation: dict[str, torch.Tensor], tokens_per_step: int, flops_per_token: int, points: int):
        self.validation, self.points = validation, points
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.measure(0, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in {round(state.max_steps * (i + 1) / self.points) for i in range(self.points)}:
            self.measure(state.global_step, model)

    def measure(self, step: int, model: PreTrainedModel) -> None:
        tokens = step * self.tokens_per_step
        losses = {domain: held_out_loss(model, blocks) for domain, blocks in self.validation.items()}
        # A training step costs a forward pass and a backward pass of twice as much.
        flops = 3 * tokens * self.flops_per_token
        self.rows.append({"tokens": tokens, "flops": flops, **losses, "mean": sum(losses.values()) / len(losses)})


def train(model: PreTrainedModel, dataset: Dataset, steps: int, curve: Curve, arguments: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.output_dir / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            warmup_steps=max(steps // 10, 1),
            lr_scheduler_type="constant_with_warmup",
            bf16=on_gpu,
            logging_steps=50,
            save_strategy="no",
            dataloader_pin_memory=on_gpu,
            report_to=[],
            seed=0,
        ),
        train_dataset=dataset,
        callbacks=[curve],
    ).train()


def models(dense_path: str) -> Iterator[tuple[str, PreTrainedModel, int]]:
    """Name, model in float32, and operations of one token's forward pass."""
    dense = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32)
    for name, recipe in RECIPES.items():
        moe = upcycle_model(dense, recipe)
        moe.config.output_router_logits = True  # the load-balancing loss
        yield name, moe, plan_upcycle(dense.config, recipe).flops_per_token
    yield "dense", dense, plan_upcycle(dense.config, RECIPES["copy"]).dense_flops_per_token


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """All curves, and below them those that start near the dense model from nearer by."""
    from matplotlib.figure import Figure

    start = curves["dense"][0]["mean"]
    near = {name: rows for name, rows in curves.items() if rows[0]["mean"] < 1.5 * start}
    figure = Figure(figsize=(10, 7), layout="constrained")
    for row, shown in zip(figure.subplots(2, 2, sharex="col", sharey="row"), (curves, near), strict=True):
        for axes, key in zip(row, ("tokens", "flops"), strict=True):
            for name, points in shown.items():
                color = "black" if name == "dense" else f"C{list(RECIPES).index(name)}"
                style = "--" if name == "dense" else "-"
                values = [point["mean"] for point in points]
                axes.plot([point[key] for point in points], values, style, color=color, marker="o", label=name)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out loss (nats per token)")
        row[0].legend()
    for axes, label in zip(row, ("tokens", "training operations"), strict=True):
        axes.set_xlabel(label)
    figure.savefig(path, dpi=100)


def table(curves: dict[str, list[dict[str, float]]]) -> str:
    """First and last point of each curve, and where it stands after as many tokens as the shortest has."""
    shared = min(rows[-1]["tokens"] for rows in curves.values())
    header = [
        "",
        "tokens",
        *(f"{domain}" for domain in DOMAINS),
        "mean",
        "mean at step 0",
        f"mean after {shared:,} tokens",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, rows in curves.items():
        first, last = rows[0], rows[-1]
        cells = [name, f"{last['tokens']:,}", *(f"{last[domain]:.3f}" for domain in DOMAINS)]
        cells += [f"{last['mean']:.3f}", f"{first['mean']:.3f}", f"{interpolated(rows, shared):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interpolated(rows: list[dict[str, float]], tokens: float) -> float:
    """The mean loss at a number of tokens between two points of a curve."""
    for before, after in zip(rows, rows[1:], strict=False):
        if before["tokens"] <= tokens <= after["tokens"]:
            share = (tokens - before["tokens"]) / (after["tokens"] - before["tokens"])
            return before["mean"] + share * (after["mean"] - before["mean"])
    raise ValueError(f"The curve ends at {rows[-1]['tokens']} tokens, before {tokens}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="dense model to start from")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--dense-steps", type=int, default=180, help="steps of the dense model; the others cost the same"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--points", type=int, default=8, help="measurements per curve")
    parser.add_argument("--eval-blocks", type=int, default=8, help="validation blocks of 256 tokens per domain")
    arguments = parser.parse_args()
    set_seed(0)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    count = arguments.dense_steps * arguments.batch_size // len(DOMAINS)
    train_blocks = [
        block
        for domain in DOMAINS
        for block in token_blocks(tokenizer, domain, "train", arguments.length, count, per_document=100)
    ]
    dataset = Dataset.from_dict({"input_ids": train_blocks, "labels": train_blocks}).shuffle(seed=0)
    validation = {
        domain: torch.tensor(token_blocks(tokenizer, domain, "validation", 256, arguments.eval_blocks))
        for domain in DOMAINS
    }

    dense_flops = plan_upcycle(arguments.dense, RECIPES["copy"]).dense_flops_per_token
    tokens_per_step = arguments.batch_size * arguments.length
    curves = {}
    for name, model, flops_per_token in models(arguments.dense):
        steps = round(arguments.dense_steps * dense_flops / flops_per_token)
        curve = Curve(validation, tokens_per_step, flops_per_token, arguments.points)
        train(model, dataset, steps, curve, arguments)
        curves[name] = curve.rows
        (arguments.output_dir / "curves.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")

    plot(curves, arguments.output_dir / "compare.png")
    print(
        f"\nheld-out loss, nats per token; {arguments.dense_steps} dense steps of {tokens_per_step} tokens and their cost"
    )
    print(table(curves))


if __name__ == "__main__":
    main()
