# SPDX-License-Identifier: Apache-2.0
"""`hf-moe bench balance`: what statistics and balance losses add to the time of a training step."""

import multiprocessing
import queue
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
    interval: Annotated[int, typer.Option(min=1, help="Steps between logs.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Intervals of each.")] = 11,
) -> None:
    """
    Training steps of a Qwen3-MoE under the Trainer, without callbacks, with statistics, and with balance losses.

    The trainings take turns step by step, each in a process of its own that waits for the others. The table has the medians of
    steps without and with a log, and the mean of an interval made of these, by that without callbacks.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    hidden, tokens = hidden or (2048 if on_gpu else 256), tokens or (16384 if on_gpu else 1024)
    length = 128
    if tokens < length or hidden % 64:
        raise ValueError(
            f"--tokens is {tokens}, --hidden {hidden}. Give at least {length} tokens and a multiple of 64."
        )
    sizes = {"layers": layers, "experts": experts, "hidden": hidden, "on_gpu": on_gpu}
    steps = (runs + 1) * interval
    seconds = seconds_of_steps(sizes, steps, interval, tokens // length, length)
    rows = []
    for name, of in seconds.items():
        # The first interval is not counted: memory is fetched, kernels are chosen and scores are found out.
        plain, logging = split(of, interval)
        rows.append(
            {
                "callbacks": name,
                "step_ms": round(1000 * plain, 1),
                "step_with_log_ms": round(1000 * logging, 1),
                "times_nothing": round(mean_step(of, interval) / mean_step(seconds[NOTHING], interval), 3),
            }
        )
    out.table(rows)
    out.text(
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {'bfloat16' if on_gpu else 'float32'}, {layers} layers of {experts} experts, hidden "
        f"size {hidden}, {tokens // length * length} tokens, log every {interval} steps, {runs} intervals"
    )


def split(seconds: list[float], interval: int) -> tuple[float, float]:
    """Medians of the steps without and with a log at their end, of all intervals but the first."""
    counted = seconds[interval:]
    logging = counted[interval - 1 :: interval]
    plain = [one for place, one in enumerate(counted) if (place + 1) % interval]
    return statistics.median(plain or logging), statistics.median(logging)


def mean_step(seconds: list[float], interval: int) -> float:
    """The mean of an interval with one log, of medians, which a moment of another program on the machine does not change."""
    plain, logging = split(seconds, interval)
    return (plain * (interval - 1) + logging) / interval


def make_model(layers: int, experts: int, hidden: int, on_gpu: bool, own_loss: bool) -> Any:
    """A Qwen3-MoE with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        moe_intermediate_size=hidden // 2,
        num_experts=experts,
        num_experts_per_tok=4,
        router_aux_loss_coef=0.001,
        output_router_logits=own_loss,
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


def seconds_of_steps(
    sizes: dict[str, Any], steps: int, interval: int, batch_size: int, length: int
) -> dict[str, list[float]]:
    """What every step of each training took, from its begin to the begin of the next one, the log included."""
    names = list(make_variants())
    context = multiprocessing.get_context("spawn")
    turns, told = [context.Semaphore(0) for _ in names], context.Queue()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, sizes, steps, interval, batch_size, length)
        processes = [
            context.Process(
                target=train, args=(name, *arguments, turns[place], turns[(place + 1) % len(names)], told), daemon=True
            )
            for place, name in enumerate(names)
        ]
        for process in processes:
            process.start()
        turns[0].release()
        number = range(steps * len(names))
        try:
            for _ in tqdm(number, desc="Training", unit=" steps", disable=True if out.is_quiet() else None):
                name, taken = _next(told, processes)
                seconds[name].append(taken)
        finally:
            for process in processes:
                process.terminate()
                process.join()
    return seconds


def _next(told: Any, processes: list[Any]) -> tuple[str, float]:
    while True:
        try:
            return told.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RuntimeError("One of the trainings ended with an error, which is above.") from None


def train(
    name: str,
    folder: str,
    sizes: dict[str, Any],
    steps: int,
    interval: int,
    batch_size: int,
    length: int,
    mine: Any,
    following: Any,
    told: Any,
) -> None:
    """One of the trainings: waits for its turn before every step, and then tells what the step took."""
    mine.acquire()

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from ..training.add_callbacks import add_moe_callbacks

    class TakeTurns(TrainerCallback):
        began: float | None = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.pass_on()
            mine.acquire()
            self.began = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            self.pass_on()
            mine.acquire()  # until it is terminated, since an end would take time of the others

        def pass_on(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self.began is not None:
                told.put((name, time.perf_counter() - self.began))
            following.release()

    logging.set_verbosity_error()
    model = make_model(**sizes, own_loss=name == OWN_LOSS)
    ids = torch.randint(
        model.config.vocab_size, (steps * batch_size, length), generator=torch.Generator().manual_seed(0)
    )
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        logging_steps=interval,
        optim="sgd",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.remove_callback(trainer.callback_handler.callbacks[-1])  # prints the log
    add_moe_callbacks(trainer, *make_variants()[name]())
    trainer.add_callback(TakeTurns())
    trainer.train()
