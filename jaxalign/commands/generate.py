"""`jaxalign generate`: responses of a model to prompts from a file or the command line."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxalign.config.inference import GenerateConfig
from jaxalign.config.limits import check
from jaxalign.data.read import sources
from jaxalign.data.read.json_rows import repaired
from jaxalign.data.sets import prompts as prompting
from jaxalign.data.sets.prompts import Prompt
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.outside import brief, sayable, visible
from jaxalign.rollout.engine.http import HttpEngine
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import encode_prompts, load_tokenizer_only, respond, with_params
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from jaxalign.run import devices
from jaxalign.run.folder import check_writable

log = logging.getLogger(__name__)

SCORED_TOGETHER = 64  # responses, or those to one prompt where they are more; the time limit is for so many


def main(config: GenerateConfig) -> int:
    """Prints the responses, or writes {"prompt", "response", "finished"} lines to `output`.

    Whatever ends it early, Ctrl-C included, the responses that are finished by then are printed or written.
    """
    _check(config)
    devices.start()
    devices.start_log()
    rewards = None if config.reward is None else Rewards(config.reward, seconds=config.reward_seconds)
    prompts, columns = read_rows(config.prompts, *(() if rewards is None else (rewards.reads,)))
    prompts = [prompting.settled(p, f"prompt {number}", config.last_turn) for number, p in enumerate(prompts, 1)]
    if rewards is not None:
        rewards.check(prompts, columns, later=["finished"])
    model = load_tokenizer_only(config.model, config.adapter)
    sampling = Sampling.of(config, model.terminators, config.stop)
    encode_prompts(model, prompts, sampling, last_turn=config.last_turn)
    count = config.n * len(prompts)
    batch_size, engine = min(config.batch_size, count), None
    if config.engine is None:
        mesh = places.inference_mesh(model.config.num_kv_heads, **dataclasses.asdict(config.mesh))
        model = with_params(model, adapter=config.adapter, dtype=compute_dtype(config.precision), mesh=mesh)
    else:
        engine = HttpEngine(
            config.engine, kind=config.engine_kind, vocabulary=model.config.vocab_size, concurrency=batch_size
        )
    finished: dict[int, tuple[str, bool]] = {}
    try:
        responses = respond(
            model,
            prompts,
            sampling,
            n=config.n,
            batch_size=batch_size,
            seed=config.seed,
            cache_dtype=None if config.cache_dtype == "auto" else config.cache_dtype,
            engine=engine,
            on_response=finished.__setitem__,
            last_turn=config.last_turn,
        )
    except BaseException:
        if finished:
            _write(_rows_of(prompts, finished, config.n), config.output)
            log.warning("%d of %d responses were finished; they are %s", len(finished), count, _place(config))
        raise
    rows = _rows_of(prompts, dict(enumerate(responses)), config.n)
    if rewards is not None:
        columns = {name: [value for value in values for _ in range(config.n)] for name, values in columns.items()}
        rows = _scored_or_saved(rows, rewards, columns, config)
        if config.keep == "best":
            groups = [rows[at : at + config.n] for at in range(0, len(rows), config.n)]
            rows = [max(group, key=lambda row: row["score"]) for group in groups]
    _write(rows, config.output)
    return 0


def _check(config: GenerateConfig) -> None:
    check(config)
    if config.adapter is not None and config.engine is not None:
        raise Mistake(
            f"`adapter` {config.adapter} would be loaded here, and `engine` responds elsewhere: serve it there"
        )
    if config.output is not None:
        _check_output(config.output)


def _scored_or_saved(
    rows: list[dict], rewards: Rewards, columns: dict[str, list], config: GenerateConfig
) -> list[dict]:
    """The rows with scores; where scoring fails, they are written without, so that no response is lost."""
    if config.output is not None:
        _write(rows, config.output)
    try:
        return scored(rows, rewards, columns, config.n)
    except BaseException as error:
        if config.output is None:
            _write(rows, None)
        unscored = f"The {len(rows)} responses are {_place(config)}, all without scores"
        if isinstance(error, RewardError):
            raise RewardError(f"{error}. {unscored}") from error
        log.warning("%s", unscored)
        raise


def scored(rows: list[dict], rewards: Rewards, columns: dict[str, list], n: int) -> list[dict]:
    """The rows with a `score` each; the n responses to a prompt are scored together."""
    size, scored = max(SCORED_TOGETHER // n, 1) * n, []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        texts = {name: [row[name] for row in part] for name in ("prompt", "response", "finished")}
        part_columns = {name: values[at : at + size] for name, values in columns.items()}
        try:
            scores = rewards(texts["prompt"], texts["response"], part_columns | {"finished": texts["finished"]})
        except RewardError as error:
            raise RewardError(f"{error} (counted from response {at})" if at else str(error)) from error
        scored += [row | {"score": float(score)} for row, score in zip(part, scores, strict=True)]
    return scored


def _rows_of(prompts: Sequence[Prompt], responses: dict[int, tuple[str, bool]], n: int) -> list[dict]:
    """Rows in the order of the prompts; n responses, by their number, belong to each."""
    return [
        {"prompt": prompts[number // n], "response": text, "finished": ended}
        for number, (text, ended) in sorted(responses.items())
    ]


def _place(config: GenerateConfig) -> str:
    return "above" if config.output is None else f"in {config.output}"


def _write(rows: list[dict], output: Path | None) -> None:
    """Prints the rows, or writes them to a file, whole or not at all; those of a full disk are printed."""
    if output is not None:
        try:
            with _partial(output).open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            os.replace(_partial(output), output)
            return
        except OSError as error:
            _partial(output).unlink(missing_ok=True)
            _write(rows, None)
            raise Mistake(f"`output` {output} cannot be written ({error.strerror}); the responses are above") from None
    text = "\n\n".join(_shown_row(row, alone=len(rows) == 1) for row in rows)
    print((visible if sys.stdout.isatty() else sayable)(text, sys.stdout.encoding))


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _shown_row(row: dict, *, alone: bool) -> str:
    prompt = "" if alone else f"> {_shown(row['prompt'])}\n"
    score = f"\n(score {row['score']:.6g})" if "score" in row else ""
    return prompt + row["response"] + score


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n> ".join(f"{m['role']}: {m['content']}" for m in prompt)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise Mistake(f"`output` {path} is a folder; name a .jsonl file")
    if os.path.lexists(path):
        raise Mistake(f"`output` {path} exists already; name another file, or move that one away")
    check_writable(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise Mistake(f"`output` {path} cannot be written ({error.strerror}); name another place") from None


def read_rows(
    text: str, elsewhere: Callable[[str], bool] = lambda column: False
) -> tuple[list[Prompt], dict[str, list[Any]]]:
    """The prompts, and the other columns of their rows, by name.

    Args:
      text: names of files, or a prompt.
      elsewhere: True for a column that a reward reads.
    """
    if not _names_data(text):
        return [repaired(text)], {}
    prompts, others = [], []
    for source in sources.parse_unweighted(text, "prompts"):
        part, _, columns = prompting.read(_rows(source), source.name, elsewhere=elsewhere)
        prompts += part
        others += columns
    return prompts, prompting.by_column(others)


def _names_data(text: str) -> bool:
    """True for names of files. Such a name has no blank, and a file's ending or a separator of folders.

    A name with a blank is one of a file only if there is this file. Raises Mistake where a name is that of no file.
    """
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    names = [re.sub(r"\*[\d.e+-]+$", "", part) for part in parts]  # without a weight
    names = [name if os.path.exists(name) else re.sub(r":[\w.-]+$", "", name) for name in names]  # without a split
    there = [os.path.exists(os.path.expanduser(name)) for name in names]
    for name, is_there in zip(names, there, strict=True):
        if not (name.endswith(sources.SUFFIXES) or os.sep in name) or (re.search(r"\s", name) and not is_there):
            return False
    for name, is_there in zip(names, there, strict=True):
        if not is_there and not name.endswith(sources.SUFFIXES):  # of those with an ending `sources` names the alike
            raise Mistake(
                f"`prompts` {brief(name)} has no blank and a {os.sep!r}, as a file's name has, and there is no such "
                "file; to ask exactly this, write it into a .txt file"
            )
    return True


def _rows(source: sources.Source) -> Sequence[sources.Row]:
    rows = sources.load_all(source)
    if not source.name.removesuffix(".gz").endswith(".txt"):
        return rows
    lines = rows[0]["text"].split("\n")  # str.splitlines would also cut at U+2028 and others that lines may hold
    return [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]
