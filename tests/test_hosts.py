"""Two real processes over loopback as two hosts of two devices each, against one process with four."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign import hosts
from jaxalign.training.metrics import deterministic, read_rows
from tests.shared import free_port

STEPS = 40


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    return os.environ | cache | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(model, data, output, environment, *more, devices):
    flags = ["--steps", STEPS, "--batch-size", 16, "--max-length", 48, "--remat", "none", "--samples", 0]
    flags += ["--eval-every", 20, "--checkpoint.every", 15, "--optimizer.learning-rate", 3e-3, *more]
    run = [sys.executable, "-m", "jaxalign.cli.main", "sft", "--model", model, "--data", data, "--output", output]
    environment = environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen([str(part) for part in [*run, *flags]], env=environment, stderr=subprocess.PIPE, text=True)


def start_two(model, data, output, environment, more=((), ())):
    joint = environment | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(model, data, output, joint | {"JAX_PROCESS_ID": str(i)}, "--distributed", *more[i], devices=2)
        for i in range(2)
    ]


def wait(processes):
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], said


def test_two_hosts_stop_together_and_continue_to_what_one_host_makes(tiny_model, tiny_data, tmp_path, environment):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(tiny_model, tiny_data, one, environment, devices=4)
    assert wait([alone])[0] == [0]

    pair = start_two(tiny_model, tiny_data, two, environment)
    deadline, rows = time.monotonic() + 200, two / "metrics.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 4:
        assert time.monotonic() < deadline and pair[0].poll() is None
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)  # to the host that writes nothing
    codes, said = wait(pair)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "the same command continues" in said[0]

    codes, said = wait(start_two(tiny_model, tiny_data, two, environment))
    assert codes == [0, 0] and "continuing after step" in said[0], said
    found, expected = (load_file(Path(run) / "final" / "model.safetensors") for run in (two, one))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
    for a, b in zip(*(read_rows(run / "metrics.jsonl") for run in (two, one)), strict=True):
        assert deterministic(a).keys() == deterministic(b).keys()
        assert all(abs(a[key] - b[key]) < 1e-4 for key in deterministic(b)), (a, b)


def test_hosts_that_were_told_different_things_both_refuse(tiny_model, tiny_data, tmp_path, environment):
    pair = start_two(tiny_model, tiny_data, tmp_path / "run", environment, [(), ("--seed", 1)])
    codes, said = wait(pair)
    assert codes == [2, 2]
    assert all("the hosts differ in settings: hosts 1 have another than host 0" in text for text in said), said
    assert not (tmp_path / "run").exists()


def test_half_an_address_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is not set"):
        hosts.join()
