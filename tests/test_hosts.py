"""Real processes as hosts: they share values and work, and a missing, dead or stopped one is named by the others."""

import json
import re
import signal
import sys

import pytest

from tests.shared import run_on_hosts

HOST = """
import json
from jaxalign import hosts
hosts.join()
import jax, jax.numpy as jnp, numpy as np
from jaxalign.models.places import make_mesh
from jaxalign.training.sharding import put_batch
host = jax.process_index()

def squares(share):
    return np.arange(5.0)[None, share] ** 2

split = jax.NamedSharding(jax.sharding.Mesh(jax.devices(), "x"), jax.P("x"))
results = [
    hosts.exchange([host, "é", 0.1]),
    hosts.first_decides(lambda: host == 0),
    hosts.first_decides(lambda: host == 1),
    hosts.run_on_first(lambda: squares(slice(None)), 1, 5).tolist(),
    hosts.run_on_each(squares, 1, 5).tolist(),
    hosts.gather(jax.make_array_from_callback((8,), split, lambda part: np.arange(8.0)[part])).tolist(),
]
try:
    hosts.agree(data=host, steps=3)
except ValueError as error:
    results.append(str(error))

def fed(**axes):
    # shape and sum of a batch of 8 rows on the mesh, and the rows that this host's devices have
    batch = put_batch(np.arange(8.0).reshape(8, 1), make_mesh(**axes))
    own = sorted({int(row) for shard in batch.addressable_shards for row in np.asarray(shard.data).ravel()})
    return [batch.shape, float(jax.jit(jnp.sum)(batch)), own]

results += [fed(**axes) for axes in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4})]
hosts.barrier("end")
print("results", json.dumps(results))
"""


def test_hosts_share_answers_results_and_rows():
    statuses, printed, errors = run_on_hosts([sys.executable, "-c", HOST])
    assert statuses == [0, 0], errors
    first, second = (json.loads(text.partition("results ")[2].splitlines()[0]) for text in printed)
    squares, differ = [[0.0, 1.0, 4.0, 9.0, 16.0]], "the hosts differ in data: hosts 1 have another than host 0"
    assert first[6].startswith(differ) and second[6].startswith(differ)
    assert list(zip(first[:6] + first[7:], second[:6] + second[7:], strict=True)) == [
        ([[0, "é", 0.1], [1, "é", 0.1]],) * 2,
        (True, True),
        (False, False),
        (squares, squares),
        (squares, squares),
        (list(range(8)), list(range(8))),
        ([[8, 1], 28.0, [0, 1, 2, 3]], [[8, 1], 28.0, [4, 5, 6, 7]]),
        ([[8, 1], 28.0, [0, 1, 2, 3]], [[8, 1], 28.0, [4, 5, 6, 7]]),
        ([[8, 1], 28.0, list(range(8))], [[8, 1], 28.0, list(range(8))]),  # every row is needed on both
    ]


# Hosts without JAX's part, and with short times: process i of the environment is host `HOSTS[i]` of `COUNT`, and a host
# that has met the others and is none of those that act waits for the next round.
MEETING = """
import json, os, signal, subprocess, sys
from jaxalign.hosts import meeting, watch
from jaxalign.mistake import Mistake
meeting.PATIENCE, meeting.LONGEST, watch.SILENCE, watch.BEAT, watch.GRACE = 1.0, 2.5, 2.0, 0.3, 2.0
numbers, count, acts = json.loads(sys.argv[1])
host = numbers[int(os.environ["JAX_PROCESS_ID"])]
try:
    here = meeting.Place(os.environ["JAX_COORDINATOR_ADDRESS"], count, host)
    links, names = meeting.meet(here)
except Mistake as mistake:
    sys.exit(f"error: {mistake}")
others = watch.Watch(host, names, links)
act = acts.get(str(host), "")
others.exchange(host)
if act == str(signal.SIGSTOP.value):  # it goes on once the others have gone
    subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
if act.isdigit():
    os.kill(os.getpid(), int(act))
if act:
    others.tell(OSError(act))
    others.leave(1)
try:
    others.exchange(host)
except watch.HostError as error:
    others.follow(error)
"""


def met(hosts, *, count, **acts):
    """Statuses and stderrs of processes that come to a meeting under these numbers; what some then do, by host."""
    acts = {name.removeprefix("host_"): str(act) for name, act in acts.items()}
    command = [sys.executable, "-c", MEETING, json.dumps([list(hosts), count, acts])]
    statuses, _, errors = run_on_hosts(command, count=len(hosts), seconds=60)
    return statuses, errors


def test_a_host_that_does_not_come_is_named_and_so_is_one_that_was_started_twice():
    statuses, errors = met([0, 1, 1], count=3)
    assert statuses == [1, 1, 1]
    missing = "host 2 of 3 has not joined within"
    twice = r"host 1 was started twice: on \S+ \(process \d+\) and on \S+ \(process \d+\); JAX_PROCESS_ID, or"
    assert missing in errors[0] and "start the same command there" in errors[0] and re.search(twice, errors[0])
    refused, waiting = sorted(errors[1:], key=lambda text: missing in text)
    assert re.search(f"^error: `distributed`: {twice}", refused) and missing not in refused
    assert re.search(f"^error: `distributed`: {missing}", waiting, re.MULTILINE) and re.search(twice, waiting)


def test_without_host_0_each_says_where_it_was_sought():
    statuses, errors = met([1], count=2)
    assert statuses == [1] and re.search(r"^host 0 \(127.0.0.1:\d+\) has not answered within 1 s; start", errors[0])


def test_hosts_that_were_told_of_different_numbers_of_hosts_do_not_begin():
    command = [
        sys.executable,
        "-c",
        MEETING.replace("links, names", "here = here._replace(count=2 + host); links, names"),
    ]
    statuses, _, errors = run_on_hosts([*command, json.dumps([[0, 1], 2, {}])], seconds=60)
    assert statuses == [1, 1] and all(
        re.search(r"host 1 \(\S+\) was told of 3 hosts, and host 0 of 2", e) for e in errors
    )


ENDS = [  # what a host does, its status, and how the others name it
    (signal.SIGKILL.value, -signal.SIGKILL, "has ended without a word: it was killed, or its machine is gone"),
    (signal.SIGSTOP.value, 3, "has not answered for 2 s: it is stopped, or cut off"),
    ("no space left", 1, "has failed: OSError: no space left"),
]


@pytest.mark.parametrize("host, count", [(0, 2), (1, 3)])
@pytest.mark.parametrize("act, status, line", ENDS, ids=["killed", "stopped", "failed"])
def test_a_host_that_ends_is_named_once_by_all_others(host, count, act, status, line):
    statuses, errors = met(range(count), count=count, **{f"host_{host}": act})
    assert statuses == [status if other == host else 3 for other in range(count)], errors
    names = [re.findall(rf"^host {host} \(\S+\) {re.escape(line)}", text, re.MULTILINE) for text in errors]
    assert [len(found) for found in names] == [other != host for other in range(count)], errors
