"""Reward functions that are not ours, or that may never return, each in a process of its own.

There a function can end the process, crash it, or search without end and without letting another thread run: the run
notices, ends the process at the time limit, and saves a checkpoint. Texts and columns are sent there as multiprocessing
sends objects; scores and errors return as JSON, so the run unpickles nothing that a function made. A function keeps its
state from call to call and runs in the main thread. JAX shows it CPUs only, as the run holds the accelerator.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.outside import visible
from jaxalign.rollout.rewards.calls import Failure, Texts, call, function_name, takes_one_response
from jaxalign.select import select

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxalign.rollout.rewards.worker import serve; serve(int(sys.argv[2]))"
)
SPARE = 10  # seconds after a time limit at which a process ends by itself, should this one be gone
LONGEST = 10**6  # seconds of a time limit for which a process watches
PATIENCE = 2  # seconds in which an idle process may end by itself


class Worker:
    """A process that holds one reward function; it has the function's name, bound keywords and signature."""

    def __init__(self, text: str):
        """
        Args:
          text: of the function, as `select` reads it.

        Raises:
          Mistake: that of `select`, or the import of the function's module ended the process.
        """
        self._text = text
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which ends its step first
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._connection, self._process)
        try:
            self._connection.send(self._text)
            description = self._received(math.inf)
        except (OSError, EOFError):
            raise Mistake(f"{self._text!r}: the import of its module {self._ending()}") from None
        if "mistake" in description:
            self._end()
            raise Mistake(description["mistake"]) from RuntimeError(description["traceback"])
        self.__name__, self.keywords = description["name"], dict.fromkeys(description["bound"])
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name, getattr(inspect.Parameter, kind), default=None if optional else inspect.Parameter.empty
                )
                for name, kind, optional in description["parameters"]
            ]
        )

    def __call__(self, prompts: Texts, responses: Texts, keywords: dict[str, Sequence[Any]], seconds: float) -> list:
        """The scores, as `call` returns them. Raises Failure, if need be `seconds` from now."""
        if self._process.poll() is not None:
            self._start()
        deadline, scores = time.monotonic() + seconds, [None] * len(responses)
        single = takes_one_response(self)
        try:
            self._connection.send((list(prompts), list(responses), keywords, seconds))
            while True:
                message = self._received(deadline)
                if "scores" in message:
                    return message["scores"]
                if "failure" in message:
                    raise Failure(message["failure"], message["row"]) from RuntimeError(message["traceback"])
                scores[message["row"]] = message["score"]
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            row = scores.index(None) if single and None in scores else None
            place = "" if row is None else f", at response {row}"
            if isinstance(error, TimeoutError):
                self._kill()
                limit = f"took longer than {seconds:g} s for {len(responses)} responses{place}"
                raise Failure(f"{limit}; `reward_seconds` allows more", row) from None
            raise Failure(f"{self._ending()}{place}", row) from None

    def _received(self, deadline: float) -> dict[str, Any]:
        """The next message. Raises TimeoutError, or EOFError where the process has ended."""
        while not self._connection.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
            if self._process.poll() is not None:  # though a process that it started holds the connection open
                raise EOFError
            if time.monotonic() >= deadline:
                raise TimeoutError
        return json.loads(self._connection.recv_bytes())

    def _ending(self) -> str:
        """The way in which the process ended, after it did."""
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._kill()
            return "closed its connection to the run"
        self._end()
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"ended its process ({cause})"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._end()


def _end(connection: Connection, process: subprocess.Popen) -> None:
    """Lets an idle process end, and kills one that does not."""
    connection.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve(descriptor: int) -> None:
    """Calls a function as a `Worker` requests, until that closes the connection."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)

    def reply(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    text = connection.recv()
    try:
        function = select(text, {})
        parameters = inspect.signature(function).parameters
    except Exception as error:
        return reply(mistake=str(error), traceback=shown_trace(error))
    except KeyboardInterrupt as error:  # the module's own: Ctrl-C does not reach this process
        return reply(mistake=f"{text!r}: its module raised KeyboardInterrupt", traceback=shown_trace(error))
    reply(
        name=function_name(function),
        bound=list(getattr(function, "keywords", {})),
        parameters=[(name, p.kind.name, p.default is not p.empty) for name, p in parameters.items()],
    )
    with open(os.devnull, "w") as nowhere:

        def watch(seconds: float) -> None:
            # needs no lock of Python's, so it ends even an endless search of a process whose run was killed
            faulthandler.dump_traceback_later(min(seconds, LONGEST) + SPARE, exit=True, file=nowhere)

        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                prompts, responses, keywords, seconds = connection.recv()
                watch(seconds)
                try:
                    scores = call(
                        function, prompts, responses, keywords, lambda row, score: reply(row=row, score=score)
                    )
                    reply(scores=scores)
                except Failure as failure:
                    reply(failure=str(failure), row=failure.row, traceback=shown_trace(failure.__cause__))
                faulthandler.cancel_dump_traceback_later()
                sys.stdout.flush()
        watch(0)


def shown_trace(error: BaseException | None) -> str:
    """The traceback of an error as text, which JAXALIGN_TRACEBACK shows."""
    return "\n" + visible("".join(traceback.format_exception(error)))


def matches(prompt: str, response: str, *, pattern: str) -> float:
    """`regex` of one response. Its process imports no more than this module, without JAX, and so starts fast."""
    return float(re.search(pattern, response) is not None)
