"""The gradient of a whole step does not depend on the number of devices, in float32 and nearly so in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.places import Layout, make_mesh, shardings
from jaxalign.models.reading import token_stats
from jaxalign.training.sharding import put_batch
from jaxalign.types import TokenBatch

CONFIG = model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
)
ROWS, LENGTH = 16, 32


@functools.cache
def gradient(dtype, **sizes):
    """Gradient of the summed loss of sixteen rows, on a mesh of these sizes; without sizes on one device."""
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    graphdef, _ = make_decoder(CONFIG, compute_dtype=dtype, layout=Layout(mesh) if sizes else None)
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, CONFIG.vocab_size), np.int32)
    counting = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    rows = TokenBatch(tokens, counting >= 4, counting, np.ones_like(tokens))

    def total(params, rows):
        model = nnx.merge(graphdef, params)
        hidden = model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
        return -jnp.sum(token_stats(model, hidden, rows).logps)

    params = jax.device_put(params, shardings(params, mesh))
    return jax.tree.map(np.asarray, jax.jit(jax.grad(total))(params, put_batch(rows, mesh)))


def distance(a, b):
    """|a - b| / |b| over all parameters."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({"fsdp": 8}, 1.0),  # the same products are rounded, and float32 adds them up
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1.2),  # halves of a product over heads are rounded before they are added
    ],
    ids=str,
)
def test_a_gradient_in_bfloat16_is_as_near_to_float32_on_eight_devices_as_on_one(sizes, most):
    exact = gradient("float32")
    alone, cut = (distance(gradient("bfloat16", **mesh), exact) for mesh in ({}, sizes))
    print(f"{sizes}: {cut:.5f}, on one device {alone:.5f}")
    assert 0.005 < alone < 0.05
    assert cut <= most * alone


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_any_number_of_devices_gives_the_gradient_of_one_in_float32(sizes):
    assert distance(gradient("float32", **sizes), gradient("float32")) < 2e-6
