"""Losses between sorted batches: preference in distribution, by optimal transport in one dimension.

The values are one per rank, not one per row, and every rank depends on all rows: the whole global batch must come in
one piece. Under jit a batch that is sharded over devices is one piece, and the sort is over all of it.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxalign.losses.contract import PerPair, Positive, Smoothing, whole_batch
from jaxalign.losses.ranking import bradley_terry


@whole_batch
def aot(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Preference for margins above the reference's in distribution: the k-th largest against the k-th largest.

    -log σ(β [sort(log π(chosen)/π(rejected)) - sort(log π_ref(chosen)/π_ref(rejected))])

    Args:
      policy_chosen_logps: inputs as in `dpo`, the whole global batch at once.
      beta: scale of the difference.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per rank, from the smallest margin up; log 2 wherever policy and reference agree, `dpo` for one pair.

    Reference: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, AOT for paired data with the logistic loss.
    """
    policy = jnp.sort(policy_chosen_logps - policy_rejected_logps)
    ref = jnp.sort(ref_chosen_logps - ref_rejected_logps)
    return bradley_terry(beta * policy, beta * ref, label_smoothing=label_smoothing)


@whole_batch
def aot_unpaired(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Preference for chosen rewards above rejected ones in distribution, whichever prompts they belong to.

    -log σ(β [sort(log π/π_ref(chosen)) - sort(log π/π_ref(rejected))])

    Args:
      policy_chosen_logps: inputs as in `dpo`, the whole global batch at once; chosen[i] and rejected[i] need not belong
        together.
      beta: scale of the reward.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per rank, from the smallest reward up; log 2 wherever policy and reference agree, `dpo` for one pair.

    Reference: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, AOT for unpaired data with the logistic loss.
    """
    chosen = jnp.sort(policy_chosen_logps - ref_chosen_logps)
    rejected = jnp.sort(policy_rejected_logps - ref_rejected_logps)
    return bradley_terry(beta * chosen, beta * rejected, label_smoothing=label_smoothing)
