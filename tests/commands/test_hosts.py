"""Several hosts train on the rows that one host trains on, and end together where one of them fails."""

import json
import re
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


FAULTS = {  # host and fault -> (its exit status, its error, newest checkpoint afterwards)
    "1:data": (2, "rows.jsonl, line 3 is not JSON", None),
    "1:source": (1, "RuntimeError: the rows are gone", 3),  # after three steps, which all save together
    "0:logger": (2, "No space left on device", 4),
    "1:space": (2, "has 0.0 MiB left", 4),
    "1:memory": (1, "RESOURCE_EXHAUSTED: Out of memory", 4),
}
LONGEST = 150  # seconds of a command with its compilation; collectives that wait for a host alone take 300


def test_a_failure_on_one_host_is_told_on_both_and_the_same_command_continues(tiny_model, tiny_data, tmp_path):
    """One run meets one fault after another; the other host ends with status 3. Undisturbed, it is the same run."""

    def flags(output):
        more = ["--steps", "6", "--eval-share", "0", "--checkpoint.every", "2", "--distributed"]
        return [*arguments("sft", tiny_model, tiny_data, tmp_path / output), *more]

    commands = [*((fault, flags("run")) for fault in FAULTS), (":", flags("run")), (":", flags("undisturbed"))]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    planted = [sys.executable, "-W", "ignore:os.fork", "-m", "tests.commands.planted", json.dumps(commands)]
    _, printed, errors = run_on_hosts(planted, devices=1, **cache)
    assert all("results " in text for text in printed), errors
    results = [json.loads(text.partition("results ")[2]) for text in printed]
    for i, (fault, (status, error, newest)) in enumerate(FAULTS.items()):
        host = int(fault[0])
        (own, text, _, _), (others, line, _, _) = results[host][i], results[1 - host][i]
        assert (own, others, max(results[0][i][2], default=None)) == (status, 3, newest), (text, line)
        assert error in text
        assert re.search(rf"^error: host {host} \(.+\) has failed: .*{re.escape(error)}", line, re.MULTILINE), line
        assert "Traceback" not in line, line
        assert ("Traceback" in text) == (status == 1), text
    assert [status for result in results for status, *_ in result[len(FAULTS) :]] == [0, 0] * 2, results
    assert all(seconds < LONGEST for result in results for *_, seconds in result), results
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")
    expected = final(tmp_path / "undisturbed")
    for leaf, value in final(tmp_path / "run").items():
        np.testing.assert_array_equal(value, expected[leaf], err_msg=leaf)
