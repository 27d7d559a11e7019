"""Placement of state and batches on a mesh, and sizes that a mesh divides."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.places import make_mesh, shardings
from jaxalign.training.sharding import ROWS, check_batch_size, put_batch
from jaxalign.training.state import TrainState
from tests.absent import tpu_devices


def abstract_params():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    attention = {name: {"kernel": shape(3, 16, 16)} for name in ("query", "output")}
    return {"embedding": shape(12, 16), "norm": {"scale": shape(16)}, "blocks": {"attention": attention}}


def test_one_table_places_parameters_and_optimizer_state_alike():
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda params, key: TrainState.create(params, optax.adam(1.0), key), abstract_params(), key)
    placed = shardings(state, make_mesh(data=2, fsdp=2, tensor=2))
    for tree in (placed.params, placed.opt_state[0].mu, placed.opt_state[0].nu):
        assert tree["embedding"].spec == P("tensor", "fsdp")
        assert tree["blocks"]["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor")
        assert tree["blocks"]["attention"]["output"]["kernel"].spec == P(None, "tensor", "fsdp")
        assert tree["norm"]["scale"].spec == P()
    assert placed.step.spec == P()


def test_a_dimension_that_the_mesh_does_not_divide_is_replicated_and_the_log_says_so(caplog):
    placed = shardings({"embedding": jax.ShapeDtypeStruct((361, 16), jnp.float32)}, make_mesh(fsdp=4, tensor=2))
    assert placed["embedding"].spec == P(None, "fsdp")
    assert "embedding: 361 is not a multiple of the mesh axis tensor=2" in caplog.text


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 1}, {"fsdp": 0}]
)
def test_a_mesh_that_does_not_fill_the_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match="does not fill 8 devices"):
        make_mesh(**sizes)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_a_batch_that_the_mesh_does_not_divide_names_the_nearest_that_it_does():
    mesh = make_mesh(fsdp=8)
    check_batch_size(16, 2, mesh)
    with pytest.raises(ValueError, match=r"`batch_size` 20 .* = 16; the nearest: 16 or 32"):
        check_batch_size(20, 2, mesh)
    with pytest.raises(ValueError, match=r"the nearest: 16$"):
        check_batch_size(3, 2, mesh)


def test_rows_of_a_batch_go_over_data_and_fsdp():
    batch = put_batch({"x": jnp.arange(16).reshape(8, 2)}, make_mesh(data=2, fsdp=2, tensor=2))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4", "v5e:8x8", "v5p:4x4x4", "v6e:2x4", "v6e:8x8"])
def test_a_slice_makes_every_mesh_and_feeds_every_row_once_to_each_part_of_the_model(topology):
    """By the devices in the order of the real slice, and the hosts that they belong to."""
    devices = tpu_devices(topology)
    powers = [2**i for i in range(len(devices).bit_length())]
    for tensor, data in itertools.product([size for size in powers if size <= 8], powers):
        if tensor * data > len(devices):
            continue
        mesh = make_mesh(data=data, tensor=tensor, devices=devices)
        assert mesh.shape["tensor"] == tensor and mesh.shape["data"] == data
        assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
        count = len(devices) // tensor * 2
        rows_of = NamedSharding(mesh, ROWS).devices_indices_map((count,))
        fed = np.zeros((count, tensor), int)
        for host in {device.process_index for device in devices}:
            for (_, _, part), device in np.ndenumerate(mesh.devices):
                if device.process_index == host:
                    fed[rows_of[device][0], part] += 1
        assert (fed == 1).all()
