"""How reward functions are called: in threads side by side, once or for each response, awaited where they are async."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxalign.mistake import Mistake

Texts = Sequence[str]
# (prompts, responses, **columns) -> scores, or (prompt, response, **columns) -> score
RewardFn = Callable[..., Any]


class RowError(Exception):
    """A function that scores single responses failed at `row`."""

    def __init__(self, row: int):
        super().__init__(row)
        self.row = row


def in_thread(work: Callable[[], Any]) -> concurrent.futures.Future:
    """The future result of `work`, which runs in a daemon thread.

    The threads of an executor would keep the process from ending as long as a function hangs; a daemon does not.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except SystemExit as error:  # in a thread it would be ignored, and the future never done
            future.set_exception(RuntimeError(f"it called sys.exit({error.code!r})"))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def call(function: RewardFn, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> Any:
    """The scores of all responses: from one call, or from one for each where the first parameter is `prompt`.

    Args:
      function: a reward function, plain or async.
      prompts: of the responses.
      responses: texts.
      columns: of the data, by name; the function gets those that it names.

    Raises:
      RowError: a call for one response raised.
    """
    keywords = {name: columns[name] for name in columns_for(function, columns)}
    if not _takes_one_response(function):
        scores = function(prompts, responses, **keywords)
        return asyncio.run(_awaited(scores)) if inspect.isawaitable(scores) else scores

    def score(row: int) -> Any:
        return function(prompts[row], responses[row], **{name: values[row] for name, values in keywords.items()})

    return asyncio.run(_each(score, len(responses)))


async def _awaited(scores: Any) -> Any:
    return await scores


async def _each(score_of: Callable[[int], Any], count: int) -> list[Any]:
    async def guarded(row: int) -> Any:
        try:
            score = score_of(row)
            return await score if inspect.isawaitable(score) else score
        except Exception as error:
            raise RowError(row) from error

    return await asyncio.gather(*(guarded(row) for row in range(count)))


def _takes_one_response(function: RewardFn) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "prompt"


def columns_for(function: RewardFn, columns: Collection[str]) -> list[str]:
    """Names of the data's columns that a function has as parameters; all of them where it has **keywords.

    Raises:
      Mistake: the data lack a column that the function requires.
    """
    parameters = inspect.signature(function).parameters
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
            f"the data have no column {missing[0]!r}; they have {', '.join(columns) or 'none'}. {name} takes it as "
            f"an argument too: {name}({missing[0]}=...)"
        )
    return [name for name in parameters if name in columns and name not in bound and name not in positional]


def function_name(function: RewardFn) -> str:
    """The name of a function, or of the one inside a partial, for messages and metrics."""
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "function")
