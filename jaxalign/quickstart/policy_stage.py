"""Training curves of the quickstart's policies that learn from their own answers: PPO and GRPO."""

from __future__ import annotations

import html
from pathlib import Path
from typing import NamedTuple

from jaxalign.report.curves import SMOOTHING, curve
from jaxalign.training.metrics import read_rows


class Course(NamedTuple):
    """Curves of one run: a value per step, measured on the policy's answers before that step's updates."""

    name: str
    rewarded_by: str
    scores: list[float]
    kls: list[float]  # from the SFT model, in nats per answer

    @property
    def kl(self) -> float:
        """KL at the end: the mean of the last SMOOTHING steps."""
        last = self.kls[-SMOOTHING:]
        return sum(last) / len(last)

    def sentence(self, gold_before: float, gold_after: float) -> str:
        """Summary in words. The gold scores are means on held-out questions: of the SFT model, and of this policy."""
        first, last = self.scores[:SMOOTHING], self.scores[-SMOOTHING:]
        return (
            f"{self.name}: in {len(self.scores)} steps {self.rewarded_by} goes from {sum(first) / len(first):.2f} to "
            f"{sum(last) / len(last):.2f}, and the policy ends {self.kl:.2f} nats per answer from the SFT model. On "
            f"held-out questions the judge's score goes from {gold_before:.2f} to {gold_after:.2f}."
        )

    def figure(self, gold_before: float, gold_after: float) -> str:
        """HTML figure: both curves, and the summary as caption."""
        caption = html.escape(self.sentence(gold_before, gold_after))
        scores = curve(f"{self.name}: {self.rewarded_by}", self.scores, unit="mean")
        kls = curve(f"{self.name}: KL to the SFT model", self.kls, unit="nats per answer")
        return f"<figure><div class=curves>{scores}{kls}</div><figcaption>{caption}</figcaption></figure>"


def read(name: str, rewarded_by: str, output: Path) -> Course:
    """The course of a PPO or GRPO run, from its folder's metrics.jsonl."""
    rows = read_rows(output / "metrics.jsonl")
    return Course(name, rewarded_by, [row["score"] for row in rows], [row["kl"] for row in rows])
