"""Preparation of the over-optimisation experiment: samples of the reference, compared by gold, and proxies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from overoptimisation_rewards import gold, members

from jaxalign.commands import reward
from jaxalign.config.offline import RewardConfig
from jaxalign.config.shared import BestCheckpointConfig, OptimizerConfig
from jaxalign.models import heads
from jaxalign.rollout.respond import Sampling, load_model, respond

OPENINGS = ("Once upon a time", "One day,", "There was a", "Lily and Tom")
RESPONSE, LENGTH = 64, 96  # tokens of a response, and of an opening with its response
WRONG = 0.25  # share of wrong labels
SEEDS = {"pool": 1, "compared": 2}


class Size(NamedTuple):
    """Sizes of data, models and optimisation."""

    pool: int = 4096  # samples for each opening; the best of n are chosen from them
    ns: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    pairs: int = 2048  # compared samples
    epochs: int = 3
    widths: tuple[int, ...] = (8, 16, 48)  # of proxies
    ensemble: int = 16  # the width of the ensemble's members
    members: int = 4
    alone: int = 3  # members on which alone a policy is optimised, for comparison
    rules: tuple[str, ...] = ("mean", "min", "mean_minus_std")
    steps: int = 45  # of reinforcement learning
    n: int = 16  # responses to each opening per step


QUICK = Size(
    pool=64,
    ns=(1, 4, 16),
    pairs=96,
    epochs=4,
    widths=(8,),
    ensemble=8,
    members=2,
    alone=1,
    rules=("min",),
    steps=3,
    n=4,
)


class Task(NamedTuple):
    """Inputs and outputs of the experiment."""

    model: Path  # the reference
    lexicon: Path
    output: Path
    size: Size


def sample(task: Task, name: str, count: int) -> list[dict]:
    """Rows of `count` responses of the reference to each opening, with gold rewards; drawn once, then read again."""
    path = task.output / f"{name}.jsonl"
    if not path.exists():
        model = load_model(str(task.model), dtype="float32")
        responses = respond(model, OPENINGS, Sampling(RESPONSE), n=count, batch_size=256, seed=SEEDS[name])
        prompts, texts = [opening for opening in OPENINGS for _ in range(count)], [text for text, _ in responses]
        known = gold(prompts, texts, path=str(task.lexicon))
        rows = zip(prompts, texts, known, strict=True)
        write(path, [{"prompt": p, "response": text, "gold": value} for p, text, value in rows])
    return [json.loads(row) for row in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(rows: list[dict], seed: int = 0) -> list[dict]:
    """Pairs of neighbouring rows, without ties. A share WRONG of them is labelled the wrong way round."""
    draw, pairs = np.random.default_rng(seed), []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        if first["gold"] == second["gold"]:
            continue
        first_wins = (first["gold"] > second["gold"]) ^ (draw.random() < WRONG)
        better, worse = (first, second) if first_wins else (second, first)
        pairs.append({"prompt": first["prompt"], "chosen": better["response"], "rejected": worse["response"]})
    return pairs


def start(task: Task, width: int) -> str:
    """Writes the start of a proxy, a two-layer decoder with the reference's tokenizer; returns `config:FOLDER`."""
    folder = task.output / f"start-{width}"
    folder.mkdir(exist_ok=True)
    for file in task.model.glob("*token*.json"):
        shutil.copy(file, folder)
    shutil.copy(task.model / "generation_config.json", folder)
    config = json.loads((task.model / "config.json").read_text())
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": width // 8, "num_key_value_heads": width // 8}
    (folder / "config.json").write_text(json.dumps(config | shape))
    return f"config:{folder}"


def train_proxy(task: Task, width: int, seed: int) -> str:
    """Trains a proxy on the compared samples and returns its folder. The seed sets weights, order and held-out data."""
    config = RewardConfig(
        model=start(task, width),
        data=str(task.output / "pairs.jsonl"),
        output=task.output / f"proxy-{width}-{seed}",
        epochs=task.size.epochs,
        batch_size=64,
        max_length=LENGTH,
        packing=False,
        remat="none",
        eval_share=0.1,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, weight_decay=0.1),
        checkpoint=BestCheckpointConfig(every=0),
    )
    finish(reward.main(config))
    return str(config.output / "final")


def finish(status: int) -> None:
    """Ends the program with the run's exit status if a signal stopped the run; the same command continues it."""
    if status:
        raise SystemExit(status)


def proxies(task: Task) -> dict[str, tuple[list[str], str]]:
    """Name -> (folders of its members, rule): a model of each width, an ensemble's members, the ensemble by each rule.

    Members share only the pairs. Heads on one trunk (`--members 4`) would share the trunk's mistakes as well.
    """
    write(task.output / "pairs.jsonl", compare(sample(task, "compared", task.size.pairs * 2 // len(OPENINGS))))
    width, seeds = task.size.ensemble, range(task.size.members)
    alone = {named(w): ([train_proxy(task, w, 0)], "mean") for w in task.size.widths}
    alone |= {named(width, seed): ([train_proxy(task, width, seed)], "mean") for seed in seeds}
    folders = [alone[named(width, seed)][0][0] for seed in seeds]
    return alone | {f"{rule} of {len(folders)}": (folders, rule) for rule in task.size.rules}


def optimised(size: Size) -> list[str]:
    """Names of the proxies on which a policy is optimised; best of n is measured for all proxies."""
    alone = [named(size.ensemble, seed) for seed in range(size.alone)]
    names = [*map(named, size.widths), *[f"{rule} of {size.members}" for rule in size.rules], *alone]
    return list(dict.fromkeys(names))


def named(width: int, seed: int = 0) -> str:
    return f"width {width}" + f", seed {seed}" * (seed > 0)


class Pool(NamedTuple):
    """Samples of the reference: their gold rewards and their scores by each proxy."""

    gold: np.ndarray  # Float64[P N], of N samples for each opening
    scores: dict[str, np.ndarray]  # Float64[P N], by proxy

    def normal(self, values: np.ndarray, proxy: str | None = None) -> np.ndarray:
        """Values in standard deviations of the pool from its mean: of gold, or of a proxy's scores."""
        pool = self.gold if proxy is None else self.scores[proxy]
        return (values - pool.mean()) / pool.std()


def score(task: Task, proxies: dict[str, tuple[list[str], str]]) -> Pool:
    """Gold rewards and all proxies' scores of the pool; scores are computed once, then read again."""
    rows = sample(task, "pool", task.size.pool)
    prompts, texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    by_folder: dict[str, np.ndarray] = {}
    for folder in {folder for folders, _ in proxies.values() for folder in folders}:
        path = Path(folder).parent / "pool.npy"
        if not path.exists():
            np.save(path, members(prompts, texts, [folder]))
        by_folder[folder] = np.load(path)
    scores = {
        name: _by_opening(heads.combine(np.concatenate([by_folder[folder] for folder in folders], axis=1), rule))
        for name, (folders, rule) in proxies.items()
    }
    return Pool(_by_opening([row["gold"] for row in rows]), scores)


def _by_opening(values: Any) -> np.ndarray:
    """Values in the order of `sample`, as Float64[P N]."""
    return np.asarray(values, np.float64).reshape(len(OPENINGS), -1)


def accuracy(pool: Pool, name: str) -> float:
    """Share of pairs of the reference's samples that a proxy orders as gold does; 1/2 for a random proxy."""
    known, scores = pool.gold, pool.scores[name]
    half = known.shape[1] // 2
    by_gold, by_proxy = known[:, :half] - known[:, half:], scores[:, :half] - scores[:, half:]
    return float(np.mean((by_gold * by_proxy > 0)[by_gold != 0]))
