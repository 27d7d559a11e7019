"""Two real processes as two hosts: one decides for both, and what stops one is what the other's error says."""

import json
import os
import subprocess
import sys

from jaxalign import hosts
from tests.shared import free_port

HOST = """
import json
from jaxalign import hosts
from jaxalign.mistake import Mistake
hosts.join()
import jax, numpy as np
host = jax.process_index()

def result_of(run):
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def full(on):
    if host == on:
        raise OSError("no space left")
    return True

def refused():
    raise Mistake("x" + "é" * hosts.MESSAGE_BYTES)

def squares(share):
    return np.arange(5.0)[None, share] ** 2

split = jax.NamedSharding(jax.sharding.Mesh(jax.devices(), "x"), jax.P("x"))
results = [
    result_of(lambda: hosts.first_decides(lambda: host == 0)),
    result_of(lambda: hosts.first_decides(lambda: host == 1)),
    result_of(lambda: hosts.first_decides(lambda: full(0))),
    result_of(lambda: hosts.first_decides(lambda: full(1))),
    result_of(lambda: hosts.first_decides(refused)),
    result_of(lambda: hosts.run_on_first(lambda: squares(slice(None)), 1, 5).tolist()),
    result_of(lambda: hosts.run_on_each(squares, 1, 5).tolist()),
    result_of(lambda: hosts.run_on_each(lambda share: full(1) * squares(share), 1, 5).tolist()),
    result_of(lambda: hosts.run_on_first(refused, 1, 5)),
    hosts.largest(3 + host),
    hosts.gather(jax.make_array_from_callback((8,), split, lambda part: np.arange(8.0)[part])).tolist(),
]
hosts.barrier("end")
print("results", json.dumps(results))
"""


def test_hosts_share_answers_results_and_the_message_of_the_one_that_fails():
    joint = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    joint |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", HOST],
            env=os.environ | joint | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    first, second = (json.loads(text.partition("results ")[2].splitlines()[0]) for text in printed)
    squares = [[0.0, 1.0, 4.0, 9.0, 16.0]]
    whole, cut = (f"x{'é' * count}" for count in (hosts.MESSAGE_BYTES, hosts.MESSAGE_BYTES // 2 - 1))
    assert list(zip(first, second, strict=True)) == [
        (True, True),
        (False, False),
        ("OSError: no space left", "Mistake: host 0 stopped: OSError: no space left"),
        (True, True),
        (f"Mistake: {whole}", f"Mistake: host 0 stopped: {cut}"),
        (squares, squares),
        (squares, squares),
        ("Mistake: host 1 has failed: OSError: no space left", "OSError: no space left"),
        (f"Mistake: {whole}", f"Mistake: host 0 has failed: {cut}"),
        (4, 4),
        (list(range(8)), list(range(8))),
    ]
