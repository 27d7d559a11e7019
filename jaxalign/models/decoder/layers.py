"""The parts of a block: embedding, norm, rotary positions, attention with its projections, MLP."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxalign.models.decoder.attention import Coordinates, attention, attention_of_one
from jaxalign.models.decoder.config import LayerKind, ModelConfig, Rope
from jaxalign.models.places import Layout
from jaxalign.ops.embedding import rows_of
from jaxalign.ops.mesh import Shards
from jaxalign.ops.product import product, shifted

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

CAST = r"(kernel|embedding)$"  # names of leaves of which nothing but a copy in the dtype of compute is read


class Compute(NamedTuple):
    """Settings that change how a model computes, not what; hashable."""

    dtype: jnp.dtype = jnp.dtype("float32")
    param_dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    attention: str | None = None
    layout: Layout | None = None


class Embedding(nnx.Module):
    """Rows of a table, cast to the dtype of compute after they are taken, so that the table is never copied."""

    def __init__(self, size: int, width: int, *, std: float, compute: Compute, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (size, width), compute.param_dtype))
        self.compute = compute

    def __call__(self, ids: jax.Array, *, on_mesh: bool = True) -> jax.Array:
        """[B T D]; `on_mesh` as `Layout.cut` places it, otherwise as XLA does."""
        layout = self.compute.layout if on_mesh else None
        shards = None if layout is None else Shards(layout.mesh, layout.rows, layout.heads)
        cut = None if layout is None else layout.tokens(ids.shape[1])
        return rows_of(self.embedding[...], jnp.asarray(ids), self.compute.dtype, shards=shards, cut=cut)


class Norm(nnx.Module):
    """x / rms(x) · (offset + scale), or layer norm with a bias, computed in float32."""

    def __init__(self, config: ModelConfig, width: int, compute: Compute):
        self.config = config
        self.scale = nnx.Param(jnp.full(width, 1.0 - config.norm_offset, compute.param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, compute.param_dtype)) if config.norm == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.bias is not None:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        wide = wide * _along_last(self.config.norm_offset + self.scale[...].astype(jnp.float32), x.ndim)
        if self.bias is not None:
            wide = wide + _along_last(self.bias[...].astype(jnp.float32), x.ndim)
        return wide.astype(x.dtype)


def _along_last(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - 1) + x.shape)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope | None) -> jax.Array:
    """Rotary positions on x [B T H K]: dimension i < dims/2 pairs with i + dims/2, those from dims on stay; float32."""
    if rope is None:
        return x
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(rope.frequencies())[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    half = rope.dims // 2
    first, second = x[..., :half].astype(jnp.float32), x[..., half : rope.dims].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [x[..., rope.dims :]], axis=-1)


class Attention(nnx.Module):
    """Grouped-query attention with its projections, whose kernels are [D, H K]."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        width, out = config.num_heads * config.head_dim, config.initializer_range / (2 * config.num_layers) ** 0.5
        kv_width = config.num_kv_heads * config.head_dim
        self.config, self.compute = config, compute
        self.query = linear(config.hidden_size, width, config.qkv_bias, config.initializer_range, compute, rngs)
        self.key = linear(config.hidden_size, kv_width, config.qkv_bias, config.initializer_range, compute, rngs)
        self.value = linear(config.hidden_size, kv_width, config.qkv_bias, config.initializer_range, compute, rngs)
        self.output = linear(width, config.hidden_size, config.output_bias, out, compute, rngs, cut_inputs=True)
        normed, whole = config.qk_norm != "none", config.qk_norm == "full"
        self.query_norm = Norm(config, width if whole else config.head_dim, compute) if normed else None
        self.key_norm = Norm(config, kv_width if whole else config.head_dim, compute) if normed else None

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B T H K], key and value [B T Hk K], before rotation."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (_heads(part, self.config.head_dim) for part in (query, key, value))
        if self.config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5 if self.config.query_scale is None else self.config.query_scale

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, coordinates: Coordinates, kind: LayerKind
    ) -> jax.Array:
        """The projected mixture of values, [B T D]; key and value [B S Hk K]."""
        mixed = attention(
            query,
            key,
            value,
            coordinates,
            window=kind.window,
            softcap=self.config.attention_softcap,
            scale=self._scale,
            implementation=self.compute.attention,
            layout=self.compute.layout,
        )
        return self.output(mixed.reshape(*mixed.shape[:2], -1))

    def attend_cached(
        self, query: jax.Array, key: jax.Array, value: jax.Array, coordinates: Coordinates, kind: LayerKind
    ) -> jax.Array:
        """`attend` to keys and values as a cache stores them, [B Hk S K]; a single query a row is a case of its own."""
        if query.shape[1] > 1:
            return self.attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), coordinates, kind)
        mixed = attention_of_one(
            query,
            key,
            value,
            coordinates,
            window=kind.window,
            softcap=self.config.attention_softcap,
            scale=self._scale,
        )
        return self.output(mixed.reshape(*mixed.shape[:2], -1))


def _heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, head_dim)


class MLP(nnx.Module):
    """down(act(gate x) · up x), or down(act(up x)) in families without a gate."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.activation
        self.gate = linear(width, inner, config.mlp_bias, std, compute, rngs) if config.gated_mlp else None
        self.up = linear(width, inner, config.mlp_bias, std, compute, rngs)
        out = std / (2 * config.num_layers) ** 0.5
        self.down = linear(inner, width, config.mlp_bias, out, compute, rngs, cut_inputs=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        inner = activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x)
        return self.down(inner)


class Linear(nnx.Module):
    """x W + b with W [in, out], cast to the dtype of compute as it is used.

    `make_decoder` may replace the kernel by a `quantise.QuantisedKernel` and add a `lora.Adapter`.
    """

    def __init__(self, kernel: jax.Array, bias: jax.Array | None, place: NamedSharding | None = None):
        self.place = place  # of the kernel while it is used, on a mesh
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.adapter = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        plain = isinstance(self.kernel, nnx.Param)
        # With tokens on one axis the gradient of W contracts one axis, not two: twice as fast with XLA on a CPU.
        # On a mesh rows and tokens of y may be cut over two of its axes, which one axis could not be.
        tokens = x.reshape(-1, x.shape[-1]) if self.place is None else x
        y = product(tokens, self.kernel[...], self.place) if plain else self.kernel.product(tokens)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if self.adapter is not None:
            y = self.adapter(x, y, self.kernel[...])
        return y if self.bias is None else shifted(y, self.bias[...])


def linear(
    inputs: int,
    outputs: int,
    bias: bool,
    std: float,
    compute: Compute,
    rngs: nnx.Rngs,
    *,
    cut_inputs: bool = False,
) -> Linear:
    """A Linear with normal weights of standard deviation `std` and a bias of zeros.

    On a mesh its outputs are cut over the axis of heads, or with `cut_inputs` its inputs.
    """
    shape, layout = (inputs, outputs), compute.layout
    kernel = std * jax.random.normal(rngs.params(), shape, compute.param_dtype)
    place = None if layout is None else layout.of_kernel(shape, inputs=cut_inputs)
    return Linear(kernel, jnp.zeros(outputs, compute.param_dtype) if bias else None, place)
