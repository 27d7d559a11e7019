"""Chat templates rendered in a process of their own, with limits of time and memory.

A template is a program that others wrote: it can loop for hours, and fill the memory with one multiplication, which
nothing within the same process could end. So a child process renders; the system ends it after SECONDS of computing,
and gives it no more than MEMORY. What it renders is what the tokenizer's `apply_chat_template` would return.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

SECONDS = 5.0  # of computing, for one conversation; a usual template takes less than a thousandth of one
MEMORY = 4 << 30  # bytes of addresses, of which Python and transformers take 200 MiB
LONGEST = 64 << 20  # characters of a rendered conversation


class TemplateError(Exception):
    """A chat template cannot render a conversation; the text says why."""


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """`tokenizer.apply_chat_template(messages, tokenize=False, **options)`, within the limits.

    Args:
      tokenizer: of transformers, with a chat template.
      messages: dicts of what JSON can hold.
      options: of `apply_chat_template`, such as `tools` and `add_generation_prompt`.

    Raises:
      TemplateError: the template is not Jinja, refuses the conversation, fails on it, or goes beyond a limit.
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    if getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template:
        return _applied(tokenizer, messages, options)  # its rendering is code of its own, and no template of others
    template = tokenizer.get_chat_template(None, options.get("tools"))
    return _child().render({"template": template, "tokens": tokenizer.special_tokens_map}, list(messages), options)


@functools.cache
def _child() -> _Child:
    return _Child()


class _Child:
    """The process that renders: started at the first conversation, and anew after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._template: dict[str, Any] | None = None  # that it has
        atexit.register(self._end)

    def render(self, template: dict[str, Any], messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                if template != self._template:
                    self._send(template)
                    self._template = template
                self._send({"messages": messages, "options": options, "seconds": SECONDS})
                assert self._process is not None and self._process.stdout is not None
                line = self._process.stdout.readline()
            except BaseException:  # Ctrl-C between a question and its answer: neither may be taken for another's
                self._end()
                raise
            if not line.endswith("\n"):
                raise TemplateError(_reason(self._end()))
        reply = json.loads(line)
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def _start(self) -> None:
        # without torch, and in a session of its own: Ctrl-C is ours to answer
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "USE_TORCH": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            env=os.environ | variables | {"TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            start_new_session=True,
        )

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the missing answer shows it
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _end(self) -> int:
        """Ends the process, if there is one; its exit status."""
        process, self._process, self._template = self._process, None, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _reason(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it was still computing after {SECONDS:g} s, and was ended"
    return f"the process that renders it ended with status {status}"


def _applied(tokenizer: Any, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    """Raises TemplateError."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"it is not Jinja, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise TemplateError(str(error) or type(error).__name__) from None
    except MemoryError:
        raise TemplateError(f"it needs more than {MEMORY >> 30} GiB of memory") from None
    except Exception as error:  # a template is a program, which can fail in any way
        raise TemplateError(f"{type(error).__name__}: {error}") from None


def serve() -> None:
    """Renders what comes as lines on stdin, under a template that came before, until it ends."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    def apply(*arguments: Any, **options: Any) -> str:
        return PreTrainedTokenizerBase.apply_chat_template(tokenizer, *arguments, **options)  # type: ignore[arg-type]

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = types.SimpleNamespace(apply_chat_template=apply)
    for line in sys.stdin:
        message = json.loads(line)
        if "template" in message:
            tokenizer.get_chat_template = lambda *_, template=message["template"]: template
            tokenizer.special_tokens_map = message["tokens"]
            continue
        signal.setitimer(signal.ITIMER_PROF, message["seconds"])  # SIGPROF ends the process, wherever it is
        try:
            text = _applied(tokenizer, message["messages"], message["options"])
            if len(text) > LONGEST:
                raise TemplateError(f"it makes a text of {len(text):,} characters; {LONGEST:,} is the most")
            reply = {"text": text}
        except TemplateError as error:
            reply = {"error": str(error)[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
