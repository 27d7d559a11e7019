"""Score of how positive a text is: logistic regression on the words that occur in it, fitted to IMDb's labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse, special

WORD = re.compile(r"[a-z']+")
LEAST_TEXTS = 5  # training texts that must contain a word for it to have a weight


class Scorer(NamedTuple):
    """P(positive | text) = σ(bias + Σ weights of the words that occur, once each)."""

    column: dict[str, int]  # known word -> its column
    weights: np.ndarray  # Float64[W]
    bias: float

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores, Float64[N] in (0, 1); that of a text without a known word is σ(bias)."""
        return special.expit(presence(texts, self.column) @ self.weights + self.bias)

    def accuracy(self, texts: Sequence[str], labels: np.ndarray) -> float:
        """Share of the texts whose score is on the same side of 1/2 as their label."""
        return float(np.mean((self(texts) > 0.5) == labels.astype(bool)))


def presence(texts: Sequence[str], column: dict[str, int]) -> sparse.csr_array:
    """Float64[N W], 1 where the word occurs in the lowercased text; repeating it changes nothing."""
    rows = [sorted({column[word] for word in WORD.findall(text.lower()) if word in column}) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.zeros(0, np.int64), *[np.array(row, np.int64) for row in rows]])
    return sparse.csr_array((np.ones(len(columns)), columns, ends), shape=(len(texts), len(column)))


def fit(texts: Sequence[str], labels: np.ndarray, *, l2: float = 1e-4, most_steps: int = 200) -> Scorer:
    """Minimises mean -log P(label | text) + l2/2 |weights|², which is convex.

    Args:
      texts: N texts of the training set.
      labels: Int[N], 1 for positive.
      l2: strength of the penalty; the bias has none.
      most_steps: limit on steps of L-BFGS.
    """
    counts = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
    words = sorted(word for word, count in counts.items() if count >= LEAST_TEXTS)
    column = {word: i for i, word in enumerate(words)}
    present, signs = presence(texts, column), 2.0 * labels - 1.0

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (present @ weights + bias)
        slopes = -signs * special.expit(-margins) / len(texts)
        value = np.mean(np.logaddexp(0.0, -margins)) + 0.5 * l2 * weights @ weights
        return value, np.append(present.T @ slopes + l2 * weights, slopes.sum())

    start = np.zeros(len(words) + 1)
    end = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": most_steps}).x
    return Scorer(column, end[:-1], float(end[-1]))
