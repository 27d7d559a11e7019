"""Params as generation reads them: cast once, gathered once, and not copied where nothing changes."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxalign.models import places
from jaxalign.models.adapters.lora import Lora, init_adapter, join, split
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.places import Layout
from jaxalign.rollout.engine import slots as device
from jaxalign.rollout.engine.engine import LocalEngine
from jaxalign.rollout.engine.params import decoding_like, decoding_params
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import leaf_names
from tests.models.tiny import TINY

CONFIG = model_config({"architectures": ["LlamaForCausalLM"], **TINY["llama"], "vocab_size": 64})
PARAMS = init_params(CONFIG, jax.random.key(0))


def on_a_mesh():
    mesh = places.make_mesh(data=2, fsdp=2, tensor=2)
    graphdef, abstract = make_decoder(CONFIG, compute_dtype=jnp.bfloat16, layout=Layout(mesh))
    return graphdef, jax.device_put(PARAMS, places.shardings(abstract, mesh))


def named(tree):
    return dict(zip(jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True))


def test_kernels_and_embeddings_are_whole_but_for_tensor_and_in_the_dtype_of_compute():
    graphdef, params = on_a_mesh()
    tree, layers = decoding_params(graphdef, params, layout="tensor")
    assert all(x.size == 0 for x in jax.tree.leaves(tree["blocks"]))  # generation does not read the stack
    leaves = named(layers[1]) | named({"embed": tree["embed"], "norm": tree["norm"]})
    for name, x in leaves.items():
        cast = name.endswith(("kernel", "embedding"))
        assert x.dtype == (jnp.bfloat16 if cast else jnp.float32), name
        shares = {shard.data.size for shard in x.addressable_shards}
        assert shares == {x.size // 2 if cast else x.size}, name  # of tensor=2; norms are whole in any layout
    up = params["blocks"]["mlp"]["up"]["kernel"][1].astype(jnp.bfloat16)
    assert (layers[1]["mlp"]["up"]["kernel"] == up).all()


@pytest.mark.parametrize("layout", ["training", "tensor"])
def test_a_token_gathers_weights_in_the_layout_of_training_alone(layout):
    """Read from the compiled loop over tokens: the shares of kernels that tensor=2 leaves, gathered over fsdp=2."""
    graphdef, params = on_a_mesh()
    decoding, sampling = decoding_params(graphdef, params, layout=layout), Sampling(8)
    slots = device.empty_slots(
        graphdef, params, slots=4, prompt=8, response=8, sampling=sampling, cache_dtype=jnp.bfloat16
    )
    text = device.decode.lower(graphdef, decoding, slots, 5, 8, sampling=sampling).compile().as_text()
    results = [line.split(" all-gather", 1)[0] for line in text.splitlines() if re.search(r" all-gather\S*\(", line)]
    gathered = {tuple(map(int, dims.split(","))) for line in results for dims in re.findall(r"\w\d+\[([\d,]+)\]", line)}
    kernels = {(32, 16), (32, 8), (16, 32), (32, 24), (24, 32)}
    assert (gathered & kernels == kernels) if layout == "training" else not gathered & kernels


def test_what_is_right_as_it_lies_is_not_copied():
    graphdef, _ = make_decoder(CONFIG)
    params = init_params(CONFIG, jax.random.key(0))
    before = named({name: x for name, x in params.items() if name != "blocks"})
    after = named({name: x for name, x in decoding_params(graphdef, params).tree.items() if name != "blocks"})
    assert all(after[name].unsafe_buffer_pointer() == x.unsafe_buffer_pointer() for name, x in before.items())


def test_kernels_whose_norms_dora_takes_keep_their_dtype():
    lora = Lora(2, 4.0, ("mlp/down",), dora=True)
    graphdef, abstract = make_decoder(CONFIG, compute_dtype=jnp.bfloat16, lora=lora)
    adapter = init_adapter(split(abstract)[1], jax.random.key(1), base=PARAMS)
    layer = decoding_params(graphdef, join(adapter, PARAMS)).layers[0]["mlp"]
    assert layer["down"]["kernel"].dtype == jnp.float32 and layer["up"]["kernel"].dtype == jnp.bfloat16


def test_a_model_may_move_to_another_mesh_and_be_there_once():
    """From shares of training, fsdp=8, to heads cut in two and rows in four, each leaf of the stack freed at once."""
    mesh = places.make_mesh(fsdp=8)
    wide = places.decoding_mesh(mesh, CONFIG.num_kv_heads)
    assert dict(wide.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert [*wide.devices.flat] == [*mesh.devices.flat]
    graphdef, abstract = make_decoder(CONFIG, compute_dtype=jnp.bfloat16, layout=Layout(wide))
    placed = places.shardings(abstract, mesh)
    params = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=placed)(PARAMS)
    expected = decoding_params(make_decoder(CONFIG, compute_dtype=jnp.bfloat16)[0], PARAMS)
    like = decoding_like(graphdef, params, layout="tensor")
    weights, _ = LocalEngine(graphdef, layout="tensor").memory(params, prompt=5, sampling=Sampling(8))
    decoding = decoding_params(graphdef, params, layout="tensor", free=True)
    tables = [decoding.tree["embed"], decoding.tree["unembedding"]]
    assert weights == places.device_bytes([decoding.layers, tables])  # the last norm lies where it was
    assert all(x.is_deleted() for x in jax.tree.leaves(params["blocks"]))
    for name, x in named({"layers": decoding.layers, "embed": decoding.tree["embed"]}).items():
        shape = named({"layers": like.layers, "embed": like.tree["embed"]})[name]
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype) and x.sharding.is_equivalent_to(shape.sharding, x.ndim)
        assert x.addressable_shards[0].data.size == x.size // (2 if name.endswith(("kernel", "embedding")) else 1)
    for ours, theirs in zip(jax.tree.leaves(decoding.layers), jax.tree.leaves(expected.layers), strict=True):
        assert (jax.device_get(ours) == jax.device_get(theirs)).all()
