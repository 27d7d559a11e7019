"""Kernels in 8 and 4 bits: how far off, how many bytes, and that they compute, shard and load like the floats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm
from safetensors.numpy import load_file

from jaxalign.models.adapters.lora import Lora, init_adapter, join, split
from jaxalign.models.adapters.merge import merge, merge_by_layer
from jaxalign.models.adapters.quantise import NF4, dequantise, quantise_kernel, quantise_kernels
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.places import make_mesh, shardings
from tests.models.tiny import TINY

HF = {"architectures": ["LlamaForCausalLM"], **TINY["llama"], "hidden_size": 128, "intermediate_size": 192}
LLAMA = model_config(HF)
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 11))
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    params = init_params(LLAMA, jax.random.key(0))
    save_pretrained(path, params, LLAMA, HF)
    return str(path), params


@functools.cache
def forward(lora, kind):
    graphdef, _ = make_decoder(LLAMA, lora=lora, quantise=kind)
    return jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS))


def hidden(params, lora=None, kind="none"):
    return forward(lora, kind)(params)


def kernel(seed=0, shape=(2, 128, 24)):
    return jax.random.normal(jax.random.key(seed), shape) * jnp.linspace(0.01, 3.0, 24)[(None,) * (len(shape) - 1)]


def test_int8_is_off_by_half_a_step_at_most():
    codes, scales = quantise_kernel(kernel(), "int8")
    step = np.repeat(np.asarray(scales, np.float32), 64, axis=1)
    error = np.abs(np.asarray(dequantise(codes, scales) - kernel())) / step
    assert codes.dtype == jnp.int8 and scales.shape == (2, 2, 24)
    assert 0.45 < error.max() <= 0.5 + 1e-4


def test_nf4_takes_the_nearest_of_its_sixteen_values():
    codes, scales = quantise_kernel(kernel(), "nf4")
    scale = np.repeat(np.asarray(scales, np.float32), 64, axis=1)
    choices = np.array(NF4)[:, None, None, None] * scale
    nearest = np.abs(choices - np.asarray(kernel())).min(axis=0)
    np.testing.assert_allclose(np.abs(dequantise(codes, scales) - kernel()), nearest, atol=1e-6)
    assert codes.dtype == jnp.uint8 and codes.shape == (2, 64, 24)
    assert len(np.unique(np.asarray(codes) & 15)) == len(np.unique(np.asarray(codes) >> 4)) == 16


def test_the_values_of_nf4_are_quantiles_of_a_normal_distribution():
    """Eight above 0 and seven below it, evenly spaced in probability up to 0.9677 (1 - (1/30 + 1/32) / 2)."""
    top = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (norm.ppf(jnp.linspace(top, 0.5, count)[:-1]) for count in (9, 8))
    expected = np.sort(np.concatenate([above, [0.0], -below])) / above[0]
    np.testing.assert_allclose(NF4, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_stand_for_is_quantised_to_the_same_codes(kind):
    once = quantise_kernel(kernel(), kind)
    twice = quantise_kernel(dequantise(*once), kind)
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_array_equal(once.scales, twice.scales)


def test_zeros_stay_zeros_and_other_widths_have_smaller_blocks():
    for kind in KINDS:
        np.testing.assert_array_equal(dequantise(*quantise_kernel(jnp.zeros((48, 3)), kind)), jnp.zeros((48, 3)))
    assert quantise_kernel(jnp.ones((48, 3)), "nf4").scales.shape == (3, 3)
    assert quantise_kernel(jnp.ones((5, 3)), "int8").scales.shape == (5, 3)
    with pytest.raises(ValueError, match=r"nf4 keeps two inputs in a byte, and a kernel \[5, 3\] has 5; take int8"):
        quantise_kernel(jnp.ones((5, 3)), "nf4")


@pytest.mark.parametrize("kind, bits, tolerance", [("int8", 8.25, 0.02), ("nf4", 4.25, 0.25)])
def test_a_quantised_model_says_nearly_the_same_in_a_fraction_of_the_bytes(kind, bits, tolerance, saved):
    path, params = saved
    base = load_params(path, LLAMA, quantise=kind)
    kernels = [x for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3]

    def bytes_of(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    others = bytes_of(params) - sum(x.nbytes for x in kernels)
    # no float copy is kept: the kernels' bits, and what was never quantised
    assert bytes_of(base) == others + sum(x.size for x in kernels) * bits / 8
    error = np.asarray(hidden(base, kind=kind) - hidden(params))
    assert 0 < np.sqrt((error**2).mean()) < tolerance  # hidden states are normalised to 1


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_the_backward_pass_keeps_no_floats_of_the_kernels(remat, saved):
    lora = Lora(2, 4.0, ("mlp/down",))
    graphdef, abstract = make_decoder(LLAMA, lora=lora, quantise="nf4", remat=remat)
    base, adapter = split(abstract)

    def loss(adapter, base):
        return jnp.sum(nnx.merge(graphdef, join(adapter, base))(TOKENS))

    backward = jax.eval_shape(lambda adapter, base: jax.vjp(lambda a: loss(a, base), adapter)[1], adapter, base)
    residuals = [x for x in jax.tree.leaves(backward) if jnp.issubdtype(x.dtype, jnp.floating)]
    kernel = base["blocks"]["attention"]["query"]["kernel"]["codes"].size * 2
    assert residuals and max(x.size for x in residuals) < kernel


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_layer_by_layer_what_quantising_the_whole_gives(kind, saved):
    path, params = saved
    expected = jax.jit(lambda params: quantise_kernels(params, kind))(params)
    places = shardings(make_decoder(LLAMA, quantise=kind)[1], make_mesh(fsdp=4, tensor=2))
    actual = load_params(path, LLAMA, quantise=kind, shardings=places)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    codes = actual["blocks"]["mlp"]["up"]["kernel"]["codes"]
    assert {shard.data.size for shard in codes.addressable_shards} == {codes.size // 8}


def test_adapters_on_a_quantised_base_merge_into_what_its_codes_stand_for(saved, tmp_path):
    (path, _), kind = saved, "nf4"
    lora = Lora(4, 8.0, ("attention/query", "mlp/down"), dora=True)
    base = load_params(path, LLAMA, quantise=kind)
    abstract = split(make_decoder(LLAMA, lora=lora, quantise=kind)[1])[1]
    adapter = init_adapter(abstract, jax.random.key(1), base=base)
    np.testing.assert_allclose(hidden(join(adapter, base), lora, kind), hidden(base, kind=kind), atol=2e-5)
    adapter = jax.tree.map(lambda x: x + 0.05, adapter)
    merged = merge(join(adapter, base), lora)
    np.testing.assert_allclose(hidden(join(adapter, base), lora, kind), hidden(merged), atol=2e-5)
    # the same a layer at a time, as it is exported
    save_pretrained(tmp_path / "out", merge_by_layer(join(adapter, base), lora), LLAMA, HF)
    again = load_params(str(tmp_path / "out"), LLAMA)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 3 + 9 * 3
