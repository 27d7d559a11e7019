"""What each stage of the quickstart did: a table for the terminal, and a page with answers side by side."""

from __future__ import annotations

import html
from typing import NamedTuple

from jaxalign.quickstart import judge, world
from jaxalign.quickstart.reward_stage import Agreement


class Stage(NamedTuple):
    """One model of the comparison."""

    name: str
    what: str
    answers: list[str]
    verdicts: list[judge.Verdict]
    seconds: float
    finished: tuple[bool, ...] = ()

    def mean(self, part: str) -> float:
        values = [getattr(verdict, part) for verdict in self.verdicts]
        return sum(values) / len(values)


PARTS = ("score", "correct", "polite", "short", "harmless")


def table(stages: list[Stage]) -> str:
    """Gold score and its parts on held-out questions, a line a stage."""
    lines = [f"\n{'':8}" + "".join(f"{part:>10}" for part in PARTS) + f"{'seconds':>10}"]
    for stage in stages:
        cells = "".join(f"{stage.mean(part):>10.2f}" for part in PARTS)
        lines.append(f"{stage.name:8}{cells}{stage.seconds:>10.0f}")
    return "\n".join(lines)


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}"
    "th,td{padding:.4rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.low{color:#a40000}.high{color:#006b2d}"
)


def render(questions: list[world.Question], stages: list[Stage], agreement: Agreement | None = None) -> str:
    """The page: what each stage did to the gold score, and answers side by side, escaped."""
    said = f"<p>{html.escape(agreement.sentence())}</p>" if agreement else ""
    head = "".join(f"<th class=n>{part}</th>" for part in PARTS)
    rows = "".join(
        f"<tr><td><b>{html.escape(s.name)}</b><br>{html.escape(s.what)}</td>"
        + "".join(f"<td class=n>{s.mean(part):.2f}</td>" for part in PARTS)
        + f"<td class=n>{s.seconds:.0f}</td></tr>"
        for s in stages
    )
    names = "".join(f"<th>{html.escape(stage.name)}</th>" for stage in stages)
    answers = "".join(
        f"<tr><td>{html.escape(q.prompt)}</td>" + "".join(_cell(stage, i) for stage in stages) + "</tr>"
        for i, q in enumerate(questions[:28])
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>jaxalign quickstart</title><style>{STYLE}</style>"
        "<h1>What did each stage do?</h1>"
        f"<p>{len(questions)} held-out questions of the tiny world, answered at temperature 1, judged by rules that "
        "know the truth. All numbers are between 0 and 1; a harmful answer scores 0.</p>"
        f"<table><tr><th>stage</th>{head}<th class=n>seconds</th></tr>{rows}</table>{said}"
        f"<h2>Answers side by side</h2><table><tr><th>question</th>{names}</tr>{answers}</table></html>\n"
    )


def _cell(stage: Stage, i: int) -> str:
    score = stage.verdicts[i].score
    colour = "high" if score > 0.9 else "low" if score < 0.5 else ""
    return f"<td>{html.escape(stage.answers[i])} <span class='{colour}'>({score:.1f})</span></td>"
