# SPDX-License-Identifier: Apache-2.0
"""Two processes with DDP or FSDP2 add to the routers' gradients what is computed by hand in one."""

import pytest
import torch
from conftest import assert_close
from distributed_balance import (
    DDP_SETTINGS,
    KINDS_OF_MODELS,
    MORE_STATE,
    SAVES,
    gradients_of_rank,
    run_processes,
    watched,
)
from router_gradients import native_gradient, rows
from test_load_balancing import expected_gradient


@pytest.mark.slow
@pytest.mark.processes
def test_one_process_with_ddp(tmp_path):
    (results,) = run_processes(tmp_path, 1)
    assert len(results) == len(KINDS_OF_MODELS) * len(DDP_SETTINGS)
    for (model_kind, _), found in results.items():
        for kind, gradient in found.items():
            expected, _ = expected_gradient(kind.partition(",")[0], model_kind, rows())
            assert_close(gradient, expected, 1e-6)


@pytest.mark.processes
def test_two_processes_are_averaged(tmp_path):
    results = run_processes(tmp_path, 2)
    for model_kind in KINDS_OF_MODELS:
        alike = {}
        different = {}
        for kind in results[0][model_kind, "DDP, all different"]:
            name, _, is_second = kind.partition(",")
            counted = expected_gradient(name, model_kind, rows(4))[1] if is_second else None
            alike[kind], _ = expected_gradient(name, model_kind, rows())
            different[kind], _ = expected_gradient(name, model_kind, rows(4), counted)
        for of_rank in results:
            for (of_model, way), found in of_rank.items():
                if of_model != model_kind or (way == "transformers" or way.startswith("callbacks")):
                    continue
                expected = alike if way.endswith("alike") else different
                assert found.keys() == expected.keys()
                for kind, gradient in found.items():
                    assert_close(gradient, expected[kind], 1e-6)

    # All that a router has gets the mean of what it would get in each process alone.
    for case in MORE_STATE:
        alone = [gradients_of_rank(case, rank, is_parallel=False) for rank in range(2)]
        for of_rank in results:
            assert of_rank["routers", case].keys() == alone[0].keys()
            for name, gradient in of_rank["routers", case].items():
                assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, 1e-5)

    # Callbacks know what both processes saw, as in one that accumulates.
    for save in SAVES:
        expected = watched(tmp_path / f"one-{save}", 2, save)
        for of_rank in results:
            found = of_rank["deepseek_v3", f"callbacks, {save}"]
            for key in ("counts", "saved", "collapse", "bias"):
                assert found[key] == expected[key], (save, key)
            assert found["balance"]["num_steps"] == expected["balance"]["num_steps"]
            for key in ("window", "coefs", "values"):
                for name, values in expected["balance"][key].items():
                    # One process has its micro-batches one after the other.
                    assert found["balance"][key][name] == pytest.approx(values, rel=1e-5), (save, key)
            assert found["logged"] == pytest.approx(expected["logged"], abs=1e-5)

    # Its own term comes twice, since the loss is multiplied by the number of processes for the mean over all tokens.
    native = results[0]["mixtral", "transformers"]["native"]
    assert torch.allclose(native, 2 * native_gradient("mixtral", rows()), rtol=1e-4, atol=1e-7)
