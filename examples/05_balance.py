# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe[plots]"]
# ///
"""
Ways to balance the experts of an upcycled model side by side: loss, load and specialization over the steps.

    python examples/fetch_texts.py .cache/texts
    python examples/05_balance.py HuggingFaceTB/SmolLM2-135M-Instruct outputs/balance --texts .cache/texts --steps 24 --points 4

prints, after the lines of the trainers (6 sparse layers of 8 experts, 24 steps of 8 x 128 tokens of code, licences, French and
prose; one run of each):

    | | held-out loss | max violation | entropy | specialization |
    |---|---|---|---|---|
    | start | 3.488 | 1.068 | 0.914 | 0.025 |
    | nothing | 3.088 | 1.027 | 0.914 | 0.025 |
    | nothing, other order | 3.075 | 1.027 | 0.912 | 0.025 |
    | switch 0.01 | 3.089 | 0.743 | 0.940 | 0.024 |
    | switch 0.1 | 3.087 | 0.235 | 0.988 | 0.022 |
    | global_batch 0.1 | 3.088 | 0.227 | 0.988 | 0.028 |
    | bias | 3.083 | 0.373 | 0.977 | 0.029 |

The loss says nothing: all are nearer to each other than two orders of the same texts. The load becomes even with every way to
balance, and stays as it was without. Experts specialize little in so few steps; what there is, the loss of a micro-batch takes
away, and the loss of the global batch and the bias do not. Of each there is one run; on the way the two without anything
differ by up to 0.03 in the loss, 0.05 in max violation and 0.001 in specialization.
"""

import argparse
import json
from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from domain_texts import DOMAINS, add_domains, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_moe


# Of the second run without anything only the order of the texts is another: how far it is from the first is chance.
RUNS: dict[str, list] = {
    "nothing": [],
    "nothing, other order": [],
    "switch 0.01": [lambda: hf_moe.LoadBalancingCallback("switch", 0.01)],
    "switch 0.1": [lambda: hf_moe.LoadBalancingCallback("switch", 0.1)],
    "global_batch 0.1": [lambda: hf_moe.LoadBalancingCallback("global_batch", 0.1)],
    "bias": [lambda: hf_moe.BiasBalancingCallback(0.002)],
}


class Measure(TrainerCallback):
    """At even distances, on held-out text: loss, load and specialization."""

    def __init__(self, validation: dict[str, torch.Tensor], points: int):
        self.validation, self.points = validation, points
        self.specialization = evaluate.load(hf_moe.metric_path("expert_specialization"))
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.measure(0, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in {round(state.max_steps * (point + 1) / self.points) for point in range(self.points)}:
            self.measure(state.global_step, model)

    @torch.no_grad()
    def measure(self, step: int, model: torch.nn.Module) -> None:
        model.eval()
        losses, statistics = {}, {}
        for domain, blocks in self.validation.items():
            with hf_moe.RoutingRecorder(model) as recorder:
                batches = blocks.to(model.device).split(4)
                losses[domain] = sum(model(batch, labels=batch).loss.item() for batch in batches) / len(batches)
            statistics[domain] = recorder.statistics()
        model.train()
        load = hf_moe.RoutingStatistics.sum(statistics.values()).summary()
        specialization = self.specialization.compute(predictions=statistics)["specialization"]
        mean = sum(losses.values()) / len(losses)
        self.rows.append({"step": step, "loss": mean, **losses, **load, "specialization": specialization})


def train(model, dataset: Dataset, name: str, measure: Measure, arguments: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    folder = arguments.output_dir / name.replace(" ", "-").replace(",", "")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulation,
            learning_rate=arguments.learning_rate,
            warmup_steps=max(arguments.steps // 10, 1),
            lr_scheduler_type="constant_with_warmup",
            bf16=on_gpu,
            logging_steps=max(arguments.steps // 10, 1),
            save_strategy="no",
            dataloader_pin_memory=on_gpu,
            report_to=[],
            seed=1 if "other order" in name else 0,
        ),
        train_dataset=dataset,
        callbacks=[measure],
    )
    callbacks = [make() for make in RUNS[name]]
    hf_moe.add_moe_callbacks(trainer, *callbacks, hf_moe.RouterStatisticsCallback(folder=str(folder / "routing")))
    trainer.train()


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    labels = {"loss": "held-out loss, nats", "max_violation": "max violation", "specialization": "specialization"}
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for name, rows in results.items():
            style = {"color": "black", "linestyle": ":" if "other" in name else "-"} if "nothing" in name else {}
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=name, marker=".", **style)
        axes.set_xlabel("step")
        axes.set_title(label)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="dense model: a folder or a Hub id")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--texts", type=Path, help="folder whose folders are domains besides code and licences")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--layers", default="::5", help="which layers become sparse")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--points", type=int, default=5, help="how often is measured")
    parser.add_argument("--eval-blocks", type=int, default=8, help="validation blocks per domain")
    arguments = parser.parse_args()

    if arguments.texts:
        add_domains(arguments.texts)
    moe = arguments.output_dir / "moe"
    recipe = hf_moe.UpcycleConfig(
        num_experts=arguments.num_experts, num_experts_per_tok=2, layers=arguments.layers, target="hf_moe"
    )
    hf_moe.upcycle(arguments.source, moe, recipe, overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(moe)
    count = -(-arguments.steps * arguments.batch_size * arguments.accumulation // len(DOMAINS))
    blocks = [
        block for domain in DOMAINS for block in token_blocks(tokenizer, domain, "train", arguments.length, count)
    ]
    dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    validation = {
        domain: torch.tensor(token_blocks(tokenizer, domain, "validation", arguments.length, arguments.eval_blocks))
        for domain in DOMAINS
    }

    results = {}
    for name in RUNS:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32, use_expert_bias=name == "bias")
        measure = Measure(validation, arguments.points)
        train(model, dataset, name, measure, arguments)
        results[name] = measure.rows
        del model
    (arguments.output_dir / "balance.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, arguments.output_dir / "balance.png")

    keys = ["loss", "max_violation", "entropy", "specialization"]
    print("\n| | " + " | ".join(["held-out loss", "max violation", "entropy", "specialization"]) + " |")
    print("|---|" + "---|" * len(keys))
    start = results["nothing"][0]
    for name, row in {"start": start, **{name: rows[-1] for name, rows in results.items()}}.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in keys) + " |")


if __name__ == "__main__":
    main()
