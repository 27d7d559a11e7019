"""Accuracy of the quickstart's reward model on held-out pairs, and its agreement with the judge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.quickstart import world
from jaxalign.rollout.rewards.scorer import load_reward_model


class Agreement(NamedTuple):
    """Shares of pairs of answers that the reward model orders correctly."""

    accuracy: float  # on pairs of a good and a bad answer to a held-out question
    pairs: int  # number of those
    with_judge: float  # on pairs of two stages' answers to one question, where the judge's scores differ
    compared: int  # number of those
    seconds: float  # of training

    def sentence(self) -> str:
        return (
            f"The reward model, trained in {self.seconds:.0f} seconds, scores the good answer above the bad one in "
            f"{self.accuracy:.2f} of {self.pairs} held-out pairs. Of two earlier stages' answers to one question, it "
            f"prefers the same one as the judge in {self.with_judge:.2f} of {self.compared} pairs."
        )


def measure(
    model: str, seed: int, questions: Sequence[world.Question], stages: Sequence[Any], seconds: float
) -> Agreement:
    """Agreement of the reward model in a folder, on the held-out questions and on the stages' answers to them."""
    scorer = load_reward_model(model, batch_size=64)
    pairs = world.held_out_pairs(seed, questions)
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (scorer(prompts, [pair[name] for pair in pairs]) for name in ("chosen", "rejected"))
    scores = np.stack([scorer(prompts, stage.answers, finished=stage.finished) for stage in stages])
    gold = np.array([[verdict.score for verdict in stage.verdicts] for stage in stages])
    share, compared = agreement(scores, gold)
    return Agreement(float(np.mean(chosen > rejected)), len(pairs), share, compared, seconds)


def agreement(scores: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(share of pairs that both order alike, number of pairs whose gold scores differ).

    Args:
      scores: of the reward model, [stages questions]. A pair is two stages' answers to one question.
      gold: of the judge, [stages questions].
    """
    alike = []
    for a, b in itertools.combinations(range(len(scores)), 2):
        differ = gold[a] != gold[b]
        alike += list(((scores[a] > scores[b]) == (gold[a] > gold[b]))[differ])
    return float(np.mean(alike)) if alike else 0.0, len(alike)
