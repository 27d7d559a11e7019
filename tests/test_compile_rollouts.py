"""Every program of `sft` and `grpo` compiles for slices of eight and sixteen small chips, with splash attention.

The rows of generation are as many as there happen to be prompts, which no number of chips need divide.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.commands import grpo, sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.on_policy import GRPOConfig
from jaxalign.models import places
from jaxalign.models.decoder.decoder import decoder_for
from jaxalign.models.files.families import model_config
from jaxalign.rollout.engine import slots as device
from jaxalign.rollout.engine.params import decoding_like, target_of, to_layers
from jaxalign.rollout.engine.slots import Admitted, Sampling
from jaxalign.training import sharding
from jaxalign.training.program import compile_step
from jaxalign.types import RolloutBatch, TokenBatch
from tests.absent import tpu_devices

# The heads of Llama 3.1 8B, with two narrow layers and few words: programs that compile in seconds.
MODEL = model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
SHARED = {
    "model": "m",
    "data": "d",
    "output": "o",
    "attention": "splash",
    "precision": "bfloat16",
    "max_length": 256,
    "remat": "none",
}
ROOM = 128  # tokens of the longest prompt, so that splash reads it
GREEDY = Sampling(max_new_tokens=64, temperature=0.0, terminators=(2,))


def mesh_of(topology):
    return places.make_mesh(devices=tpu_devices(topology))


def compiled(lowered, *, splash=True):
    assert ("splash" in lowered.as_text()) == splash
    return lowered.compile()


def token_batch(rows, width, mesh):
    place = NamedSharding(mesh, sharding.ROWS)
    dtypes = jnp.int32, jnp.bool_, jnp.int32, jnp.int32
    return TokenBatch(*(jax.ShapeDtypeStruct((rows, width), dtype, sharding=place) for dtype in dtypes))


def compile_generation(config, params, mesh, sampling, *, slots, prompts):
    """The copy of the weights; slots; `prompts` read at once, each number; and steps of one token for every slot."""
    graphdef, _ = decoder_for(config, MODEL, mesh)
    decoding = decoding_like(graphdef, params, layout="tensor")
    stack = params["blocks"]
    targets = tuple(map(target_of, jax.tree.leaves(stack), jax.tree.leaves(decoding.layers[0])))
    copy = to_layers.lower(stack, targets).compile()
    assert copy.memory_analysis().output_size_in_bytes == pytest.approx(places.device_bytes(decoding.layers), rel=1e-3)
    options = {"slots": slots, "prompt": ROOM, "response": 64, "sampling": sampling, "cache_dtype": None}
    state = device.slots_like(graphdef, decoding.tree, **options)
    everywhere = NamedSharding(mesh, P())

    def struct(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def admit(params, slots, new):
        return device.admit(graphdef, params, slots, new)

    for count in prompts:
        numbers = struct(jnp.int32, count)
        rows = struct(jnp.int32, count, ROOM), struct(jnp.bool_, count, ROOM)
        keys = struct(jax.eval_shape(lambda: jax.random.key(0)).dtype, count)
        compiled(jax.jit(admit).lower(decoding, state, Admitted(*rows, numbers, numbers, keys, numbers)))
    steps = device.decode.lower(graphdef, decoding, state, struct(jnp.int32), struct(jnp.int32), sampling=sampling)
    return compiled(steps, splash=False), state  # one query a row is read by XLA


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4"])
def test_sft_and_its_samples_compile_for_a_slice(topology):
    mesh = mesh_of(topology)
    config = SFTConfig(**SHARED, batch_size=16)
    program = compile_step(config, sft.recipe(config, MODEL, mesh), mesh, steps=10)
    compiled(program.step.lower(program.like, program.frozen, token_batch(16, 256, mesh)))
    compile_generation(config, program.like.params, mesh, GREEDY, slots=4, prompts=(4,))


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4"])
def test_grpo_compiles_for_a_slice(topology):
    mesh = mesh_of(topology)
    config = GRPOConfig(**SHARED, max_new_tokens=128, n=2)
    program = compile_step(config, grpo.recipe(config, MODEL, mesh), mesh, steps=10)
    rows = NamedSharding(mesh, sharding.ROWS)
    of_tokens, of_rows = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in ((16, 256), (16,)))
    columns = dict.fromkeys(("old_logps", "advantages"), of_tokens) | dict.fromkeys(("scores", "ended"), of_rows)
    batch = RolloutBatch(token_batch(16, 256, mesh), columns)
    compiled(program.step.lower(program.like, program.frozen, batch))  # it scores too, before the loss
    own = places.decoding_mesh(mesh, MODEL.num_kv_heads)
    assert own.shape["tensor"] == 8
    sampling = Sampling(max_new_tokens=128, terminators=(2,))
    steps, slots = compile_generation(config, program.like.params, own, sampling, slots=64, prompts=(1, 3, 8))
    cache = places.device_bytes(slots.cache)
    assert cache == 2 * 2 * 64 * 8 * 192 * 64 * 2 // mesh.size + 2 * 64 * 192 * 4 // own.shape["data"] + 4
    assert steps.memory_analysis().argument_size_in_bytes < 2 * places.device_bytes((slots, program.like.params))
