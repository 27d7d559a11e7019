"""Rows of files: JSON, CSV, parquet and plain texts, the text ones also packed.

A .json file holds a list of objects, an object with one such list, or an object on each line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.read import arrow
from jaxalign.data.read.json_rows import Row, parse_json, read_jsonl
from jaxalign.mistake import Mistake
from jaxalign.outside import MIB, brief

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet", ".txt", ".txt.gz")

# A .gz file may unpack to UNPACKED bytes, or to UNPACKED_RATIO times its size if that is more; text packs to a third,
# very repetitive rows to a fiftieth, and a file made to fill the memory to a thousandth.
UNPACKED, UNPACKED_RATIO = 64 * MIB, 100

# Keys of an object in a .json file: with a text under one of the former it is a row; the latter would go into rows.
OF_ROWS = ("prompt", "instruction", "question", "query", "inputs", "text")
BEFORE_ROWS = ("system", "system_prompt", "system_message", "tools", "functions", "history")
# Columns of feedback that a CSV file, which has no types, holds as numbers or truth values.
NUMBERS = ("label", "desirable", "margin", "preference", "tie", "score_chosen", "score_rejected")


def read_file(path: Path) -> Sequence[Row]:
    """The rows of a file. Raises Mistake if it is empty, malformed, or of an unknown kind."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may give bytes for ever, or never
        raise Mistake(f"data {path} is not a regular file; write its rows into one")
    rows = _read_rows(path)
    if not rows:
        raise Mistake(f"data file {path} is empty")
    return rows


def _read_rows(path: Path) -> Sequence[Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return list(read_jsonl(_text(path), path))
    if name.endswith(".txt"):
        text = _text(path)
        return [{"text": text}] if text.strip() else []
    if name.endswith(".json"):
        return _read_json(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    if name.endswith(".parquet"):
        return arrow.read_parquet(path)
    raise Mistake(f"data file {path}: unknown kind {path.suffix!r}; known are {', '.join(SUFFIXES)}")


def _text(path: Path) -> str:
    raw = b""
    try:
        raw = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(
            f"data file {path} is not readable: {error}; is it whole, and of the kind that its name says?"
        ) from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Mistake(f"data file {path}, line {line}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _unpacked(path: Path) -> bytes:
    limit = max(UNPACKED, UNPACKED_RATIO * path.stat().st_size)
    with gzip.open(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise Mistake(
            f"data file {path} unpacks to more than {limit:,} bytes, {UNPACKED_RATIO} times its size, as a file that "
            "was made to fill the memory does; if it is right, unpack it yourself"
        )
    return raw


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    first, _, rest = text.strip().partition("\n")
    if rest and _is_object(first):
        return list(read_jsonl(text, path))
    rows = parse_json(text, path)
    if isinstance(rows, dict):
        rows = _rows_in(rows, path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Mistake(f"data file {path} is not a list of objects, nor an object on each line")
    return rows


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _rows_in(value: Row, path: Path) -> list[Row] | None:
    """The list of objects in an object; the object as the only row if it has turns or texts instead."""

    def is_turn(item: Any) -> bool:
        return isinstance(item, dict) and bool({"role", "from"} & set(item)) and bool({"content", "value"} & set(item))

    lists = {name: items for name, items in value.items() if isinstance(items, list) and items}
    rows = {name: items for name, items in lists.items() if all(isinstance(item, dict) for item in items)}
    turns = any(all(map(is_turn, items)) for items in rows.values())  # beside them, other lists are tools or files
    if turns or any(isinstance(value.get(name), str) for name in OF_ROWS):
        return [value]
    if len(rows) > 1:
        raise Mistake(f"data file {path} has several lists of rows, {listed([*rows])}; write each into a file")
    texts = [name for name, item in value.items() if isinstance(item, str)]
    if rows:
        if others := [name for name in value if name not in rows]:
            content = next((name for name in others if name in BEFORE_ROWS and value[name]), None)
            if content is not None:
                raise Mistake(f"data file {path}: {content!r} stands beside the rows; write it into each of them")
            log.info("%s: the rows are in %s; nothing reads %s beside it", path, brief(repr(*rows)), listed(others))
        return next(iter(rows.values()))
    return [value] if texts else None


def _read_csv(path: Path) -> list[Row]:
    """Rows whose cells are texts, "007", "NA" and "true" too; only the columns NUMBERS become numbers."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[Row] = []
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            raise Mistake(f"data file {path} has several columns {listed(twice)}; rename all but one of each")
        reads = [_number if name in NUMBERS else str for name in names]
        for cells in reader:
            if cells and len(cells) != len(names):
                raise Mistake(
                    f"data file {path}, line {reader.line_num}: {len(cells)} cells, and the first line has {len(names)}"
                )
            if cells:
                rows.append({name: read(cell) for name, read, cell in zip(names, reads, cells, strict=True)})
    except csv.Error as error:
        raise Mistake(f"data file {path}, line {reader.line_num}: cannot be read as .csv: {error}") from None
    return rows


def _number(cell: str) -> Any:
    """The number or truth value of a cell, None if it is empty, or its text if it is none of these."""
    words = {"": None, "nan": None, "na": None, "null": None, "none": None, "true": True, "false": False}
    if cell.strip().lower() in words:
        return words[cell.strip().lower()]
    try:
        return float(cell)
    except ValueError:
        return cell


def listed(names: Sequence[str]) -> str:
    """Names as a message shows them."""
    return brief(", ".join(brief(name, 40) for name in names), 400)
