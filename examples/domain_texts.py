# SPDX-License-Identifier: Apache-2.0
"""
Two domains of real text that every Python environment has, code and licences, and the perplexity on them; `add_domains` adds
others (`fetch_texts.py` gets two).

Code is the standard library (PSF-2.0); licences are those of the installed packages, without the paragraphs that they
share. Documents go to training or validation by a hash of their text.
"""

import hashlib
import importlib.metadata
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch


def code() -> Iterator[str]:
    """Modules of the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib", "encodings"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def licences() -> Iterator[str]:
    """Licence texts of the installed packages; a paragraph that an earlier text had is left out."""
    seen: set[str] = set()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda item: item.name):
        for file in distribution.files or []:
            if file.name.lower().startswith(("license", "licence", "copying", "notice")) and file.locate().is_file():
                text = file.locate().read_text(encoding="utf-8", errors="replace")
                new = {" ".join(paragraph.split()): paragraph for paragraph in text.split("\n\n")}
                kept = [paragraph for key, paragraph in new.items() if key not in seen and len(key) > 40]
                seen |= set(new)
                yield "\n\n".join(kept)


DOMAINS = {"code": code, "licences": licences}


def add_domains(folder: Path) -> None:
    """Make every folder in `folder` a domain whose documents are its text files."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            DOMAINS[path.name] = lambda path=path: (
                text.read_text(encoding="utf-8") for text in sorted(path.glob("*.txt"))
            )


def documents(domain: str, split: str) -> list[str]:
    """The texts of a domain; one document in eight is for `"validation"`, the others are for `"train"`."""
    chosen = []
    for text in DOMAINS[domain]():
        is_validation = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 8 == 0
        if len(text) > 500 and is_validation == (split == "validation"):
            chosen.append(text)
    return chosen


def token_blocks(
    tokenizer, domain: str, split: str, length: int, count: int, *, per_document: int = 10
) -> list[list[int]]:
    """
    `count` blocks of `length` token ids, spread evenly over the domain's documents. Of a document no more is read than
    `per_document` blocks take at 4 characters a token, which keeps long ones from being tokenized for nothing.
    """
    blocks = []
    for text in documents(domain, split):
        ids = tokenizer(text[: 4 * length * per_document], verbose=False)["input_ids"]
        blocks += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(blocks) < count:
        raise ValueError(f"There are only {len(blocks)} blocks of {length} tokens of {domain} ({split}), not {count}.")
    return [blocks[index * len(blocks) // count] for index in range(count)]


def perplexity(model, blocks: list[list[int]]) -> float:
    """Perplexity of the language model alone, without the load-balancing term."""
    model.eval()
    arguments = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    with torch.no_grad():
        batches = torch.tensor(blocks).to(model.device).split(4)
        losses = [model(batch, labels=batch, **arguments).loss.item() for batch in batches]
    return math.exp(sum(losses) / len(losses))
