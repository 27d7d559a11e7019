"""`jaxalign grpo` and `jaxalign rloo`: a model, prompts and a reward in, a policy that earns more of it out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.policy_gradient import check as check_algorithm
from jaxalign.algorithms.policy_gradient import policy_gradient
from jaxalign.commands import name_of, on_policy
from jaxalign.config.on_policy import GRPOConfig
from jaxalign.losses import POLICY, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.ops.advantages import batch_advantages, decoupled_advantages, group_advantages, leave_one_out
from jaxalign.rollout.batches import to_rollout_batch
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.scored import ScoredResponses, has_spread, score_std
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.program import Recipe, implementation
from jaxalign.types import RolloutBatch

log = logging.getLogger(__name__)

DECOUPLED = "decoupled"  # compares the reward functions' own scores, not their sum
GLOBAL = "global"  # compares all responses of a batch, so one to a prompt is enough
ADVANTAGES: dict[str, Callable] = {
    "group": functools.partial(group_advantages, scale="group"),
    "batch": functools.partial(group_advantages, scale="batch"),
    "scores": functools.partial(group_advantages, scale="scores"),
    GLOBAL: batch_advantages,
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out,
}


@hosts.failing_together()
def main(config: GRPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, name_of(config))
    plan = recipe(config, run.model, run.mesh)
    prompting = on_policy.load_prompts(config, run, plan)
    data = on_policy.run_data(config, prompting)
    if not run.claim(data):
        return 0
    _log_correction(config)
    rows = on_policy.count_rows(config, run.mesh, responses=config.n)
    batch_of = functools.partial(to_batch, config, prompting.rewards.weights, rows)
    responses = on_policy.rollouts(config, run, prompting, batch_of)
    outcome = run.fit(plan, data, source=responses, last_because=on_policy.beyond_kl_budget(config.kl_budget))
    return final.language_model(run, outcome)


def recipe(config: GRPOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, its reference if it is held, and the policy gradient."""
    algorithm, policy = config.algorithm, part.language_model(config, model, mesh)
    reference = part.frozen_copy(config, model, mesh, policy) if algorithm.reference else None
    gradient = policy_gradient(
        algorithm,
        policy.graphdef,
        None if reference is None else reference.graphdef,
        loss=_loss(config),
        longest=config.max_new_tokens,
        temperature=config.temperature,
        corrected=_is_corrected(config),
        implementation=implementation(config),
    )._replace(rows=config.batch_size * config.n)
    return Recipe(policy, gradient, reference, offload=config.offload_reference)


def check(config: GRPOConfig) -> None:
    """Raises Mistake on a loss that cannot be used, or on settings that exclude each other."""
    on_policy.check(config)
    algorithm = config.algorithm
    check_algorithm(algorithm, _loss(config))
    if config.n < 2 and algorithm.advantages != GLOBAL:
        raise Mistake("`n` 1: a response is judged beside others to its prompt; draw 2 or more")
    if config.n < 2 and (config.dynamic_sampling or config.batch_size < 2):
        raise Mistake("`n` 1: it needs a `batch_size` of 2 or more, and no `dynamic_sampling`, which compares groups")
    if config.offload_reference and not algorithm.reference:
        raise Mistake("`offload_reference` with `algorithm.reference` off: there is none to keep")
    if config.kl_budget is not None and not algorithm.reference:
        raise Mistake(f"`kl_budget` {config.kl_budget} needs the reference; leave `algorithm.reference` on")
    changed = config.reward_clip is not None or config.missing_end_penalty or config.length_penalty
    if algorithm.advantages == DECOUPLED and changed:
        raise Mistake(
            "`algorithm.advantages` decoupled compares the reward functions one by one, not their sum, which "
            "`reward_clip`, `missing_end_penalty` and `length_penalty` are about; write penalties as functions"
        )


def to_batch(
    config: GRPOConfig,
    weights: Mapping[str, float],
    rows: int,
    responses: ScoredResponses,
    prompts: Sequence[tuple[int, ...]],
    width: int,
    step: int,
) -> tuple[RolloutBatch, dict[str, float]]:
    """Responses behind their prompts, with their advantages over those to the same prompt."""
    groups = responses.scores.reshape(-1, config.n)
    if config.algorithm.advantages == DECOUPLED:
        terms = jnp.stack([jnp.asarray(responses.terms[name].reshape(groups.shape), jnp.float32) for name in weights])
        advantages = decoupled_advantages(terms, jnp.asarray([*weights.values()], jnp.float32))
    else:
        advantages = ADVANTAGES[config.algorithm.advantages](jnp.asarray(groups, jnp.float32))
    batch = to_rollout_batch(responses, prompts, advantages=np.asarray(advantages).reshape(-1), width=width, rows=rows)
    return batch, {
        "score_std": score_std(groups),
        "same_scores": float(np.mean(~has_spread(groups))),
    }


def _loss(config: GRPOConfig) -> Callable:
    return select_loss(config.algorithm.loss, POLICY)


def _is_corrected(config: GRPOConfig) -> bool:
    """True if tokens are drawn from another distribution than the policy's; they are weighted then.

    Those drawn here are the policy's but for rounding, by 0.01 nats a token in bfloat16 on average
    (experiments/benchmarks/rollout_drift.py). The losses' ratios are to the probabilities that they were drawn with, so
    they correct for that already.
    """
    return Sampling.of(config).truncates or config.engine is not None


def _log_correction(config: GRPOConfig) -> None:
    if not _is_corrected(config):
        return
    reason = (
        "engine computes log-probabilities in its own precision"
        if config.engine
        else "top_p, top_k and min_p cut tokens off, from which nothing can be learned"
    )
    log.info(
        "%s: each token is weighted by the ratio of the policy to what drew it, at most %g",
        reason,
        config.algorithm.importance_cap,
    )
