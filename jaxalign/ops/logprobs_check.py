"""A check of the kernel on this machine: its values and gradients against those of the chunked implementation.

A fused kernel has returned log-probabilities of +123 in a published trainer, and the run went on
(https://github.com/volcengine/verl/issues/2656). A run can check before its first step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxalign.mistake import Mistake
from jaxalign.ops.logprobs import Shards, TokenLogps, token_logps
from jaxalign.types import Unembedding

VALUE_TOLERANCE = 1e-3  # nats: both sum the same products in float32, in another order
# Share of a gradient's largest entry: both round the gradient of the logits, and the result, to bfloat16 (2**-9 each).
GRADIENT_TOLERANCE = 1e-2
WEIGHTS = {"logps": -1.0, "entropy": 0.1, "log_normalizer": 0.1, "mean_logit": 0.1}  # a loss that uses everything


class Difference(NamedTuple):
    """The entry at which an array of the kernel differs most from that of the chunked implementation."""

    distance: jax.Array
    index: tuple[jax.Array, ...]
    kernel: jax.Array
    chunked: jax.Array
    largest: jax.Array  # max |chunked|


def differences(
    hidden: Float[Array, "N D"],
    unembedding: Unembedding,
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"],
    *,
    shards: Shards | None = None,
) -> dict[str, Difference]:
    """Differences of every value, and of the gradients of a loss of all: "d_hidden", "d_weight", "d_bias"."""
    kernel, chunked = (
        _everything(implementation, hidden, unembedding, targets, mask, shards)
        for implementation in ("pallas", "chunked")
    )
    return {name: _furthest(kernel[name], chunked[name]) for name in kernel}


def refuse(measured: dict[str, Difference]) -> None:
    """Raises Mistake if a difference exceeds its tolerance, or is not a number."""
    wrong = []
    for name, (distance, index, kernel, chunked, largest) in measured.items():
        gradient = name.startswith("d_")
        limit = GRADIENT_TOLERANCE * float(largest) if gradient else VALUE_TOLERANCE
        if not float(distance) <= limit:
            place = ", ".join(str(int(i)) for i in index)
            wrong.append(
                f"{name}[{place}] is {float(kernel):.6g}, and {float(chunked):.6g} in chunks: "
                f"{float(distance):.3g} apart, where {limit:.3g} is allowed"
            )
    if wrong:
        raise Mistake(
            "the log-probability kernel is not to be trusted here: " + "; ".join(wrong) + ". Run with "
            "`implementation` chunked, and report this with the versions in config.json"
        )


def summary(measured: dict[str, Difference]) -> str:
    """The distances in one line."""
    return ", ".join(f"{name} {float(np.asarray(entry.distance)):.1e}" for name, entry in measured.items())


def _everything(
    implementation: str,
    hidden: jax.Array,
    unembedding: Unembedding,
    targets: jax.Array,
    mask: jax.Array,
    shards: Shards | None,
) -> dict[str, jax.Array]:
    def loss(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, TokenLogps]:
        extras = {name: True for name in WEIGHTS if name != "logps"}
        options = {"mask": mask, "implementation": implementation, "shards": shards, **extras}
        values = token_logps(hidden, Unembedding(weight, bias, unembedding.softcap), targets, **options)
        return sum(scale * jnp.sum(getattr(values, name)) for name, scale in WEIGHTS.items()), values

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    gradients, values = gradient(hidden, unembedding.weight, unembedding.bias)
    named = dict(zip(("d_hidden", "d_weight", "d_bias"), gradients, strict=True))
    return {name: x for name, x in {**values._asdict(), **named}.items() if x is not None}


def _furthest(kernel: jax.Array, chunked: jax.Array) -> Difference:
    kernel, chunked = kernel.astype(jnp.float32), chunked.astype(jnp.float32)
    distance = jnp.abs(kernel - chunked)
    index = jnp.unravel_index(jnp.argmax(distance), distance.shape)  # argmax takes a NaN for the largest
    return Difference(distance[index], index, kernel[index], chunked[index], jnp.max(jnp.abs(chunked)))
