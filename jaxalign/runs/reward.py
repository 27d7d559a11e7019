"""`jaxalign reward`: a model and compared responses in, a model that scores responses out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.algorithms import process
from jaxalign.algorithms.process import process_reward
from jaxalign.algorithms.reward import check_loss, laid_over, response_scores, reward
from jaxalign.config.offline import RewardConfig
from jaxalign.config.shared import MeshConfig
from jaxalign.data.batches import groups
from jaxalign.data.batches.groups import GroupBatches, GroupPlan
from jaxalign.data.sets import preferences, solutions
from jaxalign.losses.contract import input_names
from jaxalign.losses.ranking import RANKING_LOSSES
from jaxalign.losses.sums import select_loss
from jaxalign.mistake import Mistake
from jaxalign.models import heads
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.save import gather
from jaxalign.models.places import Layout
from jaxalign.runs import devices, finish, scorer, train
from jaxalign.runs.program import Method, make_program
from jaxalign.runs.sft import data_options
from jaxalign.runs.vocabulary import Vocabulary
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.sharding import put_batch
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree, ResponseBatch

PAIRWISE = {"chosen_scores", "rejected_scores"}
# Columns of the data that a loss may ask for, and what it is told where they lack.
ASKED = {"margins": ("margin", "bradley_terry"), "preferences": ("preference", "bradley_terry(label_smoothing=0.1)")}
ASKED["ties"] = ("tie", "bradley_terry")
# Groups whose scores have mean 0 and variance 1: those of training, where nothing is held out, and where fewer than
# FEWEST_GROUPS are, so many more of training.
REFERENCE_GROUPS, FEWEST_GROUPS = 512, 64


def run(config: RewardConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "reward", _gather)


def export(config: RewardConfig, output: Path, checkpoints: Checkpoints, step: int | None) -> int | None:
    """A checkpoint of a run as a folder like `final/`, on the devices that are here; its step, None if there is none.

    The run's data are read again: scores are normalised on what was held out, and on more where that is little.
    """
    task = _gather(dataclasses.replace(config, mesh=MeshConfig()), False)
    program = make_program(task.config, task.base.model, task.base.mesh, task.method, steps=task.batches.steps)
    found = checkpoints.restore_part("params", program.like.params, step=step)
    if found is None:
        return None
    params, step = found
    _write(task, output, laid_over(params, train.load_frozen(task, program)), step)
    return step


def _gather(config: RewardConfig, starts: bool) -> train.Task:
    loss = select_loss(config.algorithm.loss, RANKING_LOSSES)
    build = process_reward if of_steps(config) else reward
    (process.check_loss if of_steps(config) else check_loss)(loss)
    heads.combine(np.zeros((1, config.members), np.float32), config.combine)
    _check_trained(config)
    base = train.load_base(config, starts=starts)
    base = dataclasses.replace(base, model=heads.trunk_config(base.model))
    names = set(input_names(loss))
    data = feedback(config, base.vocabulary)
    _check_asked(config, names, data)
    unit = base.mesh.shape["data"] * base.mesh.shape["fsdp"] * config.microbatches
    plan = GroupPlan(config.batch_size, config.max_length, unit, config.packing, config.shuffle, config.seed)
    batches = GroupBatches(data.train, plan, steps=1, **train.host())
    batches.steps = train.count_steps(config, batches.groups_per_epoch() / config.batch_size)
    held_out = groups.eval_batches(data.held_out, plan, **train.host())
    train.check_held_out(config, held_out)
    return train.Task(
        config,
        base,
        Method(lambda graphdef, _: build(graphdef, loss=loss), heads=config.members, freeze_trunk=config.freeze_trunk),
        batches,
        held_out,
        shapes=batches.layout.shapes,
        fingerprint=data.responses.fingerprint(),
        held_out_fingerprint=data.held_out.fingerprint(),
        prompts=[],
        export=_export,
    )


def _check_asked(config: RewardConfig, names: set[str], data: preferences.PreferenceData) -> None:
    sets = {"data": data.responses}
    if len(data.held_out):
        sets["held-out data" if config.eval_data is None else f"`eval_data` {config.eval_data}"] = data.held_out
    for name, (column, instead) in ASKED.items():
        for which, responses in sets.items():
            if name in names and column not in responses.columns:
                raise Mistake(f"`algorithm.loss` {config.algorithm.loss}: the {which} have no {name}; take {instead}")


def of_steps(config: RewardConfig) -> bool:
    """Whether the loss is of steps, not of whole responses."""
    return "step_scores" in input_names(select_loss(config.algorithm.loss, RANKING_LOSSES))


def feedback(config: RewardConfig, vocabulary: Vocabulary) -> preferences.PreferenceData:
    """The responses, in groups, that the run learns from and those that it holds out."""
    options = data_options(config, vocabulary.terminators)
    if of_steps(config):
        return solutions.load(
            config.data,
            vocabulary.tokenizer,
            options,
            separator=config.step_separator,
            eval_spec=config.eval_data,
        )
    names = input_names(select_loss(config.algorithm.loss, RANKING_LOSSES))
    return preferences.load(
        config.data,
        vocabulary.tokenizer,
        options,
        kind=preferences.PAIRS if PAIRWISE & set(names) else preferences.RANKED,
        eval_spec=config.eval_data,
        as_chat=config.as_chat,
        ties="ties" in names,
    )


def _check_trained(config: RewardConfig) -> None:
    if config.freeze_trunk and config.lora.rank:
        raise Mistake("`freeze_trunk` trains the heads alone, and `lora.rank` adapters besides; give one of them")
    if config.members > 1 and config.lora.rank and huggingface.is_random(config.model):
        raise Mistake(
            f"`members` {config.members} are adapters of `model` {config.model}, whose random weights nobody could "
            "load again; train them first, or leave out `lora.rank`"
        )


def _export(task: train.Task, state: TrainState, frozen: Any) -> None:
    final = Path(task.config.output) / "final"
    finish.put_aside(final)
    _write(task, final, laid_over(state.params, frozen), int(state.step))


def _write(task: train.Task, folder: Path, params: PyTree, step: int) -> None:
    if of_steps(task.config):  # logits, whose zero and unit mean something
        found, separator = np.array([[-1.0], [1.0]]).repeat(task.config.members, axis=1), task.config.step_separator
    else:
        found, separator = _reference_scores(task, params), None
    scorer.save(folder, task.config, task.base, params, found.mean(axis=0), found.std(axis=0), step, separator)


def _reference_scores(task: train.Task, params: PyTree) -> np.ndarray:
    """Float32[N M] of every held-out response; of some that were trained on where too few are held out."""
    config, base = task.config, task.base
    graphdef, _ = make_decoder(
        base.model,
        compute_dtype=devices.compute_dtype(config.precision),
        param_dtype=config.param_dtype,
        attention=None if config.attention == "auto" else config.attention,
        layout=Layout(base.mesh) if base.mesh.size > 1 else None,
        lora=base.lora,
        quantise=config.lora.quantise,
    )
    scores = jax.jit(lambda params, batch: response_scores(graphdef, params, batch))

    def read(batch: ResponseBatch) -> tuple[np.ndarray, np.ndarray]:
        batch = put_batch(batch, base.mesh)
        return gather(scores(params, batch)), gather(batch.present)

    found = [read(batch) for batch in task.held_out]
    wanted = FEWEST_GROUPS if found else REFERENCE_GROUPS
    epoch = -(-task.batches.groups_per_epoch() // config.batch_size)
    for i in range(min(task.batches.steps, epoch)):
        if sum(present.any(axis=-1).sum() for _, present in found) >= wanted:
            break
        found.append(read(task.batches[i]))
    return np.concatenate([values[present] for values, present in found])
