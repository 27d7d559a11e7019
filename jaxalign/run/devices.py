"""The start of a process: join the other hosts, keep compiled programs, log in plain lines."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.attention import SPLASH_UNIT

log = logging.getLogger(__name__)


def start(*, distributed: bool = False) -> None:
    """Joins the other hosts if asked, and turns on the persistent compilation cache.

    The cache is in JAX_COMPILATION_CACHE_DIR, else in $XDG_CACHE_HOME/jaxalign (else ~/.cache/jaxalign); an empty
    JAX_COMPILATION_CACHE_DIR turns it off.
    """
    if distributed:
        hosts.join()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxalign" / "compiled"))


def check_attention(attention: str, max_length: int) -> None:
    """Raises Mistake when a forced implementation does not run on these devices, or not on such rows."""
    needs, here = {"splash": "tpu", "cudnn": "gpu"}.get(attention), jax.default_backend()
    if needs not in (None, here):
        raise Mistake(f"`attention` {attention} runs on {needs.upper()}, not on {here.upper()}; auto picks what fits")
    if here == "tpu" and attention in ("auto", "splash") and max_length % SPLASH_UNIT:
        log.info(
            "attention pads rows of %d tokens to a multiple of %d: `max_length` %d costs no more",
            max_length,
            SPLASH_UNIT,
            max_length + -max_length % SPLASH_UNIT,
        )


def start_log() -> None:
    """Logs to stderr in plain lines: information from the first process, warnings from all."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    root = logging.getLogger("jaxalign")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    for name in ("transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # when a write fails, Orbax logs a traceback from every thread, and leaves futures that nobody asks and callbacks to
    # a loop that it has closed; what went wrong is in the error that Checkpoints raises
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _all_but_closed_loops


def _all_but_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Plain(logging.Formatter):
    """The message, with its level in front when it is more than information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
