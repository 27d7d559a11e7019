"""Sinks of metric rows: metrics.jsonl and the terminal always, TensorBoard and Weights & Biases on request.

A row's values follow from the run alone, except CLOCK_FIELDS, which measure this machine's speed: apart from them, an
interrupted and resumed run writes the same rows as one that was not interrupted.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from types import UnionType
from typing import IO, Any

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief, parse_json, read_bytes, read_text, writing

log = logging.getLogger(__name__)

Row = dict[str, Any]
LONGEST = 8 << 30  # bytes of a file of rows
CLOCK_FIELDS = ("step_seconds", "tokens_per_second", "mfu")
CLOCK_FIELDS += ("generation_seconds", "generated_tokens_per_second", "reward_seconds")
CLOCK_FIELDS += ("training_seconds", "trained_tokens_per_second")


def deterministic(row: Row) -> Row:
    """The row without CLOCK_FIELDS."""
    return {name: value for name, value in row.items() if name not in CLOCK_FIELDS}


class JsonLines:
    """A file of one JSON object per line, each on disk once written. NaN and infinities become null, which JSON has."""

    def __init__(self, path: Path, *, keep_until: int = -1, repeats: bool = True):
        """Drops rows of steps after `keep_until`, and a half-written last line.

        Without `repeats` a step has one row: of several, which two processes may have written, the last one stays.
        """
        self.path = path
        if path.exists():
            self._truncate(keep_until, repeats)

    def _truncate(self, keep_until: int, repeats: bool) -> None:
        rows = [(row["step"], line) for row, line in _lines(self.path) if row["step"] <= keep_until]
        lines = [line for _, line in (rows if repeats else sorted(dict(rows).items()))]
        partial = self.path.with_suffix(".partial")
        with writing(self.path):
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(partial, self.path)

    def write(self, row: Row) -> None:
        line = json.dumps({name: _plain(value) for name, value in row.items()})
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _lines(path: Path, kinds: type | UnionType = object) -> list[tuple[Row, str]]:
    """The rows of a file, each with its line. Lines that are no row are left out, with a warning unless it is the last.

    Args:
      path: of the file.
      kinds: of the values of a row.

    Raises:
      Mistake: the file cannot be read.
    """
    rows, damaged = [], []
    lines = read_bytes(path, limit=LONGEST).split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = Fields(parse_json(line.decode(), ""), "")
            row.get("step", int)
            if not all(isinstance(value, kinds) for value in row.content.values()):
                raise TypeError
            rows.append((row.content, line.decode()))
        except (Mistake, TypeError, UnicodeDecodeError):
            damaged += [number] if number < len(lines) else []
    if damaged:
        log.warning("%s: %d damaged lines are left out, the first is line %d", path, len(damaged), damaged[0])
    return rows


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics.jsonl."""
    return [row for row, _ in _lines(path, int | float | None)]


class Recorder:
    """Writes each row to every sink; only the first process has one."""

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        resumed_at: int = -1,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        stream: IO[str] | None = None,
    ):
        self._lines = JsonLines(folder / "metrics.jsonl", keep_until=resumed_at, repeats=False)
        self._console = Console(total_steps, stream or sys.stderr)
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._board = _tensorboard(folder, resumed_at) if tensorboard else None
        self._wandb = _wandb(folder, wandb) if wandb else None

    def __call__(self, row: Row) -> None:
        if self._peak_flops and "tokens_per_second" in row:
            row["mfu"] = row["tokens_per_second"] * self._flops_per_token / self._peak_flops
        self._lines.write(row)
        self._console.show(row)
        numbers = {n: v for n, v in row.items() if n != "step" and isinstance(v, int | float)}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        self._console.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class Silent:
    """The recorder of every process but the first."""

    def __call__(self, row: Row) -> None: ...

    def close(self) -> None: ...


def _tensorboard(folder: Path, resumed_at: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at > 0 else None)


def check_wandb(project: str | None) -> None:
    """Raises Mistake where a project is named and Weights & Biases is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise Mistake("`log.wandb` needs the package wandb: pip install 'jaxalign[wandb]'")


def _wandb(folder: Path, project: str) -> Any:
    check_wandb(project)
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")  # git runs programs that the configuration of a folder names
    import wandb

    path = folder / "wandb_run_id"
    if not path.exists():
        path.write_text(wandb.util.generate_id())
    name = read_text(path, limit=1000).strip()
    if not re.fullmatch(r"[\w-]{1,128}", name, re.ASCII):
        raise Mistake(f"{path} holds {brief(repr(name))}, which is no id of Weights & Biases; delete it for a new one")
    return wandb.init(project=project, dir=str(folder), id=name, resume="allow")


class Console:
    """Progress as one line that changes, in a terminal; elsewhere as a line now and then."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total_steps: int, stream: IO[str]):
        self._total, self._stream = total_steps, stream
        self._live = stream.isatty()
        self._last = -math.inf

    def show(self, row: Row) -> None:
        text, now = format_row(row, self._total), time.monotonic()
        milestone = "eval_loss" in row or row["step"] in (1, self._total)
        if self._live:
            self._write(f"\r\x1b[K{text}" + ("\n" if milestone else ""))
        elif milestone or now - self._last >= self.SECONDS_BETWEEN_LINES:
            self._write(text + "\n")
            self._last = now

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # the reader has left
            raise
        except OSError as error:
            raise Mistake(
                f"the log cannot be written ({error.strerror}); make room, and run the same command again"
            ) from None

    def close(self) -> None:
        if self._live:
            self._write("\n")


def format_row(row: Row, total_steps: int) -> str:
    """`step 20/100  loss 1.2345  eval_loss 1.3  123 tokens/s  MFU 40.1 %  1:20 left`."""
    parts = [f"step {row['step']}/{total_steps}"]
    parts += [f"{name} {row[name]:.4f}" for name in ("loss", "eval_loss") if isinstance(row.get(name), float)]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in row:
        parts.append(f"MFU {100 * row['mfu']:.1f} %")
    if row.get("skipped_steps"):
        parts.append(f"skipped {row['skipped_steps']}")
    if "step_seconds" in row:
        left = round((total_steps - row["step"]) * row["step_seconds"])
        parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return "  ".join(parts)


# Dense bfloat16 FLOP/s of one chip as jax counts devices, from https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
# and https://www.nvidia.com/en-us/data-center/h100/ (h200, a100 alike).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a chip, by the longest known name that its kind starts with; None if no name fits."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None
