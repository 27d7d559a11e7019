"""Helpers of tests in several folders. Fixtures stand in the conftest.py files."""

import concurrent.futures
import contextlib
import functools
import importlib.util
import os
import socket
import subprocess
from pathlib import Path

import pytest

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "sees", "likes", "runs", "to", "from"]
WORDS += ["red", "blue", "one", "two", "Human", "Assistant", ":", ".", "?", "\n"]
"""Vocabulary of the tiny model. It has no double newline, so its chat template uses single ones."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant : {{ m.content }} {{ eos_token }}\n"
    "{% else %}Human : {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant : {% endif %}"
)


@contextlib.contextmanager
def on_one_device():
    """Meshes made inside the block consist of the first device only."""
    import jax

    from jaxalign.models import places

    first = {"devices": jax.devices()[:1]}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_mesh", "inference_mesh"):
            patch.setattr(places, name, functools.partial(_with, getattr(places, name), first))
        yield


def _with(function, fixed, *arguments, **options):
    return function(*arguments, **options | fixed)


def rows(output):
    """Rows of a run's metrics.jsonl without what depends on the clock."""
    from jaxalign.training.metrics import deterministic, read_rows

    return [deterministic(row) for row in read_rows(Path(output) / "metrics.jsonl")]


def final(output):
    """Tensors of a run's final model by name."""
    from safetensors.numpy import load_file

    return load_file(Path(output) / "final" / "model.safetensors")


def run_on_hosts(command, *, count=2, devices=2, seconds=400, **variables):
    """Runs a command as `count` hosts, processes of `devices` fake devices each; (statuses, stdouts, stderrs)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    joint = variables | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PLATFORMS": "cpu",
    }
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    joint |= {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env=os.environ | joint | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(count)
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            printed = list(pool.map(lambda process: process.communicate(timeout=seconds), processes))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*printed, strict=True)


def experiment(name):
    """Module of an experiment, which is a program and no part of the package."""
    path = Path(__file__).parents[1] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
