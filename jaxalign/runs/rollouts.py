"""Where on-policy commands get their batches: prompts are answered by the policy as it is, and the answers rewarded."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.config.on_policy import RolloutConfig
from jaxalign.data.batches.rows import bucket_widths
from jaxalign.data.sets import prompts as prompting
from jaxalign.data.sets.prompts import PromptBatches, Prompts
from jaxalign.mistake import Mistake
from jaxalign.models.files import huggingface
from jaxalign.rollout import scored
from jaxalign.rollout.engine.engine import Request, Response, Stats
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import text_after, without_terminator
from jaxalign.rollout.rewards import on_hosts
from jaxalign.rollout.rewards.rewards import Rewards
from jaxalign.rollout.scored import Drawn
from jaxalign.runs import engines, train
from jaxalign.runs.program import Method, Program
from jaxalign.runs.terminal import visible
from jaxalign.training import loop
from jaxalign.training.metrics import JsonLines
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

SHOWN = 96  # characters of a response on the screen; samples.jsonl has it whole


@dataclasses.dataclass(frozen=True)
class Judged:
    """The responses of a step, those to one prompt side by side.

    With dynamic sampling they are to fewer prompts than --batch-size where not enough were found.
    """

    step: int
    prompts: list[tuple[int, ...]]
    responses: list[Response]
    scores: np.ndarray  # Float32[N]
    width: int  # tokens of the rows that hold prompt and response
    rows: int  # of the batch, one for each response of all --batch-size prompts, or some more
    terms: dict[str, np.ndarray]  # Float64[N], of each reward function


# (the responses of a step) -> (what an update learns from, what is said of it)
BatchFn = Callable[[Judged], tuple[Any, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an on-policy run needs besides a model: prompts, the order of them, and what rewards the answers."""

    prompts: Prompts
    rewards: Rewards
    batches: PromptBatches


def sampling_of(config: RolloutConfig, terminators: tuple[int, ...] = ()) -> Sampling:
    """How the responses are drawn."""
    return Sampling(
        config.max_new_tokens,
        config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        terminators=terminators,
    )


def gather(config: RolloutConfig, starts: bool, *, own_tokens: bool = True) -> tuple[train.Base, Asked]:
    """Everything that can be wrong is found: ValueError.

    Args:
      own_tokens: the loss takes every token for one that the policy itself drew, so sampling must not cut any off.
    """
    rewards = Rewards(config.reward, seconds=config.reward_seconds)
    _check(config)
    if own_tokens and sampling_of(config).truncates:
        raise Mistake(
            "`top_p`, `top_k` and `min_p` draw tokens from another distribution than the policy's, and the loss of "
            "this command takes them for the policy's own; leave them out, or use jaxalign grpo, which weighs tokens"
        )
    base = train.load_base(config, starts=starts)
    prompts = prompting.load(
        config.data,
        base.vocabulary.tokenizer,
        max_length=config.max_length - config.max_new_tokens,
        max_dropped=config.max_dropped,
        as_chat=config.as_chat,
    )
    rewards.check(prompts.given, prompts.columns, later=["finished", "tokens"])
    if starts:
        engines.check_server(config)
    batches = PromptBatches(len(prompts), config.batch_size, steps=1, shuffle=config.shuffle, seed=config.seed)
    batches.steps = train.count_steps(config, len(prompts) / config.batch_size)
    return base, Asked(prompts, rewards, batches)


def _check(config: RolloutConfig) -> None:
    rows, algorithm = config.batch_size * config.n, config.algorithm
    if huggingface.is_random(config.model):
        raise Mistake(f"`model` {config.model}: random weights say nothing to be rewarded; train them first")
    if config.max_new_tokens >= config.max_length:
        raise Mistake(
            f"`max_new_tokens` {config.max_new_tokens} leaves no room for a prompt in `max_length` {config.max_length}"
        )
    if config.temperature == 0:
        raise Mistake("`temperature` 0: greedy responses are all alike, so there is nothing to learn from them")
    parts = algorithm.minibatches * config.microbatches
    if rows % parts:
        raise Mistake(
            f"{config.batch_size} prompts x {config.n} responses = {rows} rows cannot be cut into "
            f"`algorithm.minibatches` {algorithm.minibatches} x `microbatches` {config.microbatches}"
        )
    if config.offload_reference and config.lora.rank:
        raise Mistake(
            f"`offload_reference` with `lora.rank` {config.lora.rank}: the reference is the base that the adapters are "
            "on, which every update needs; `lora.quantise` makes it small"
        )
    if config.check_kernels:
        raise Mistake("`check_kernels` compares on the first batch, which is not made yet; check with jaxalign sft")
    if jax.process_count() > 1 and config.engine is not None:
        raise Mistake(f"`engine` serves a run on one host so far, not on {jax.process_count()}")
    if config.eval_data is not None:
        raise Mistake("`eval_data`: rewards of the training prompts are new at every step; there is no held-out loss")
    if config.eval_share not in (0, type(config).eval_share):
        raise Mistake(
            f"`eval_share` {config.eval_share}: no prompts are held out, as rewards are new at every step; leave it out"
        )
    if config.checkpoint.keep_best:
        raise Mistake(
            f"`checkpoint.keep_best` {config.checkpoint.keep_best}: there is no held-out loss to be the best by; "
            "`checkpoint.keep` says how many of the newest checkpoints stay"
        )


def count_rows(config: RolloutConfig, mesh: Mesh) -> int:
    """Rows of a batch: a response each, filled up so that devices, minibatches and microbatches get equally many."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.microbatches * config.algorithm.minibatches
    return -(-config.batch_size * config.n // unit) * unit


def kl_budget(config: RolloutConfig) -> Callable[[loop.Row], str | None]:
    """Why a step's row ends the run: its policy is further from the reference than --kl-budget."""

    def enough(row: loop.Row) -> str | None:
        if config.kl_budget is None or row["kl"] <= config.kl_budget:
            return None
        return f"its responses are {row['kl']:.3g} nats from the reference, beyond `kl_budget` {config.kl_budget:g}"

    return enough


class Rollouts:
    """state -> (a batch of its policy's responses, what is said of how they were made).

    Several hosts take every step of generation together, know all responses, and take their rows of the batch.
    """

    def __init__(
        self,
        config: RolloutConfig,
        task: train.Task,
        program: Program,
        frozen: Any,
        numbers: Iterator[np.ndarray],
        resumed_at: int,
        *,
        asked: Asked,
        batch_of: BatchFn,
        policy_of: Callable[[PyTree], PyTree] = lambda params: params,
        rounds: int = 0,
    ):
        """
        Args:
          numbers: of the prompts of each step.
          batch_of: makes what an update learns from, and what is said of it.
          policy_of: the policy's params among those that the algorithm assembles.
          rounds: of generation at most, by dynamic sampling, in a step; 0: the prompts are taken as they come.
        """
        self._config, self._prompts, self._rewards, self._rounds = config, asked.prompts, asked.rewards, rounds
        self._vocabulary, self._numbers, self._batch_of = task.base.vocabulary, numbers, batch_of
        self._policy = lambda state: policy_of(program.algorithm.assemble(state.params, frozen))
        self._sampling = sampling_of(config, task.base.vocabulary.terminators)
        devices = task.base.mesh.shape["data"] * task.base.mesh.shape["fsdp"]
        longest = max(map(len, asked.prompts.ids))
        self._engine = engines.make_engine(config, task.base, program, ways=devices, prompt_room=longest)
        self._rows = count_rows(config, task.base.mesh)
        path = Path(config.output) / "samples.jsonl"
        self._samples = JsonLines(path, keep_until=resumed_at - 1) if jax.process_index() == 0 else None

    def __call__(self, state: TrainState) -> tuple[Any, dict[str, float]]:
        config, step, chosen = self._config, int(state.step), next(self._numbers)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), step)
        policy, spent = self._policy(state), _Spent()
        draw = lambda numbers, before: self._draw(policy, numbers, before, key, spent)  # noqa: E731
        if self._rounds:
            others = scored.stand_ins(len(self._prompts), chosen, seed=config.seed, step=step)
            drawn, said = scored.fill(draw, chosen, others, n=config.n, rounds=self._rounds)
        else:
            drawn, said = draw(chosen, 0), {}
        self._write_samples(step, drawn)
        said |= {f"rewards/{name}": float(scores.mean()) for name, scores in drawn.terms.items()}
        prompts = [self._prompts.ids[i] for i in drawn.prompts]
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, drawn.responses, strict=True))
        width = next(w for w in bucket_widths(config.max_length) if w >= longest)
        batch, more = self._batch_of(
            Judged(step, prompts, drawn.responses, drawn.scores, width, self._rows, drawn.terms)
        )
        return hosts.share(batch), said | more | spent.said()

    def _draw(self, policy: PyTree, numbers: np.ndarray, before: int, key: jax.Array, spent: _Spent) -> Drawn:
        """--n responses to each of the prompts, rewarded; `before` of this step were drawn already."""
        chosen = np.repeat(numbers, self._config.n)
        requests = [Request(self._prompts.ids[i], before + k) for k, i in enumerate(chosen)]
        responses = self._engine.generate(policy, requests, key, sampling=self._sampling)
        texts = [self._text(i, response) for i, response in zip(chosen, responses, strict=True)]
        began = time.perf_counter()
        scores, terms = self._score(chosen, responses, texts)
        spent.add(self._engine.stats, time.perf_counter() - began)
        return Drawn(chosen, responses, texts, scores, terms)

    def _score(
        self, chosen: np.ndarray, responses: list[Response], texts: list[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(Float32[N], the scores of each reward function by its name)"""
        config = self._config
        columns = {name: [values[i] for i in chosen] for name, values in self._prompts.columns.items()}
        finished, tokens = (
            list(values) for values in zip(*((r.finished, len(r.tokens)) for r in responses), strict=True)
        )
        columns |= {"finished": finished, "tokens": tokens}
        terms = on_hosts.by_name(self._rewards, [self._prompts.given[i] for i in chosen], texts, columns)
        scores = self._rewards.summed(terms)
        if config.reward_clip is not None:
            scores = np.clip(scores, -config.reward_clip, config.reward_clip)
        if config.missing_end_penalty:
            scores = scores - config.missing_end_penalty * ~np.array(finished)
        if config.length_penalty:
            scores = scores - config.length_penalty * np.array(tokens)
        return scores.astype(np.float32), terms

    def _text(self, number: int, response: Response) -> str:
        """What continues a text is read with it; what answers messages is a text of its own."""
        continues = isinstance(self._prompts.given[number], str) and not self._config.as_chat
        before = self._prompts.ids[number] if continues else ()
        return text_after(self._vocabulary.tokenizer, before, without_terminator(response.tokens, self._sampling))

    def _write_samples(self, step: int, drawn: Drawn) -> None:
        """The first responses of a few prompts, every --eval-every steps and at the first."""
        config = self._config
        if self._samples is None or (step and (config.eval_every == 0 or step % config.eval_every)):
            return
        shown = []
        for row in range(0, min(config.samples * config.n, len(drawn.texts)), config.n):
            line = {"step": step, "prompt": self._prompts.given[drawn.prompts[row]], "response": drawn.texts[row]}
            self._samples.write(line | {"score": float(drawn.scores[row])})
            shown.append(f"{drawn.scores[row]:8.3g}  {_in_one_line(drawn.texts[row])}")
        if shown:
            log.info("samples of step %d, a score and how the response begins:\n%s", step, "\n".join(shown))


def _in_one_line(text: str) -> str:
    """The beginning of a text, with nothing that a terminal would obey."""
    return visible(" ".join(text[:SHOWN].split()))


class _Spent:
    """What the rounds of a step took."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._scoring = 0.0, 0, 0.0

    def add(self, stats: Stats, scoring: float) -> None:
        self._seconds += stats.seconds
        self._tokens += stats.tokens
        self._scoring += scoring

    def said(self) -> dict[str, float]:
        return {
            "generation_seconds": self._seconds,
            "generated_tokens_per_second": self._tokens / self._seconds,
            "reward_seconds": self._scoring,
        }


def task_of(
    config: RolloutConfig,
    base: train.Base,
    asked: Asked,
    method: Method,
    batch_of: BatchFn,
    *,
    fingerprint: int = 0,
    export: Callable[[train.Task, TrainState, Any], None] = train.export_language_model,
    **more: Any,
) -> train.Task:
    """The run of an on-policy command.

    Args:
      batch_of: makes what an update learns from, and what is said of it.
      fingerprint: of data besides the prompts.
      more: options of Rollouts.
    """

    def source(task: train.Task, program: Program, frozen: Any, numbers: Iterator, resumed_at: int) -> Rollouts:
        return Rollouts(config, task, program, frozen, numbers, resumed_at, asked=asked, batch_of=batch_of, **more)

    return train.Task(
        config,
        base,
        method,
        asked.batches,
        held_out=[],
        shapes=len(bucket_widths(config.max_length)),
        fingerprint=asked.prompts.fingerprint() ^ fingerprint,
        prompts=[],
        export=export,
        source=source,
        enough=kl_budget(config),
    )
