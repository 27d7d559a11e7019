"""From logits to a token: temperature, top-k, top-p, and the draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """True on the k largest logits of each row, and on those equal to the smallest of them; k = 0: on all."""
    if k <= 0 or k >= logits.shape[-1]:
        return jnp.ones(logits.shape, bool)
    return logits >= jax.lax.top_k(logits, k)[0][:, -1:]


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """True on the smallest set of most likely tokens that holds probability p, the one that crosses p included.

    Nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, eq. 2.
    """
    if p >= 1.0:
        return jnp.ones(logits.shape, bool)
    ordered = -jnp.sort(-jax.nn.softmax(logits, axis=-1), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # probability of the more likely tokens
    smallest = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.nn.softmax(logits, axis=-1) >= smallest


def sample(
    keys: Key[Array, "B"],
    logits: Float[Array, "B V"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A token for each row, and its log-probability under the distribution it was drawn from.

    Args:
      keys: one for each row, so that what a row draws does not depend on its neighbours.
      logits: of the model, in float32.
      temperature: the logits are divided by it; 0 takes the most likely token, the lowest id among equals, whose
        log-probability is that of the model itself.
      top_k: draw from the k most likely tokens; 0: from all.
      top_p: then from the smallest set that holds this share of the probability.
    """
    if temperature == 0.0:
        tokens = jnp.argmax(logits, axis=-1)
        kept = logits
    else:
        kept = logits / temperature
        kept = jnp.where(keep_top_k(kept, top_k), kept, -jnp.inf)
        kept = jnp.where(keep_top_p(kept, top_p), kept, -jnp.inf)
        tokens = jax.vmap(jax.random.categorical)(keys, kept)
    logps = jax.nn.log_softmax(kept, axis=-1)
    return tokens, jnp.take_along_axis(logps, tokens[:, None], axis=1)[:, 0]
