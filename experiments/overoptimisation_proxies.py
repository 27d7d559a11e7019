"""What comes before optimisation: samples of the reference, compared by gold, and the proxies that learn from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxalign.runs import reward
from overoptimisation_rewards import gold, members

from jaxalign.config.offline import RewardConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig
from jaxalign.models import heads
from jaxalign.rollout.respond import Sampling, load_model, respond

OPENINGS = ("Once upon a time", "One day,", "There was a", "Lily and Tom")
RESPONSE, LENGTH = 64, 96  # tokens; LENGTH has room for an opening too
WRONG = 0.25  # share of the labels
SEEDS = {"pool": 1, "compared": 2}


class Size(NamedTuple):
    """How much of everything."""

    pool: int = 4096  # samples to each opening, that the best of n are chosen from
    ns: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    pairs: int = 2048  # compared samples
    epochs: int = 3
    widths: tuple[int, ...] = (8, 16, 48)  # of proxies
    ensemble: int = 16  # the width of the ensemble's members
    members: int = 4
    alone: int = 3  # members that a policy is optimised on alone, for comparison
    rules: tuple[str, ...] = ("mean", "min", "mean_minus_std")
    steps: int = 45  # of reinforcement learning
    n: int = 16  # responses to each opening in a step


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
    """What everything is made from, and where."""

    model: Path  # the reference
    lexicon: Path
    output: Path
    size: Size


def sample(task: Task, name: str, count: int) -> list[dict]:
    """`count` responses of the reference to each opening with their gold reward, in turn; made once."""
    path = task.output / f"{name}.jsonl"
    if not path.exists():
        model = load_model(str(task.model), dtype="float32")
        found = respond(model, OPENINGS, Sampling(RESPONSE), n=count, batch_size=256, seed=SEEDS[name])
        prompts, texts = [opening for opening in OPENINGS for _ in range(count)], [text for text, _ in found]
        known = gold(prompts, texts, path=str(task.lexicon))
        rows = zip(prompts, texts, known, strict=True)
        write(path, [{"prompt": p, "response": text, "gold": value} for p, text, value in rows])
    return [json.loads(row) for row in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(rows: list[dict], seed: int = 0) -> list[dict]:
    """Neighbours as pairs, of which a share of WRONG is labelled the wrong way round; a tie is no pair."""
    draw, pairs = np.random.default_rng(seed), []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        if one["gold"] == other["gold"]:
            continue
        better, worse = (one, other) if (one["gold"] > other["gold"]) ^ (draw.random() < WRONG) else (other, one)
        pairs.append({"prompt": one["prompt"], "chosen": better["response"], "rejected": worse["response"]})
    return pairs


def start(task: Task, width: int) -> str:
    """`config:FOLDER` of a two-layer decoder with the reference's tokenizer."""
    folder = task.output / f"start-{width}"
    folder.mkdir(exist_ok=True)
    for file in task.model.glob("*token*.json"):
        shutil.copy(file, folder)
    shutil.copy(task.model / "generation_config.json", folder)
    held = json.loads((task.model / "config.json").read_text())
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": width // 8, "num_key_value_heads": width // 8}
    (folder / "config.json").write_text(json.dumps(held | shape))
    return f"config:{folder}"


def train_proxy(task: Task, width: int, seed: int) -> str:
    """The folder of a reward model of the compared samples: another seed, other weights, order and held-out pairs."""
    config = RewardConfig(
        model=start(task, width),
        data=str(task.output / "pairs.jsonl"),
        output=task.output / f"proxy-{width}-{seed}",
        epochs=task.size.epochs,
        batch_size=64,
        max_length=LENGTH,
        packing=False,
        remat="none",
        samples=0,
        eval_share=0.1,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=0),
    )
    finish(reward.run(config))
    return str(config.output / "final")


def finish(status: int) -> None:
    """Ends the program as the run ended, if a signal stopped it; the same command continues."""
    if status:
        raise SystemExit(status)


def proxies(task: Task) -> dict[str, tuple[list[str], str]]:
    """Name -> (folders of its members, their rule): a model of each width, an ensemble's members, and it by each rule.

    The members share nothing but the pairs: heads on one trunk (`--members 4`) would share what it gets wrong.
    """
    write(task.output / "pairs.jsonl", compare(sample(task, "compared", task.size.pairs * 2 // len(OPENINGS))))
    width, seeds = task.size.ensemble, range(task.size.members)
    found = {named(w): ([train_proxy(task, w, 0)], "mean") for w in task.size.widths}
    found |= {named(width, seed): ([train_proxy(task, width, seed)], "mean") for seed in seeds}
    of = [found[named(width, seed)][0][0] for seed in seeds]
    return found | {f"{rule} of {len(of)}": (of, rule) for rule in task.size.rules}


def optimised(size: Size) -> list[str]:
    """Which proxies a policy is optimised on; the best of n is looked at for all."""
    alone = [named(size.ensemble, seed) for seed in range(size.alone)]
    names = [*map(named, size.widths), *[f"{rule} of {size.members}" for rule in size.rules], *alone]
    return list(dict.fromkeys(names))


def named(width: int, seed: int = 0) -> str:
    return f"width {width}" + f", seed {seed}" * (seed > 0)


class Pool(NamedTuple):
    """Samples of the reference, their gold reward and what each reward model says of them."""

    gold: np.ndarray  # Float64[P N], of N samples to each opening
    scores: dict[str, np.ndarray]  # Float64[P N], by proxy

    def normal(self, values: np.ndarray, proxy: str | None = None) -> np.ndarray:
        """In standard deviations of the samples from their mean: of gold, or of a proxy's score."""
        of = self.gold if proxy is None else self.scores[proxy]
        return (values - of.mean()) / of.std()


def score(task: Task, found: dict[str, tuple[list[str], str]]) -> Pool:
    """What all proxies say of the pool."""
    rows = sample(task, "pool", task.size.pool)
    prompts, texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    told: dict[str, np.ndarray] = {}
    for folder in {folder for folders, _ in found.values() for folder in folders}:
        path = Path(folder).parent / "pool.npy"
        if not path.exists():
            np.save(path, members(prompts, texts, [folder]))
        told[folder] = np.load(path)
    table = lambda values: np.asarray(values, np.float64).reshape(len(OPENINGS), -1)  # noqa: E731
    scores = {
        name: table(heads.combine(np.concatenate([told[folder] for folder in folders], axis=1), rule))
        for name, (folders, rule) in found.items()
    }
    return Pool(table([row["gold"] for row in rows]), scores)


def accuracy(pool: Pool, name: str) -> float:
    """Share of pairs of the reference's samples that a proxy orders as gold does; 1/2 for a coin."""
    known, scores = pool.gold, pool.scores[name]
    half = known.shape[1] // 2
    better, said = known[:, :half] - known[:, half:], scores[:, :half] - scores[:, half:]
    return float(np.mean((better * said > 0)[better != 0]))
