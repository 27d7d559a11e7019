"""Rewards of the over-optimisation experiment: gold, a known formula, and proxies, which are trained to predict it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.models import heads
from jaxalign.rollout.rewards.functions import Texts, lexicon
from jaxalign.rollout.rewards.scorer import Scorer, load_reward_model

WORD = re.compile(r"[\w']+")
NEAR = 8  # words


def gold(prompts: Texts, responses: Texts, *, path: str) -> list[float]:
    """Gold reward: Σ valence of the distinct words - number of words that repeat one of the NEAR words before them.

    A happy word counts once, and repeating it soon costs one. A small model's stories repeat words rarely, so a model
    that learns from comparisons of them learns the first term well and the second badly.

    Args:
      prompts: not read.
      responses: texts.
      path: file of `word<tab>valence` lines, such as VADER's lexicon.
    """
    words_of = [WORD.findall(text.lower()) for text in responses]
    once = lexicon(prompts, [" ".join(dict.fromkeys(words)) for words in words_of], path=path)
    return [valence - stammers(words) for valence, words in zip(once, words_of, strict=True)]


def stammers(words: Sequence[str]) -> int:
    """Number of words that repeat one of the NEAR words before them."""
    return sum(word in words[max(0, i - NEAR) : i] for i, word in enumerate(words))


def members(prompts: Texts, responses: Texts, folders: Sequence[str]) -> np.ndarray:
    """Scores of M reward models, Float32[N M], each with mean 0 and variance 1 on its held-out data."""
    return np.concatenate([_scorer(folder).members(prompts, responses) for folder in folders], axis=1)


@functools.lru_cache
def _scorer(folder: str) -> Scorer:
    return load_reward_model(folder, batch_size=64)


def proxy(
    prompts: Texts, responses: Texts, *, folders: Sequence[str], rule: str, lexicon_path: str, notes: str
) -> list[float]:
    """Reward of the policy: the members' scores, combined by a rule of `models/heads.py`.

    Each call also appends a line to `notes`: proxy and gold reward of these responses, which are fresh samples of the
    step's policy. Responses are scored with a terminator, as in training, even if they were cut off. The members run on
    the CPU, for a reward function of one's own has a process without accelerator.
    """
    scores = np.asarray(heads.combine(members(prompts, responses, folders), rule))
    known = np.array(gold(prompts, responses, path=lexicon_path))
    with Path(notes).open("a") as file:
        file.write(json.dumps({"proxy": _mean_and_error(scores), "gold": _mean_and_error(known)}) + "\n")
    return scores.tolist()


def _mean_and_error(values: np.ndarray) -> list[float]:
    """[mean, its standard error]."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]
