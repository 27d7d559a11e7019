"""`jaxalign kto`: a model and responses rated good or bad in, a model that people prefer out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.unpaired import unpaired
from jaxalign.commands import feedback
from jaxalign.config.offline import KTOConfig
from jaxalign.data.batches.groups import Responses, UnpairedBatches, unpaired_eval_batches
from jaxalign.data.batches.plan import Plan
from jaxalign.data.sets import preferences
from jaxalign.data.sets.split import Set
from jaxalign.losses import UNPAIRED, select_loss
from jaxalign.losses.unpaired import balanced_lambdas
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.run import final, reference_logps
from jaxalign.run.run import Data, Run
from jaxalign.training.program import Recipe, implementation

log = logging.getLogger(__name__)


@hosts.failing_together()
def main(config: KTOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, "kto")
    feedback.check_reference(config, run)
    sets, plan = feedback.load_groups(config, run, preferences.RATED)
    _log_balance(sets.responses.columns["label"])
    rated = [sets.responses, sets.held_out]
    mismatched = [preferences.mismatched(part, seed=config.seed) if len(part) > 1 else part for part in rated]
    data = batches(run, plan, sets, [*rated, *mismatched])
    if not run.claim(data):
        return 0
    if config.precompute_reference:
        parts = reference_logps.precompute(run, plan, [*rated, *mismatched])
        data = batches(run, plan, sets, parts, data.batches.steps)
    return final.language_model(run, run.fit(recipe(config, run.model, run.mesh), data))


def recipe(config: KTOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, its reference if the loss needs one, and the mean loss over responses."""
    loss = _loss(config)
    policy, reference, follow = feedback.parts(config, model, mesh, loss)
    algorithm = unpaired(
        policy.graphdef,
        None if reference is None else reference.graphdef,
        loss=loss,
        implementation=implementation(config),
    )
    return Recipe(policy, algorithm._replace(follow=follow), reference)


def check(config: KTOConfig) -> Callable:
    """The loss. Raises Mistake on one that cannot be used, or on settings that exclude each other."""
    loss = _loss(config)
    feedback.check(config, loss)
    if config.batch_size < 2:
        raise Mistake("`batch_size` 1: KTO's KL is a mean over the batch; give 2 or more")
    return loss


def batches(run: Run, plan: Plan, sets: Set[Responses], parts: Sequence[Responses], steps: int | None = None) -> Data:
    """Batches of rated responses, of `parts`: rated for training and held out, and the mismatched ones of both."""
    train, held_out, train_mismatched, held_out_mismatched = parts
    mixture = dataclasses.replace(sets.train, examples=train)
    batches = UnpairedBatches(mixture, train_mismatched, plan)
    batches = run.counted(batches) if steps is None else batches.with_steps(steps)
    return Data.of(sets, batches, unpaired_eval_batches(held_out, held_out_mismatched, plan))


def _loss(config: KTOConfig) -> Callable:
    return select_loss(config.algorithm.loss, UNPAIRED)


def _log_balance(labels: np.ndarray) -> None:
    desirable, undesirable = int(labels.sum()), int((~labels).sum())
    log.info("%d desirable and %d undesirable responses", desirable, undesirable)
    if not desirable or not undesirable:
        only, other = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
        log.warning("all responses are %s: without %s ones nothing holds the policy back", only, other)
        return
    weights = balanced_lambdas(desirable, undesirable)
    if max(weights) > 1:
        log.info("the paper's rule would weigh them kto(lambda_d=%.3g, lambda_u=%.3g)", *weights)
