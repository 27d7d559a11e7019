"""Results of the quickstart: a table for the terminal, and a page with answers side by side."""

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
    """One trained model and its answers to the held-out questions."""

    name: str
    summary: str  # how it was trained, in a line
    answers: list[str]
    verdicts: list[judge.Verdict]
    seconds: float  # of training
    finished: tuple[bool, ...] = ()  # answers that ended with the end token
    models: str = ""  # in memory during training
    kl: float | None = None  # from the SFT model, in nats per answer; PPO and GRPO measure it

    def mean(self, part: str) -> float:
        """Mean over the answers of one of PARTS."""
        values = [getattr(verdict, part) for verdict in self.verdicts]
        return sum(values) / len(values)

    def error(self) -> float:
        """Standard error of the mean score: how much it would vary with other questions."""
        scores = [verdict.score for verdict in self.verdicts]
        return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


PARTS = ("score", "correct", "polite", "short", "harmless")


def table(stages: list[Stage]) -> str:
    """One line per stage: gold score and its parts on held-out questions, KL from the SFT model, seconds."""
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
    "PPO and GRPO train on questions without answers: at every step the model answers a few of them, the answers are "
    "scored, and the model learns from the scores. PPO's scores come from the reward model, which learned from pairs "
    "of answers. That works even where nobody can write down rules, but a reward model can be fooled. So PPO also pays "
    "for every nat of KL, which keeps the policy near the SFT model, where the scores can be trusted. GRPO's scores "
    "come from the judge's rules: it needs no pairs, and there is no model to fool, but it works only where such rules "
    f"exist. Pale lines show single steps, bold lines the mean of the last {SMOOTHING}."
)


def render(
    questions: list[world.Question],
    stages: list[Stage],
    agreement: Agreement | None = None,
    courses: Sequence[Course] = (),
) -> str:
    """HTML page: a table of scores, curves of the courses, and answers side by side. All texts are escaped."""
    reward_model = f"<p>{html.escape(agreement.sentence())}</p>" if agreement else ""
    head = "".join(f"<th class=n>{name}</th>" for name in (*PARTS, "KL", "seconds"))
    names = "".join(f"<th>{html.escape(stage.name)}</th>" for stage in stages)
    answers = "".join(
        f"<tr><td>{html.escape(q.prompt)}</td>" + "".join(_cell(stage, i) for stage in stages) + "</tr>"
        for i, q in enumerate(questions[:28])
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>jaxalign quickstart</title><style>{STYLE}</style>"
        "<h1>What did each stage do?</h1>"
        f"<p>Each model answers the same {len(questions)} held-out questions of the tiny world, at temperature 1. A "
        "judge, made of rules that know the right answers, scores each answer between 0 and 1; a harmful answer scores "
        f"0. Mean scores have a standard error of at most {max(stage.error() for stage in stages):.2f}. KL is measured "
        f"from the SFT model, in nats per answer, over the last {SMOOTHING} training steps of PPO and GRPO.</p>"
        f"<table><tr><th>stage</th><th>in memory</th>{head}</tr>{''.join(map(_row, stages))}</table>{reward_model}"
        f"{_courses(stages, courses)}"
        f"<h2>Answers side by side</h2><table><tr><th>question</th>{names}</tr>{answers}</table></html>\n"
    )


def _row(stage: Stage) -> str:
    numbers = [f"{stage.mean(part):.2f}" for part in PARTS] + [_kl(stage), f"{stage.seconds:.0f}"]
    return (
        f"<tr><td><b>{html.escape(stage.name)}</b><br>{html.escape(stage.summary)}</td>"
        f"<td>{html.escape(stage.models)}</td>" + "".join(f"<td class=n>{n}</td>" for n in numbers) + "</tr>"
    )


def _courses(stages: list[Stage], courses: Sequence[Course]) -> str:
    if not courses:
        return ""
    gold = {stage.name: stage.mean("score") for stage in stages}
    figures = "".join(course.figure(gold["SFT"], gold[course.name]) for course in courses)
    return f"<h2>Learning from the model's own answers</h2><p>{html.escape(OWN_ANSWERS)}</p>{figures}"


def _cell(stage: Stage, i: int) -> str:
    score = stage.verdicts[i].score
    colour = "high" if score > 0.9 else "low" if score < 0.5 else ""
    return f"<td>{html.escape(stage.answers[i])} <span class='{colour}'>({score:.1f})</span></td>"
