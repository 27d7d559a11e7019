"""`jaxalign generate`: responses of a model to prompts from a file or the command line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.config.inference import GenerateConfig
from jaxalign.config.limits import check
from jaxalign.data.read import sources
from jaxalign.data.sets import prompts as prompting
from jaxalign.data.sets.prompts import Prompt
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.outside import sayable, visible
from jaxalign.rollout.engine.http import HttpEngine
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import encode_prompts, load_tokenizer_only, respond, with_params
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from jaxalign.run import devices
from jaxalign.run.folder import check_writable

log = logging.getLogger(__name__)

SCORED_TOGETHER = 64  # responses, or those to one prompt where they are more; the time limit is for so many


def main(config: GenerateConfig) -> int:
    """Prints the responses, or writes {"prompt", "response", "finished"} lines to `output`."""
    _check(config)
    devices.start()
    devices.start_log()
    rewards = None if config.reward is None else Rewards(config.reward, seconds=config.reward_seconds)
    prompts, columns = read_rows(config.prompts)
    if rewards is not None:
        rewards.check(prompts, columns, later=["finished"])
    model = load_tokenizer_only(config.model)
    sampling = Sampling.of(config, model.terminators, config.stop)
    encode_prompts(model, prompts, sampling)
    batch_size, engine = min(config.batch_size, config.n * len(prompts)), None
    if config.engine is None:
        model = with_params(model, adapter=config.adapter, dtype=compute_dtype(config.precision))
    else:
        engine = HttpEngine(config.engine, kind=config.engine_kind, concurrency=batch_size)
    responses = respond(
        model,
        prompts,
        sampling,
        n=config.n,
        batch_size=batch_size,
        seed=config.seed,
        cache_dtype=None if config.cache_dtype == "auto" else config.cache_dtype,
        engine=engine,
    )
    prompt_of = [number // config.n for number in range(len(responses))]
    rows = [
        {"prompt": prompts[i], "response": text, "finished": ended}
        for i, (text, ended) in zip(prompt_of, responses, strict=True)
    ]
    if rewards is not None:
        columns = {name: [values[i] for i in prompt_of] for name, values in columns.items()}
        rows = _scored_or_saved(rows, rewards, columns, config)
        if config.keep == "best":
            groups = [rows[at : at + config.n] for at in range(0, len(rows), config.n)]
            rows = [max(group, key=lambda row: row["score"]) for group in groups]
    _write(rows, config.output)
    return 0


def _check(config: GenerateConfig) -> None:
    check(config)
    if config.keep == "best" and config.reward is None:
        raise Mistake("`keep` best needs `reward`, which says which response is the best")
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
    except RewardError as error:
        if config.output is None:
            _write(rows, None)
        where = "above" if config.output is None else f"in {config.output}"
        raise RewardError(f"{error}. The {len(rows)} responses are {where}, all without scores") from error


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


def _write(rows: list[dict], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    text = "\n\n".join(
        row["response"] if len(rows) == 1 else f"> {_shown(row['prompt'])}\n{row['response']}" for row in rows
    )
    print((visible if sys.stdout.isatty() else sayable)(text, sys.stdout.encoding))


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n> ".join(f"{m['role']}: {m['content']}" for m in prompt)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise Mistake(f"`output` {path} is a folder; name a .jsonl file")
    check_writable(path.parent)


def read_rows(text: str) -> tuple[list[Prompt], dict[str, list[Any]]]:
    """The prompts, and the other columns of their rows, by name."""
    if not _names_data(text):
        return [sources.repaired(text)], {}
    prompts, others = [], []
    for source in sources.parse(text):
        rows = _rows(source)
        column = next((name for name in ("prompt", "messages") if name in rows[0]), None)
        if column is None:
            raise Mistake(f"{source.name}: rows have {', '.join(rows[0])}; prompts are in `prompt` or `messages`")
        for number, row in enumerate(rows, 1):
            prompts.append(prompting.as_prompt(row.get(column), f"{source.name}, row {number}", column))
            others.append({name: value for name, value in row.items() if name != column})
    return prompts, prompting.by_column(others)


def _names_data(text: str) -> bool:
    name = re.sub(r":[\w.-]+$", "", text)  # that of a split
    return name.endswith(sources.SUFFIXES) or (os.sep in name and os.path.exists(name))


def _rows(source: sources.Source) -> Sequence[sources.Row]:
    rows = sources.load_all(source)
    if not source.name.removesuffix(".gz").endswith(".txt"):
        return rows
    lines = rows[0]["text"].split("\n")  # str.splitlines would also cut at U+2028 and others that lines may hold
    return [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]
