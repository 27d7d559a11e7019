"""samples.jsonl: responses of the model while it learns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxalign.config.on_policy import RolloutConfig
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.outside import visible
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import generate_ids
from jaxalign.rollout.scored import ScoredResponses
from jaxalign.run import lock
from jaxalign.run.vocabulary import Vocabulary
from jaxalign.training.metrics import JsonLines

log = logging.getLogger(__name__)

FILE = "samples.jsonl"
MAX_NEW_TOKENS = 64
SHOWN = 96  # characters of a response on the screen; the file has it whole


class Sampler:
    """Greedy responses to a few held-out prompts at every evaluation, a line each: step, prompt, response, finished."""

    def __init__(
        self,
        config: Any,
        graphdef: nnx.GraphDef,
        model: ModelConfig,
        vocabulary: Vocabulary,
        resumed_at: int,
    ):
        room = MAX_NEW_TOKENS if not model.learned_positions else min(MAX_NEW_TOKENS, model.learned_positions // 2)
        self._count = config.samples if jax.process_count() == 1 else 0
        if self._count != config.samples and jax.process_index() == 0:
            log.info("no samples are written: a run on several hosts draws none")
        self._graphdef, self._tokenizer = graphdef, vocabulary.tokenizer
        self._sampling = Sampling(max_new_tokens=room, temperature=0.0, terminators=vocabulary.terminators)
        self._longest = max(1, model.max_length - room)
        keep = resumed_at if resumed_at else -1
        self._lines = JsonLines(Path(config.output) / FILE, keep_until=keep) if self._count else None

    def write(self, params: Any, step: int, prompts: Sequence[Sequence[int]]) -> None:
        """Responds to the first few prompts (ids)."""
        if self._lines is None or not prompts:
            return
        lock.check(self._lines.path.parent)
        chosen = [list(prompt[-self._longest :]) for prompt in prompts[: self._count]]
        responses = generate_ids(
            self._graphdef, params, chosen, jax.random.key(0), sampling=self._sampling, batch_size=len(chosen)
        )
        for prompt, (ids, ended) in zip(chosen, responses, strict=True):
            text = self._tokenizer.decode(prompt, skip_special_tokens=True)
            response = self._tokenizer.decode(ids, skip_special_tokens=True)
            self._lines.write({"step": step, "prompt": text, "response": response, "finished": ended})


class RolloutSamples:
    """The first responses to a few prompts, every `eval_every` steps: step, prompt, response, score.

    A run that resumes at a step drops the lines of that step and later ones at its first call.
    """

    def __init__(self, config: RolloutConfig):
        self._config, self._lines = config, None

    def __call__(self, step: int, scored: ScoredResponses, prompts: Sequence[Any]) -> None:
        """Writes and logs them.

        Args:
          step: of the run.
          scored: all responses of the step.
          prompts: of each response, as the data have it.
        """
        config = self._config
        if jax.process_index() != 0:
            return
        if self._lines is None:
            self._lines = JsonLines(Path(config.output) / FILE, keep_until=step - 1)
        if step and (config.eval_every == 0 or step % config.eval_every):
            return
        shown = []
        for row in range(0, min(config.samples * config.n, len(scored.texts)), config.n):
            line = {"step": step, "prompt": prompts[row], "response": scored.texts[row]}
            self._lines.write(line | {"score": float(scored.scores[row])})
            beginning = visible(" ".join(scored.texts[row][:SHOWN].split()))  # nothing that a terminal would obey
            shown.append(f"{scored.scores[row]:8.3g}  {beginning}")
        if shown:
            log.info("samples of step %d, a score and how the response begins:\n%s", step, "\n".join(shown))
