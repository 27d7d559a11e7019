"""`jaxalign dpo` and `jaxalign kto`: a model and feedback in, a model that people prefer out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.base import FollowFn
from jaxalign.algorithms.follow import follow
from jaxalign.algorithms.pairwise import dpo
from jaxalign.algorithms.unpaired import kto
from jaxalign.config.offline import DPOConfig, FeedbackConfig, KTOConfig
from jaxalign.data.batches import groups
from jaxalign.data.batches.groups import GroupBatches, GroupPlan, Responses, UnpairedBatches
from jaxalign.data.sets import preferences
from jaxalign.losses import contract, unpaired
from jaxalign.losses.pairs.margin import PREFERENCE_LOSSES
from jaxalign.losses.sums import select_loss
from jaxalign.losses.unpaired import UNPAIRED_LOSSES
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files import huggingface
from jaxalign.runs import program, reference, train
from jaxalign.runs.program import Method, Program, implementation
from jaxalign.runs.sft import data_options

log = logging.getLogger(__name__)


def run_dpo(config: DPOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "dpo", _gather_dpo)


def run_kto(config: KTOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "kto", _gather_kto)


def _gather_dpo(config: DPOConfig, starts: bool) -> train.Task:
    loss = select_loss(config.algorithm.loss, PREFERENCE_LOSSES)
    contract.check_inputs(loss, contract.PAIR_INPUTS)
    if config.share_prompt and (not config.packing or config.attention == "splash"):
        raise Mistake(
            "`share_prompt` puts both responses behind one prompt in a row: it needs `packing`, and `attention` xla or "
            "cudnn, for the splash kernel cannot keep the two apart"
        )
    base = _load_base(config, loss, starts)
    data = _load_data(config, base, preferences.PAIRS)
    plan, whole = _plan(config, base), contract.needs_whole_batch(loss)
    held_out = _whole_batches(data.held_out, config.batch_size) if whole else data.held_out

    def batches(train_set: Responses, held_out: Responses) -> tuple[GroupBatches, list[Any]]:
        mixture = dataclasses.replace(data.train, examples=train_set)
        return (
            GroupBatches(mixture, plan, steps=1, **train.host()),
            groups.eval_batches(held_out, plan, **train.host()),
        )

    return _task(config, base, loss, data, [data.responses, held_out], batches)


def _gather_kto(config: KTOConfig, starts: bool) -> train.Task:
    loss = select_loss(config.algorithm.loss, UNPAIRED_LOSSES)
    contract.check_inputs(loss, contract.UNPAIRED_INPUTS)
    if config.batch_size < 2:
        raise Mistake("`batch_size` 1: KTO's KL is a mean over the batch; give 2 or more")
    base = _load_base(config, loss, starts)
    data = _load_data(config, base, preferences.RATED)
    _report_balance(data.responses.columns["label"])
    plan = _plan(config, base)
    sets = [data.responses, data.held_out]
    others = [preferences.mismatched(part, seed=config.seed) if len(part) > 1 else part for part in sets]

    def batches(train_set: Responses, held_out: Responses, *others: Responses) -> tuple[GroupBatches, list[Any]]:
        mixture = dataclasses.replace(data.train, examples=train_set)
        return (
            UnpairedBatches(mixture, others[0], plan, steps=1, **train.host()),
            groups.unpaired_eval_batches(held_out, others[1], plan, **train.host()),
        )

    return _task(config, base, loss, data, [*sets, *others], batches)


def make_program(config: FeedbackConfig, model: ModelConfig, mesh: Mesh, *, loss: Callable, steps: int) -> Program:
    """The train step of a config on a mesh; the mesh may be of devices that are not there."""
    return program.make_program(config, model, mesh, _method(config, loss), steps=steps)


def _method(config: FeedbackConfig, loss: Callable) -> Method:
    options: dict[str, Any] = {"loss": loss, "implementation": implementation(config)}
    algorithm = dpo if isinstance(config, DPOConfig) else kto
    if algorithm is dpo and contract.needs_whole_batch(loss):
        options["groups"] = config.batch_size
    return Method(
        lambda graphdef, ref: algorithm(graphdef, ref_graphdef=ref, **options),
        reference=contract.needs_reference(loss) and not config.precompute_reference,
        follow=_follow(config, loss),
    )


def _load_base(config: FeedbackConfig, loss: Callable, starts: bool) -> train.Base:
    _follow(config, loss)  # refuses, before anything is read
    if huggingface.is_random(config.model):
        raise Mistake(f"`model` {config.model}: random weights have nothing to prefer; train them with jaxalign sft")
    base = train.load_base(config, starts=starts)
    if config.ref_model is None:
        return base
    if not contract.needs_reference(loss):
        raise Mistake(f"`ref_model` {config.ref_model}: the loss {config.algorithm.loss!r} uses no reference")
    if base.lora is not None and config.ref_model != config.model:
        raise Mistake("`ref_model`: with LoRA the reference is the base, `model`, which is held anyway; leave it out")
    if huggingface.read_config(config.ref_model) != base.model:
        raise Mistake(f"`ref_model` {config.ref_model} must have the architecture and sizes of `model` {config.model}")
    return base


def _follow(config: FeedbackConfig, loss: Callable) -> FollowFn | None:
    """How the reference follows the policy, if it shall; a ValueError where it cannot."""
    update = config.ref_update
    if update.every == 0:
        return None
    flag = f"`ref_update.every` {update.every}"
    if update.alpha > 1:
        raise Mistake(f"`ref_update.alpha` {update.alpha}: it must be at most 1, which copies the policy")
    if not contract.needs_reference(loss):
        raise Mistake(f"{flag}: the loss {config.algorithm.loss!r} uses no reference")
    if config.precompute_reference:
        raise Mistake(f"{flag}: log-probabilities precomputed once are of a reference that stays; leave one out")
    if config.lora.rank:
        raise Mistake(
            f"{flag}: with LoRA the reference is the base, which adapters share and nothing may change; train all "
            "parameters, or merge the adapter (jaxalign export) and start again from that model"
        )
    return follow(alpha=update.alpha, every=update.every)


def _load_data(config: FeedbackConfig, base: train.Base, kind: str) -> preferences.PreferenceData:
    options = data_options(config, base.vocabulary.terminators)
    return preferences.load(
        config.data,
        base.vocabulary.tokenizer,
        options,
        kind=kind,
        eval_spec=config.eval_data,
        as_chat=config.as_chat,
    )


def _plan(config: FeedbackConfig, base: train.Base) -> GroupPlan:
    """Rows are a multiple of what devices and microbatches cut them into; the number of groups need not be."""
    unit = base.mesh.shape["data"] * base.mesh.shape["fsdp"] * config.microbatches
    share = isinstance(config, DPOConfig) and config.share_prompt
    return GroupPlan(config.batch_size, config.max_length, unit, config.packing, config.shuffle, config.seed, share)


def _whole_batches(responses: Responses, size: int) -> Responses:
    """Without the last groups that fill no batch: a loss that sorts means another thing on a smaller one."""
    whole = len(responses) // size * size
    if whole < len(responses):
        log.info("held out: %d of %d groups, which fill batches of %d", whole, len(responses), size)
    return responses.take(range(whole))


def _report_balance(labels: np.ndarray) -> None:
    desirable, undesirable = int(labels.sum()), int((~labels).sum())
    log.info("%d desirable and %d undesirable responses", desirable, undesirable)
    weights = unpaired.balanced_lambdas(desirable, undesirable)
    if max(weights) > 1:
        log.info("the paper's rule would weigh them kto(lambda_d=%.3g, lambda_u=%.3g)", *weights)


def _task(
    config: FeedbackConfig,
    base: train.Base,
    loss: Callable,
    data: preferences.PreferenceData,
    sets: list[Responses],
    batches_of: Callable[..., tuple[GroupBatches, list[Any]]],
) -> train.Task:
    """A task on the batches that `batches_of` makes of the sets, again once the reference has read them."""
    precomputes = config.precompute_reference and contract.needs_reference(loss)
    batches, held_out = batches_of(*sets)
    steps = train.count_steps(config, batches.groups_per_epoch() / config.batch_size)
    train.check_held_out(config, held_out)

    def complete(task: train.Task) -> train.Task:
        batches, held_out = batches_of(*(reference.precompute(config, base, _plan(config, base), sets)))
        batches.steps = steps
        return dataclasses.replace(task, batches=batches, held_out=held_out)

    batches.steps = steps
    task = train.Task(
        config,
        base,
        _method(config, loss),
        batches,
        held_out,
        shapes=batches.layout.shapes,
        fingerprint=data.responses.fingerprint(),
        held_out_fingerprint=data.held_out.fingerprint(),
        prompts=data.prompts,
        export=train.export_language_model,
    )
    return dataclasses.replace(task, complete=complete) if precomputes else task
