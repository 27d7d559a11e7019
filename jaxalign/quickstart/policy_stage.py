"""What the quickstart's policies that learn from their own answers went through, step by step."""

from __future__ import annotations

import html
from pathlib import Path
from typing import NamedTuple

from jaxalign.report.curves import SMOOTHING, curve
from jaxalign.training.metrics import read_rows


class Course(NamedTuple):
    """Of one run; a value a step, of the answers that the policy gave before the step's updates."""

    name: str
    rewarded_by: str
    scores: list[float]
    kls: list[float]  # nats an answer from the SFT model

    @property
    def kl(self) -> float:
        """At the end, the mean of the last steps."""
        last = self.kls[-SMOOTHING:]
        return sum(last) / len(last)

    def sentence(self, gold_before: float, gold_after: float) -> str:
        """Given the gold scores on held-out questions of the SFT model and of this one."""
        first, last = self.scores[:SMOOTHING], self.scores[-SMOOTHING:]
        return (
            f"{self.name}: in {len(self.scores)} steps {self.rewarded_by} goes from {sum(first) / len(first):.2f} to "
            f"{sum(last) / len(last):.2f}, {self.kl:.2f} nats from the SFT model; the gold score on held-out questions "
            f"from {gold_before:.2f} to {gold_after:.2f}."
        )

    def figure(self, gold_before: float, gold_after: float) -> str:
        """As HTML: two curves and what they say."""
        said = html.escape(self.sentence(gold_before, gold_after))
        scores = curve(f"{self.name}: {self.rewarded_by}", self.scores, unit="mean")
        kls = curve(f"{self.name}: KL to the SFT model", self.kls, unit="nats an answer")
        return f"<figure><div class=curves>{scores}{kls}</div><figcaption>{said}</figcaption></figure>"


def read(name: str, rewarded_by: str, output: Path) -> Course:
    """From what a run of PPO or GRPO wrote into its folder."""
    rows = read_rows(output / "metrics.jsonl")
    return Course(name, rewarded_by, [row["score"] for row in rows], [row["kl"] for row in rows])
