"""What the model answers while it learns: samples.jsonl, a few held-out prompts at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign.models.decoder.config import ModelConfig
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import generate_ids
from jaxalign.runs.vocabulary import Vocabulary
from jaxalign.training.metrics import JsonLines

MAX_NEW_TOKENS = 64


class Sampler:
    """Writes one line a prompt: step, prompt, response, and whether the response ended by itself."""

    def __init__(
        self,
        config: Any,
        graphdef: Any,
        model: ModelConfig,
        vocabulary: Vocabulary,
        resumed_at: int,
    ):
        room = MAX_NEW_TOKENS if not model.learned_positions else min(MAX_NEW_TOKENS, model.learned_positions // 2)
        self._count = config.samples if jax.process_count() == 1 else 0
        self._graphdef, self._tokenizer = graphdef, vocabulary.tokenizer
        self._sampling = Sampling(max_new_tokens=room, temperature=0.0, terminators=vocabulary.terminators)
        self._longest = max(1, model.max_length - room)
        keep = resumed_at if resumed_at else -1
        self._lines = JsonLines(Path(config.output) / "samples.jsonl", keep_until=keep) if self._count else None

    def write(self, params: Any, step: int, prompts: Sequence[Sequence[int]]) -> None:
        """Greedy answers to the first few prompts (ids)."""
        if self._lines is None or not prompts:
            return
        chosen = [list(prompt[-self._longest :]) for prompt in prompts[: self._count]]
        found = generate_ids(
            self._graphdef, params, chosen, jax.random.key(0), sampling=self._sampling, batch_size=len(chosen)
        )
        for prompt, (ids, ended) in zip(chosen, found, strict=True):
            text = self._tokenizer.decode(prompt, skip_special_tokens=True)
            response = self._tokenizer.decode(ids, skip_special_tokens=True)
            self._lines.write({"step": step, "prompt": text, "response": response, "finished": ended})
