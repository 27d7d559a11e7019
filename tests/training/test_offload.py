"""A frozen tree in host memory: steps are the same to the bit, and on absent devices it takes no device memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithms.base import Algorithm
from jaxalign.models import places
from jaxalign.models.places import fetched, offloaded
from jaxalign.training import sharding
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import Average
from tests.absent import device

WIDTH, LAYERS = 512, 8
OPTIMIZER = optax.adam(0.1)


def prepare(params, frozen, batch):
    return batch | {"y": jnp.tanh(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], frozen["head"])[0])}


def loss(params, batch):
    return Average.of((batch["x"] @ params["head"] - batch["y"]) ** 2), {}


def start():
    return TrainState.create({"head": jnp.ones((WIDTH, WIDTH))}, OPTIMIZER, jax.random.key(0))


def program(mesh, *, offload):
    """(jitted step, shapes and places of its state, frozen tree and batch)."""
    like = sharding.placed(jax.eval_shape(start), mesh)
    frozen = {"head": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
    frozen = sharding.placed(frozen, mesh, offload=offload)
    rows = jax.sharding.NamedSharding(mesh, sharding.ROWS)
    batch = {"x": jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=rows)}
    train_step = make_train_step(Algorithm(loss, prepare), OPTIMIZER, microbatches=2)
    return sharding.jit_step(train_step, like, frozen, mesh, offload=offload), (like, frozen, batch)


def test_what_is_fetched_from_the_host_is_what_was_put_there_in_the_same_shares():
    mesh = places.make_mesh()
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.sharding.NamedSharding(mesh, sharding.ROWS))
    away = offloaded({"x": x})["x"]
    assert away.sharding.memory_kind == "pinned_host" and away.sharding.spec == x.sharding.spec
    back = fetched({"x": away})["x"]
    assert back.sharding.is_equivalent_to(x.sharding, 2) and back.sharding.memory_kind == "device"
    np.testing.assert_array_equal(back, x)


def test_steps_with_a_frozen_tree_in_host_memory_are_the_same_to_the_bit():
    mesh, results = places.make_mesh(), []

    def drawn(x):
        return jax.device_put(jax.random.normal(jax.random.key(1), x.shape), x.sharding)

    for offload in (False, True):
        step, (like, frozen, batch) = program(mesh, offload=offload)
        state = jax.device_put(start(), jax.tree.map(lambda x: x.sharding, like))
        frozen, batch = jax.tree.map(drawn, (frozen, batch))
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        assert frozen["head"].sharding.memory_kind == ("pinned_host" if offload else "device")
        results.append((state.params["head"], metrics["loss"]))
    for on_device, on_host in zip(*results, strict=True):
        np.testing.assert_array_equal(on_device, on_host)


def test_a_chip_holds_less_by_the_frozen_tree_between_steps():
    """On a TPU: a program compiled for an absent GPU does not report which memory its arguments are in."""
    mesh, size = places.make_mesh(data=1, fsdp=1, tensor=1, devices=[device("v5e:1x1")]), LAYERS * WIDTH**2 * 4
    on_device, on_host = {}, {}
    for offload in (False, True):
        step, shapes = program(mesh, offload=offload)
        analysis = step.lower(*shapes).compile().memory_analysis()
        on_device[offload] = analysis.argument_size_in_bytes
        on_host[offload] = analysis.host_argument_size_in_bytes
    assert on_device[False] - on_device[True] == size
    assert on_host == {False: 0, True: size}
