# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench balance`: what statistics and balance losses add to the time of a training step."""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from huggingface_hub.cli import out
from huggingface_hub.utils import tqdm


NOTHING, OWN_LOSS = "no callbacks", "transformers' own loss"


def balance(
    layers: Annotated[int, typer.Option(min=1, help="Layers, all of them sparse.")] = 16,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, 4 of them per token.")] = 32,
    hidden: Annotated[int | None, typer.Option(help="Hidden size (256 on CPU, 2048 on GPU).")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a step (1024 on CPU, 16384 on GPU).")] = None,
    interval: Annotated[int, typer.Option(min=1, help="Steps between logs; a turn is one interval.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 11,
) -> None:
    """
    Training steps of a Qwen3-MoE under the Trainer, without callbacks, with statistics, and with balance losses.

    All variants share the weights and take turns of one logging interval each, the log included. What a step takes is the
    mean of its turn; the table has the medians of the turns.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    hidden, tokens = hidden or (2048 if on_gpu else 256), tokens or (16384 if on_gpu else 1024)
    length = 128
    if tokens < length or hidden % 64:
        raise ValueError(
            f"--tokens is {tokens}, --hidden {hidden}. Give at least {length} tokens and a multiple of 64."
        )
    model = make_model(layers, experts, hidden, on_gpu)
    variants = make_variants()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    # The first turns are not counted: memory is fetched and kernels are chosen.
    for turn in tqdm(range(runs + 1), desc="Training", unit=" rounds", disable=True if out.is_quiet() else None):
        for name, callbacks in variants.items():
            taken = time_of_turn(model, callbacks(), interval, tokens // length, length, name == OWN_LOSS)
            if turn:
                seconds[name].append(taken / interval)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    out.table(
        [
            {
                "callbacks": name,
                "median_ms": round(1000 * median[name], 1),
                "min_ms": round(1000 * min(values), 1),
                "max_ms": round(1000 * max(values), 1),
                # Of what ran right before or after, which shares the machine's moods.
                "times_nothing": round(
                    statistics.median(one / other for one, other in zip(values, seconds[NOTHING], strict=True)), 3
                ),
            }
            for name, values in seconds.items()
        ]
    )
    out.text(
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {model.dtype}, {layers} layers of {experts} experts, hidden size {hidden}, "
        f"{tokens} tokens, log every {interval} steps, {runs} turns"
    )


def make_model(layers: int, experts: int, hidden: int, on_gpu: bool) -> Any:
    """A Qwen3-MoE with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        moe_intermediate_size=hidden // 2,
        num_experts=experts,
        num_experts_per_tok=4,
        router_aux_loss_coef=0.001,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    return model.to("cuda", torch.bfloat16) if on_gpu else model


def make_variants() -> dict[str, Callable[[], list[Any]]]:
    """By name, what makes the callbacks of a turn."""
    from ..training.callbacks import LoadBalancingCallback
    from ..training.statistics_callback import RouterStatisticsCallback

    return {
        NOTHING: lambda: [],
        "statistics": lambda: [RouterStatisticsCallback()],
        "statistics, switch": lambda: [RouterStatisticsCallback(), LoadBalancingCallback("switch")],
        "statistics, global_batch": lambda: [RouterStatisticsCallback(), LoadBalancingCallback("global_batch")],
        OWN_LOSS: lambda: [],
    }


def time_of_turn(model: Any, callbacks: list[Any], steps: int, batch_size: int, length: int, own_loss: bool) -> float:
    """Seconds of a few steps and their log; the step before them is not counted."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from ..training.attach import add_moe_callbacks

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:  # in which scores are found out, once in a training
                self.started = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

    model.config.output_router_logits = own_loss
    ids = torch.randint(
        model.config.vocab_size, ((steps + 1) * batch_size, length), generator=torch.Generator().manual_seed(0)
    )
    clock, level = Clock(), logging.get_verbosity()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps + 1,
            per_device_train_batch_size=batch_size,
            logging_steps=steps + 1,
            optim="sgd",
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.remove_callback(trainer.callback_handler.callbacks[-1])  # prints the log
        add_moe_callbacks(trainer, *callbacks)
        trainer.add_callback(clock)
        trainer.train()
    logging.set_verbosity(level)
    return clock.seconds
