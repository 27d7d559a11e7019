"""`jaxalign online-dpo`: at each step the policy responds, the reward ranks, and a preference loss learns from pairs.

Guo et al. 2024 (OAIF), https://arxiv.org/abs/2402.04792, with any reward in the place of the annotator. The reference
is the model that training starts from; with LoRA, the base. Log-probabilities are at temperature 1, whatever the
responses were drawn at: a preference loss makes no ratio to what drew them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.pairwise import pairwise
from jaxalign.commands import on_policy
from jaxalign.config.on_policy import OnlineDPOConfig
from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.losses import PAIR, contract, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.rollout.batches import best_and_worst, to_pairs
from jaxalign.rollout.scored import ScoredResponses, score_std
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.program import Recipe, implementation
from jaxalign.types import ResponseBatch


@hosts.failing_together()
def main(config: OnlineDPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, "online-dpo")
    plan = recipe(config, run.model, run.mesh)
    prompting = on_policy.load_prompts(config, run, plan)
    data = on_policy.run_data(config, prompting)
    if not run.claim(data):
        return 0
    rows = on_policy.count_rows(config, run.mesh, responses=1)  # of a pair each
    responses = on_policy.rollouts(config, run, prompting, functools.partial(to_batch, config, rows))
    outcome = run.fit(plan, data, source=responses)
    return final.language_model(run, outcome)


def recipe(config: OnlineDPOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, its reference if the loss needs one, and the mean loss over pairs."""
    loss, policy = _loss(config), part.language_model(config, model, mesh)
    reference = part.frozen_copy(config, model, mesh, policy) if contract.needs_reference(loss) else None
    algorithm = pairwise(
        policy.graphdef,
        None if reference is None else reference.graphdef,
        loss=loss,
        implementation=implementation(config),
        epochs=config.algorithm.epochs,
        minibatches=config.algorithm.minibatches,
    )._replace(rows=config.batch_size)
    return Recipe(policy, algorithm, reference, offload=config.offload_reference)


def check(config: OnlineDPOConfig) -> None:
    """Raises Mistake on a loss that cannot be used, or on settings that exclude each other."""
    on_policy.check(config)
    loss = _loss(config)
    if config.offload_reference and not contract.needs_reference(loss):
        raise Mistake(f"`offload_reference`: the loss {config.algorithm.loss!r} uses no reference")
    if config.n < 2:
        raise Mistake("`n` 1: a pair is two responses to a prompt; draw 2 or more")
    if contract.needs_whole_batch(loss):
        raise Mistake(
            f"`algorithm.loss` {config.algorithm.loss!r} compares the pairs of whole batches with each other, and "
            "these have a number that changes: prompts whose responses are worth the same give none"
        )


def to_batch(
    config: OnlineDPOConfig,
    rows: int,
    responses: ScoredResponses,
    prompts: Sequence[tuple[int, ...]],
    width: int,
    step: int,
) -> tuple[ResponseBatch, dict[str, float]]:
    """A pair a row; a prompt whose responses are all worth the same has none, and its row is empty."""
    groups = responses.scores.reshape(-1, config.n)
    chosen = best_and_worst(groups)
    pairs = to_pairs(responses, prompts, chosen)
    plan = Plan(rows, config.max_length, packing=False)
    batch = BatchShapes(plan, responses=2, max_groups=1, row_counts=(rows,)).batch(pairs)
    best, worst = (responses.scores[side] for side in chosen.T)
    return batch, {
        "score": float(responses.scores.mean()),
        "score_chosen": float(best.mean()) if len(best) else 0.0,
        "score_rejected": float(worst.mean()) if len(worst) else 0.0,
        "score_std": score_std(groups),
        "ties": len(groups) - len(chosen),
        "length": float(np.mean([len(response.tokens) for response in responses.responses])),
        "ended": float(np.mean([response.finished for response in responses.responses])),
    }


def _loss(config: OnlineDPOConfig) -> Callable:
    return select_loss(config.algorithm.loss, PAIR)
