"""XLA's attention takes a long row in blocks of queries, each with the keys up to its end, and nothing changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.decoder import attention as module
from jaxalign.models.places import Layout, make_mesh

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 150, 4, 2, 8  # blocks of 64, 64 and 22


@pytest.fixture(scope="module")
def row():
    """A left-padded row, and one with a prompt, two responses to it, and another sequence."""
    rng = np.random.default_rng(0)

    def draw(heads):
        return jnp.asarray(rng.normal(size=(BATCH, LENGTH, heads, WIDTH)), jnp.float32)

    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[0, :30] = 0
    segments[1] = np.repeat([1, 2, 3, 4], [40, 30, 50, 30])
    lengths = [np.arange(40), 40 + np.arange(30), 40 + np.arange(50), np.arange(30)]
    positions = np.stack([np.maximum(np.arange(LENGTH) - 30, 0), np.concatenate(lengths)]).astype(np.int32)
    prefixes = np.where(np.isin(segments, [2, 3]), 1, segments).astype(np.int32)
    return (draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)), jnp.asarray(positions), jnp.asarray(segments), prefixes


@pytest.mark.parametrize(
    ("window", "softcap", "shared"), [(None, None, False), (20, None, False), (None, 5.0, False), (70, None, True)]
)
def test_values_and_gradients_are_those_of_all_queries_at_once(row, window, softcap, shared, monkeypatch):
    operands, positions, segments, prefixes = row
    prefix_ids = jnp.asarray(prefixes) if shared else None
    coordinates = module.Coordinates(positions, segments, positions, segments, prefix_ids)

    def values_and_gradients(blocks):
        def total(query, key, value):
            mixed = module.attention(
                query, key, value, coordinates, window=window, softcap=softcap, scale=0.3, implementation="xla"
            )
            mixed = jnp.where((segments > 0)[..., None, None], mixed, 0.0)
            return jnp.sum(mixed**2), mixed

        assert str(jax.make_jaxpr(total)(*operands)).count("exp ") == blocks
        (_, mixed), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*operands)
        return [mixed, *grads]

    in_blocks = values_and_gradients(3)
    monkeypatch.setattr(module, "QUERY_BLOCK", LENGTH)
    for blocked, whole in zip(in_blocks, values_and_gradients(1), strict=True):
        np.testing.assert_allclose(blocked, whole, atol=2e-5)


@pytest.mark.parametrize("devices", [None, 8])
def test_splash_pads_rows_of_any_width_and_any_number_for_the_mesh(row, devices, monkeypatch):
    """Two rows of 150 tokens, on a mesh that cuts rows in eight: interpreted, the kernel gives what XLA gives."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    (query, key, value), positions, segments, _ = row
    operands = query, jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2)
    coordinates = module.Coordinates(positions, segments, positions, segments)
    options = {"window": None, "softcap": None, "scale": 0.3}
    layout = None if devices is None else Layout(make_mesh(fsdp=devices))

    def mixed(implementation):
        run = functools.partial(module.attention, implementation=implementation, layout=layout, **options)
        return jax.jit(run)(*operands, coordinates)

    counts = np.asarray(segments > 0)
    np.testing.assert_allclose(mixed("splash")[counts], mixed("xla")[counts], atol=2e-5)


@pytest.mark.parametrize(("tokens", "implementation"), [(127, "xla"), (128, "splash"), (8000, "splash")])
def test_a_tpu_takes_splash_for_rows_of_any_width_from_128(tokens, implementation):
    query = jax.ShapeDtypeStruct((1, tokens, 8, 64), jnp.bfloat16)
    assert module.choose(query, query, None, platform="tpu") == implementation
