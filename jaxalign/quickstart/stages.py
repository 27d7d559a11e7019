"""The stages of the quickstart, in order: what each learns from, and its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.runs.config import (
    CheckpointConfig,
    DPOAlgorithm,
    DPOConfig,
    KTOAlgorithm,
    KTOConfig,
    OptimizerConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)

PRETRAINING_STEPS, SFT_STEPS, DPO_STEPS, KTO_STEPS, REWARD_STEPS = 600, 150, 100, 60, 100
LENGTH, BATCH = 64, 32


class Planned(NamedTuple):
    """A stage to be run."""

    name: str
    what: str
    config: TrainConfig


def plan(output: Path, seed: int) -> list[Planned]:
    """All stages, each from what those before it left in the output folder."""
    learned = "pretrained from random weights on the world's texts, good and bad answers alike"
    return [
        Planned("base", learned, _base(output, seed)),
        Planned("SFT", "supervised fine-tuning on demonstrations, some of them bad", _tuned(output, seed)),
        Planned("DPO", "SFT, then pairs of a good and a bad answer", _dpo(output, seed)),
        Planned("KTO", "SFT, then the same answers, each called good or bad", _kto(output, seed)),
        Planned("reward", "SFT, then a head that scores answers, from the same pairs", _reward(output, seed)),
    ]


def _shared(seed: int) -> dict[str, Any]:
    return {"seed": seed, "remat": "none", "samples": 2, "checkpoint": CheckpointConfig(every=200)}


def _base(output: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        model=f"config:{output / 'world'}",
        data=str(output / "world" / "pretraining.jsonl"),
        output=output / "base",
        steps=PRETRAINING_STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.95),
        **_shared(seed),
    )


def _tuned(output: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        model=str(output / "base" / "final"),
        data=str(output / "world" / "instructions.jsonl"),
        output=output / "sft",
        steps=SFT_STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
        **_shared(seed),
    )


def _feedback(output: Path, seed: int) -> dict[str, Any]:
    return {
        "model": str(output / "sft" / "final"),
        "data": str(output / "world" / "preferences.jsonl"),
        "as_chat": True,
        "batch_size": BATCH,
        "max_length": LENGTH,
        **_shared(seed),
    }


def _dpo(output: Path, seed: int) -> DPOConfig:
    # Not all rejected answers are false: some are curt. Without its likelihood term DPO unlearns facts with the manner.
    return DPOConfig(
        output=output / "dpo",
        algorithm=DPOAlgorithm("dpo(beta=0.3) + 2.0*sft"),
        steps=DPO_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        **_feedback(output, seed),
    )


def _kto(output: Path, seed: int) -> KTOConfig:
    return KTOConfig(
        output=output / "kto",
        algorithm=KTOAlgorithm("kto(beta=0.5)"),
        steps=KTO_STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
        **_feedback(output, seed),
    )


def _reward(output: Path, seed: int) -> RewardConfig:
    return RewardConfig(
        output=output / "reward",
        steps=REWARD_STEPS,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        **_feedback(output, seed),
    )
