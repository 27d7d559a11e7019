"""`jaxalign grpo` and `jaxalign rloo`: a model, prompts and a reward in, a policy that earns more of it out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.policy import policy_gradient
from jaxalign.data.batches import bucket_widths
from jaxalign.losses.policy import POLICY_LOSSES
from jaxalign.ops.advantages import group_advantages, leave_one_out
from jaxalign.rollout.experience import rollout_batch
from jaxalign.runs import rollouts, train
from jaxalign.runs.program import Method, Program, implementation
from jaxalign.runs.rl_config import PolicyConfig
from jaxalign.runs.rollouts import Judged, Rollouts
from jaxalign.select import select
from jaxalign.types import RolloutBatch

ADVANTAGES: dict[str, Callable] = {
    "group": functools.partial(group_advantages, scale="group"),
    "batch": functools.partial(group_advantages, scale="batch"),
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out,
}


def run_grpo(config: PolicyConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "grpo", _gather)


def run_rloo(config: PolicyConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "rloo", _gather)


def _gather(config: PolicyConfig, starts: bool) -> train.Task:
    algorithm, loss = config.algorithm, select(config.algorithm.loss, POLICY_LOSSES)
    _check(config)
    base, asked = rollouts.gather(config, starts)

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
            epochs=algorithm.epochs,
            minibatches=algorithm.minibatches,
            implementation=implementation(config),
        )

    def source(task: train.Task, program: Program, frozen: Any, numbers: Iterator, resumed_at: int) -> Rollouts:
        batch_of = functools.partial(_batch, config)
        return Rollouts(config, task, program, frozen, numbers, resumed_at, asked=asked, batch_of=batch_of)

    return train.Task(
        config,
        base,
        Method(
            build,
            reference=algorithm.reference,
            offload=config.offload_reference,
            epochs=algorithm.epochs,
            updates=algorithm.epochs * algorithm.minibatches,
        ),
        asked.batches,
        held_out=[],
        shapes=len(bucket_widths(config.max_length)),
        fingerprint=asked.prompts.fingerprint(),
        prompts=[],
        export=train.export_language_model,
        source=source,
        enough=rollouts.kl_budget(config),
    )


def _check(config: PolicyConfig) -> None:
    algorithm = config.algorithm
    if config.n < 2:
        raise ValueError("--n 1: a response is judged beside others to its prompt; draw 2 or more")
    if algorithm.kl_coef and not algorithm.reference:
        raise ValueError(f"--algorithm.kl-coef {algorithm.kl_coef} needs the reference; leave --algorithm.reference on")
    if config.offload_reference and not algorithm.reference:
        raise ValueError("--offload-reference with --algorithm.no-reference: there is none to keep")
    if config.kl_budget is not None and not algorithm.reference:
        raise ValueError(f"--kl-budget {config.kl_budget} needs the reference; leave --algorithm.reference on")


def _batch(config: PolicyConfig, judged: Judged) -> tuple[RolloutBatch, dict[str, float]]:
    """Responses with their advantages over those to the same prompt."""
    groups = judged.scores.reshape(config.batch_size, config.n)
    advantages = np.asarray(ADVANTAGES[config.algorithm.advantages](jnp.asarray(groups, jnp.float32))).reshape(-1)
    batch = rollout_batch(
        judged.prompts,
        judged.responses,
        scores=judged.scores,
        advantages=advantages,
        width=judged.width,
        rows=judged.rows,
    )
    said = {
        "score_std": float(groups.std(axis=1).mean()),
        "same_scores": float(np.mean(groups.max(axis=1) == groups.min(axis=1))),
    }
    return batch, said
