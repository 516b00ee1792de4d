# SPDX-License-Identifier: Apache-2.0
"""What the dense model and the result are compared on: `draw_sample` takes text, or random tokens or images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .calibration import MIN_TOKENS_PER_ROW, read_text
from .checkpoint import Checkpoint, load_tokenizer
from .errors import UpcycleError
from .recipe import UpcycleConfig
from .routing import kinds_of_tokens


logger = logging.get_logger(__name__)
NUM_TOKENS = 256
# Were the experts equally popular, one in ten million would get none of so many tokens by chance.
TOKENS_PER_EXPERT = 16
TEXT = """The harbour master counted the boats twice before he wrote 37 into the log, because the fog had already hidden
the far pier. "If the tide turns at 6:15," he said, "we shall have four hours and ten minutes." Nobody answered him.

def moving_average(values: list[float], width: int) -> list[float]:
    if width < 1 or width > len(values):
        raise ValueError(f"width must lie between 1 and {len(values)}, got {width}")
    total = sum(values[:width])
    averages = [total / width]
    for leaving, entering in zip(values, values[width:]):
        total += entering - leaving
        averages.append(total / width)
    return averages

Le train de nuit part à 22 h 40 ; il arrive à Lyon vers sept heures. Das Wetter bleibt bis Freitag wechselhaft.
Let f be continuous on [0, 1] with f(0) < 0 < f(1). Then f(x) = 0 for some x, since the supremum of the set where f is
negative belongs neither to that set nor to its complement's interior. See RFC 9110, section 15.5.5: 404 Not Found.
The licensee may copy, modify and distribute the work, provided that this notice is kept and that changes are marked.
"""


class Sample(NamedTuple):
    """
    What the models are given.

    Args:
        inputs (`dict[str, torch.Tensor]`): Keyword arguments of `forward`.
        num_tokens (`int`): The number of tokens in them.
        is_text (`bool`): Whether they are text.
        routing (`dict[str, torch.Tensor]`): More of them for the mixture of experts, whose routers read them.
        in_each_of (`str`, *optional*): As what the same tokens come several times, `"2 domains"` or `"2 modalities"`.
    """

    inputs: dict[str, torch.Tensor]
    num_tokens: int
    is_text: bool
    routing: dict[str, torch.Tensor] = {}
    in_each_of: str | None = None

    def as_type(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs for a model of one data type: images are numbers, tokens are not."""
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.inputs.items()}


def draw_sample(dense: Checkpoint, recipe: UpcycleConfig) -> Sample:
    """
    What [`sample_of`] gives, of the recipe's `calibration_text` or our own, with enough tokens to show which experts get
    none. Where domains or modalities have experts of their own, it comes once as each of them.
    """
    needed = max(NUM_TOKENS, TOKENS_PER_EXPERT * max(recipe.expert_counts) // recipe.num_experts_per_tok)
    sample = sample_of(dense, needed, recipe.calibration_files)
    return of_every_kind(sample, *kinds_of_tokens(recipe))


def of_every_kind(sample: Sample, kinds: str, count: int) -> Sample:
    """The same tokens as each of `count` `"domains"` or `"modalities"`."""
    if count == 1:
        return sample
    inputs = {name: torch.cat([value] * count) for name, value in sample.inputs.items()}
    num_rows = len(next(iter(sample.inputs.values())))
    kind_B = torch.arange(count).repeat_interleave(num_rows)
    tokens_per_row = sample.num_tokens // num_rows
    routing = (
        {"domain_ids": kind_B}
        if kinds == "domains"
        else {"mm_token_type_ids": kind_B[:, None].expand(-1, tokens_per_row)}
    )
    return Sample(inputs, count * sample.num_tokens, sample.is_text, routing, f"{count} {kinds}")


def sample_of(dense: Checkpoint, needed: int = NUM_TOKENS, files: Sequence[str] = ()) -> Sample:
    """
    A text in the model's own tokens; random ones with a warning if it has no tokenizer that works; random images for a
    model that sees.

    Args:
        needed (`int`, *optional*, defaults to 256): Number of tokens at least. They are more where the sliding window is at
            most 1024, to be longer than it.
        files (`Sequence[str]`, *optional*): Files with the text, each of which gives an equal share, repeated where it is
            shorter. Ours if there are none.

    Raises:
        UpcycleError: if a file cannot be read or has fewer than 32 tokens, or if there are files and no tokenizer.
    """
    generator = torch.Generator().manual_seed(0)
    if hasattr(dense.config, "image_size"):
        return _random_images(dense.config, needed, generator)
    window = getattr(dense.config, "sliding_window", None) or 0
    length = max(needed, window + 32 if window <= 4 * NUM_TOKENS else 0)
    length = min(length, dense.config.max_position_embeddings)
    rows = -(-needed // length)
    tokenizer = load_tokenizer(dense)
    if tokenizer is not None:
        texts = {file: tokenizer(read_text(Path(file)), verbose=False)["input_ids"] for file in files}
        for file, ids in texts.items():
            if len(ids) < MIN_TOKENS_PER_ROW:
                raise UpcycleError(
                    f"The calibration text {file} gives {len(ids)} tokens; each file needs at least {MIN_TOKENS_PER_ROW}."
                )
        texts = texts or {"ours": tokenizer(TEXT, verbose=False)["input_ids"]}
        share = -(-rows * length // len(texts))
        ids = [token for text in texts.values() for token in _repeated(text, share)]
        return Sample({"input_ids": torch.tensor(ids[: rows * length]).view(rows, length)}, rows * length, True)
    if files:
        raise UpcycleError(
            f"{dense.source} has no tokenizer that loads, so `calibration_text` cannot be read. Save the tokenizer into its "
            "folder, or leave the text out."
        )
    logger.warning(f"{dense.source} has no tokenizer that loads: random tokens are compared.")
    ids = torch.randint(dense.config.vocab_size, (rows, length), generator=generator)
    return Sample({"input_ids": ids}, rows * length, False)


def _repeated(ids: list[int], length: int) -> list[int]:
    return (ids * (length // len(ids) + 1))[:length]


def _random_images(config: PreTrainedConfig, num_tokens: int, generator: torch.Generator) -> Sample:
    def pair(size: Any) -> tuple[int, int]:
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    tokens_per_image = (height // patch_height) * (width // patch_width) + 1
    count = -(-num_tokens // tokens_per_image)
    images = torch.randn(count, config.num_channels, height, width, generator=generator)
    return Sample({"pixel_values": images}, count * tokens_per_image, False)


def describe_sample(sample: Sample, config: PreTrainedConfig) -> dict[str, Any]:
    """What a reader must know of the tokens that were compared."""
    window = getattr(config, "sliding_window", None)
    beyond_window = sample.inputs["input_ids"].shape[1] > window if window else None
    return {
        "num_tokens": sample.num_tokens,
        "text": sample.is_text,
        "in_each_of": sample.in_each_of,
        "beyond_window": beyond_window,
    }
