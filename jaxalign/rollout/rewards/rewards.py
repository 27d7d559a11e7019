"""What a response is worth: functions (prompts, responses, **columns) -> one score each, and weighted sums of them.

"numeric_match"                               of REWARDS; it reads the data's column `answer`
"my_lab.rewards:short(most=40)"               your own
"numeric_match + 0.2*length(target=60)"       a sum

A function of (prompt, response, **columns) judges one response and is called for each. Both kinds may be `async def`:
one that judges single responses then has all of them under way at once, as one that asks a service should.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import math
import reprlib
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.rollout.rewards.calls import RewardFn, RowError, call, name_of, started, wanted
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
    """A weighted sum of reward functions, each within a time limit, its scores checked."""

    def __init__(self, text: str, *, seconds: float = 60.0):
        """
        Args:
          text: what `select_sum` takes, over REWARDS.
          seconds: that the functions, which run side by side, may take for the responses of one call.

        Raises:
          Mistake: a function or keyword does not exist, and the message lists what does; or a function of REWARDS
            cannot be called with its keywords: it lacks one, or a file or reward model cannot be read.
        """
        terms, self._seconds = select_sum(text, REWARDS), seconds
        for _, function in terms:
            _check_arguments(function)
        names = _distinct([name_of(function) for _, function in terms])
        self._functions = dict(zip(names, (function for _, function in terms), strict=True))
        self.weights = dict(zip(names, (weight for weight, _ in terms), strict=True))

    @property
    def models(self) -> dict[str, str]:
        """The reward models in the sum: their folders, by name."""
        models = ((name, f) for name, f in self._functions.items() if _kind(f) is reward_model)
        return {name: function.keywords["path"] for name, function in models}

    def check(self, prompts: Sequence[Any], columns: dict[str, Sequence[Any]], *, later: Sequence[str] = ()) -> None:
        """Finds what would end a run at the step that draws it.

        Args:
          prompts: all that there are.
          columns: of their rows, by name.
          later: names of columns that come with the responses.

        Raises:
          Mistake: a function asks for a column that is neither here nor comes later, an answer is none, or a prompt
            fills all that a reward model reads.
        """
        for name, function in self._functions.items():
            asks = wanted(function, [*columns, *later])
            if _kind(function) in (exact_match, numeric_match) and "answer" in asks:
                _check_answers(name, prompts, columns["answer"])
            elif _kind(function) is reward_model:
                scorer(**function.keywords).check(prompts)

    def __call__(self, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> np.ndarray:
        """Float32[N], the weighted sum.

        Raises:
          RewardError: a function raised, took too long, or gave other than one finite number for each response.
        """
        return self.summed(self.by_name(prompts, responses, columns))

    def by_name(
        self,
        prompts: Texts,
        responses: Texts,
        columns: dict[str, Sequence[Any]],
        names: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Each function's own scores, Float64[N], before weights; by default of all. Raises what the sum does."""
        run = lambda function: started(functools.partial(call, function, prompts, responses, columns))  # noqa: E731
        until = time.monotonic() + self._seconds
        asked = self._functions if names is None else names
        under_way = {name: run(self._functions[name]) for name in asked}
        return {name: self._checked(name, future, until, len(responses)) for name, future in under_way.items()}

    def summed(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Float32[N] of `by_name`'s scores. Raises RewardError where a sum is beyond float32."""
        total = sum(self.weights[name] * values for name, values in scores.items())
        for row in np.flatnonzero(np.abs(total) > LARGEST)[:1]:
            raise RewardError(f"the rewards of response {row} add up to {total[row]:g}; a float32 holds {LARGEST:.2g}")
        return total.astype(np.float32)

    def _checked(self, name: str, future: concurrent.futures.Future, until: float, count: int) -> np.ndarray:
        name = f"the reward {name}"
        try:
            scores = list(future.result(timeout=max(0.0, until - time.monotonic())))
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
            said = reprlib.repr(scores[row])
            raise RewardError(f"{name} gave {said} for response {row}; a score is a finite number, as float32 holds it")
        return numbers


def _real(score: Any) -> float:
    """A number of Python, numpy or JAX, or a bool; nan for anything else, complex numbers too."""
    try:
        return math.nan if isinstance(score, str) or np.iscomplexobj(score) or np.ndim(score) else float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _kind(function: RewardFn) -> RewardFn:
    """The function whose keywords are bound."""
    return getattr(function, "func", function)


def _check_arguments(function: RewardFn) -> None:
    """Raises Mistake on keywords that a function of REWARDS cannot be called with: it is called for no responses."""
    kind, given = _kind(function), getattr(function, "keywords", {})
    if kind not in REWARDS.values():
        return
    told = inspect.getfullargspec(kind)
    needed = [name for name in told.kwonlyargs if name not in (told.kwonlydefaults or {})]
    missing = [name for name in needed if name not in given and name not in FROM_DATA]
    if missing:
        raise Mistake(f"{kind.__name__} needs {missing[0]}; give it as {kind.__name__}({missing[0]}=...)")
    if kind is reward_model:
        scorer(**given)
        return
    try:
        kind([], [], **{name: () for name in needed} | given)
    except Exception as error:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise Mistake(f"{kind.__name__}({said}) cannot be used: {error}") from error


def _check_answers(name: str, prompts: Sequence[Any], answers: Sequence[Any]) -> None:
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        try:
            checked_answer(answer)
        except ValueError as error:
            raise Mistake(f"the reward {name}: prompt {number}, {str(prompt)[:60]!r}: {error}") from None


def _distinct(names: Sequence[str]) -> list[str]:
    """A name that comes again is numbered: length, length_2."""
    return [name if (seen := names[:i].count(name)) == 0 else f"{name}_{seen + 1}" for i, name in enumerate(names)]
