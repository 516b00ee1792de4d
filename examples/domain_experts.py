# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune copies of a dense model, one per domain, as experts for the method `compose`.

Only the feed-forwards are trained: the copies then agree in everything else, and the mixture that is composed of them
computes exactly what one of them does when all tokens go to its expert.
"""

from pathlib import Path

import torch
from domain_texts import token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer


def train_domain_expert(
    source: str | Path,
    output_dir: str | Path,
    domain: str,
    *,
    steps: int = 60,
    length: int = 256,
    learning_rate: float = 1e-4,
) -> list[float]:
    """
    Train the feed-forwards of a model on one domain of `domain_texts`, one block of tokens a step, and save the copy.

    Training is in float32; the copy has the data type of the source, so that what was frozen stays the same to the bit.

    Returns:
        `list[float]`: The loss of every step.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".mlp." in name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for block in token_blocks(tokenizer, domain, "train", length, steps):
        input_ids = torch.tensor([block])
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    dtype = AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype
    model.to(dtype).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return losses


@torch.no_grad()
def perplexity(model: torch.nn.Module, blocks: list[list[int]]) -> float:
    """Perplexity over blocks of tokens of one length."""
    losses = [model(torch.tensor([block]), labels=torch.tensor([block])).loss for block in blocks]
    return torch.stack(losses).mean().exp().item()
