"""Log-probabilities over a mesh of eight devices are those of one device, in chunks and by the kernel."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import front
from jaxalign.models import places
from jaxalign.ops.logprobs import Shards, token_logps
from jaxalign.types import Unembedding

N, D = 32, 8
EXTRAS = {"entropy": True, "log_normalizer": True, "mean_logit": True, "correct": True}


def problem(vocabulary):
    keys = jax.random.split(jax.random.key(0), 6)
    hidden, weight = jax.random.normal(keys[0], (N, D)), jax.random.normal(keys[1], (vocabulary, D))
    targets = jax.random.randint(keys[2], (N,), 0, vocabulary)
    mask = jax.random.bernoulli(keys[3], 0.6, (N,)) & (jnp.arange(N) >= N // 8)  # the first device has none
    return hidden, weight, jax.random.normal(keys[4], (vocabulary,)), targets, mask, jax.random.normal(keys[5], (4, N))


def outcome(implementation, shards, cotangents, hidden, weight, bias, targets, mask):
    def total(hidden, weight, bias):
        unembedding = Unembedding(weight, bias, 5.0)
        options = {**EXTRAS, "temperature": 0.7, "implementation": implementation, "shards": shards}
        actual = token_logps(hidden, unembedding, targets, mask=mask, **options)
        return sum(jnp.vdot(g, x) for g, x in zip(cotangents, actual[:4], strict=True)), actual

    gradients, actual = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, weight, bias)
    return actual, gradients


# A vocabulary that the axis does not divide stays whole on every device.
@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
@pytest.mark.parametrize(
    "sizes, vocabulary",
    [
        ({"fsdp": 4, "tensor": 2}, 40),
        ({"data": 2, "fsdp": 1, "tensor": 4}, 300),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 41),
    ],
    ids=str,
)
def test_any_cut_of_tokens_width_and_vocabulary_gives_the_same_values_and_gradients(
    sizes, vocabulary, implementation, monkeypatch
):
    monkeypatch.setattr(front, "WORTH_A_CHOICE", 0)
    hidden, weight, bias, targets, mask, cotangents = problem(vocabulary)
    mesh = places.make_mesh(**sizes)
    rows = P(("data", "fsdp"))
    tensor = "tensor" if vocabulary % mesh.shape["tensor"] == 0 else None
    specs = P(("data", "fsdp"), None), P(tensor, "fsdp"), P(tensor), rows, rows
    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip((hidden, weight, bias, targets, mask), specs, strict=True)
    ]
    actual = jax.jit(lambda *x: outcome(implementation, Shards(mesh), cotangents, *x))(*placed)
    expected = outcome("reference", None, cotangents, hidden, weight, bias, targets, mask)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_tokens_that_the_mesh_does_not_divide_go_in_chunks_and_the_log_says_so_once(caplog, monkeypatch):
    ours = logging.getLogger("jaxalign")  # a run in the same process may have taken it over
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "handlers", [])
    hidden, weight, _, targets, _, _ = problem(40)
    shards = Shards(places.make_mesh(fsdp=8))
    for _ in range(2):
        actual = token_logps(hidden[:30], Unembedding(weight), targets[:30], implementation="pallas", shards=shards)
    expected = token_logps(hidden[:30], Unembedding(weight), targets[:30], implementation="chunked")
    np.testing.assert_array_equal(actual.logps, expected.logps)
    warnings = [record.message for record in caplog.records if "no log-probability kernel" in record.message]
    assert warnings == ["no log-probability kernel for 30 tokens, 40 x 8 weights in float32: in chunks"]
