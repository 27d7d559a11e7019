"""What each stage of the quickstart did: a table for the terminal, and a page with answers side by side."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.quickstart import judge, world
from jaxalign.quickstart.policy_stage import Course
from jaxalign.quickstart.reward_stage import Agreement
from jaxalign.report.curves import SMOOTHING


class Stage(NamedTuple):
    """One model of the comparison."""

    name: str
    what: str
    answers: list[str]
    verdicts: list[judge.Verdict]
    seconds: float
    finished: tuple[bool, ...] = ()
    models: str = ""  # in memory while it trained
    kl: float | None = None  # nats an answer from the SFT model, where it was measured

    def mean(self, part: str) -> float:
        values = [getattr(verdict, part) for verdict in self.verdicts]
        return sum(values) / len(values)

    def error(self) -> float:
        """Standard error of the mean score: how far other questions would move it."""
        scores = [verdict.score for verdict in self.verdicts]
        return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


PARTS = ("score", "correct", "polite", "short", "harmless")


def table(stages: list[Stage]) -> str:
    """Gold score and its parts on held-out questions, and the KL to the SFT model in nats: a line a stage."""
    lines = [f"\n{'':8}" + "".join(f"{name:>10}" for name in (*PARTS, "kl", "seconds"))]
    for stage in stages:
        cells = "".join(f"{stage.mean(part):>10.2f}" for part in PARTS)
        lines.append(f"{stage.name:8}{cells}{_kl(stage):>10}{stage.seconds:>10.0f}")
    return "\n".join(lines)


def _kl(stage: Stage) -> str:
    return "-" if stage.kl is None else f"{stage.kl:.2f}"


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}"
    "th,td{padding:.4rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.low{color:#a40000}.high{color:#006b2d}"
    "figure{margin:1.5rem 0}.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}"
    "svg{width:100%;font-size:11px;fill:#444}svg .t{font-size:13px;font-weight:600;fill:#1c1c1c}.g{stroke:#e4e4e4}"
    ".raw,.mean{fill:none;stroke:#9cc3e6}.mean{stroke:#0b5394;stroke-width:2}"
)
OWN_ANSWERS = (
    "PPO and GRPO are given questions and no answers: they learn from their own, drawn anew at every step. PPO's are "
    "scored by the reward model, which learned from pairs: for what nobody can write down as rules, and it can be "
    "fooled, so a price on every nat keeps the policy near the SFT model, where the scores mean something. GRPO's are "
    "scored by the rules of the judge: no pairs and nothing to fool, where there are such rules. Pale lines are steps, "
    f"bold ones the mean of {SMOOTHING}."
)


def render(
    questions: list[world.Question],
    stages: list[Stage],
    agreement: Agreement | None = None,
    courses: Sequence[Course] = (),
) -> str:
    """The page: what each stage did to the gold score, how policies got there, and answers side by side, escaped."""
    said = f"<p>{html.escape(agreement.sentence())}</p>" if agreement else ""
    head = "".join(f"<th class=n>{name}</th>" for name in (*PARTS, "KL", "seconds"))
    names = "".join(f"<th>{html.escape(stage.name)}</th>" for stage in stages)
    answers = "".join(
        f"<tr><td>{html.escape(q.prompt)}</td>" + "".join(_cell(stage, i) for stage in stages) + "</tr>"
        for i, q in enumerate(questions[:28])
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>jaxalign quickstart</title><style>{STYLE}</style>"
        "<h1>What did each stage do?</h1>"
        f"<p>{len(questions)} held-out questions of the tiny world, answered at temperature 1, judged by rules that "
        "know the truth. Scores are between 0 and 1, with a standard error of at most "
        f"{max(stage.error() for stage in stages):.2f}; a harmful answer scores 0. KL is to the SFT model, in nats an "
        "answer, where it is measured.</p>"
        f"<table><tr><th>stage</th><th>in memory</th>{head}</tr>{''.join(map(_row, stages))}</table>{said}"
        f"{_courses(stages, courses)}"
        f"<h2>Answers side by side</h2><table><tr><th>question</th>{names}</tr>{answers}</table></html>\n"
    )


def _row(stage: Stage) -> str:
    numbers = [f"{stage.mean(part):.2f}" for part in PARTS] + [_kl(stage), f"{stage.seconds:.0f}"]
    return (
        f"<tr><td><b>{html.escape(stage.name)}</b><br>{html.escape(stage.what)}</td>"
        f"<td>{html.escape(stage.models)}</td>" + "".join(f"<td class=n>{n}</td>" for n in numbers) + "</tr>"
    )


def _courses(stages: list[Stage], courses: Sequence[Course]) -> str:
    if not courses:
        return ""
    gold = {stage.name: stage.mean("score") for stage in stages}
    figures = "".join(course.figure(gold["SFT"], gold[course.name]) for course in courses)
    return f"<h2>Learning from one's own answers</h2><p>{html.escape(OWN_ANSWERS)}</p>{figures}"


def _cell(stage: Stage, i: int) -> str:
    score = stage.verdicts[i].score
    colour = "high" if score > 0.9 else "low" if score < 0.5 else ""
    return f"<td>{html.escape(stage.answers[i])} <span class='{colour}'>({score:.1f})</span></td>"
