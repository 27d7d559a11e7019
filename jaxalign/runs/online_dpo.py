"""`jaxalign online-dpo`: at each step the policy answers, the reward ranks, and a preference loss learns from pairs.

Guo et al. 2024 (OAIF), https://arxiv.org/abs/2402.04792, with any reward in the place of the annotator. The reference
is the model that training starts from; with LoRA, the base. Log-probabilities are at temperature 1, whatever
--temperature the responses were drawn at: a preference loss makes no ratio to what drew them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.pairwise import dpo
from jaxalign.config.on_policy import OnlineDPOConfig
from jaxalign.data.batches.groups import GroupPlan, Layout
from jaxalign.losses import contract
from jaxalign.losses.pairs.margin import PREFERENCE_LOSSES
from jaxalign.losses.sums import select_loss
from jaxalign.mistake import Mistake
from jaxalign.rollout.batches import best_and_worst, pairs_of
from jaxalign.runs import rollouts, train
from jaxalign.runs.program import Method, implementation
from jaxalign.runs.rollouts import Judged
from jaxalign.types import ResponseBatch


def run(config: OnlineDPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "online-dpo", _gather)


def _gather(config: OnlineDPOConfig, starts: bool) -> train.Task:
    algorithm, loss = config.algorithm, select_loss(config.algorithm.loss, PREFERENCE_LOSSES)
    _check(config, loss)
    base, asked = rollouts.gather(config, starts, own_tokens=False)

    def build(graphdef: Any, ref_graphdef: Any) -> Algorithm:
        made = dpo(graphdef, loss=loss, ref_graphdef=ref_graphdef, implementation=implementation(config))
        return made._replace(epochs=algorithm.epochs, minibatches=algorithm.minibatches)

    method = Method(
        build,
        reference=contract.needs_reference(loss),
        offload=config.offload_reference,
        epochs=algorithm.epochs,
        updates=algorithm.epochs * algorithm.minibatches,
    )
    rows = rollouts.count_rows(dataclasses.replace(config, n=1), base.mesh)  # of a pair each
    batch_of = functools.partial(_batch, config, rows)
    return rollouts.task_of(config, base, asked, method, batch_of, rounds=config.dynamic_sampling)


def _check(config: OnlineDPOConfig, loss: Callable) -> None:
    contract.check_inputs(loss, contract.PAIR_INPUTS)
    if config.offload_reference and not contract.needs_reference(loss):
        raise Mistake(f"`offload_reference`: the loss {config.algorithm.loss!r} uses no reference")
    if config.kl_budget is not None:
        raise Mistake(f"`kl_budget` {config.kl_budget:g}: the KL of pairs is not measured; grpo and ppo do")
    if config.n < 2:
        raise Mistake("`n` 1: a pair is two responses to a prompt; draw 2 or more")
    if contract.needs_whole_batch(loss):
        raise Mistake(
            f"`algorithm.loss` {config.algorithm.loss!r} compares the pairs of whole batches with each other, and "
            "these have a number that changes: prompts whose responses are worth the same give none"
        )


def _batch(config: OnlineDPOConfig, rows: int, judged: Judged) -> tuple[ResponseBatch, dict[str, float]]:
    """A pair a row; a prompt whose responses are all worth the same has none, and its row is empty."""
    groups = judged.scores.reshape(-1, config.n)
    chosen = best_and_worst(groups)
    pairs = pairs_of(judged.prompts, judged.responses, chosen)
    plan = GroupPlan(rows, config.max_length, packing=False)
    batch = Layout(plan, responses=2, most=1, row_counts=(rows,)).batch(pairs)
    best, worst = (judged.scores[side] for side in chosen.T)
    said = {
        "score": float(judged.scores.mean()),
        "score_chosen": float(best.mean()) if len(best) else 0.0,
        "score_rejected": float(worst.mean()) if len(worst) else 0.0,
        "score_std": float(groups.std(axis=1).mean()),
        "ties": len(groups) - len(chosen),
        "length": float(np.mean([len(response.tokens) for response in judged.responses])),
        "ended": float(np.mean([response.finished for response in judged.responses])),
    }
    return batch, said
