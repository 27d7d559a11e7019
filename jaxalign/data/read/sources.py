"""Rows of `data`: files, folders and hub names, mixed by weight.

stories.jsonl.gz                 a file: .jsonl .json .csv .parquet .txt, the text ones also .gz
stories.jsonl.gz:train           its rows whose column `split` is "train"
name  name:split  name:config:split      a set on the Hugging Face hub
a.jsonl*0.7,b.jsonl*0.3          a mixture; without weights every row counts once

The name of an existing file may contain colons, commas and stars. A .json file holds a list of objects, an object with
one such list, or an object on each line.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import gzip
import io
import json
import logging
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jaxalign.mistake import Mistake
from jaxalign.outside import MIB, brief, check_local

log = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str | None, Sequence[Row]]
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "validation", "valid", "val", "held", "heldout", "dev", "eval")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet", ".txt", ".txt.gz")

# A .gz file may unpack to UNPACKED bytes, or to UNPACKED_RATIO times its size if that is more; text packs to a third,
# very repetitive rows to a fiftieth, and a file made to fill the memory to a thousandth.
UNPACKED, UNPACKED_RATIO = 64 * MIB, 100

# Objects in whose keys Arrow's None means that the row lacks them: schemas of tools, and calls.
OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")
# Keys of an object in a .json file: with a text under one of the former it is a row; the latter would go into rows.
OF_ROWS = ("prompt", "instruction", "question", "query", "inputs", "text")
BEFORE_ROWS = ("system", "system_prompt", "system_message", "tools", "functions", "history")
# Columns of feedback that a CSV file, which has no types, holds as numbers or truth values.
NUMBERS = ("label", "desirable", "margin", "preference", "tie", "score_chosen", "score_rejected")


@dataclasses.dataclass(frozen=True)
class Source:
    """One set of a mixture."""

    name: str
    split: str | None = None
    config: str | None = None
    weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Rows of a source, and the split of it that they are."""

    rows: Sequence[Row]
    split: str | None = None


class _ArrowRows(Sequence[Row]):
    """Rows of a dataset. Arrow gives all objects of a column the same keys; those added as None leave OF_TOOLS again.

    Keys in JSON files stay as they are, null too.
    """

    def __init__(self, dataset: Sequence[Row]):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return _compact(self._dataset[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_compact, self._dataset)


def _compact(value: Any, *, of_tools: bool = False) -> Any:
    if isinstance(value, list):
        return [_compact(item, of_tools=of_tools) for item in value]
    if not isinstance(value, dict):
        return value
    items = value.items()
    return {k: _compact(v, of_tools=of_tools or k in OF_TOOLS) for k, v in items if v is not None or not of_tools}


def parse(spec: str) -> list[Source]:
    """The sources of a spec. Raises Mistake if a weight is not a positive number, or if some sources have none."""
    check_local(spec)
    if _exists(spec):  # its name may contain a comma, a star or a colon
        return [Source(spec)]
    sources = [_parse_one(part.strip()) for part in spec.split(",") if part.strip()]
    if not sources:
        raise Mistake(f"data {spec!r} names nothing")
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) != len(sources):
        raise Mistake(f"data {spec!r}: give every source a weight (name*0.5), or none")
    return sources


def parse_unweighted(spec: str, setting: str) -> list[Source]:
    """The sources of a spec of which every row counts once. Raises Mistake if one has a weight."""
    sources = parse(spec)
    weighted = next((source for source in sources if source.weight is not None), None)
    if weighted is not None:
        check_exists(weighted)
        raise Mistake(f"`{setting}` {spec}: {weighted.name} has a weight, and every row counts once here; leave it out")
    return sources


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def _parse_one(text: str) -> Source:
    if _exists(text):
        return Source(text)
    name, star, weight = text.rpartition("*")
    if not star:
        name, weight = text, ""
    value = None
    if star:
        try:
            value = float(weight)
        except ValueError:
            raise Mistake(f"data {text!r}: {weight!r} is not a weight; write name*0.5") from None
        if not 0 < value < math.inf:
            raise Mistake(f"data {text!r}: weight {value} must be positive and finite")
    if _exists(name):
        return Source(name, weight=value)
    parts = name.split(":")
    if len(parts) > 3:
        raise Mistake(f"data {text!r}: at most name:config:split")
    config = parts[1] if len(parts) == 3 else None
    return Source(parts[0], split=parts[-1] if len(parts) > 1 else None, config=config, weight=value)


def load(source: Source, *, held_out: bool = False) -> Loaded:
    """The rows of a source: of its split, or else of the training (or held-out) split that it has.

    Raises:
      Mistake: there is no such file, folder, reachable hub name or split; or a file is empty, or malformed (with the
        line).
    """
    check_exists(source)
    path = Path(source.name).expanduser()
    if os.path.isdir(path):
        return _pick(source, _load_folder(path), held_out)
    if os.path.exists(path):
        return _pick(source, _by_split_column(_read_file(path), path), held_out)
    return _pick(source, _load_hub(source), held_out)


def load_all(source: Source) -> Sequence[Row]:
    """The rows of a source; without a split, all rows of a file, in their order."""
    path = Path(source.name).expanduser()
    if source.split is None and os.path.isfile(path):
        return _read_file(path)
    return load(source).rows


def check_exists(source: Source) -> None:
    """Raises Mistake if the name can only be that of a local file, and there is none."""
    path = Path(source.name).expanduser()
    local = path.name.endswith(SUFFIXES) or source.name.startswith((".", "/", "~")) or source.name.count("/") > 1
    if local and not os.path.exists(path):
        raise Mistake(f"data file {brief(source.name, 200)} does not exist{_nearby(path)}")


def _nearby(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f": there is no folder {brief(str(path.parent), 200)}"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; {path.parent} has {', '.join(close or names[:5]) or 'nothing'}"


def _pick(source: Source, splits: dict[str | None, Sequence[Row]], held_out: bool) -> Loaded:
    names = [name for name in splits if name is not None]
    if source.split is not None:
        if source.split not in splits:
            raise Mistake(f"{source.name} has no split {source.split!r}; it has {_listed(names) or 'no splits'}")
        return Loaded(splits[source.split], source.split)
    if not names:
        return Loaded([] if held_out else splits[None])
    wanted = HELD_OUT_NAMES if held_out else TRAIN_NAMES
    split = next((name for name in wanted if name in splits), None)
    if split is None and held_out:
        return Loaded([])
    if split is None and len(names) > 1:
        raise Mistake(f"{source.name} has splits {_listed(names)}; choose one: {source.name}:{brief(names[0], 40)}")
    split = split or names[0]
    if None in splits and not held_out:
        log.warning("%s: %d rows are in no split and are not read", source.name, len(splits[None]))
    return Loaded(splits[split], split)


def _listed(names: Sequence[str]) -> str:
    return brief(", ".join(brief(name, 40) for name in names), 400)


def repaired(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which is no character and which no tokenizer accepts."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _by_split_column(rows: Sequence[Row], path: Path) -> Splits:
    if not isinstance(rows[0].get("split"), str):
        return {None: rows}
    splits: dict[str | None, list[Row]] = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("split") or None
        if not isinstance(name, str | None):
            raise Mistake(
                f"data file {path}, row {number}: 'split' is {brief(repr(name))}; it must be a text, as in row 1"
            )
        splits.setdefault(name, []).append(row)
    return dict(splits) if len(splits) > 1 else {None: rows}


def _read_file(path: Path) -> Sequence[Row]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may give bytes for ever, or never
        raise Mistake(f"data {path} is not a regular file; write its rows into one")
    rows = _read_rows(path)
    if not rows:
        raise Mistake(f"data file {path} is empty")
    return rows


def _read_rows(path: Path) -> Sequence[Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return list(_read_jsonl(_text(path), path))
    if name.endswith(".txt"):
        text = _text(path)
        return [{"text": text}] if text.strip() else []
    if name.endswith(".json"):
        return _read_json(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    if name.endswith(".parquet"):
        import pyarrow.parquet
        from datasets import Dataset

        try:
            pyarrow.parquet.read_schema(path)  # raises the error that `datasets` would also log
            return _ArrowRows(cast(Sequence[Row], Dataset.from_parquet(str(path))))
        except Exception as error:  # arrow's errors, under many names
            causes = [error, error.__cause__ or error]  # `datasets` gives the reason in the cause
            reason = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
            raise Mistake(f"data file {path} cannot be read as {path.suffix}: {brief(reason, 200)}") from None
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


def _parse_json(text: str, path: Path, line: int = 1) -> Any:
    """json.loads, which also repairs texts that were cut through an emoji, as "\\ud83d" was. Raises Mistake."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if not re.search(r"\\u[dD][89a-fA-F]", text):
            return value
        return json.loads(repaired(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        at, reason = _deepest(text), "lists or objects are nested too deeply"
    except json.JSONDecodeError as error:
        at, reason = error.pos, f"not JSON ({error.msg})"
    except _TwiceError as error:
        at, reason = _row_with_a_key_twice(text), f"the key {brief(repr(str(error)), 40)} stands twice in an object"
    except ValueError:  # of int()
        digits = sys.get_int_max_str_digits()
        number = re.search(rf"\d{{{digits + 1},}}", text)
        at, reason = number.start() if number else 0, f"a number has more than {digits} digits"
    start = text.rfind("\n", 0, at) + 1
    shown = brief(repr(text[start : start + 60]))
    raise Mistake(f"data file {path}, line {line + text.count(chr(10), 0, at)}: {reason}: {shown}")


class _TwiceError(ValueError):
    """An object has a key twice, of which Python would keep the last value in silence."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for at, name in enumerate(names) if name in names[:at]))
    return value


def _row_with_a_key_twice(text: str) -> int:
    """Index of the first item of the first list of a text that is refused; 0 if it is none of them."""
    decoder, at = json.JSONDecoder(object_pairs_hook=_object), text.find("[") + 1
    while at:
        at = len(text) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            _, at = decoder.raw_decode(text, at)
        except _TwiceError:
            return at
        except ValueError:
            return 0
    return 0


def _deepest(text: str) -> int:
    """Index of the innermost bracket outside texts."""
    depth, deepest, at = 0, 0, 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{}\]]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > deepest:
            deepest, at = depth, match.start()
    return at


def _read_jsonl(text: str, path: Path) -> Iterator[Row]:
    # lines end with \n alone: str.splitlines would also cut at U+2028 and others that JSON strings may contain
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(line, path, number)
        if not isinstance(row, dict):
            raise Mistake(f"data file {path}, line {number}: a {type(row).__name__}, not an object of columns")
        yield row


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    first, _, rest = text.strip().partition("\n")
    if rest and _is_object(first):
        return list(_read_jsonl(text, path))
    rows = _parse_json(text, path)
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
        raise Mistake(f"data file {path} has several lists of rows, {_listed([*rows])}; write each into a file")
    texts = [name for name, item in value.items() if isinstance(item, str)]
    if rows:
        if others := [name for name in value if name not in rows]:
            content = next((name for name in others if name in BEFORE_ROWS and value[name]), None)
            if content is not None:
                raise Mistake(f"data file {path}: {content!r} stands beside the rows; write it into each of them")
            log.info("%s: the rows are in %s; nothing reads %s beside it", path, brief(repr(*rows)), _listed(others))
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
            raise Mistake(f"data file {path} has several columns {_listed(twice)}; rename all but one of each")
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


def _load_folder(path: Path) -> Splits:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError:
        raise Mistake(f"data folder {path} is not a dataset saved with save_to_disk") from None
    except Exception as error:  # of a damaged folder, under many names
        reason = brief(f"{type(error).__name__}: {error}", 200)
        raise Mistake(f"data folder {path} cannot be read: {reason}; save it again") from None
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {None: dataset}
    return {name and str(name): _ArrowRows(cast(Sequence[Row], rows)) for name, rows in splits.items()}


def _load_hub(source: Source) -> Splits:
    from datasets import load_dataset

    unreachable = _go_offline_if_unreachable(source.name)
    try:
        splits = dict(load_dataset(source.name, source.config))
        return {str(name): _ArrowRows(cast(Sequence[Row], rows)) for name, rows in splits.items()}
    except Exception as error:  # the hub client raises under many names
        reason = brief(unreachable or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", 200)
        raise Mistake(
            f"data {brief(source.name, 200)!r} is no local file and could not be fetched from the hub ({reason}). "
            "Check the spelling and the network"
        ) from None


def _go_offline_if_unreachable(name: str) -> str | None:
    """Makes one request to the hub; if it fails, sets the hub's client offline for the rest of this process.

    A client that is not offline retries five times for each file, half a minute in all, before it reads its cache.
    Returns the reason why the hub cannot be reached, or None.
    """
    import datasets.config
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return None  # reached; load_dataset reports the same error
    except Exception as error:  # httpx's connection errors, under many names
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None
