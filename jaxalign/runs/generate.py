"""`jaxalign generate`: answers of a model to prompts from a file or the command line."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign.config.inference import GenerateConfig
from jaxalign.config.limits import check
from jaxalign.data.read import sources
from jaxalign.data.sets import prompts as prompting
from jaxalign.data.sets.prompts import Prompt
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import join
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import load_adapter
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.http import HttpEngine
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import text_after, without_terminator
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from jaxalign.runs import devices
from jaxalign.runs.folder import check_writable
from jaxalign.runs.terminal import sayable, visible
from jaxalign.runs.vocabulary import check_fits
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

SCORED_TOGETHER = 64  # responses, or those to one prompt where they are more; the time limit is for so many


def run(config: GenerateConfig) -> int:
    """Prints the responses, or writes {"prompt", "response", "finished"} lines to --output."""
    check(config)
    if config.keep == "best" and config.reward is None:
        raise Mistake("`keep` best needs `reward`, which says which response is the best")
    if config.output is not None:
        _check_output(config.output)
    devices.start()
    devices.start_log()
    rewards = None if config.reward is None else Rewards(config.reward, seconds=config.reward_seconds)
    prompts, columns = read_rows(config.prompts)
    if rewards is not None:
        rewards.check(prompts, columns, later=["finished"])
    found = respond(
        config.model,
        prompts,
        adapter=config.adapter,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
        n=config.n,
        batch_size=min(config.batch_size, config.n * len(prompts)),
        cache_dtype=None if config.cache_dtype == "auto" else config.cache_dtype,
        seed=config.seed,
        precision=config.precision,
        engine=config.engine,
        engine_kind=config.engine_kind,
    )
    asked = [number // config.n for number in range(len(found))]  # whose response it is
    rows = [
        {"prompt": prompts[i], "response": text, "finished": ended}
        for i, (text, ended) in zip(asked, found, strict=True)
    ]
    if rewards is not None:
        rows = _kept_or_scored(
            rows, rewards, {name: [values[i] for i in asked] for name, values in columns.items()}, config
        )
        if config.keep == "best":
            groups = [rows[at : at + config.n] for at in range(0, len(rows), config.n)]
            rows = [max(group, key=lambda row: row["score"]) for group in groups]
    _tell(rows, config.output)
    return 0


def _kept_or_scored(rows: list[dict], rewards: Rewards, columns: dict[str, list], config: GenerateConfig) -> list[dict]:
    """`_scored`; whatever ends it, the responses are not lost."""
    if config.output is not None:
        _tell(rows, config.output)
    try:
        return _scored(rows, rewards, columns, config.n)
    except RewardError as error:
        if config.output is None:
            _tell(rows, None)
        where = "above" if config.output is None else f"in {config.output}"
        raise RewardError(f"{error}. The {len(rows)} responses are {where}, all without scores") from error


def _scored(rows: list[dict], rewards: Rewards, columns: dict[str, list], n: int) -> list[dict]:
    """The rows with a `score` each; the n responses to a prompt are scored together."""
    size, scored = max(SCORED_TOGETHER // n, 1) * n, []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        said = {name: [row[name] for row in part] for name in ("prompt", "response", "finished")}
        given = {name: values[at : at + size] for name, values in columns.items()}
        try:
            scores = rewards(said["prompt"], said["response"], given | {"finished": said["finished"]})
        except RewardError as error:
            raise RewardError(f"{error} (counted from response {at})" if at else str(error)) from error
        scored += [row | {"score": float(score)} for row, score in zip(part, scores, strict=True)]
    return scored


def _tell(rows: list[dict], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    said = "\n\n".join(
        row["response"] if len(rows) == 1 else f"> {_shown(row['prompt'])}\n{row['response']}" for row in rows
    )
    print((visible if sys.stdout.isatty() else sayable)(said, sys.stdout.encoding))


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n> ".join(f"{m['role']}: {m['content']}" for m in prompt)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise Mistake(f"`output` {path} is a folder; name a .jsonl file")
    check_writable(path.parent)


def read_prompts(text: str) -> list[Prompt]:
    """Prompts of files (`prompt` or `messages` of each row; lines of a .txt), or the text itself."""
    return read_rows(text)[0]


def read_rows(text: str) -> tuple[list[Prompt], dict[str, list[Any]]]:
    """The prompts, and the other columns of their rows, by name."""
    if not _names_data(text):
        return [sources.repaired(text)], {}
    found, others = [], []
    for source in sources.parse(text):
        rows = _rows(source)
        column = next((name for name in ("prompt", "messages") if name in rows[0]), None)
        if column is None:
            raise Mistake(f"{source.name}: rows have {', '.join(rows[0])}; prompts are in `prompt` or `messages`")
        for number, row in enumerate(rows, 1):
            found.append(prompting.checked(row.get(column), f"{source.name}, row {number}", column))
            others.append({name: value for name, value in row.items() if name != column})
    return found, prompting.by_column(others)


def _names_data(text: str) -> bool:
    name = re.sub(r":[\w.-]+$", "", text)  # that of a split
    return name.endswith(sources.SUFFIXES) or (os.sep in name and os.path.exists(name))


def _rows(source: sources.Source) -> Sequence[sources.Row]:
    rows = sources.load_all(source)
    if not source.name.removesuffix(".gz").endswith(".txt"):
        return rows
    lines = rows[0]["text"].split("\n")  # str.splitlines would also cut at U+2028 and others that lines may hold
    return [{"prompt": line.removesuffix("\r")} for line in lines if line.strip()]


def respond(
    model: str,
    prompts: Sequence[Prompt],
    *,
    adapter: Path | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    n: int = 1,
    batch_size: int = 16,
    cache_dtype: str | None = None,
    seed: int = 0,
    precision: str = "auto",
    engine: str | None = None,
    engine_kind: str = "vllm",
) -> list[tuple[str, bool]]:
    """(response, whether it ended by itself), n for each prompt in turn. Texts are continued, messages are answered.

    With the address of an engine its server answers, with what it serves; of the model only the tokenizer is used.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise Mistake(
            f"temperature={temperature} must be at least 0, top_p={top_p} in (0, 1], top_k={top_k} at least 0 and "
            f"max_new_tokens={max_new_tokens} at least 1"
        )
    if huggingface.is_random(model):
        raise Mistake(f"`model` {model} has random weights, which answer nothing; name a folder with *.safetensors")
    config = huggingface.read_config(model)
    tokenizer = huggingface.load_tokenizer(model)
    check_fits(tokenizer, config, model)
    ids = [prompting.encode(prompt, tokenizer, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    _check_lengths(ids, max_new_tokens, config, model)
    sampling = Sampling(
        max_new_tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        terminators=huggingface.terminators(model, tokenizer),
        stop=tuple(stop),
    )
    in_context = functools.partial(text_after, tokenizer)
    if engine is None:
        graphdef, params = load_model(model, config, adapter, precision)
        draws = LocalEngine(graphdef, slots=batch_size, cache_dtype=cache_dtype, decode_text=in_context)
    elif adapter is not None:
        raise Mistake(f"`adapter` {adapter} would be loaded here, and `engine` answers elsewhere: serve it there")
    else:
        draws, params = HttpEngine(engine, kind=engine_kind, concurrency=batch_size), None
    requests = [Request(tuple(prompt), n * row + sample) for row, prompt in enumerate(ids) for sample in range(n)]
    found = draws.generate(params, requests, jax.random.key(seed), sampling=sampling)
    # what continues a text is read with it; what answers messages is a text of its own
    before = [row if isinstance(prompt, str) else () for prompt, row in zip(prompts, ids, strict=True)]
    return [
        (in_context(before[number // n], without_terminator(response.tokens, sampling)), response.finished)
        for number, response in enumerate(found)
    ]


def load_model(model: str, config: ModelConfig, adapter: Path | None, precision: str) -> tuple[Any, PyTree]:
    """(graphdef, params) of a model in the dtype of compute, with an adapter's leaves beside the base's."""
    dtype = devices.compute_dtype(precision)
    lora, adapted = (None, None) if adapter is None else load_adapter(adapter, config)
    graphdef, _ = make_decoder(config, compute_dtype=dtype, param_dtype=dtype, lora=lora)
    params = load_params(model, config, param_dtype=dtype)
    return graphdef, params if adapted is None else join(jax.device_put(adapted), params)


def _check_lengths(ids: list[list[int]], max_new_tokens: int, config: ModelConfig, model: str) -> None:
    """Raises Mistake on an empty prompt, or one that leaves no room in learned positions; warns beyond others."""
    if [] in ids:
        raise Mistake(f"prompt {ids.index([]) + 1} has no tokens, so there is nothing to continue")
    longest = max(map(len, ids))
    said = f"the longest prompt has {longest} tokens, which with `max_new_tokens` {max_new_tokens} is more than the"
    if config.learned_positions and longest + max_new_tokens > config.learned_positions:
        raise Mistake(f"{said} {config.learned_positions} positions of {model}; shorten the one or lower the other")
    if longest + max_new_tokens > config.max_length:
        log.warning("%s %d that %s was made for", said, config.max_length, model)
