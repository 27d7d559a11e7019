"""The two rewards of the over-optimisation experiment: the gold one, which is known, and proxies, which guess at it."""

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
    """Σ valence of the distinct words - how many words stood among the NEAR before them already.

    A happy word pleases once, and saying it again and again costs. Stories of a small model stammer little, so those
    who learn from comparisons of them see the first term well and the second dimly.

    Args:
      prompts: not read.
      responses: texts.
      path: a file of `word<tab>valence` lines, such as VADER's lexicon.
    """
    said = [WORD.findall(text.lower()) for text in responses]
    once = lexicon(prompts, [" ".join(dict.fromkeys(words)) for words in said], path=path)
    return [valence - stammers(words) for valence, words in zip(once, said, strict=True)]


def stammers(words: Sequence[str]) -> int:
    """How many words are one of the NEAR before them."""
    return sum(word in words[max(0, i - NEAR) : i] for i, word in enumerate(words))


def members(prompts: Texts, responses: Texts, folders: Sequence[str]) -> np.ndarray:
    """Float32[N M], scores of M reward models, each with mean 0 and variance 1 on what it was held out from."""
    return np.concatenate([_scorer(folder).members(prompts, responses) for folder in folders], axis=1)


@functools.lru_cache
def _scorer(folder: str) -> Scorer:
    return load_reward_model(folder, batch_size=64)


def proxy(
    prompts: Texts, responses: Texts, *, folders: Sequence[str], rule: str, lexicon_path: str, notes: str
) -> list[float]:
    """What the policy is paid: the members' scores, combined by a rule of `models/heads.py`.

    What it is not paid, the gold reward of the same responses, is written into `notes`, a line a call: no other
    samples would say more exactly what the policy of that step is worth. Responses are read with a terminator, as in
    training, wherever they were cut.
    """
    scores = np.asarray(heads.combine(members(prompts, responses, folders), rule))
    known = np.array(gold(prompts, responses, path=lexicon_path))
    with Path(notes).open("a") as file:
        file.write(json.dumps({"proxy": _told(scores), "gold": _told(known)}) + "\n")
    return scores.tolist()


def _told(values: np.ndarray) -> list[float]:
    """[mean, its standard error]."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]
