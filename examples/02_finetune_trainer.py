# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe[plots]"]
# ///
"""
Fine-tune an upcycled model with transformers' Trainer on two domains, beside the dense model on the same tokens.

    python examples/02_finetune_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-moe outputs

prints, after the Trainer's own lines (as `make demo` runs it, on 2 cores):

    30 steps of 4 x 96 tokens
                   ppl code  ppl licences  tokens/s  load entropy  load CV  dead experts
    dense             13.58         11.15
    dense trained     11.94          8.05       126
    MoE at step 0     13.58         11.15                   0.949    0.332         0.000
    MoE trained       11.93          8.04        74         0.947    0.344         0.000

    reloaded MixtralForCausalLM: 'The capital of France is Paris.\n\nThe United States is a member of the European Union and the'
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from domain_texts import DOMAINS, perplexity, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import hf_moe
from hf_moe.plots import plot_load


def finetune(model, dataset: Dataset, arguments: argparse.Namespace) -> float:
    """Train in place; returns tokens per second."""
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.output_dir / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=1e-4,
            warmup_steps=arguments.steps // 10,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            seed=0,
        ),
        train_dataset=dataset,
    )
    seconds = trainer.train().metrics["train_runtime"]
    return arguments.steps * arguments.batch_size * arguments.length / seconds


def routing(model, blocks: list[list[int]]) -> hf_moe.RoutingStatistics:
    """Which experts serve the validation text."""
    with hf_moe.RoutingRecorder(model) as recorder, torch.no_grad():
        for batch in torch.tensor(blocks).to(model.device).split(4):
            model(batch)
    return recorder.statistics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="dense model that was upcycled")
    parser.add_argument("moe", help="what it was upcycled to")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=96, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-blocks", type=int, default=8, help="validation blocks of 256 tokens per domain")
    arguments = parser.parse_args()
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    count = arguments.steps * arguments.batch_size // len(DOMAINS)
    train = [
        block for domain in DOMAINS for block in token_blocks(tokenizer, domain, "train", arguments.length, count)
    ]
    dataset = Dataset.from_dict({"input_ids": train, "labels": train})
    validation = {
        domain: token_blocks(tokenizer, domain, "validation", 256, arguments.eval_blocks) for domain in DOMAINS
    }
    text = [block for blocks in validation.values() for block in blocks]

    rows: list[list[str]] = []

    def measure(name: str, model, tokens_per_second: float | None = None) -> None:
        row = [name, *(f"{perplexity(model, blocks):.2f}" for blocks in validation.values())]
        row.append(f"{tokens_per_second:.0f}" if tokens_per_second else "")
        if hasattr(model.config, "output_router_logits"):
            statistics = routing(model, text)
            statistics.save(arguments.output_dir / f"routing-{name.replace(' ', '-')}.json")
            plot_load(statistics, arguments.output_dir / f"load-{name.replace(' ', '-')}.png", title=name)
            summary = statistics.summary()
            row += [f"{summary[key]:.3f}" for key in ("entropy", "coefficient_of_variation", "dead_fraction")]
        rows.append(row)

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32)
    measure("dense", dense)
    measure("dense trained", dense, finetune(dense, dataset, arguments))
    del dense

    # Equal experts give the router no gradient; the load-balancing loss does, and keeps the experts in use.
    moe = AutoModelForCausalLM.from_pretrained(arguments.moe, dtype=torch.float32, output_router_logits=True)
    measure("MoE at step 0", moe)
    measure("MoE trained", moe, finetune(moe, dataset, arguments))

    header = ["", *(f"ppl {domain}" for domain in DOMAINS), "tokens/s", "load entropy", "load CV", "dead experts"]
    widths = [max(len(row[i]) for row in [header, *rows] if i < len(row)) for i in range(len(header))]
    print(f"\n{arguments.steps} steps of {arguments.batch_size} x {arguments.length} tokens")
    for row in [header, *rows]:
        cells = [*row, *[""] * (len(header) - len(row))]
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
            )
        )

    finetuned = arguments.output_dir / "finetuned"
    moe.save_pretrained(finetuned)
    tokenizer.save_pretrained(finetuned)
    reloaded = AutoModelForCausalLM.from_pretrained(finetuned)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = reloaded.generate(**prompt, max_new_tokens=16, do_sample=False)
    print(f"\nreloaded {type(reloaded).__name__}: {tokenizer.decode(generated[0])!r}")
    print(f"heat maps and statistics are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
