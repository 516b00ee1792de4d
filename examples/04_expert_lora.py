# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe[trl]"]
# ///
"""
Expert LoRA with transformers' Trainer and TRL's SFTTrainer, and fine-tuning of chosen experts (ESFT), on an upcycled model.

    python examples/01_upcycle.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-moe --num-experts 8
    python examples/04_expert_lora.py smollm2-moe outputs --steps 5 --eval-blocks 2

prints, after what will train and the lines of the trainers (2 cores; times vary by a factor of two there):

    LoRA on licences, 5 steps of 4 x 96 tokens
                    trained  ppl code  ppl licences  s/step
    as upcycled                  9.29          3.56
    Trainer      12,902,400      9.16          3.11    4.21
    SFTTrainer   12,902,400      9.16          3.11    6.20
    PEFT's own computation of the same adapter: 6.80 s/step (3 steps)
    reloaded in PEFT alone: max|logit difference| / max|logit| = 2.4e-06

    ESFT, experts that serve 20% of the tokens
                         trained  ppl code  ppl licences  s/step  MiB saved
    ESFT on code      84,934,656      9.13          3.51    3.80        324
    ESFT on licences  84,934,656      9.25          3.16    3.44        324

    selected experts          code      licences
    layer  0                [3, 7]        [7, 3]
    layer  1                   [2]           [2]
    layer  2                   [1]           [1]
    layer  3                [4, 0]           [0]
    layer  4                   [6]           [6]
    layer  5                   [7]           [4]
    ...
    the same in 15 of 30 layers
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from domain_texts import DOMAINS, perplexity, token_blocks
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

import hf_moe


def training_values(arguments: argparse.Namespace, steps: int, learning_rate: float) -> dict:
    return {
        "output_dir": str(arguments.output_dir / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "bf16": False,  # SFTConfig's default is True
        "seed": 0,
    }


def train(model, dataset: Dataset, arguments: argparse.Namespace, steps: int, learning_rate: float) -> float:
    """Train in place; returns seconds per step."""
    trainer = Trainer(
        model, TrainingArguments(**training_values(arguments, steps, learning_rate)), train_dataset=dataset
    )
    started = time.perf_counter()
    trainer.train()
    return (time.perf_counter() - started) / steps


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print("  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", help="an upcycled model, or any other mixture of experts")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peft-steps", type=int, default=3, help="steps with PEFT's own computation, for the time")
    parser.add_argument("--length", type=int, default=96, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-blocks", type=int, default=4, help="validation blocks of 256 tokens per domain")
    parser.add_argument("--top-p", type=float, default=0.2, help="share of the tokens that ESFT's experts serve")
    arguments = parser.parse_args()
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.moe)
    count = arguments.steps * arguments.batch_size
    datasets = {}
    for domain in DOMAINS:
        blocks = token_blocks(tokenizer, domain, "train", arguments.length, count)
        datasets[domain] = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    validation = {
        domain: token_blocks(tokenizer, domain, "validation", 256, arguments.eval_blocks) for domain in DOMAINS
    }

    def load():
        return AutoModelForCausalLM.from_pretrained(arguments.moe, dtype=torch.float32)

    def row(name: str, model, seconds: float | None = None) -> list[str]:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        perplexities = [f"{perplexity(model, blocks):.2f}" for blocks in validation.values()]
        return [name, f"{trained:,}" if seconds else "", *perplexities, f"{seconds:.2f}" if seconds else ""]

    header = ["", "trained", *(f"ppl {domain}" for domain in DOMAINS), "s/step"]

    # Expert LoRA, on licences.
    model = load()
    rows = [row("as upcycled", model)]
    config = hf_moe.ExpertLoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        expert_rank="r//top_k",
        expert_dropout=0.05,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config.for_model(model))
    print(hf_moe.expert_lora_report(model))
    seconds = train(model, datasets["licences"], arguments, arguments.steps, 5e-4)
    rows.append(row("Trainer", model, seconds))
    model.save_pretrained(arguments.output_dir / "adapter")

    # The same files in PEFT alone.
    batch = torch.tensor(validation["licences"][:1])
    with torch.no_grad():
        logits = model(batch).logits
        vanilla = PeftModel.from_pretrained(load(), arguments.output_dir / "adapter")
        difference = (vanilla(batch).logits - logits).abs().max() / logits.abs().max()
    del model, vanilla

    plain = load()
    config_of_peft = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"[qkvo]_proj": 16},
        alpha_pattern={"[qkvo]_proj": 32},
    )
    plain = get_peft_model(plain, config_of_peft)
    peft_seconds = train(plain, datasets["licences"], arguments, arguments.peft_steps, 5e-4)
    del plain

    model = load()
    trainer = SFTTrainer(
        model,
        SFTConfig(**training_values(arguments, arguments.steps, 5e-4), max_length=arguments.length, packing=False),
        train_dataset=datasets["licences"].select_columns(["input_ids"]),
        processing_class=tokenizer,
        peft_config=config.for_model(model),
    )
    started = time.perf_counter()
    trainer.train()
    rows.append(row("SFTTrainer", trainer.model, (time.perf_counter() - started) / arguments.steps))
    del model, trainer
    print_table(
        f"LoRA on licences, {arguments.steps} steps of {arguments.batch_size} x {arguments.length} tokens",
        header,
        rows,
    )
    print(f"PEFT's own computation of the same adapter: {peft_seconds:.2f} s/step ({arguments.peft_steps} steps)")
    print(f"reloaded in PEFT alone: max|logit difference| / max|logit| = {difference:.1e}")

    # ESFT: for each domain the experts that it uses most, trained in full.
    rows, selections = [], {}
    for domain, dataset in datasets.items():
        model = load()
        batches = [
            {"input_ids": torch.tensor(dataset[start : start + 4]["input_ids"])} for start in range(0, count, 4)
        ]
        scores = hf_moe.score_experts(model, batches, kind="token")
        selections[domain] = hf_moe.select_experts(scores, top_p=arguments.top_p)
        hf_moe.apply_esft(model, selections[domain])
        seconds = train(model, dataset, arguments, arguments.steps, 1e-4)
        rows.append(row(f"ESFT on {domain}", model, seconds))
        hf_moe.save_esft(model, arguments.output_dir / f"esft-{domain}")
        size = (arguments.output_dir / f"esft-{domain}" / "experts.safetensors").stat().st_size
        rows[-1].append(f"{size / 2**20:.0f}")
        del model
    print_table(f"ESFT, experts that serve {arguments.top_p:.0%} of the tokens", [*header, "MiB saved"], rows)
    first, second = selections.values()
    print("\nselected experts  " + "  ".join(f"{domain:>12}" for domain in DOMAINS))
    for layer in first.experts:
        print(f"layer {layer:>2}          {first.experts[layer]!s:>12}  {second.experts[layer]!s:>12}")
    same = sum(first.experts[layer] == second.experts[layer] for layer in first.experts)
    print(f"the same in {same} of {len(first.experts)} layers")


if __name__ == "__main__":
    main()
