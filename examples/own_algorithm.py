"""An algorithm of your own, online KTO, from public pieces: nothing in the package changes.

    python examples/own_algorithm.py --model MODEL --data PROMPTS --output RUN --reward "length(target=20)" --n 4

At each step the policy responds to prompts, a response is desirable if its score is above the mean of its prompt's, and
the KTO loss learns from the rated responses. A prompt whose responses all score the same has undesirable ones only;
`--dynamic-sampling 3` replaces such prompts by others. Everything that `jaxalign online-dpo` has is here too: LoRA,
microbatches, meshes, servers that generate, exact resume, the exported model.

In the package it would touch five files: `OnlineKTOAlgorithm` and `OnlineKTOConfig` in config/on_policy.py, `to_rated`
in rollout/batches.py, the other functions in commands/online_kto.py, a line of `COMMANDS` in commands/__init__.py, and
a line of the table of runs in tests/commands/test_rl.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro
from jax.sharding import Mesh

from jaxalign.algorithms.unpaired import unpaired
from jaxalign.commands import on_policy
from jaxalign.config.limits import at_least
from jaxalign.config.on_policy import GroupConfig
from jaxalign.data.batches.groups import BatchShapes, Responses
from jaxalign.data.batches.plan import Plan
from jaxalign.data.read.tokens import Examples
from jaxalign.data.sets.preferences import mismatched
from jaxalign.losses import UNPAIRED, select_loss
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.rollout.scored import ScoredResponses, score_std
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.program import Recipe, implementation
from jaxalign.types import UnpairedBatch


@dataclass(frozen=True)
class OnlineKTOAlgorithm:
    """The loss of a rated response of the policy's own."""

    loss: str = "kto"
    """Loss per response, from losses/unpaired.py: 'kto(beta=0.1)', a sum, or your own 'my.module:function(x=1)'."""
    epochs: Annotated[int, at_least(1)] = 1
    """Number of passes over the responses of a step."""
    minibatches: Annotated[int, at_least(1)] = 1
    """Number of optimizer updates in each pass."""


@dataclass(frozen=True, kw_only=True)
class OnlineKTOConfig(GroupConfig):
    """Online KTO: a model's own responses, rated against the mean score of their prompt."""

    algorithm: OnlineKTOAlgorithm = field(default_factory=OnlineKTOAlgorithm)


def main(config: OnlineKTOConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    run = Run.open(config, "online-kto")
    plan = recipe(config, run.model, run.mesh)
    prompting = on_policy.load_prompts(config, run, plan)
    data = on_policy.run_data(config, prompting)
    if not run.claim(data):
        return 0
    rows = on_policy.count_rows(config, run.mesh, responses=config.n)
    responses = on_policy.rollouts(config, run, prompting, functools.partial(to_batch, config, rows))
    return final.language_model(run, run.fit(plan, data, source=responses))


def recipe(config: OnlineKTOConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """The policy, whole or as adapters, its frozen reference, and the mean loss over responses."""
    policy = part.language_model(config, model, mesh)
    reference = part.frozen_copy(config, model, mesh, policy)
    loss = select_loss(config.algorithm.loss, UNPAIRED)
    algorithm = unpaired(policy.graphdef, reference.graphdef, loss=loss, implementation=implementation(config))
    algorithm = algorithm._replace(epochs=config.algorithm.epochs, minibatches=config.algorithm.minibatches)
    return Recipe(policy, algorithm, reference, offload=config.offload_reference)


def check(config: OnlineKTOConfig) -> None:
    """Raises Mistake on a loss that cannot be used, or on settings that exclude each other."""
    on_policy.check(config)
    select_loss(config.algorithm.loss, UNPAIRED)
    if config.n < 2 or config.batch_size < 2:
        raise Mistake(
            f"`n` {config.n}, `batch_size` {config.batch_size}: a response is rated beside others to its prompt, and "
            "KTO's KL reads responses to other prompts; draw 2 or more for each of 2 or more prompts"
        )


def to_batch(
    config: OnlineKTOConfig, rows: int, responses: ScoredResponses, prompts: Sequence[tuple], width: int, step: int
) -> tuple[UnpairedBatch, dict[str, float]]:
    """A rated response a row, and in equally many rows the prompts with responses to others, for KTO's KL."""
    scores = responses.scores.reshape(-1, config.n)
    labels = (scores > scores.mean(axis=1, keepdims=True)).reshape(-1)
    rated = to_rated(responses, prompts, labels)
    # packing with room for one response a row: every row has the width of the step, so few shapes are compiled
    shapes = BatchShapes(Plan(rows, width), responses=1, max_groups=1, row_counts=(rows,))
    others = mismatched(rated, seed=config.seed + step)
    return UnpairedBatch(shapes.batch(rated), shapes.batch(others)), {
        "score": float(scores.mean()),
        "score_std": score_std(scores),
        "desirable": float(labels.mean()),
    }


def to_rated(scored: ScoredResponses, prompt_ids: Sequence[Sequence[int]], labels: np.ndarray) -> Responses:
    """Groups of one response behind its prompt, with its label: True where it is desirable."""
    parts = []
    for prompt, response in zip(prompt_ids, scored.responses, strict=True):
        ids = np.array([*prompt, *response.tokens], np.int32)
        parts.append((ids, np.arange(len(ids)) >= len(prompt)))
    return Responses(Examples.of(parts), np.arange(len(parts))[:, None], {"label": labels})


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(OnlineKTOConfig)))
