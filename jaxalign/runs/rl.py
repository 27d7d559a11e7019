"""`jaxalign grpo` and `jaxalign rloo`: a model, prompts and a reward in, a policy that earns more of it out."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.policy import policy_gradient
from jaxalign.data import prompts as prompting
from jaxalign.data.batches import bucket_widths
from jaxalign.data.prompts import PromptBatches, Prompts
from jaxalign.losses.policy import POLICY_LOSSES
from jaxalign.models import huggingface
from jaxalign.ops.advantages import group_advantages, leave_one_out
from jaxalign.rollout.engine import LocalEngine, Request, Response
from jaxalign.rollout.experience import rollout_batch
from jaxalign.rollout.generate import without_terminator
from jaxalign.rollout.rewards import Rewards
from jaxalign.rollout.slots import Sampling
from jaxalign.runs import train
from jaxalign.runs.config import PolicyConfig
from jaxalign.runs.program import Method, Program, implementation
from jaxalign.select import select
from jaxalign.training.metrics import JsonLines
from jaxalign.training.state import TrainState
from jaxalign.types import RolloutBatch

log = logging.getLogger(__name__)

ADVANTAGES: dict[str, Callable] = {
    "group": functools.partial(group_advantages, scale="group"),
    "batch": functools.partial(group_advantages, scale="batch"),
    "none": functools.partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out,
}


def run_grpo(config: PolicyConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "grpo", _gather)


def run_rloo(config: PolicyConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "rloo", _gather)


def _gather(config: PolicyConfig, starts: bool) -> train.Task:
    algorithm, loss = config.algorithm, select(config.algorithm.loss, POLICY_LOSSES)
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

    def build(graphdef: Any, ref_graphdef: Any) -> Any:
        return policy_gradient(
            graphdef,
            loss=loss,
            ref_graphdef=ref_graphdef if algorithm.reference else None,
            kl_coef=algorithm.kl_coef,
            kl_estimator=algorithm.kl_estimator,
            level=algorithm.level,
            aggregate=algorithm.aggregate,
            longest=config.max_new_tokens,
            temperature=config.temperature,
            epochs=algorithm.epochs,
            minibatches=algorithm.minibatches,
            implementation=implementation(config),
        )

    def source(task: train.Task, program: Program, frozen: Any, numbers: Iterator, resumed_at: int) -> Rollouts:
        return Rollouts(config, task, program, frozen, numbers, resumed_at, prompts=prompts, rewards=rewards)

    return train.Task(
        config,
        base,
        Method(build, reference=algorithm.reference, updates=algorithm.epochs * algorithm.minibatches),
        batches,
        held_out=[],
        shapes=len(bucket_widths(config.max_length)),
        fingerprint=prompts.fingerprint(),
        prompts=[],
        export=train.export_language_model,
        source=source,
    )


def _check(config: PolicyConfig) -> None:
    rows, algorithm = config.batch_size * config.n, config.algorithm
    if huggingface.is_random(config.model):
        raise ValueError(f"--model {config.model}: random weights say nothing to be rewarded; train them first")
    if config.n < 2:
        raise ValueError("--n 1: a response is judged beside others to its prompt; draw 2 or more")
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in --max-length {config.max_length}"
        )
    if config.temperature == 0:
        raise ValueError("--temperature 0: greedy responses are all alike, so there is nothing to learn from them")
    if algorithm.kl_coef and not algorithm.reference:
        raise ValueError(f"--algorithm.kl-coef {algorithm.kl_coef} needs the reference; leave --algorithm.reference on")
    parts = algorithm.minibatches * config.microbatches
    if rows % parts:
        raise ValueError(
            f"{config.batch_size} prompts x {config.n} responses = {rows} rows cannot be cut into "
            f"--algorithm.minibatches {algorithm.minibatches} x --microbatches {config.microbatches}"
        )
    if jax.process_count() > 1:
        raise ValueError(f"jaxalign generates on one host so far, not on {jax.process_count()}")
    if config.eval_data is not None:
        raise ValueError(
            "--eval-data: rewards of the training prompts are new at every step; there is no held-out loss"
        )


class Rollouts:
    """state -> (a batch of its policy's responses, what is said of how they were made)."""

    def __init__(
        self,
        config: PolicyConfig,
        task: train.Task,
        program: Program,
        frozen: Any,
        numbers: Iterator[np.ndarray],
        resumed_at: int,
        *,
        prompts: Prompts,
        rewards: Rewards,
    ):
        self._config, self._prompts, self._rewards, self._frozen = config, prompts, rewards, frozen
        self._vocabulary, self._numbers, self._assemble = task.base.vocabulary, numbers, program.algorithm.assemble
        self._sampling = Sampling(
            config.max_new_tokens, config.temperature, terminators=task.base.vocabulary.terminators
        )
        rows = config.batch_size * config.n
        devices = task.base.mesh.shape["data"] * task.base.mesh.shape["fsdp"]
        slots = min(config.slots, rows)
        self._engine = LocalEngine(
            program.graphdef, slots=-(-slots // devices) * devices, prompt_room=max(map(len, prompts.ids))
        )
        unit = devices * config.microbatches * config.algorithm.minibatches
        self._rows = -(-rows // unit) * unit
        self._samples = JsonLines(Path(config.output) / "samples.jsonl", keep_until=resumed_at - 1)

    def __call__(self, state: TrainState) -> tuple[RolloutBatch, dict[str, float]]:
        config, step = self._config, int(state.step)
        chosen = np.repeat(next(self._numbers), config.n)
        prompts = [self._prompts.ids[i] for i in chosen]
        requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), step)
        params = self._assemble(state.params, self._frozen)
        responses = self._engine.generate(params, requests, key, sampling=self._sampling)
        texts = [self._text(response) for response in responses]
        began = time.perf_counter()
        columns = {name: [values[i] for i in chosen] for name, values in self._prompts.columns.items()}
        finished = [response.finished for response in responses]
        scores = self._rewards([self._prompts.given[i] for i in chosen], texts, columns | {"finished": finished})
        scoring = time.perf_counter() - began
        if config.missing_end_penalty:
            scores = scores - config.missing_end_penalty * ~np.array(finished)
        groups = scores.reshape(config.batch_size, config.n)
        advantages = np.asarray(ADVANTAGES[config.algorithm.advantages](jnp.asarray(groups, jnp.float32))).reshape(-1)
        self._write_samples(step, chosen, texts, scores)
        stats = self._engine.stats
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, responses, strict=True))
        width = next(w for w in bucket_widths(config.max_length) if w >= longest)
        batch = rollout_batch(prompts, responses, scores=scores, advantages=advantages, width=width, rows=self._rows)
        said = {
            "score_std": float(groups.std(axis=1).mean()),
            "same_scores": float(np.mean(groups.max(axis=1) == groups.min(axis=1))),
            "generation_seconds": stats.seconds,
            "generated_tokens_per_second": stats.tokens / stats.seconds,
            "reward_seconds": scoring,
        }
        return batch, said

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
