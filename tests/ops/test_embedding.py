"""Rows of a table on a mesh are those of one device, and so is its gradient, in any cut of vocabulary and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.places import Layout, make_mesh
from jaxalign.ops.embedding import rows_of
from jaxalign.ops.mesh import Shards

B, T, D = 8, 6, 16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "sizes, vocabulary, rows",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 40, B),
        ({"fsdp": 4, "tensor": 2}, 41, B),  # whole on every device
        ({"fsdp": 2, "tensor": 4}, 40, B),  # 4 does not divide the tokens
        ({"fsdp": 4, "tensor": 2}, 40, 3),  # nor 4 the rows
    ],
    ids=str,
)
def test_any_mesh_gives_the_rows_of_one_device_and_a_gradient_summed_in_float32(sizes, vocabulary, rows, dtype):
    mesh = make_mesh(**sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    table, ids = jax.random.normal(keys[0], (vocabulary, D)), jax.random.randint(keys[1], (rows, T), 0, vocabulary)
    slopes = jax.random.normal(keys[2], (rows, T, D)).astype(dtype)
    cut = Layout(mesh).tokens(T)
    assert cut == ("tensor" if T % mesh.shape["tensor"] == 0 else None)

    @jax.jit
    def outcome(table):
        rows, pull = jax.vjp(lambda table: rows_of(table, ids, dtype, shards=Shards(mesh), cut=cut), table)
        return rows, pull(slopes)[0]

    spec = P("tensor" if vocabulary % mesh.shape["tensor"] == 0 else None, "fsdp")
    actual, gradient = outcome(jax.device_put(table, NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(actual, table.astype(dtype)[ids])
    assert actual.dtype == dtype and gradient.dtype == jnp.float32
    exact = np.zeros(table.shape)
    np.add.at(exact, np.asarray(ids), np.asarray(slopes, np.float64))
    np.testing.assert_allclose(gradient, exact, atol=1e-5)
