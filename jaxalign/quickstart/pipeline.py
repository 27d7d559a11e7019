"""`jaxalign quickstart`: the tiny world through the same runs that a pod runs, and a table of what each stage did."""

from __future__ import annotations

import html
import json
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.quickstart import judge, reward_stage, tokenizer, world
from jaxalign.quickstart.reward_stage import Agreement
from jaxalign.runs import devices, generate, preferences, reward, sft
from jaxalign.runs.config import (
    CheckpointConfig,
    DPOAlgorithm,
    DPOConfig,
    KTOAlgorithm,
    KTOConfig,
    OptimizerConfig,
    QuickstartConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from jaxalign.runs.folder import check_writable
from jaxalign.runs.values import check

log = logging.getLogger(__name__)

PRETRAINING_TEXTS, INSTRUCTIONS, QUESTIONS = 24_000, 4_000, 140
PRETRAINING_STEPS, SFT_STEPS, DPO_STEPS, KTO_STEPS, REWARD_STEPS = 600, 150, 100, 60, 30
LENGTH, BATCH = 64, 32
RUNS = {
    SFTConfig: sft.run,
    DPOConfig: preferences.run_dpo,
    KTOConfig: preferences.run_kto,
    RewardConfig: reward.run,
}


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


def run(config: QuickstartConfig) -> int:
    """Writes OUTPUT/index.html; a second call continues, or shows the result again."""
    check(config)
    devices.start()
    devices.start_log()
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    check_writable(output)
    _write_world(output / "world", config.seed)
    questions = world.held_out_questions(config.seed, QUESTIONS)
    stages, agreement = [], None
    for name, what, run_config in _runs(output, config.seed):
        log.info("\n== %s: %s", name, what)
        start = time.perf_counter()
        if status := RUNS[type(run_config)](run_config):
            return status
        seconds, model = time.perf_counter() - start, str(run_config.output / "final")
        if isinstance(run_config, RewardConfig):
            agreement = reward_stage.measure(model, config.seed, questions, stages, seconds)
        else:
            stages.append(_judge(name, what, model, questions, seconds))
    page = output / "index.html"
    page.write_text(render(questions, stages, agreement), encoding="utf-8")
    print(table(stages))
    print(f"\n{agreement.sentence()}")
    print(f"\nThe answers side by side: {page}")
    return 0


def _write_world(folder: Path, seed: int) -> None:
    tokenizer.write_start(folder)
    files = {
        "pretraining.jsonl": world.pretraining_rows(seed, PRETRAINING_TEXTS),
        "instructions.jsonl": world.instruction_rows(seed, INSTRUCTIONS),
        "preferences.jsonl": world.preference_rows(seed, INSTRUCTIONS),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def _runs(output: Path, seed: int) -> list[tuple[str, str, TrainConfig]]:
    shared: dict[str, Any] = {
        "batch_size": BATCH,
        "max_length": LENGTH,
        "seed": seed,
        "remat": "none",
        "samples": 2,
        "checkpoint": CheckpointConfig(every=200),
    }
    base = SFTConfig(
        model=f"config:{output / 'world'}",
        data=str(output / "world" / "pretraining.jsonl"),
        output=output / "base",
        steps=PRETRAINING_STEPS,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.95),
        **shared,
    )
    tuned = SFTConfig(
        model=str(output / "base" / "final"),
        data=str(output / "world" / "instructions.jsonl"),
        output=output / "sft",
        steps=SFT_STEPS,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
        **shared,
    )
    feedback: dict[str, Any] = {
        "model": str(output / "sft" / "final"),
        "data": str(output / "world" / "preferences.jsonl"),
        "as_chat": True,
        **shared,
    }
    # Not all rejected answers are false: some are curt. Without its likelihood term DPO unlearns facts with the manner.
    dpo = DPOConfig(
        output=output / "dpo",
        algorithm=DPOAlgorithm("dpo(beta=0.3) + 2.0*sft"),
        steps=DPO_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        **feedback,
    )
    kto = KTOConfig(
        output=output / "kto",
        algorithm=KTOAlgorithm("kto(beta=0.5)"),
        steps=KTO_STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
        **feedback,
    )
    scores = RewardConfig(
        output=output / "reward",
        steps=REWARD_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        **feedback,
    )
    return [
        ("base", "pretrained from random weights on the world's texts, good and bad answers alike", base),
        ("SFT", "supervised fine-tuning on demonstrations, some of them bad", tuned),
        ("DPO", "SFT, then pairs of a good and a bad answer", dpo),
        ("KTO", "SFT, then the same answers, each called good or bad", kto),
        ("reward", "SFT, then a head that scores answers, from the same pairs", scores),
    ]


def _judge(name: str, what: str, model: str, questions: list[world.Question], seconds: float) -> Stage:
    prompts = [[{"role": "user", "content": question.prompt}] for question in questions]
    found = generate.respond(model, prompts, max_new_tokens=30, temperature=1.0, batch_size=len(prompts))
    verdicts = [judge.judge(q, text, finished=ended) for q, (text, ended) in zip(questions, found, strict=True)]
    return Stage(name, what, [text for text, _ in found], verdicts, seconds, tuple(ended for _, ended in found))


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
