# SPDX-License-Identifier: Apache-2.0
"""Entry point of `hf-moe`: the commands, and errors as one line instead of a traceback."""

import os
import sys

from huggingface_hub import typer_factory
from huggingface_hub.cli import out
from huggingface_hub.errors import StrictDataclassError

from .bench import bench
from .bench_balance import balance
from .bench_lora import lora
from .bench_routers import routers
from .doctor import doctor
from .edit import collapse, expand, extract, insert, merge, prune
from .evaluate import evaluate
from .inspect import inspect
from .upcycle import plan, upcycle


LEARN_MORE = "Learn more\n  Use `hf-moe <command> --help` for more information about a command."


def _epilog(*examples: str) -> str:
    return "\n".join(["Examples", *(f"  $ {example}" for example in examples), "", LEARN_MORE])


app = typer_factory(
    help="Turn dense Hugging Face models into mixtures of experts, change those that exist, look at their routing.",
    epilog=LEARN_MORE,
)
app.command(
    epilog=_epilog(
        "hf-moe plan HuggingFaceTB/SmolLM2-135M --num-experts 4", "hf-moe plan ./model --method residual --json"
    )
)(plan)
app.command(
    epilog=_epilog(
        "hf-moe upcycle HuggingFaceTB/SmolLM2-135M smollm2-moe --num-experts 4",
        "hf-moe upcycle ./model ./moe --recipe recipe.yml",
    )
)(upcycle)
app.command(epilog=_epilog("hf-moe inspect ./moe --text essay.txt --plot load.png"))(inspect)
app.command(
    "eval",
    epilog=_epilog(
        "hf-moe eval ./moe --text code=code.txt --text legal=legal.txt",
        "hf-moe eval ./moe --text code=code.txt --length 2048 --max-tokens 100000 --output report.json",
        "hf-moe eval ./moe --tasks arc_easy,hellaswag --batch-size 16",
    ),
)(evaluate)
app.command(
    epilog=_epilog("hf-moe expand ./moe ./moe-16 --factor 2", "hf-moe expand ./moe ./moe-16 --keep-top-k --noise 0.01")
)(expand)
app.command(
    epilog=_epilog(
        "hf-moe inspect ./moe --text essay.txt --output statistics.json",
        "hf-moe prune ./moe ./moe-6 --keep 6 --statistics statistics.json",
        "hf-moe prune ./moe ./moe-7 --drop 3",
    )
)(prune)
app.command(epilog=_epilog("hf-moe merge ./moe-16 ./moe-8 --num-experts 8 --top-k 2"))(merge)
app.command(epilog=_epilog("hf-moe collapse ./moe ./dense", "hf-moe collapse ./moe ./dense --expert 3"))(collapse)
app.command(epilog=_epilog("hf-moe extract ./moe expert.safetensors --expert 3"))(extract)
app.command(epilog=_epilog("hf-moe insert ./moe expert.safetensors ./moe-9"))(insert)
app.command(
    epilog=_epilog(
        "hf-moe doctor ./adapter --base ./moe",
        "hf-moe doctor ./adapter --base ./moe --run --text essay.txt",
        "hf-moe doctor ./old-adapter --base mistralai/Mixtral-8x7B-v0.1 --fix ./adapter",
    )
)(doctor)
bench.command(
    "lora",
    epilog=_epilog("hf-moe bench lora", "hf-moe bench lora --shape qwen3-30b-a3b --scale 1 --tokens 512 --runs 7"),
)(lora)
bench.command("balance", epilog=_epilog("hf-moe bench balance", "hf-moe bench balance --interval 10 --runs 21"))(
    balance
)
bench.command(
    "routers",
    epilog=_epilog(
        "hf-moe bench routers",
        "hf-moe bench routers --router switch --router gshard --size 1024x512x32x4 --tokens 2048",
    ),
)(routers)
app.add_group(bench, name="bench")


def main() -> None:
    """Run the command line. Errors of use are printed; `HF_DEBUG=1` shows their traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        if os.environ.get("HF_DEBUG"):
            raise
        # The validator's own words tell nothing about the command line.
        out.error(str(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error))
        sys.exit(1)
