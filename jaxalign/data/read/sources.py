"""Rows of `data`: files, folders and hub names, mixed by weight.

stories.jsonl.gz                 a file: .jsonl .json .csv .parquet .txt, the text ones also .gz
stories.jsonl.gz:train           its rows whose column `split` is "train"
name  name:split  name:config:split      a set on the Hugging Face hub
a.jsonl*0.7,b.jsonl*0.3          a mixture; without weights every row counts once

The name of an existing file may contain colons, commas and stars.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from jaxalign.data.read import arrow
from jaxalign.data.read.arrow import Splits
from jaxalign.data.read.files import SUFFIXES, listed, read_file
from jaxalign.data.read.json_rows import Row
from jaxalign.mistake import Mistake
from jaxalign.outside import brief, check_local

log = logging.getLogger(__name__)

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "validation", "valid", "val", "held", "heldout", "dev", "eval")


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
        return _pick(source, arrow.load_folder(path), held_out)
    if os.path.exists(path):
        return _pick(source, _by_split_column(read_file(path), path), held_out)
    return _pick(source, arrow.load_hub(source.name, source.config), held_out)


def load_all(source: Source) -> Sequence[Row]:
    """The rows of a source; without a split, all rows of a file, in their order."""
    path = Path(source.name).expanduser()
    if source.split is None and os.path.isfile(path):
        return read_file(path)
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
            raise Mistake(f"{source.name} has no split {source.split!r}; it has {listed(names) or 'no splits'}")
        return Loaded(splits[source.split], source.split)
    if not names:
        return Loaded([] if held_out else splits[None])
    wanted = HELD_OUT_NAMES if held_out else TRAIN_NAMES
    split = next((name for name in wanted if name in splits), None)
    if split is None and held_out:
        return Loaded([])
    if split is None and len(names) > 1:
        raise Mistake(f"{source.name} has splits {listed(names)}; choose one: {source.name}:{brief(names[0], 40)}")
    split = split or names[0]
    if None in splits and not held_out:
        log.warning("%s: %d rows are in no split and are not read", source.name, len(splits[None]))
    return Loaded(splits[split], split)


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
