"""Where on-policy commands get their batches: prompts are answered by the policy as it is, and the answers rewarded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data import prompts as prompting
from jaxalign.data.batches import bucket_widths
from jaxalign.data.prompts import PromptBatches, Prompts
from jaxalign.models import huggingface
from jaxalign.rollout.engine import LocalEngine, Request, Response
from jaxalign.rollout.generate import without_terminator
from jaxalign.rollout.rewards import Rewards
from jaxalign.rollout.slots import Sampling
from jaxalign.runs import train
from jaxalign.runs.program import Program
from jaxalign.runs.rl_config import RolloutConfig
from jaxalign.training import loop
from jaxalign.training.metrics import JsonLines
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree, RolloutBatch


@dataclasses.dataclass(frozen=True)
class Judged:
    """The responses of a step, those to one prompt side by side."""

    step: int
    prompts: list[tuple[int, ...]]
    responses: list[Response]
    scores: np.ndarray  # Float32[N]
    width: int  # tokens of the rows that hold prompt and response
    rows: int  # of the batch, N or some more


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an on-policy run needs besides a model: prompts, the order of them, and what rewards the answers."""

    prompts: Prompts
    rewards: Rewards
    batches: PromptBatches


def gather(config: RolloutConfig, starts: bool) -> tuple[train.Base, Asked]:
    """Everything that can be wrong is found: ValueError."""
    rewards = Rewards(config.reward, seconds=config.reward_seconds)
    _check(config)
    base = train.load_base(config, starts=starts)
    prompts = prompting.load(
        config.data,
        base.vocabulary.tokenizer,
        max_length=config.max_length - config.max_new_tokens,
        max_dropped=config.max_dropped,
        as_chat=config.as_chat,
    )
    rewards.check(list(prompts.columns))
    batches = PromptBatches(len(prompts), config.batch_size, steps=1, shuffle=config.shuffle, seed=config.seed)
    batches.steps = train.count_steps(config, len(prompts) / config.batch_size)
    return base, Asked(prompts, rewards, batches)


def _check(config: RolloutConfig) -> None:
    rows, algorithm = config.batch_size * config.n, config.algorithm
    if huggingface.is_random(config.model):
        raise ValueError(f"--model {config.model}: random weights say nothing to be rewarded; train them first")
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in --max-length {config.max_length}"
        )
    if config.temperature == 0:
        raise ValueError("--temperature 0: greedy responses are all alike, so there is nothing to learn from them")
    parts = algorithm.minibatches * config.microbatches
    if rows % parts:
        raise ValueError(
            f"{config.batch_size} prompts x {config.n} responses = {rows} rows cannot be cut into "
            f"--algorithm.minibatches {algorithm.minibatches} x --microbatches {config.microbatches}"
        )
    if config.offload_reference and config.lora.rank:
        raise ValueError(
            f"--offload-reference with --lora.rank {config.lora.rank}: the reference is the base that the adapters are "
            "on, which every update needs; --lora.quantise makes it small"
        )
    if config.check_kernels:
        raise ValueError("--check-kernels compares on the first batch, which is not made yet; check with jaxalign sft")
    if jax.process_count() > 1:
        raise ValueError(f"jaxalign generates on one host so far, not on {jax.process_count()}")
    if config.eval_data is not None:
        raise ValueError(
            "--eval-data: rewards of the training prompts are new at every step; there is no held-out loss"
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
        return f"its responses are {row['kl']:.3g} nats from the reference, beyond --kl-budget {config.kl_budget:g}"

    return enough


class Rollouts:
    """state -> (a batch of its policy's responses, what is said of how they were made)."""

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
        batch_of: Callable[[Judged], tuple[RolloutBatch, dict[str, float]]],
        policy_of: Callable[[PyTree], PyTree] = lambda params: params,
    ):
        """
        Args:
          numbers: of the prompts of each step.
          batch_of: makes what an update learns from, and what is said of it.
          policy_of: the policy's params among those that the algorithm assembles.
        """
        self._config, self._prompts, self._rewards = config, asked.prompts, asked.rewards
        self._vocabulary, self._numbers, self._batch_of = task.base.vocabulary, numbers, batch_of
        self._policy = lambda state: policy_of(program.algorithm.assemble(state.params, frozen))
        self._sampling = Sampling(
            config.max_new_tokens, config.temperature, terminators=task.base.vocabulary.terminators
        )
        rows = config.batch_size * config.n
        devices = task.base.mesh.shape["data"] * task.base.mesh.shape["fsdp"]
        slots = min(config.slots, rows)
        self._engine = LocalEngine(
            program.graphdef,
            slots=-(-slots // devices) * devices,
            prompt_room=max(map(len, asked.prompts.ids)),
            layout=config.decode_layout,
        )
        self._rows = count_rows(config, task.base.mesh)
        self._samples = JsonLines(Path(config.output) / "samples.jsonl", keep_until=resumed_at - 1)

    def __call__(self, state: TrainState) -> tuple[RolloutBatch, dict[str, float]]:
        config, step = self._config, int(state.step)
        chosen = np.repeat(next(self._numbers), config.n)
        prompts = [self._prompts.ids[i] for i in chosen]
        requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), step)
        responses = self._engine.generate(self._policy(state), requests, key, sampling=self._sampling)
        texts = [self._text(response) for response in responses]
        began = time.perf_counter()
        scores = self._score(chosen, responses, texts)
        scoring = time.perf_counter() - began
        self._write_samples(step, chosen, texts, scores)
        stats = self._engine.stats
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, responses, strict=True))
        width = next(w for w in bucket_widths(config.max_length) if w >= longest)
        batch, said = self._batch_of(Judged(step, prompts, responses, scores, width, self._rows))
        said |= {
            "generation_seconds": stats.seconds,
            "generated_tokens_per_second": stats.tokens / stats.seconds,
            "reward_seconds": scoring,
        }
        return batch, said

    def _score(self, chosen: np.ndarray, responses: list[Response], texts: list[str]) -> np.ndarray:
        config = self._config
        columns = {name: [values[i] for i in chosen] for name, values in self._prompts.columns.items()}
        finished = [response.finished for response in responses]
        scores = self._rewards([self._prompts.given[i] for i in chosen], texts, columns | {"finished": finished})
        if config.missing_end_penalty:
            scores = scores - config.missing_end_penalty * ~np.array(finished)
        if config.length_penalty:
            scores = scores - config.length_penalty * np.array([len(response.tokens) for response in responses])
        return scores.astype(np.float32)

    def _text(self, response: Response) -> str:
        ids = without_terminator(response.tokens, self._sampling)
        return self._vocabulary.tokenizer.decode(ids, skip_special_tokens=True)

    def _write_samples(self, step: int, chosen: np.ndarray, texts: list[str], scores: np.ndarray) -> None:
        """The first responses of a few prompts, every --eval-every steps and at the first."""
        config = self._config
        if step and (config.eval_every == 0 or step % config.eval_every):
            return
        for row in range(0, min(config.samples, config.batch_size) * config.n, config.n):
            line = {"step": step, "prompt": self._prompts.given[chosen[row]], "response": texts[row]}
            self._samples.write(line | {"score": float(scores[row])})
