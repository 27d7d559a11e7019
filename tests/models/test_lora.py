"""Adapters: what they compute, where their gradient is, and that the base stays one copy of itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxalign.algorithms.supervised import supervised
from jaxalign.losses import cross_entropy
from jaxalign.models.adapters.lora import (
    Adapter,
    Lora,
    init_adapter,
    join,
    linear_layers,
    merged_norms,
    resolve_targets,
    split,
)
from jaxalign.models.adapters.merge import merge
from jaxalign.models.adapters.quantise import quantise_kernels
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.decoder.layers import Linear
from jaxalign.models.files.families import model_config
from jaxalign.models.places import Layout, make_mesh, shardings
from jaxalign.training.optimizer import is_matrix
from jaxalign.training.sharding import jit_step, put_batch
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import TokenBatch
from tests.models.tiny import TINY, hf_config

LLAMA = model_config({"architectures": ["LlamaForCausalLM"], **TINY["llama"], "initializer_range": 0.2})
PHI3 = model_config(hf_config("phi3"))
GPT2 = model_config(hf_config("gpt2"))
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 11))
PLAIN = Lora(4, 8.0, resolve_targets("all-linear", LLAMA))
DORA = Lora(4, 8.0, resolve_targets("q_proj,mlp/.*", LLAMA), rslora=True, dora=True)


@functools.cache
def base_params():
    return init_params(LLAMA, jax.random.key(0))


@functools.cache
def start(lora):
    _, abstract = split(make_decoder(LLAMA, lora=lora)[1])
    return init_adapter(abstract, jax.random.key(1), base=base_params())


def stirred(adapter):
    """As after training: every leaf moved."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def forward(lora=None, quantise="none"):
    graphdef, _ = make_decoder(LLAMA, lora=lora, quantise=quantise)
    return jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS))


def test_a_fresh_adapter_changes_no_bit_of_the_hidden_states():
    np.testing.assert_array_equal(forward(PLAIN)(join(start(PLAIN), base_params())), forward()(base_params()))


def test_fresh_magnitudes_are_the_norms_of_the_kernels_so_dora_starts_at_the_base():
    adapter = start(DORA)
    kernel = base_params()["blocks"]["attention"]["query"]["kernel"]
    expected = np.linalg.norm(np.asarray(kernel, np.float64), axis=1)
    np.testing.assert_allclose(adapter["blocks"]["attention"]["query"]["adapter"]["magnitude"], expected, rtol=1e-6)
    # m / ‖W‖ is 1 to the last digit of a float32, where another program rounds the norm otherwise
    np.testing.assert_allclose(forward(DORA)(join(adapter, base_params())), forward()(base_params()), atol=1e-5)


@pytest.mark.parametrize("lora", [PLAIN, DORA], ids=["lora", "rslora and dora"])
def test_adapters_compute_what_the_merged_kernels_compute(lora):
    params = join(stirred(start(lora)), base_params())
    merged = merge(params, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base_params())
    adapted, plain = forward(lora)(params), forward()(merged)
    np.testing.assert_allclose(adapted, plain, atol=1e-5)
    assert float(jnp.abs(adapted - forward()(base_params())).max()) > 0.1


def test_rank_one_by_hand():
    # x = (1, 2), W = I, A = (3, 1)ᵀ, B = (1, -1), alpha / r = 2: x A = 5, so y = (1, 2) + 2 · 5 · (1, -1) = (11, -8)
    layer = Linear(jnp.eye(2), jnp.array([0.5, 0.0]))
    a, b = jnp.array([[3.0], [1.0]]), jnp.array([[1.0, -1.0]])
    layer.adapter = Adapter(a, b, None, scale=2.0)
    np.testing.assert_array_equal(layer(jnp.array([[1.0, 2.0]])), [[11.5, -8.0]])
    # The columns of W + 2 A B are (7, 2) and (-6, -1); with magnitudes of their norms times (1, 10), DoRA gives
    # (11, -80), and then the bias.
    norms = np.array([53.0, 37.0]) ** 0.5
    np.testing.assert_allclose(merged_norms(jnp.eye(2), a, b, scale=2.0), norms, rtol=1e-6)
    layer.adapter = Adapter(a, b, jnp.array(norms * [1, 10]), scale=2.0)
    np.testing.assert_allclose(layer(jnp.array([[1.0, 2.0]])), [[11.5, -80.0]], rtol=1e-6)


def test_every_output_of_a_merged_dora_kernel_is_as_long_as_its_magnitude():
    adapter = stirred(start(DORA))
    merged = merge(join(adapter, base_params()), DORA)
    for name in ("gate", "up", "down"):
        lengths = np.linalg.norm(merged["blocks"]["mlp"][name]["kernel"], axis=1)
        np.testing.assert_allclose(lengths, adapter["blocks"]["mlp"][name]["adapter"]["magnitude"], rtol=1e-5)


def test_a_is_uniform_within_one_over_the_root_of_its_inputs():
    a = np.asarray(start(Lora(64, 1.0, ("mlp/down",)))["blocks"]["mlp"]["down"]["adapter"]["a"])
    bound = 48**-0.5  # of PEFT's kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) · in))
    assert a.shape == (3, 48, 64) and np.abs(a).max() <= bound
    np.testing.assert_allclose([a.mean(), a.var()], [0.0, bound**2 / 3], atol=1e-3)
    assert len(np.unique(a)) > 0.99 * a.size  # layers are drawn apart


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert Lora(16, 32.0, ()).scale == 2.0 and Lora(16, 32.0, (), rslora=True).scale == 8.0


def batch():
    tokens = np.random.default_rng(1).integers(3, 67, (8, 11))
    positions = np.broadcast_to(np.arange(11), tokens.shape)
    return TokenBatch(tokens, positions > tokens % 7, positions, np.ones_like(tokens))


def three_steps(mesh, microbatches):
    """(losses, the state after three steps of DoRA on an int8 base, the base, the traces of the step)."""
    layout = Layout(mesh) if mesh.size > 1 else None
    graphdef, abstract = make_decoder(LLAMA, lora=DORA, quantise="int8", remat="blocks", layout=layout)
    base = jax.device_put(quantise_kernels(base_params(), "int8"), shardings(split(abstract)[0], mesh))
    optimizer = optax.adam(1e-2)

    def create(adapter):
        return TrainState.create(adapter, optimizer, jax.random.key(3))

    places = shardings(jax.eval_shape(create, start(DORA)), mesh)
    state = jax.jit(create, out_shardings=places)(start(DORA))
    algorithm = supervised(graphdef, loss=cross_entropy)._replace(assemble=join)
    train_step = make_train_step(algorithm, optimizer, microbatches=microbatches)
    traces = []
    step = jit_step(lambda *args: traces.append(1) or train_step(*args), state, base, mesh)
    losses = []
    for _ in range(3):
        state, metrics = step(state, base, put_batch(batch(), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state, base, len(traces)


@functools.cache
def on_one_device():
    return three_steps(make_mesh(devices=jax.devices()[:1]), microbatches=1)


def test_a_step_trains_the_adapters_alone_and_is_traced_once():
    losses, state, base, traces = on_one_device()
    assert losses[2] < losses[1] < losses[0] and traces == 1
    assert jax.tree.structure(state.params) == jax.tree.structure(start(DORA))
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(start(DORA))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state.params, start(DORA))))
    chex.assert_trees_all_equal(base, quantise_kernels(base_params(), "int8"))  # neither changed nor donated


def test_a_mesh_and_microbatches_train_the_same_adapters():
    losses, state, base, _ = three_steps(make_mesh(data=2, fsdp=2, tensor=2), microbatches=2)
    expected_losses, expected, _, _ = on_one_device()
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    chex.assert_trees_all_close(*map(jax.device_get, (state.params, expected.params)), atol=1e-5)
    codes = base["blocks"]["mlp"]["up"]["kernel"]["codes"]
    assert {shard.data.size for shard in codes.addressable_shards} == {codes.size // 4}


def test_several_adapters_share_one_base():
    """Members of an ensemble are a vmap over adapters; the base has no such axis."""
    one, two = stirred(start(PLAIN)), jax.tree.map(jnp.negative, stirred(start(PLAIN)))
    both = jax.tree.map(lambda *xs: jnp.stack(xs), one, two)
    graphdef, _ = make_decoder(LLAMA, lora=PLAIN)

    def member(adapter, base):
        return nnx.merge(graphdef, join(adapter, base))(TOKENS)

    actual = jax.jit(jax.vmap(member, in_axes=(0, None)))(both, base_params())
    expected = [forward(PLAIN)(join(adapter, base_params())) for adapter in (one, two)]
    np.testing.assert_allclose(actual, jnp.stack(expected), atol=1e-5)


def test_split_takes_apart_what_join_puts_together():
    plain, (base, adapter) = make_decoder(LLAMA)[1], split(make_decoder(LLAMA, lora=DORA)[1])
    assert jax.tree.structure(base) == jax.tree.structure(plain)
    again = split(join(adapter, base))
    assert jax.tree.structure(again) == jax.tree.structure((base, adapter))
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (again, (base, adapter))), strict=True))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("q_proj,v_proj", ("attention/query", "attention/value")),
        ("value, query", ("attention/query", "attention/value")),
        ("self_attn.o_proj", ("attention/output",)),
        ("mlp/.*", ("mlp/gate", "mlp/up", "mlp/down")),
        (".*(up|down)_proj", ("mlp/up", "mlp/down")),
        ("all-linear", tuple(linear_layers(LLAMA))),
    ],
)
def test_layers_are_named_in_our_words_or_in_hugging_faces(text, expected):
    assert set(resolve_targets(text, LLAMA)) == set(expected)


def test_a_fused_module_is_all_that_it_fuses():
    assert resolve_targets("qkv_proj", PHI3) == ("attention/query", "attention/key", "attention/value")
    assert resolve_targets("c_proj", GPT2) == ("attention/output", "mlp/down")


@pytest.mark.parametrize("text", ["q_proj,gate_and_up", "", "[", "lm_head"])
def test_a_target_that_names_nothing_is_an_error_that_lists_what_exists(text):
    with pytest.raises(ValueError, match=r"regular expression|attention/query \(self_attn.q_proj\), .*all-linear"):
        resolve_targets(text, LLAMA)


def test_adapters_are_placed_where_their_kernels_inputs_and_outputs_are():
    placed = shardings(make_decoder(LLAMA, lora=Lora(4, 8.0, PLAIN.targets, dora=True))[1], make_mesh(fsdp=4, tensor=2))
    up, down = (placed["blocks"]["mlp"][name]["adapter"] for name in ("up", "down"))
    assert [up[name].spec for name in ("a", "b", "magnitude")] == [
        P(None, "fsdp", None),
        P(None, None, "tensor"),
        P(None, "tensor"),
    ]
    assert [down[name].spec for name in ("a", "b", "magnitude")] == [
        P(None, "tensor", None),
        P(None, None, "fsdp"),
        P(),
    ]


def test_decay_shrinks_a_and_b_and_not_the_magnitudes():
    decayed = is_matrix(make_decoder(LLAMA, lora=DORA)[1])["blocks"]["mlp"]["up"]["adapter"]
    assert decayed == {"a": True, "b": True, "magnitude": False}
