"""Language-modelling losses: one value per token, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.contract import LANGUAGE_INPUTS, Coefficient, Kind, Share


def cross_entropy(
    logps: Float[Array, "*tokens"],
    log_normalizer: Float[Array, "*tokens"],
    mean_logit: Float[Array, "*tokens"],
    *,
    label_smoothing: Share = 0.0,
    z_loss: Coefficient = 0.0,
) -> Float[Array, "*tokens"]:
    """Cross-entropy with the next token, optionally smoothed, optionally keeping the normaliser near 1.

    -(1 - ε) log p(token) - ε (1/V) Σ_v log p(v) + z_loss · (log Z)²

    where (1/V) Σ_v log p(v) = mean_logit - log Z.

    Args:
      logps: log p(token) in nats.
      log_normalizer: log Z = log Σ_v exp z_v.
      mean_logit: (1/V) Σ_v z_v.
      label_smoothing: ε, the share of the target spread evenly over the vocabulary.
      z_loss: coefficient; PaLM uses 1e-4.

    Returns:
      One loss per token; log V when all logits are 0, whatever ε is.

    Reference: smoothing, Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7; z-loss, Chowdhery et al.
    2022, https://arxiv.org/abs/2204.02311, section 5.
    """
    loss = -logps
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_normalizer - mean_logit)
    return loss + z_loss * log_normalizer**2 if z_loss else loss


def dft(logps: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """Dynamic fine-tuning: cross-entropy weighted by the token's own probability, which carries no gradient.

    -sg(p(token)) log p(token)

    Args:
      logps: log p(token) in nats.

    Reference: Wu et al. 2025, https://arxiv.org/abs/2508.05629, the token-level loss.
    """
    return -jax.lax.stop_gradient(jnp.exp(logps)) * logps


LANGUAGE_LOSSES = {"cross_entropy": cross_entropy, "dft": dft}
LANGUAGE = Kind(LANGUAGE_LOSSES, LANGUAGE_INPUTS, "B T")
