"""`jaxalign quickstart`: trains on the tiny world with the ordinary commands, and compares the resulting models."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from jaxalign.commands import COMMANDS, name_of
from jaxalign.config.inference import QuickstartConfig
from jaxalign.config.limits import check
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.quickstart import judge, policy_stage, reward_stage, tokenizer, world
from jaxalign.quickstart.page import Stage, render, table
from jaxalign.quickstart.stages import Planned, plan
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, respond
from jaxalign.run import devices
from jaxalign.run.folder import check_writable

log = logging.getLogger(__name__)

PRETRAINING_TEXTS, INSTRUCTIONS, QUESTIONS = 24_000, 4_000, 140


def main(config: QuickstartConfig) -> int:
    """Writes OUTPUT/index.html. Called again, it continues where it stopped, or prints the result again."""
    check(config)
    devices.start()
    devices.start_log()
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise Mistake(f"`output` {output} is a file; name a folder")
    check_writable(output)
    _write_world(output / "world", config.seed)
    questions = world.held_out_questions(config.seed, QUESTIONS)
    stages, courses, agreement = [], [], None
    for planned in plan(output, config.seed):
        log.info("\n== %s: %s", planned.name, planned.summary)
        command = name_of(planned.config)
        start = time.perf_counter()
        if status := COMMANDS[command].load()(planned.config):
            return status
        seconds = time.perf_counter() - start
        if command == "reward":
            model = str(planned.config.output / "final")
            agreement = reward_stage.measure(model, config.seed, questions, stages, seconds)
            continue
        if planned.rewarded_by:
            courses.append(policy_stage.read(planned.name, planned.rewarded_by, planned.config.output))
        stages.append(_judge(planned, questions, seconds, courses[-1].kl if planned.rewarded_by else None))
    page = output / "index.html"
    page.write_text(render(questions, stages, agreement, courses), encoding="utf-8")
    print(table(stages))
    assert agreement is not None  # the plan has a stage of reward
    print(f"\n{agreement.sentence()}")
    print(f"\nThe page with curves, and with answers side by side: {page}")
    return 0


def _write_world(folder: Path, seed: int) -> None:
    """Writes the tokenizer, the model's config and the data. A file that would not change keeps its time stamp."""
    tokenizer.write_start(folder)
    files = {
        "pretraining.jsonl": world.pretraining_rows(seed, PRETRAINING_TEXTS),
        "instructions.jsonl": world.instruction_rows(seed, INSTRUCTIONS),
        "preferences.jsonl": world.preference_rows(seed, INSTRUCTIONS),
        "questions.jsonl": world.question_rows(seed, INSTRUCTIONS),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def _judge(planned: Planned, questions: list[world.Question], seconds: float, kl: float | None) -> Stage:
    prompts = [[{"role": "user", "content": question.prompt}] for question in questions]
    model = load_model(str(planned.config.output / "final"), dtype=compute_dtype("auto"))
    responses = respond(model, prompts, Sampling(max_new_tokens=30), batch_size=len(prompts))
    verdicts = [judge.judge(q, text, finished=ended) for q, (text, ended) in zip(questions, responses, strict=True)]
    answers, ended = zip(*responses, strict=True)
    return Stage(planned.name, planned.summary, list(answers), verdicts, seconds, ended, planned.models, kl)
