"""`jaxalign dpo`: a model and pairs of responses in, a model that people prefer out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.pairwise import pairwise
from jaxalign.commands import feedback
from jaxalign.config.offline import DPOConfig
from jaxalign.data.batches.groups import GroupBatches, Responses, eval_batches
from jaxalign.data.batches.plan import Plan
from jaxalign.data.sets import preferences
from jaxalign.data.sets.split import Set
from jaxalign.losses import PAIR, contract, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.run import final, reference_logps
from jaxalign.run.run import Data, Run
from jaxalign.training.program import Recipe, implementation

log = logging.getLogger(__name__)


@hosts.failing_together()
def main(config: DPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    loss = check(config)
    run = Run.open(config, "dpo")
    feedback.check_reference(config, run)
    sets, plan = feedback.load_groups(config, run, preferences.PAIRS)
    held_out = _full_batches(sets.held_out, plan) if contract.needs_whole_batch(loss) else sets.held_out
    data = batches(run, plan, sets, [sets.responses, held_out])
    if not run.claim(data):
        return 0
    if config.precompute_reference:
        parts = reference_logps.precompute(run, plan, [sets.responses, held_out])
        data = batches(run, plan, sets, parts, data.batches.steps)
    return final.language_model(run, run.fit(recipe(config, run.model, run.mesh), data))


def recipe(config: DPOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, its reference if the loss needs one, and the mean loss over pairs."""
    loss = _loss(config)
    policy, reference, follow = feedback.parts(config, model, mesh, loss)
    algorithm = pairwise(
        policy.graphdef,
        None if reference is None else reference.graphdef,
        loss=loss,
        pairs=config.batch_size,
        implementation=implementation(config),
    )
    return Recipe(policy, algorithm._replace(follow=follow), reference)


def check(config: DPOConfig) -> Callable:
    """The loss. Raises Mistake on one that cannot be used, or on settings that exclude each other."""
    loss = _loss(config)
    feedback.check(config, loss)
    if config.share_prompt and (not config.packing or config.attention == "splash"):
        raise Mistake(
            "`share_prompt` puts both responses behind one prompt in a row: it needs `packing`, and `attention` xla or "
            "cudnn, for the splash kernel cannot keep the two apart"
        )
    return loss


def batches(run: Run, plan: Plan, sets: Set[Responses], parts: Sequence[Responses], steps: int | None = None) -> Data:
    """Batches of pairs; `parts` are those for training and held out, with the reference's log-probabilities or not."""
    train, held_out = parts
    mixture = dataclasses.replace(sets.train, examples=train)
    batches = GroupBatches(mixture, plan)
    batches = run.counted(batches) if steps is None else batches.with_steps(steps)
    return Data.of(sets, batches, eval_batches(held_out, plan))


def _loss(config: DPOConfig) -> Callable:
    return select_loss(config.algorithm.loss, PAIR)


def _full_batches(responses: Responses, plan: Plan) -> Responses:
    """Without the last groups that fill no batch: a loss that sorts means another thing on a smaller one."""
    whole = len(responses) // plan.batch_size * plan.batch_size
    if whole < len(responses):
        log.info("held out: %d of %d groups, which fill batches of %d", whole, len(responses), plan.batch_size)
    return responses.take(range(whole))
