"""How reward functions are called: once or for each response, awaited where they are async, with their columns."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import itertools
import reprlib
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.outside import brief

Texts = Sequence[str]
# (prompts, responses, **columns) -> scores, or (prompt, response, **columns) -> score
RewardFn = Callable[..., Any]
LARGEST = float(np.finfo(np.float32).max)  # of a score
ERROR_LENGTH = 300  # characters of another's error


class Failure(Exception):
    """A reward function failed, at `row` or as a whole; the text goes on behind the function's name."""

    def __init__(self, text: str, row: int | None = None):
        super().__init__(text)
        self.row = row


def raised(error: BaseException, row: int | None = None) -> Failure:
    """The failure of a function that raised `error`."""
    place = "" if row is None else f" for response {row}"
    try:
        text = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        text = text if isinstance(error, Mistake) else brief(text, ERROR_LENGTH)
    except Exception:  # of the error's own
        text = "its text cannot be shown"
    kind = "RuntimeError" if isinstance(error, SystemExit) else type(error).__name__
    return Failure(f"raised {brief(kind)}{place}" + (f": {text}" if text else ""), row)


def in_thread(work: Callable[[], Any]) -> concurrent.futures.Future:
    """The future result of `work`, which runs in a daemon thread.

    The threads of an executor would keep the process from ending as long as a function hangs; a daemon does not.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def call(
    function: RewardFn,
    prompts: Texts,
    responses: Texts,
    keywords: dict[str, Sequence[Any]],
    report: Callable[[int, float | str], None] = lambda row, score: None,
) -> list[float | str]:
    """The scores of all responses, as `checked` returns them: from one call, or from one for each response.

    Args:
      function: a reward function, plain or async; it is called for each response if its first parameter is `prompt`.
      prompts: of the responses.
      responses: texts.
      keywords: columns of the data, by name, as `columns_for` chooses them.
      report: called with the row and score of each single response, once it is known.

    Raises:
      Failure: the function raised.
    """
    try:
        if takes_one_response(function):

            def score(row: int) -> Any:
                return function(
                    prompts[row], responses[row], **{name: column[row] for name, column in keywords.items()}
                )

            return asyncio.run(_each(score, len(responses), report))
        scores = function(prompts, responses, **keywords)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores))
        return [checked(score) for score in itertools.islice(scores, len(responses) + 1)]
    except Failure:
        raise
    except BaseException as error:
        raise raised(error) from error


def takes_one_response(function: RewardFn) -> bool:
    """True of a function that is called for each response: its first parameter is `prompt`."""
    return next(iter(inspect.signature(function).parameters), "") == "prompt"


async def _awaited(scores: Any) -> Any:
    return await scores


async def _each(score_of: Callable[[int], Any], count: int, report: Callable[[int, float | str], None]) -> list[Any]:
    async def guarded(row: int) -> Any:
        try:
            score = score_of(row)
            score = checked(await score if inspect.isawaitable(score) else score)
        except (Exception, SystemExit) as error:
            raise raised(error, row) from error
        report(row, score)
        return score

    return await asyncio.gather(*(guarded(row) for row in range(count)))


def checked(score: Any) -> float | str:
    """A finite real number or bool of Python, numpy or JAX that a float32 holds; a text that shows anything else."""
    try:
        if not (isinstance(score, str) or np.iscomplexobj(score) or np.ndim(score)) and abs(float(score)) <= LARGEST:
            return float(score)
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        return brief(reprlib.repr(score))
    except Exception:  # of the value's own
        return brief(f"a {type(score).__name__}")


def columns_for(function: RewardFn, columns: Collection[str]) -> list[str]:
    """Names of the data's columns that a function has as parameters; all of them where it has **keywords.

    Raises:
      Mistake: the function does not take prompts and responses, or the data lack a column that it requires.
    """
    signature = inspect.signature(function)
    try:
        signature.bind_partial((), ())
    except TypeError:
        name = function_name(function)
        raise Mistake(
            f"{name}{brief(str(signature))} cannot be called as {name}(prompts, responses), which a reward must allow"
        ) from None
    parameters = signature.parameters
    positional = list(parameters)[:2]  # prompts and responses, whatever the data call their columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return [name for name in columns if name not in positional]
    bound = getattr(function, "keywords", {})
    missing = [
        name
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in columns and name not in bound
    ]
    if missing:
        name = function_name(function)
        raise Mistake(
            f"the data have no column {missing[0]!r}; they have {', '.join(map(brief, columns)) or 'none'}. "
            f"{name} takes it as an argument too: {name}({missing[0]}=...)"
        )
    return [name for name in parameters if name in columns and name not in bound and name not in positional]


def function_name(function: RewardFn) -> str:
    """The name of a function, or of the one inside a partial, for messages and metrics."""
    name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "function")
    return brief(str(name))
