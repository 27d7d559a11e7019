"""`jaxalign grpo` and `jaxalign rloo`: a model, prompts and a reward in, a policy that earns more of it out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.policy_gradient import policy_gradient
from jaxalign.config.on_policy import GRPOConfig
from jaxalign.losses.policy import POLICY_LOSSES
from jaxalign.mistake import Mistake
from jaxalign.ops.advantages import decoupled_advantages, group_advantages, leave_one_out
from jaxalign.rollout.batches import rollout_batch
from jaxalign.rollout.scored import differ
from jaxalign.runs import rollouts, train
from jaxalign.runs.program import Method, implementation
from jaxalign.runs.rollouts import Judged
from jaxalign.select import select
from jaxalign.types import RolloutBatch

log = logging.getLogger(__name__)

DECOUPLED = "decoupled"  # of the reward functions' own scores, not of their sum
ADVANTAGES: dict[str, Callable] = {
    "group": functools.partial(group_advantages, scale="group"),
    "batch": functools.partial(group_advantages, scale="batch"),
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out,
}


def run_grpo(config: GRPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "grpo", _gather)


def run_rloo(config: GRPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "rloo", _gather)


def _gather(config: GRPOConfig, starts: bool) -> train.Task:
    algorithm, loss = config.algorithm, select(config.algorithm.loss, POLICY_LOSSES)
    _check(config)
    base, asked = rollouts.gather(config, starts, own_tokens=False)
    corrected = rollouts.sampling_of(config).truncates or config.engine is not None
    if corrected:
        cut = "`top_p`, `top_k` and `min_p` cut tokens off, from which nothing can be learned"
        log.info(
            "%s: each token is weighted by the ratio of the policy to what drew it, at most %g",
            "`engine` has numerics of its own" if config.engine else cut,
            algorithm.importance_cap,
        )

    def build(graphdef: Any, ref_graphdef: Any) -> Any:
        return policy_gradient(
            graphdef,
            loss=loss,
            ref_graphdef=ref_graphdef if algorithm.reference else None,
            kl_coef=algorithm.kl_coef,
            kl_estimator=algorithm.kl_estimator,
            level=algorithm.level,
            aggregate=algorithm.aggregate,
            longest=config.max_new_tokens,
            temperature=config.temperature,
            importance_cap=algorithm.importance_cap if corrected else None,
            epochs=algorithm.epochs,
            minibatches=algorithm.minibatches,
            implementation=implementation(config),
        )

    method = Method(
        build,
        reference=algorithm.reference,
        offload=config.offload_reference,
        epochs=algorithm.epochs,
        updates=algorithm.epochs * algorithm.minibatches,
    )
    batch_of = functools.partial(_batch, config, asked.rewards.weights)
    return rollouts.task_of(config, base, asked, method, batch_of, rounds=config.dynamic_sampling)


def _check(config: GRPOConfig) -> None:
    algorithm = config.algorithm
    if config.n < 2:
        raise Mistake("`n` 1: a response is judged beside others to its prompt; draw 2 or more")
    if algorithm.kl_coef and not algorithm.reference:
        raise Mistake(f"`algorithm.kl_coef` {algorithm.kl_coef} needs the reference; leave `algorithm.reference` on")
    if config.offload_reference and not algorithm.reference:
        raise Mistake("`offload_reference` needs a reference, and `algorithm.reference` is off: there is none to keep")
    if config.kl_budget is not None and not algorithm.reference:
        raise Mistake(f"`kl_budget` {config.kl_budget} needs the reference; leave `algorithm.reference` on")
    changed = config.reward_clip is not None or config.missing_end_penalty or config.length_penalty
    if algorithm.advantages == DECOUPLED and changed:
        raise Mistake(
            "`algorithm.advantages` decoupled compares the reward functions one by one, not their sum, which "
            "`reward_clip`, `missing_end_penalty` and `length_penalty` are about; write penalties as functions"
        )


def _batch(config: GRPOConfig, weights: dict[str, float], judged: Judged) -> tuple[RolloutBatch, dict[str, float]]:
    """Responses with their advantages over those to the same prompt."""
    groups = judged.scores.reshape(-1, config.n)
    if config.algorithm.advantages == DECOUPLED:
        terms = jnp.stack([jnp.asarray(judged.terms[name].reshape(groups.shape), jnp.float32) for name in weights])
        advantages = decoupled_advantages(terms, jnp.asarray([*weights.values()], jnp.float32))
    else:
        advantages = ADVANTAGES[config.algorithm.advantages](jnp.asarray(groups, jnp.float32))
    batch = rollout_batch(
        judged.prompts,
        judged.responses,
        scores=judged.scores,
        advantages=np.asarray(advantages).reshape(-1),
        width=judged.width,
        rows=judged.rows,
    )
    said = {
        "score_std": float(groups.std(axis=1).mean()),
        "same_scores": float(np.mean(~differ(groups))),
    }
    return batch, said
