"""Two real processes as two hosts: one decides for both, and what stops one is what the other's error says."""

import json
import sys

from jaxalign import hosts
from tests.shared import run_on_hosts

HOST = """
import json
from jaxalign import hosts
from jaxalign.mistake import Mistake
hosts.join()
import jax, jax.numpy as jnp, numpy as np
from jaxalign.models.places import make_mesh
from jaxalign.training.sharding import put_batch
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

def fed(**axes):
    # shape and sum of a batch of 8 rows on the mesh, and the rows that this host's devices have
    batch = put_batch(np.arange(8.0).reshape(8, 1), make_mesh(**axes))
    own = sorted({int(row) for shard in batch.addressable_shards for row in np.asarray(shard.data).ravel()})
    return [batch.shape, float(jax.jit(jnp.sum)(batch)), own]

results += [fed(**axes) for axes in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4})]
hosts.barrier("end")
print("results", json.dumps(results))
"""


def test_hosts_share_answers_results_and_the_message_of_the_one_that_fails():
    _, printed, _ = run_on_hosts([sys.executable, "-c", HOST])
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
        ([[8, 1], 28.0, [0, 1, 2, 3]], [[8, 1], 28.0, [4, 5, 6, 7]]),
        ([[8, 1], 28.0, [0, 1, 2, 3]], [[8, 1], 28.0, [4, 5, 6, 7]]),
        ([[8, 1], 28.0, list(range(8))], [[8, 1], 28.0, list(range(8))]),  # every row is needed on both
    ]
