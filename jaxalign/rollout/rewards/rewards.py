"""Scores of responses: reward functions, and weighted sums of them.

    "numeric_match"                               of REWARDS; it reads the data's column `answer`
    "my_lab.rewards:short(most=40)"               your own
    "numeric_match + 0.2*length(target=60)"       a weighted sum

A reward function returns one score per response. The name of its first parameter decides how it is called:

    def f(prompts, responses, *, answer): ...     once, with sequences; returns a sequence of scores
    def f(prompt, response, *, answer): ...       for each response, because its first parameter is `prompt`

Columns of the data are passed by keyword, those that the function names, or all if it has **columns. Either kind may be
`async def`; the calls of one for single responses then run concurrently, as suits a function that queries a service.
Your own functions, and `regex`, run in processes of their own (`worker`), all others in threads.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.mistake import Mistake, about
from jaxalign.outside import brief
from jaxalign.rollout.rewards.calls import (
    ERROR_LENGTH,
    LARGEST,
    Failure,
    RewardFn,
    call,
    columns_for,
    function_name,
    in_thread,
)
from jaxalign.rollout.rewards.functions import (
    FROM_DATA,
    REWARDS,
    Texts,
    checked_answer,
    checked_count,
    checked_number,
    exact_match,
    numeric_match,
    overlong,
    regex,
    reward_model,
    scorer,
)
from jaxalign.rollout.rewards.worker import Worker, matches
from jaxalign.select import select, terms

# the column of the data that a function of REWARDS reads, and what raises Mistake on a value with which it never scores
CHECKS: dict[RewardFn, tuple[str, Callable[[Any], Any]]] = {
    exact_match: ("answer", checked_answer),
    numeric_match: ("answer", checked_number),
    overlong: ("tokens", checked_count),
}
GRACE = 1.0  # seconds after the time limit in which a function's process is ended


class RewardError(Mistake):
    """A reward function failed; the message names it, and `row` is the response's number where one is to blame."""

    def __init__(self, text: str, row: int | None = None):
        super().__init__(text)
        self.row = row


def reward_models(text: str) -> list[str]:
    """Folders of the reward models in a sum; its other functions are not looked at."""
    functions = [select(term, REWARDS) for _, term in terms(text) if ":" not in term.partition("(")[0]]
    return [f.keywords["path"] for f in functions if _unbound(f) is reward_model]


class Rewards:
    """A weighted sum of reward functions that run side by side, with a time limit and checks of each score."""

    @about("reward")
    def __init__(self, text: str, *, seconds: float = 60.0):
        """
        Args:
          text: the sum, as `select_sum` reads it; bare names are those of REWARDS.
          seconds: time limit for the responses of one call; a reward model has none.

        Raises:
          Mistake: a function or keyword does not exist, and the message lists what does; or a function of REWARDS
            cannot be called with its keywords: one is missing, or a file or reward model cannot be read.
        """
        self._seconds = seconds
        weights, functions = zip(*((weight, _load(term)) for weight, term in terms(text)), strict=True)
        names = _numbered([function_name(function) for function in functions])
        self._functions = dict(zip(names, functions, strict=True))
        self.weights = dict(zip(names, weights, strict=True))

    @property
    def models(self) -> dict[str, str]:
        """Folders of the reward models in the sum, by name."""
        models = ((name, f) for name, f in self._functions.items() if _unbound(f) is reward_model)
        return {name: function.keywords["path"] for name, function in models}

    def reads(self, column: str) -> bool:
        """True if a function of the sum takes the data's column of this name."""
        return any(
            column in columns_for(function, [column, *inspect.signature(function).parameters])
            for function in self._functions.values()
        )

    def check(self, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]], *, later: Sequence[str] = ()) -> None:
        """Requires of all prompts what scoring needs, so that no run ends at the step that draws a bad one.

        Args:
          prompts: of the whole data.
          columns: of their rows, by name.
          later: names of columns that come with the responses.

        Raises:
          Mistake: a function requires a column that is neither in `columns` nor in `later`, a function of REWARDS can
            never score with a row's value, or a prompt fills all that a reward model reads.
        """
        for name, function in self._functions.items():
            keywords = columns_for(function, [*columns, *later])
            column, check = CHECKS.get(_unbound(function), ("", None))
            if check and column in keywords and column not in later:
                _check_column(name, prompts, columns[column], check)
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
        futures, columns = {}, dict(columns)
        for name in self._functions if names is None else names:
            function = self._functions[name]
            try:
                keywords = {column: columns[column] for column in columns_for(function, columns)}
            except Mistake as mistake:
                raise RewardError(f"the reward {name}: {mistake}") from None
            arguments = (self._seconds,) if isinstance(function, Worker) else ()
            work = function if isinstance(function, Worker) else functools.partial(call, function)
            futures[name] = in_thread(functools.partial(work, prompts, responses, keywords, *arguments))
        deadline = time.monotonic() + self._seconds + GRACE
        ours = self.models  # they end, and their first call compiles, which takes as long as it takes
        return {
            name: self._checked(name, future, None if name in ours else deadline, len(responses))
            for name, future in futures.items()
        }

    def weighted_sum(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Float32[N], Σ weight · scores of `scores_by_function`. Raises RewardError where it is beyond float32."""
        total = sum(self.weights[name] * values for name, values in scores.items())
        for row in np.flatnonzero(np.abs(total) > LARGEST)[:1]:
            raise RewardError(f"the scores of response {row} add up to {total[row]:g}; a float32 holds {LARGEST:.2g}")
        return total.astype(np.float32)

    def _checked(self, name: str, future: concurrent.futures.Future, deadline: float | None, count: int) -> np.ndarray:
        name = f"the reward {name}"
        try:
            scores = future.result(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Failure as failure:
            raise RewardError(f"{name} {failure}", failure.row) from failure.__cause__
        except Mistake as mistake:  # of a process that was started anew
            raise RewardError(f"{name}: {mistake}") from mistake
        except TimeoutError:
            raise RewardError(
                f"{name} took longer than {self._seconds:g} s for {count} responses; `reward_seconds` allows more"
            ) from None
        if len(scores) != count:
            amount = f"more than {count}" if len(scores) > count else len(scores)
            raise RewardError(f"{name} gave {amount} scores for {count} responses; it must give one each")
        for row, score in enumerate(scores):
            if isinstance(score, str):
                raise RewardError(
                    f"{name} gave {score} for response {row}; a score must be a finite number in float32", row
                )
        return np.array(scores, np.float64)


def _load(term: str) -> RewardFn:
    """The function of a term. One of a user's module, or that may search for ever, gets a process of its own."""
    if ":" in term.partition("(")[0]:
        return Worker(term)
    function = select(term, REWARDS)
    _check_arguments(function)
    if _unbound(function) is regex:
        worker = Worker(f"{matches.__module__}:{matches.__name__}(pattern={function.keywords['pattern']!r})")
        worker.__name__ = "regex"
        return worker
    return function


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
        raise Mistake(f"{unbound.__name__}({arguments}) cannot be used: {brief(str(error), ERROR_LENGTH)}") from error


def _check_column(name: str, prompts: Sequence[Any], values: Sequence[Any], check: Callable[[Any], Any]) -> None:
    for number, (prompt, value) in enumerate(zip(prompts, values, strict=True), 1):
        try:
            check(value)
        except Mistake as mistake:
            raise Mistake(f"the reward {name}: prompt {number}, {brief(repr(prompt))}: {mistake}") from None


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with its number behind it: length, length_2."""
    return [name if (seen := names[:i].count(name)) == 0 else f"{name}_{seen + 1}" for i, name in enumerate(names)]
