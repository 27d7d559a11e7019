"""Several hosts train on the rows that one host trains on, also where a row's devices belong to two of them."""

import json
import sys

import numpy as np
import pytest

from jaxalign.cli.main import main
from tests.shared import final, on_one_device, rows, run_on_hosts

COMMANDS = """
import json, sys
from jaxalign.cli.main import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""
MESHES = {"sft": {"fsdp": 1, "tensor": 4}, "kto": {"fsdp": 2, "tensor": 2}}


def arguments(command, model, data, output, **axes):
    flags = {
        "model": model,
        "data": data,
        "output": output,
        "steps": 2,
        "batch-size": 8,
        "microbatches": 2,
        "max-length": 16,
        "remat": "none",
        "eval-share": 0.25,
        "samples": 0,
        "optimizer.learning-rate": 1e-2,
        "optimizer.schedule": "constant",
        **{f"mesh.{axis}": size for axis, size in axes.items()},
    }
    return [command, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def test_two_hosts_train_on_what_one_host_trains_on(tiny_model, tiny_data, pairs, tmp_path):
    """SFT with `tensor` across the hosts, so that both need every row, and KTO with `fsdp` across them."""
    data = {"sft": tiny_data, "kto": pairs}
    joint = [arguments(name, tiny_model, data[name], tmp_path / name, **axes) for name, axes in MESHES.items()]
    command = [sys.executable, "-c", COMMANDS, json.dumps([[*flags, "--distributed"] for flags in joint])]
    statuses, _, errors = run_on_hosts(command)
    assert statuses == [0, 0], errors
    for name in MESHES:
        with on_one_device():
            assert main(arguments(name, tiny_model, data[name], tmp_path / "one" / name)) == 0
        expected, actual = rows(tmp_path / "one" / name), rows(tmp_path / name)
        assert [row.get("num_tokens") for row in actual] == [row.get("num_tokens") for row in expected]
        assert [row["eval_loss"] for row in actual if "eval_loss" in row] == pytest.approx(
            [row["eval_loss"] for row in expected if "eval_loss" in row], abs=1e-5
        )
        weights = final(tmp_path / "one" / name)
        for leaf, value in final(tmp_path / name).items():
            np.testing.assert_allclose(value, weights[leaf], atol=1e-5, err_msg=leaf)
