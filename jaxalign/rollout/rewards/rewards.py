"""Scores of responses: reward functions, and weighted sums of them.

    "numeric_match"                               of REWARDS; it reads the data's column `answer`
    "my_lab.rewards:short(most=40)"               your own
    "numeric_match + 0.2*length(target=60)"       a weighted sum

A reward function returns one score per response. The name of its first parameter decides how it is called:

    def f(prompts, responses, *, answer): ...     once, with sequences; returns a sequence of scores
    def f(prompt, response, *, answer): ...       for each response, because its first parameter is `prompt`

Columns of the data are passed by keyword, those that the function names, or all if it has **columns. Either kind may be
`async def`; the calls of one for single responses then run concurrently, as suits a function that queries a service.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import math
import reprlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.rollout.rewards.calls import RewardFn, RowError, call, columns_for, function_name, in_thread
from jaxalign.rollout.rewards.functions import (
    FROM_DATA,
    REWARDS,
    Texts,
    checked_answer,
    exact_match,
    numeric_match,
    reward_model,
    scorer,
)
from jaxalign.select import select_sum

LARGEST = float(np.finfo(np.float32).max)  # of a score


class RewardError(Mistake):
    """A reward function failed; the message names it, and the row where one is to blame."""


class Rewards:
    """A weighted sum of reward functions that run side by side, with a time limit and checks of each score."""

    def __init__(self, text: str, *, seconds: float = 60.0):
        """
        Args:
          text: the sum, as `select_sum` reads it; bare names are those of REWARDS.
          seconds: time limit for the responses of one call.

        Raises:
          Mistake: a function or keyword does not exist, and the message lists what does; or a function of REWARDS
            cannot be called with its keywords: one is missing, or a file or reward model cannot be read.
        """
        terms, self._seconds = select_sum(text, REWARDS), seconds
        for _, function in terms:
            _check_arguments(function)
        names = _numbered([function_name(function) for _, function in terms])
        self._functions = dict(zip(names, (function for _, function in terms), strict=True))
        self.weights = dict(zip(names, (weight for weight, _ in terms), strict=True))

    @property
    def models(self) -> dict[str, str]:
        """Folders of the reward models in the sum, by name."""
        models = ((name, f) for name, f in self._functions.items() if _unbound(f) is reward_model)
        return {name: function.keywords["path"] for name, function in models}

    def check(self, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]], *, later: Sequence[str] = ()) -> None:
        """Requires of all prompts what scoring needs, so that no run ends at the step that draws a bad one.

        Args:
          prompts: of the whole data.
          columns: of their rows, by name.
          later: names of columns that come with the responses.

        Raises:
          Mistake: a function requires a column that is neither in `columns` nor in `later`, an answer is neither text
            nor number, or a prompt fills all that a reward model reads.
        """
        for name, function in self._functions.items():
            keywords = columns_for(function, [*columns, *later])
            if _unbound(function) in (exact_match, numeric_match) and "answer" in keywords:
                _check_answers(name, prompts, columns["answer"])
            elif _unbound(function) is reward_model:
                scorer(**function.keywords).check(prompts)

    def __call__(self, prompts: Texts, responses: Texts, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Float32[N], the weighted sum of the functions' scores.

        Raises:
          RewardError: a function raised, took too long, or gave other than one finite number for each response.
        """
        return self.weighted_sum(self.scores_by_function(prompts, responses, columns))

    def scores_by_function(
        self,
        prompts: Texts,
        responses: Texts,
        columns: Mapping[str, Sequence[Any]],
        names: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Each function's own scores, Float64[N], before weights; of `names`, or of all. Raises what the sum does."""
        deadline = time.monotonic() + self._seconds
        names = self._functions if names is None else names
        futures = {
            name: in_thread(functools.partial(call, self._functions[name], prompts, responses, columns))
            for name in names
        }
        return {name: self._checked(name, future, deadline, len(responses)) for name, future in futures.items()}

    def weighted_sum(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Float32[N], Σ weight · scores of `scores_by_function`. Raises RewardError where it is beyond float32."""
        total = sum(self.weights[name] * values for name, values in scores.items())
        for row in np.flatnonzero(np.abs(total) > LARGEST)[:1]:
            raise RewardError(f"the scores of response {row} add up to {total[row]:g}; a float32 holds {LARGEST:.2g}")
        return total.astype(np.float32)

    def _checked(self, name: str, future: concurrent.futures.Future, deadline: float, count: int) -> np.ndarray:
        name = f"the reward {name}"
        try:
            scores = list(future.result(timeout=max(0.0, deadline - time.monotonic())))
        except RowError as error:
            cause = error.__cause__
            raise RewardError(f"{name} raised {type(cause).__name__} for response {error.row}: {cause}") from cause
        except Exception as error:  # a function of the user's may raise anything, a TimeoutError of its own too
            if not future.done():
                raise RewardError(
                    f"{name} took longer than {self._seconds:g} s for {count} responses; `reward_seconds` allows more"
                ) from None
            raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error
        if len(scores) != count:
            raise RewardError(f"{name} gave {len(scores)} scores for {count} responses; it must give one each")
        numbers = np.array([_real(score) for score in scores], np.float64)
        for row in np.flatnonzero(~(np.abs(numbers) <= LARGEST))[:1]:
            value = reprlib.repr(scores[row])
            raise RewardError(f"{name} gave {value} for response {row}; a score must be a finite number in float32")
        return numbers


def _real(score: Any) -> float:
    """A real number or bool of Python, numpy or JAX as float; nan for anything else."""
    try:
        return math.nan if isinstance(score, str) or np.iscomplexobj(score) or np.ndim(score) else float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _unbound(function: RewardFn) -> RewardFn:
    """The function inside a partial, or the function itself."""
    return getattr(function, "func", function)


def _check_arguments(function: RewardFn) -> None:
    """Raises Mistake if a function of REWARDS cannot be called with its keywords, by a call for no responses."""
    unbound, keywords = _unbound(function), getattr(function, "keywords", {})
    if unbound not in REWARDS.values():
        return
    signature = inspect.getfullargspec(unbound)
    required = [name for name in signature.kwonlyargs if name not in (signature.kwonlydefaults or {})]
    missing = [name for name in required if name not in keywords and name not in FROM_DATA]
    if missing:
        raise Mistake(f"{unbound.__name__} needs {missing[0]}; give it as {unbound.__name__}({missing[0]}=...)")
    if unbound is reward_model:
        scorer(**keywords)
        return
    try:
        unbound([], [], **{name: () for name in required} | keywords)
    except Exception as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        raise Mistake(f"{unbound.__name__}({arguments}) cannot be used: {error}") from error


def _check_answers(name: str, prompts: Sequence[Any], answers: Sequence[Any]) -> None:
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        try:
            checked_answer(answer)
        except ValueError as error:
            raise Mistake(f"the reward {name}: prompt {number}, {str(prompt)[:60]!r}: {error}") from None


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with its number behind it: length, length_2."""
    return [name if (seen := names[:i].count(name)) == 0 else f"{name}_{seen + 1}" for i, name in enumerate(names)]
