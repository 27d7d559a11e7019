"""Log-probabilities on every device of a mesh: each takes its own tokens and its own share of the vocabulary.

XLA cannot partition a Pallas call, and it would gather the whole unembedding for every tile of a loop over a vocabulary
that the mesh cuts. So the collectives are written here, once for both bodies: the weight is gathered along the axis
that cuts its width, in the dtype of compute; shards of the vocabulary exchange six numbers a token; in the backward
pass dhidden is summed over them, and dweight, in float32, over the tokens' shards, each of which keeps its share of the
width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import logprob
from jaxalign.kernels.runtime import Target
from jaxalign.ops.mesh import Shards


@runtime_checkable
class Body(Protocol):
    """The computation of a device, with static settings; hashable. V may be cut over the mapped axis `axis`."""

    def forward(self, hidden: Any, weight: Any, bias: Any, targets: Any, mask: Any, *, axis: str | None) -> tuple:
        """(values by name, residuals [N] for `backward`)"""
        ...

    def backward(
        self, hidden: Any, weight: Any, bias: Any, targets: Any, mask: Any, saved: Any, gradients: Any, *, axis: Any
    ) -> tuple:
        """(dhidden, dweight in float32, dbias); of a shard of V, the contributions of its logits."""
        ...


class Kernel(NamedTuple):
    """The Pallas kernel of `kernels/logprob.py`."""

    options: logprob.Options
    target: Target

    def forward(self, *inputs: Any, axis: str | None) -> tuple:
        """Implements `Body`."""
        return logprob.forward(self.options, self.target, *inputs, axis=axis)

    def backward(self, *inputs: Any, axis: str | None) -> tuple:
        """Implements `Body`."""
        return logprob.backward(self.options, self.target, *inputs, axis=axis, weight_dtype=jnp.dtype(jnp.float32))


# custom_vjp is around the map over devices, not inside it: forward and backward each write out their own sums.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_logps(
    body: Body,
    shards: Shards,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """The values of `body` for each of the N tokens, over the mesh of `shards`, whose rows must divide N."""
    return _forward(body, shards, hidden, weight, bias, targets, mask)[0]


def _forward(body, shards, hidden, weight, bias, targets, mask):
    axis = shards.axis(weight.shape[0])
    run = functools.partial(body.forward, axis=axis)
    mapped = jax.shard_map(
        run, mesh=shards.mesh, in_specs=_specs(shards, axis), out_specs=P(shards.rows), check_vma=False
    )
    values, saved = mapped(hidden, weight.astype(hidden.dtype), bias, targets, mask)
    return values, (hidden, weight, bias, targets, mask, saved)


def _backward(body, shards, residuals, gradients):
    hidden, weight, bias, targets, mask, saved = residuals
    gradients = {name: g for name, g in gradients.items() if name != "correct"}
    axis = shards.axis(weight.shape[0])
    place = shards.of_weight(weight.shape)

    def local(*arguments):
        d_hidden, d_weight, d_bias = body.backward(*arguments, axis=axis)
        if axis is not None:
            d_hidden = jax.lax.psum(d_hidden.astype(jnp.float32), axis).astype(d_hidden.dtype)
        return d_hidden, shards.summed(d_weight, place), None if d_bias is None else jax.lax.psum(d_bias, shards.rows)

    rows = P(shards.rows)
    d_hidden, d_weight, d_bias = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(*_specs(shards, axis), rows, rows),
        out_specs=(P(shards.rows, None), place, P(axis)),
        check_vma=False,
    )(hidden, weight.astype(hidden.dtype), bias, targets, mask, saved, gradients)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_hidden, d_weight.astype(weight.dtype), d_bias, None, None


token_logps.defvjp(_forward, _backward)


def _specs(shards: Shards, axis: str | None) -> tuple[P, ...]:
    return P(shards.rows, None), P(axis, None), P(axis), P(shards.rows), P(shards.rows)
