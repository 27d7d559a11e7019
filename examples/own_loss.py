"""A loss of your own for pairs of responses: one pure function, no registration.

    python examples/own_loss.py --model MODEL --data PAIRS --output RUN

is short for

    PYTHONPATH=examples jaxalign dpo --model MODEL --data PAIRS --output RUN \
        --algorithm.loss "own_loss:squared_hinge(delta=1.0)"

The positional parameters are inputs, by the names of PAIR_INPUTS in jaxalign/losses/contract.py; the keyword-only ones
are hyperparameters. A loss that names no `ref_` input needs no reference model. Name, keywords, inputs and the shape of
the values are checked before a model is loaded. `--algorithm.loss "0.5*own_loss:squared_hinge + 0.5*dpo"` is a sum.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign.cli.main import main


def squared_hinge(
    policy_chosen_logps: jax.Array,
    policy_rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    delta: float = 1.0,
) -> jax.Array:
    """Squared hinge on the margin of log-ratios: pairs that lead by delta nats are left alone.

    max(0, δ - h)²,  h = log π/π_ref(chosen) - log π/π_ref(rejected)

    Args:
      policy_chosen_logps: Float32[B], log π(chosen | prompt) in nats, summed over the tokens of the response.
      policy_rejected_logps: the same of the rejected response.
      ref_chosen_logps: the same of the chosen response under the frozen reference.
      ref_rejected_logps: the same of the rejected response under the frozen reference.
      delta: δ, the margin in nats from which on a pair has no gradient.

    Returns:
      Float32[B], one loss per pair; δ² wherever policy and reference agree.
    """
    margin = policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps
    return jnp.maximum(0.0, delta - margin) ** 2


def train(arguments: Sequence[str]) -> int:
    """Runs `jaxalign dpo` with this loss; the exit status."""
    return main(["dpo", *arguments, "--algorithm.loss", "own_loss:squared_hinge(delta=1.0)"])


if __name__ == "__main__":
    raise SystemExit(train(sys.argv[1:]))
