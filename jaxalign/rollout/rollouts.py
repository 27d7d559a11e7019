"""On-policy batches: the policy responds to a step's prompts as it is, and the responses are scored."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.clock import elapsed
from jaxalign.config.on_policy import RolloutConfig
from jaxalign.data.batches.plan import bucket_widths
from jaxalign.data.sets.prompts import PromptBatches, Prompts
from jaxalign.outside import brief
from jaxalign.rollout import scored
from jaxalign.rollout.engine.engine import Request, Response
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import text_after, without_terminator
from jaxalign.rollout.rewards import on_hosts
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from jaxalign.rollout.scored import ScoredResponses
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

SAMPLES = 3  # folded into a run's key, for what draws responses

# (scored responses, ids of the prompt of each, tokens of a row, step) -> (batch, metrics)
BatchFn = Callable[[ScoredResponses, Sequence[tuple[int, ...]], int, int], tuple[Any, dict[str, float]]]
# (step, scored responses, their prompts as the data have them): writes a few of them
# (params of the policy, step) -> (batch, metrics)
SourceFn = Callable[[PyTree, int], tuple[Any, dict[str, float]]]
SamplesFn = Callable[[int, ScoredResponses, Sequence[Any]], None]


class Rollouts:
    """(the policy's params, step) -> (a batch of its responses, metrics).

    Several hosts take every step of generation together, and all know all responses and the whole batch.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: Any,
        prompts: Prompts,
        batches: PromptBatches,
        rewards: Rewards,
        to_batch: BatchFn,
        *,
        tokenizer: Any,
        terminators: tuple[int, ...],
        write_samples: SamplesFn,
    ):
        """
        Args:
          config: how responses are drawn, and what changes a score.
          engine: draws them.
          prompts: all that there are.
          batches: step -> the numbers of its prompts.
          rewards: score responses.
          to_batch: makes the batch of an update.
          tokenizer: of the policy.
          terminators: the tokens that end a response.
          write_samples: shows a few responses of a step.
        """
        self._config, self._engine, self._prompts, self._batches = config, engine, prompts, batches
        self._rewards, self._to_batch, self._tokenizer = rewards, to_batch, tokenizer
        self._sampling, self._write_samples = Sampling.of(config, terminators), write_samples
        self._rounds = getattr(config, "dynamic_sampling", 0)

    def __call__(self, params: PyTree, step: int) -> tuple[Any, dict[str, float]]:
        config, numbers = self._config, self._batches[step]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), SAMPLES), step)
        seconds = Seconds()

        def draw(numbers: np.ndarray, drawn_before: int) -> ScoredResponses:
            return self._draw(params, numbers, drawn_before, key, seconds)

        if self._rounds:
            others = scored.replacements(len(self._prompts), numbers, seed=config.seed, step=step)
            responses, metrics = scored.draw_with_spread(draw, numbers, others, n=config.n, rounds=self._rounds)
        else:
            responses, metrics = draw(numbers, 0), {}
        self._write_samples(step, responses, [self._prompts.raw[i] for i in responses.prompts])
        metrics |= {f"scores/{name}": float(scores.mean()) for name, scores in responses.terms.items()}
        ids = [self._prompts.ids[i] for i in responses.prompts]
        longest = max(len(p) + len(r.tokens) for p, r in zip(ids, responses.responses, strict=True))
        width = next(width for width in bucket_widths(config.max_length) if width >= longest)
        batch, batch_metrics = self._to_batch(responses, ids, width, step)
        return batch, metrics | batch_metrics | seconds.metrics()

    def _draw(
        self, params: PyTree, numbers: np.ndarray, drawn_before: int, key: jax.Array, seconds: Seconds
    ) -> ScoredResponses:
        """n scored responses to each of the prompts; `drawn_before` of this step were drawn in earlier rounds."""
        prompts = np.repeat(numbers, self._config.n)
        requests = [Request(self._prompts.ids[i], drawn_before + k) for k, i in enumerate(prompts)]
        responses = self._engine.generate(params, requests, key, sampling=self._sampling)
        texts = [self._text(i, response) for i, response in zip(prompts, responses, strict=True)]
        began = time.perf_counter()
        scores, terms = self._score(prompts, responses, texts)
        seconds.add(self._engine.stats, elapsed(began))
        return ScoredResponses(prompts, responses, texts, scores, terms)

    def _score(
        self, prompts: np.ndarray, responses: list[Response], texts: list[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(Float32[N], the scores of each reward function by its name)"""
        config = self._config
        columns = {name: [values[i] for i in prompts] for name, values in self._prompts.columns.items()}
        finished, tokens = [r.finished for r in responses], [len(r.tokens) for r in responses]
        columns |= {"finished": finished, "tokens": tokens}
        raw = [self._prompts.raw[i] for i in prompts]
        try:
            terms = on_hosts.scores_by_function(self._rewards, raw, texts, columns)
        except RewardError as error:
            if error.row is None:
                raise
            place = f"prompt {prompts[error.row] + 1}, {brief(repr(raw[error.row]))}"
            raise RewardError(f"{error} (to {place})", error.row) from error
        scores = self._rewards.weighted_sum(terms)
        if config.reward_clip is not None:
            scores = np.clip(scores, -config.reward_clip, config.reward_clip)
        if config.missing_end_penalty:
            scores = scores - config.missing_end_penalty * ~np.array(finished)
        if config.length_penalty:
            scores = scores - config.length_penalty * np.array(tokens)
        return scores.astype(np.float32), terms

    def _text(self, number: int, response: Response) -> str:
        """The response as text: read with the prompt where it continues a text, by itself where it is a turn."""
        continues = isinstance(self._prompts.raw[number], str) and not self._config.as_chat
        before = self._prompts.ids[number] if continues else ()
        return text_after(self._tokenizer, before, without_terminator(response.tokens, self._sampling))


@dataclasses.dataclass
class Seconds:
    """Time without compilation, and tokens, of a step's rounds of generation and scoring."""

    generation: float = 0.0
    scoring: float = 0.0
    tokens: int = 0

    def add(self, stats: Any, scoring: float) -> None:
        """Counts a round: the engine's stats, and the seconds of scoring."""
        self.generation += stats.seconds
        self.tokens += stats.tokens
        self.scoring += scoring

    def metrics(self) -> dict[str, float]:
        """Seconds of generation and of scoring, and generated tokens per second."""
        return {
            "generation_seconds": self.generation,
            "generated_tokens_per_second": self.tokens / max(self.generation, 1e-9),
            "reward_seconds": self.scoring,
        }
