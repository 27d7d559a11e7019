"""The kernel of `kernels/logprob.py` on one device, or on every device of a mesh.

XLA cannot partition a Pallas call, so the collectives are written here: each device takes its own tokens and its own
share of the vocabulary, whole in width. The weight is gathered along the axis that cuts its width, in the dtype of
compute; shards of the vocabulary exchange six numbers a token; in the backward pass dhidden is summed over them, and
dweight, in float32, over the tokens' shards, each of which keeps its share of the width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import logprob
from jaxalign.kernels.logprob import Options
from jaxalign.kernels.runtime import Target


class Shards(NamedTuple):
    """The mesh, its axes that cut tokens, and the one that cuts the vocabulary. Hashable, so it can be static."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data", "fsdp")  # the last of them also cuts the width of the weight
    vocabulary: str | None = "tensor"

    def axis(self, vocabulary: int) -> str | None:
        """The axis over which a vocabulary of this size is cut; None if it is whole on every device."""
        size = 1 if self.vocabulary is None else self.mesh.shape[self.vocabulary]
        return self.vocabulary if size > 1 and vocabulary % size == 0 else None

    def local(self, tokens: int, vocabulary: int) -> tuple[int, int] | None:
        """(tokens, vocabulary) of a device; None if the tokens cannot be cut into equal parts."""
        parts = 1
        for name in self.rows:
            parts *= self.mesh.shape[name]
        if tokens % parts:
            return None
        axis = self.axis(vocabulary)
        return tokens // parts, vocabulary // (1 if axis is None else self.mesh.shape[axis])


def token_logps(
    options: Options,
    target: Target,
    shards: Shards | None,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """`kernels.logprob.token_logps`, over the mesh of `shards`."""
    if shards is None:
        return logprob.token_logps(options, target, hidden, weight, bias, targets, mask)
    return _sharded(options, target, shards, hidden, weight, bias, targets, mask)


# custom_vjp is around the map over devices, not inside it: forward and backward each write out their own sums.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sharded(options, target, shards, hidden, weight, bias, targets, mask):
    return _forward(options, target, shards, hidden, weight, bias, targets, mask)[0]


def _forward(options, target, shards, hidden, weight, bias, targets, mask):
    axis = shards.axis(weight.shape[0])
    run = functools.partial(logprob.forward, options, target, axis=axis)
    mapped = jax.shard_map(
        run, mesh=shards.mesh, in_specs=_specs(shards, axis), out_specs=P(shards.rows), check_vma=False
    )
    values, saved = mapped(hidden, weight.astype(hidden.dtype), bias, targets, mask)
    return values, (hidden, weight, bias, targets, mask, saved)


def _backward(options, target, shards, residuals, gradients):
    hidden, weight, bias, targets, mask, saved = residuals
    gradients = {name: g for name, g in gradients.items() if name != "correct"}
    axis, last = shards.axis(weight.shape[0]), shards.rows[-1]
    cut = weight.shape[1] % shards.mesh.shape[last] == 0

    def local(*arguments):
        d_hidden, d_weight, d_bias = logprob.backward(
            options, target, *arguments, axis=axis, weight_dtype=jnp.dtype(jnp.float32)
        )
        if axis is not None:
            d_hidden = jax.lax.psum(d_hidden.astype(jnp.float32), axis).astype(d_hidden.dtype)
        if cut:
            d_weight = jax.lax.psum_scatter(d_weight, last, scatter_dimension=1, tiled=True)
        d_weight = jax.lax.psum(d_weight, shards.rows[:-1] if cut else shards.rows)
        return d_hidden, d_weight, None if d_bias is None else jax.lax.psum(d_bias, shards.rows)

    rows = P(shards.rows)
    d_hidden, d_weight, d_bias = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(*_specs(shards, axis), rows, rows),
        out_specs=(P(shards.rows, None), P(axis, last if cut else None), P(axis)),
        check_vma=False,
    )(hidden, weight.astype(hidden.dtype), bias, targets, mask, saved, gradients)
    return d_hidden, d_weight.astype(weight.dtype), d_bias, None, None


_sharded.defvjp(_forward, _backward)


def _specs(shards: Shards, axis: str | None) -> tuple[P, ...]:
    return P(shards.rows, None), P(axis, None), P(axis), P(shards.rows), P(shards.rows)
