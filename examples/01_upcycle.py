# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-moe"]
# ///
"""
Upcycle a dense model into a mixture of experts and prove that nothing was lost.

    python examples/01_upcycle.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-moe --num-experts 4

prints (as `make demo` runs it):

    .cache/smollm2 -> MixtralForCausalLM, exact: True
    parameters          134,515,008 -> 373,462,848
    active per token    134,515,008 -> 214,210,368
    FLOPs per token     268,959,744 -> 428,350,464
    wrote 746,925,696 bytes to outputs/demo/moe
    computed in float32   max|logit difference| / max|logit| = 1.4e-06, same top token 100.0%
    computed in bfloat16  max|logit difference| / max|logit| = 0.0e+00, same top token 100.0%
"""

import argparse

from hf_moe import UpcycleConfig, plan_upcycle, upcycle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="dense model: a folder or a Hub id")
    parser.add_argument("output_dir")
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()

    recipe = UpcycleConfig(num_experts=arguments.num_experts, num_experts_per_tok=arguments.top_k)

    plan = plan_upcycle(arguments.source, recipe)  # reads the configuration only
    print(f"{arguments.source} -> {plan.architecture}, exact: {plan.exact}")
    print(f"parameters        {plan.num_dense_parameters:>13,} -> {plan.num_parameters:,}")
    print(f"active per token  {plan.num_dense_parameters:>13,} -> {plan.num_active_parameters:,}")
    print(f"FLOPs per token   {plan.dense_flops_per_token:>13,} -> {plan.flops_per_token:,}")

    report = upcycle(arguments.source, arguments.output_dir, recipe, overwrite=arguments.overwrite)
    print(f"wrote {report.bytes_written:,} bytes to {report.output_dir}")
    for dtype in ("float32", "bfloat16"):
        if dtype in report.parity:
            measured = report.parity[dtype]
            print(
                f"computed in {dtype:<9} max|logit difference| / max|logit| = {measured['max_relative_error']:.1e}, "
                f"same top token {measured['top1_agreement']:.1%}"
            )
    print(f"entropy of the untrained routers' load: {report.routing.summary()['entropy']:.2f}")


if __name__ == "__main__":
    main()
