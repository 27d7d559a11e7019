"""`jaxalign reward`: a model and compared responses in, a model that scores responses out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.process import process_reward
from jaxalign.algorithms.reward import response_scores, reward
from jaxalign.config import limits
from jaxalign.config.offline import RewardConfig
from jaxalign.config.shared import MeshConfig
from jaxalign.data.batches.groups import GroupBatches, Responses, eval_batches
from jaxalign.data.batches.plan import Plan
from jaxalign.data.sets import preferences, solutions, supervised
from jaxalign.data.sets.split import Set
from jaxalign.losses import OUTCOME, STEPS, select_loss
from jaxalign.losses.contract import input_names
from jaxalign.mistake import Mistake, about
from jaxalign.models import heads
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import decoder_for
from jaxalign.models.files import huggingface
from jaxalign.models.files.reward import heads_of
from jaxalign.outside import Fields, brief
from jaxalign.run import final
from jaxalign.run.run import SUMMARY, Data, Run
from jaxalign.run.vocabulary import Vocabulary
from jaxalign.select import names_own_code
from jaxalign.training import part
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.program import Recipe
from jaxalign.training.sharding import placed, put_batch
from jaxalign.types import PyTree, ResponseBatch

PAIRWISE = {"chosen_scores", "rejected_scores"}
# Inputs of a loss that are columns of the data: (the column, a loss that does without it)
OPTIONAL_COLUMNS = {
    "margins": ("margin", "bradley_terry"),
    "preferences": ("preference", "bradley_terry(label_smoothing=0.1)"),
    "ties": ("tie", "bradley_terry"),
}
# Scores are normalised on the held-out groups; on REFERENCE_GROUPS of training if none are held out, and topped up to
# FEWEST_GROUPS with groups of training if fewer are.
REFERENCE_GROUPS, FEWEST_GROUPS = 512, 64


@hosts.failing_together()
def main(config: RewardConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, "reward", scores=True)
    heads_of(config.model, config.members, alike=config.lora.rank > 0)
    data = load_data(config, run)
    if not run.claim(data):
        return 0
    outcome = run.fit(recipe(config, run.model, run.mesh), data, summary=functools.partial(statistics, run, data))
    if outcome.is_new:
        params = part.laid_over(outcome.state.params, outcome.frozen)
        summary = outcome.summary or statistics(run, data, params)
        final.reward_model(final.final_folder(run), run, params, summary, outcome.step)
    return run.end(outcome)


def recipe(config: RewardConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """Heads, and the trunk or adapters, and the mean loss over groups and members."""
    loss, trained = _loss(config), part.scorer(config, model, mesh)
    return Recipe(trained, (process_reward if scores_steps(config) else reward)(trained.graphdef, loss=loss))


def export(config: RewardConfig, output: Path, checkpoints: Checkpoints, step: int | None) -> int | None:
    """Writes a checkpoint of a run as a folder like `final/`, on the devices that are here; its step, None without one.

    Scores are normalised as the checkpoint says. One of an older version says nothing: then the run's data are read
    again, and refused if they have changed.
    """
    config = dataclasses.replace(config, mesh=MeshConfig())
    run = Run.read(config, "reward", scores=True)
    trained = part.scorer(config, run.model, run.mesh)
    restored = checkpoints.restore_part("params", placed(trained.trained, run.mesh), step=step)
    if restored is None:
        return None
    params, step = restored
    params = trained.assemble(params, trained.load(placed(trained.frozen, run.mesh)))
    extras = checkpoints.extras(step)
    summary = extras.get(SUMMARY, dict, None) or _statistics_again(run, extras, params)
    final.reward_model(output, run, params, summary, step)
    return step


def check(config: RewardConfig) -> None:
    """Raises Mistake on a loss that cannot be used, or on settings that exclude each other."""
    limits.check(config)
    _loss(config)
    if config.step_separator != RewardConfig.step_separator and not scores_steps(config):
        raise Mistake("`step_separator` is for losses of steps: use `algorithm.loss` process, or leave it out")
    with about("combine"):
        heads.combine(jnp.zeros((1, config.members)), config.combine)
    if config.freeze_trunk and config.lora.rank:
        raise Mistake("`freeze_trunk` trains the heads alone, and `lora.rank` adapters besides; give one of them")
    if config.members > 1 and config.lora.rank and huggingface.is_random(config.model):
        raise Mistake(
            f"`members` {config.members} are adapters of `model` {config.model}, whose random weights nobody could "
            "load again; train them first, or leave out `lora.rank`"
        )


def load_data(config: RewardConfig, run: Run) -> Data:
    """Groups of responses for training, and those held out."""
    sets = load_feedback(config, run.vocabulary)
    _check_columns(config, sets)
    plan = Plan.of(config, unit=run.unit)
    batches = run.counted(GroupBatches(sets.train, plan))
    return Data.of(sets, batches, eval_batches(sets.held_out, plan))


def load_feedback(config: RewardConfig, vocabulary: Vocabulary) -> Set[Responses]:
    """The responses, in groups, that the run learns from and those that it holds out."""
    options = supervised.Options.of(config, vocabulary.terminators)
    if scores_steps(config):
        return solutions.load(
            config.data,
            vocabulary.tokenizer,
            options,
            separator=config.step_separator,
            eval_spec=config.eval_data,
        )
    names = input_names(_loss(config))
    return preferences.load(
        config.data,
        vocabulary.tokenizer,
        options,
        kind=preferences.PAIRS if PAIRWISE & set(names) else preferences.RANKED,
        eval_spec=config.eval_data,
        as_chat=config.as_chat,
        ties="ties" in names,
    )


def scores_steps(config: RewardConfig) -> bool:
    """True if the loss is one of solution steps, not of whole responses."""
    return "step_scores" in input_names(_loss(config))


def _loss(config: RewardConfig) -> Callable:
    return select_loss(config.algorithm.loss, OUTCOME, STEPS)


def _check_columns(config: RewardConfig, sets: Set[Responses]) -> None:
    names = input_names(_loss(config))
    groups = {f"`data` {config.data}": sets.responses}
    if len(sets.held_out):
        groups["the held-out data" if config.eval_data is None else f"`eval_data` {config.eval_data}"] = sets.held_out
    for name, (column, other_loss) in OPTIONAL_COLUMNS.items():
        for source, responses in groups.items():
            if name in names and column not in responses.columns:
                raise Mistake(
                    f"loss {config.algorithm.loss} needs a column `{column}` in every pair, and {source} has none; add "
                    f"it, or use `algorithm.loss` {other_loss}"
                )


def statistics(run: Run, data: Data, params: PyTree) -> dict[str, Any]:
    """Mean and standard deviation of each member's scores, and what else a reward model needs besides its params."""
    config = run.config
    if scores_steps(config):  # logits, whose zero and unit mean something
        return {"mean": [0.0] * config.members, "std": [1.0] * config.members, "separator": config.step_separator}
    scores = _reference_scores(run, data, params)
    return {name: [float(x) for x in value] for name, value in (("mean", scores.mean(0)), ("std", scores.std(0)))}


def _statistics_again(run: Run, extras: Fields, params: PyTree) -> dict[str, Any]:
    """The statistics of a checkpoint that lacks them, of the run's data as they are now."""
    config = run.config
    if names_own_code(config.algorithm.loss):
        raise Mistake(
            f"{run.folder} names the loss {brief(config.algorithm.loss)}, code of a user's own, which export does not "
            "run; repeat the command of the run, which exports its last step"
        )
    try:
        data = load_data(config, run)
    except Mistake as mistake:
        raise Mistake(
            f"the checkpoints of {run.folder} are of an older version, so scores are normalised on `data` "
            f"{config.data}, which cannot be read: {mistake}. Put the data back where the run read them"
        ) from None
    seen = extras.get("data", int, None), extras.get("held_out", int, None)
    if seen != (data.fingerprint, data.held_out_fingerprint):
        raise Mistake(
            f"the data of `data` {config.data} have changed since {run.folder} was started, and its checkpoints, of an "
            "older version, do not say how scores are normalised; restore the data"
        )
    return statistics(run, data, params)


@functools.lru_cache(maxsize=1)
def _compiled(graphdef: Any) -> Any:
    return jax.jit(functools.partial(response_scores, graphdef))


def _reference_scores(run: Run, data: Data, params: PyTree) -> np.ndarray:
    """Float32[N M] of every held-out response; of some that were trained on where too few are held out."""
    graphdef, _ = decoder_for(run.config, run.model, run.mesh, run.lora)
    scores = _compiled(graphdef)

    def read(batch: ResponseBatch) -> tuple[np.ndarray, np.ndarray]:
        batch = put_batch(batch, run.mesh)
        return hosts.gather(scores(params, batch)), hosts.gather(batch.present)

    parts = [read(batch) for batch in data.held_out]
    wanted = FEWEST_GROUPS if parts else REFERENCE_GROUPS
    epoch = int(np.ceil(data.batches.steps_per_epoch))
    for i in range(min(data.batches.steps, epoch)):
        if sum(present.any(axis=-1).sum() for _, present in parts) >= wanted:
            break
        parts.append(read(data.batches[i]))
    return np.concatenate([values[present] for values, present in parts])
