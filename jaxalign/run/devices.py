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
from jaxalign.outside import brief, visible

log = logging.getLogger(__name__)


def start(*, distributed: bool = False) -> None:
    """Joins the other hosts if asked, finds the devices, and turns on the persistent compilation cache.

    The cache is in JAX_COMPILATION_CACHE_DIR, else in $XDG_CACHE_HOME/jaxalign (else ~/.cache/jaxalign); an empty
    JAX_COMPILATION_CACHE_DIR turns it off, and so does a home in which nothing can be written.

    Raises:
      Mistake: JAX finds no device of the platforms that JAX_PLATFORMS names.
    """
    if distributed or jax.distributed.is_initialized():
        hosts.join()
    _find_devices()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := _cache_folder()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _find_devices() -> None:
    """Starts JAX's backend. A plugin that cannot be used is a line, not JAX's traceback."""
    problems: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        problems.append(brief(record.getMessage() + (f": {error}" if error else ""), 200))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where the only platform's plugin is unusable
        platforms = os.environ.get("JAX_PLATFORMS")
        raise Mistake(
            f"JAX finds no device ({'; '.join([*problems, brief(str(error), 200)]).rstrip('; ')}); JAX_PLATFORMS is "
            f"{'not set' if platforms is None else brief(repr(platforms))}: cpu works everywhere"
        ) from error
    finally:
        logger.removeFilter(keep)
    for problem in problems:
        log.warning("%s", problem)


def _cache_folder() -> Path | None:
    """The folder of compiled programs, made; None where it cannot be."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home at all
        return None
    return folder if os.access(folder, os.W_OK) else None


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
    """The message, with its level in front when it is more than information.

    What a message quotes may be anybody's, so nothing in it is obeyed by a terminal, and it has one line unless the
    text of the log call itself has several.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = record.message if "\n" in str(record.msg) else record.message.replace("\n", "\\n")
        return visible(text) if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {visible(text)}"

    def formatException(self, ei: Any) -> str:
        return visible(super().formatException(ei))
