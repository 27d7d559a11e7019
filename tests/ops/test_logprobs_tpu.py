"""The compiler's own account of the loss on a TPU v5e: 8k tokens, width 4096, vocabulary 128k."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxalign.ops.logprobs import token_logps
from jaxalign.types import Average, Unembedding

N, D, V = 8192, 4096, 128_256


def temporary_bytes(implementation, entropy):
    topologies = pytest.importorskip("jax.experimental.topologies")
    pytest.importorskip("libtpu")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]

    def shape(*s, dtype):
        return jax.ShapeDtypeStruct(s, dtype, sharding=SingleDeviceSharding(chip))

    def loss(hidden, weight, targets):
        actual = token_logps(hidden, Unembedding(weight), targets, entropy=entropy, implementation=implementation)
        extra = 0.0 if actual.entropy is None else Average.of(actual.entropy).compute()
        return Average.of(-actual.logps).compute() - 0.01 * extra

    arguments = shape(N, D, dtype=jnp.bfloat16), shape(V, D, dtype=jnp.bfloat16), shape(N, dtype=jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("entropy", [False, True])
def test_the_loss_needs_a_fifth_of_the_memory_of_logits_or_less(entropy):
    chunked, reference = (temporary_bytes(implementation, entropy) for implementation in ("chunked", "reference"))
    print(f"temporary MiB, entropy={entropy}: chunked {chunked / 2**20:,.0f}, reference {reference / 2**20:,.0f}")
    assert chunked * 5 <= reference
