"""Shared parts of dpo and kto: the settings of the reference, and feedback in groups of responses."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from jaxalign.algorithms.base import FollowFn
from jaxalign.algorithms.follow import follow
from jaxalign.config import limits
from jaxalign.config.offline import FeedbackConfig
from jaxalign.data.batches.groups import Responses
from jaxalign.data.batches.plan import Plan
from jaxalign.data.sets import preferences, supervised
from jaxalign.data.sets.split import Set
from jaxalign.losses import contract
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files import huggingface
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.part import Part


def check(config: FeedbackConfig, loss: Callable) -> None:
    """Raises Mistake on settings that exclude each other."""
    limits.check(config)
    if huggingface.is_random(config.model):
        raise Mistake(f"`model` {config.model}: random weights have nothing to prefer; train them with jaxalign sft")
    needs_reference = contract.needs_reference(loss)
    if config.ref_model is not None and not needs_reference:
        raise Mistake(f"`ref_model` {config.ref_model}: the loss {config.algorithm.loss!r} uses no reference")
    if config.precompute_reference and not needs_reference:
        raise Mistake(f"`precompute_reference`: the loss {config.algorithm.loss!r} uses no reference; leave it out")
    of_parts = [n for n in contract.input_names(loss) if n.startswith("ref_") and n.endswith("_public_logps")]
    if config.precompute_reference and of_parts:
        raise Mistake(
            "`precompute_reference` stores the reference's log-probabilities of whole responses, and the loss "
            f"{config.algorithm.loss!r} needs {', '.join(of_parts)}, of their first tokens; leave it out"
        )
    if config.ref_model not in (None, config.model) and config.lora.rank:
        raise Mistake("`ref_model`: with LoRA the reference is the base, `model`, which is held anyway; leave it out")
    if config.ref_update.every == 0:
        return
    setting = f"`ref_update.every` {config.ref_update.every}"
    if config.ref_update.alpha > 1:
        raise Mistake(f"`ref_update.alpha` {config.ref_update.alpha}: it must be at most 1, which copies the policy")
    if not needs_reference:
        raise Mistake(f"{setting}: the loss {config.algorithm.loss!r} uses no reference")
    if config.precompute_reference:
        raise Mistake(
            f"{setting} changes the reference, and `precompute_reference` stores log-probabilities of a fixed one; "
            "drop one of the two"
        )
    if config.lora.rank:
        raise Mistake(
            f"{setting}: with LoRA the reference is the base, which adapters share and nothing may change; train all "
            "parameters, or merge the adapter (jaxalign export) and start again from that model"
        )


def check_reference(config: FeedbackConfig, run: Run) -> None:
    """Raises Mistake unless the model of `ref_model` is of the policy's architecture."""
    if config.ref_model is not None and huggingface.read_config(config.ref_model) != run.model:
        raise Mistake(f"`ref_model` {config.ref_model} must have the architecture and sizes of `model` {config.model}")


def parts(
    config: FeedbackConfig, model: ModelConfig, mesh: Mesh, loss: Callable
) -> tuple[Part, Part | None, FollowFn | None]:
    """(the policy, its reference if the loss needs one beside the data, how the reference follows the policy)"""
    policy = part.language_model(config, model, mesh)
    reference = None
    if contract.needs_reference(loss) and not config.precompute_reference:
        reference = part.frozen_copy(config, model, mesh, policy, config.ref_model)
    update = config.ref_update
    return policy, reference, follow(alpha=update.alpha, every=update.every) if update.every else None


def load_groups(config: FeedbackConfig, run: Run, kind: str) -> tuple[Set[Responses], Plan]:
    """Responses in groups of a kind, and the plan of their batches."""
    sets = preferences.load(
        config.data,
        run.vocabulary.tokenizer,
        supervised.Options.of(config, run.vocabulary.terminators),
        kind=kind,
        eval_spec=config.eval_data,
        as_chat=config.as_chat,
    )
    return sets, Plan.of(config, unit=run.unit)
