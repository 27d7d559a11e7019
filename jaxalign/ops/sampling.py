"""Sampling of a token from logits: penalties and bans, temperature, top-k, top-p, min-p, and the draw."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxalign.ops.logits import NEIGHBOURS, blocks, inside, largest


class Drawn(NamedTuple):
    """A token for each row, and its log-probabilities in nats."""

    tokens: Int[Array, "B"]
    logps: Float[Array, "B"]  # under the distribution that they were drawn from
    model_logps: Float[Array, "B"]  # under the model's own distribution, at temperature 1


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """True on the k largest logits of each row, and on those equal to the smallest of them; k = 0: on all."""
    if k <= 0 or k >= logits.shape[-1]:
        return jnp.ones(logits.shape, bool)
    return logits >= jax.lax.top_k(logits, k)[0][:, -1:]


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """True on the smallest set of most likely tokens with probability p, the one that crosses p included.

    Tokens as likely as the least likely of them are included. Nucleus sampling, Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751, section 3.1.
    """
    if p >= 1.0:
        return jnp.ones(logits.shape, bool)
    probs = jax.nn.softmax(logits, axis=-1)
    # Bisection for the largest threshold whose tokens have probability p: floats that are not negative are ordered as
    # their bits are, so 31 halvings are exact, without a sort of the vocabulary.
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: Int[Array, ""], bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # tokens from low on have p, those from high on do not
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle[:, None], probs, 0.0), axis=-1) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    zeros = jnp.zeros(logits.shape[:1], jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(2.0), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (zeros, jnp.broadcast_to(above_one, zeros.shape)))
    return bits >= low[:, None]


def keep_min_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """True on tokens at least p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082)."""
    if p <= 0.0:
        return jnp.ones(logits.shape, bool)
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Logits of seen tokens divided by the penalty where positive, multiplied where negative.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1, with the sign rule that libraries added to it.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def categorical(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """A token for each row, drawn from softmax(logits); one whose logit is -inf is never drawn.

    By inversion: draws a block of neighbours by its mass, then a token of the block. That takes two random numbers a
    row; the Gumbel trick takes one, and two logarithms, for each token of the vocabulary.
    """
    mass = blocks(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = crossing(jnp.sum(mass, axis=-1), draws[:, 0])
    return block * NEIGHBOURS + crossing(inside(mass, block), draws[:, 1])


def crossing(mass: Float[Array, "B N"], share: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index of each row up to which more than this share of its mass lies; its own mass is not 0."""
    reached, places = jnp.cumsum(mass, axis=-1), jnp.arange(mass.shape[1])[None, :]
    last = jnp.max(jnp.where(mass > 0, places, 0), axis=-1, keepdims=True)  # if rounding lets nothing cross
    crossed = (reached > share[:, None] * reached[:, -1:]) | (places == last)
    return jnp.argmax(crossed & (mass > 0), axis=-1)


def sample(
    keys: Key[Array, "B"],
    logits: Float[Array, "B V"],
    *,
    allowed: Bool[Array, "B V"] | None = None,
    seen: Bool[Array, "B V"] | None = None,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Drawn:
    """A token for each row, and its log-probability under the distribution it was drawn from and under the model's.

    Args:
      keys: one for each row, so that the draw of a row does not depend on its neighbours.
      logits: the model's logits, in float32.
      allowed: False on tokens that must not be drawn; None: all may be drawn.
      seen: True on tokens to penalise; None: none.
      repetition_penalty: the penalty of `penalise`; 1: none.
      temperature: divisor of the logits; 0 takes the most likely token, the lowest id among equals, with its
        log-probability among all allowed tokens.
      top_k: draw from the k most likely tokens; 0: from all.
      top_p: then from the smallest set with this share of the probability; 1: from all.
      min_p: then from tokens at least this share as likely as the most likely one; 0: from all.
    """
    modified = logits
    if seen is not None and repetition_penalty != 1.0:
        modified = penalise(modified, seen, repetition_penalty)
    if allowed is not None:
        modified = jnp.where(allowed, modified, -jnp.inf)
    if temperature == 0.0:
        tokens = largest(modified)
    else:
        modified = modified / temperature
        for keep, limit in ((keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p)):
            modified = jnp.where(keep(modified, limit), modified, -jnp.inf)
        tokens = categorical(keys, modified)
    model_logps = _logps_of(logits, tokens)
    return Drawn(tokens, model_logps if modified is logits else _logps_of(modified, tokens), model_logps)


def _logps_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
