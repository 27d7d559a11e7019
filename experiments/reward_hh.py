"""A reward model from a 260K-parameter story teller and people's judgements, compared with preferring by length.

Paper:     Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 3: preference models on hh-rlhf, up to 52B
           parameters, whose accuracy grows with the logarithm of parameters and of data; Köpf et al. 2023
           (OpenAssistant), https://arxiv.org/abs/2304.07327.
Command:   python experiments/reward_hh.py FOLDER --output runs
           FOLDER holds models/stories260K (Karpathy's TinyStories Llama, as a Hugging Face folder),
           hh-rlhf/harmless-base.test.jsonl.gz and oasst/en_100_tree.jsonl.gz.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  little: the trunk was trained on children's stories alone, with a vocabulary of 512, and rows are cut at 256
           tokens. Accuracy a few points over chance at most, and no better than preferring by length.
Observed:  (6e6c1e0, two CPU cores, about 9 minutes beside other work) Accuracy is the share of held-out pairs in the
           right order, with its standard error over prompts. hh-rlhf, 259 of 1,294 prompts held out (1,018 do not fit
           the window), one epoch: mean of four heads 0.521 ± 0.031, their minimum 0.552 ± 0.031; "shorter wins" 0.571 ±
           0.028. Held-out loss 0.964 at the start, 0.696 after 65 steps; that of a coin is log 2. OASST, 23 of 113
           prompts held out, three epochs of K-wise loss: mean 0.525 ± 0.067, minimum 0.642 ± 0.069; "longer wins" 0.620
           ± 0.039. Loss 1.156, then 0.804: worse than a coin. Neither model differs significantly from chance or from
           length, and the differences between rules of combination are noise: this tests the way from people's
           judgements to a score, and gives no model to use.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from jaxalign.config.offline import RewardAlgorithm, RewardConfig
from jaxalign.config.shared import BestCheckpointConfig, OptimizerConfig
from jaxalign.data.batches.groups import Responses

LOSSES = {"pairs": "bradley_terry(centering_coef=0.01)", "ranked": "kwise"}
SETS = {"hh-rlhf": ("harmless-base.test", "pairs", 1), "oasst": ("en_100_tree", "ranked", 3)}


def reward_model(folder: Path, output: Path, name: str) -> RewardConfig:
    """Four heads on one trunk, with a seeded fifth of the prompts held out."""
    file, kind, epochs = SETS[name]
    return RewardConfig(
        model=str(folder / "models" / "stories260K"),
        data=str(folder / name / f"{file}.jsonl.gz"),
        output=output / f"reward-{name}",
        chat_template="plain",
        members=4,
        algorithm=RewardAlgorithm(LOSSES[kind]),
        epochs=epochs,
        batch_size=16,
        max_length=256,
        max_dropped=0.8,  # a token is a letter or two, so most dialogues are too long
        eval_share=0.2,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.1),
        checkpoint=BestCheckpointConfig(every=200),
    )


def report(config: RewardConfig) -> dict[str, float]:
    """Accuracy on held-out pairs by each rule of combination, with its standard error over prompts."""
    from jaxalign.commands import reward
    from jaxalign.models import heads
    from jaxalign.models.files.huggingface import read_config
    from jaxalign.rollout.rewards.scorer import load_reward_model
    from jaxalign.run.vocabulary import load_vocabulary

    held_out = reward.load_feedback(config, load_vocabulary(config, read_config(config.model))).held_out
    scorer = load_reward_model(str(config.output / "final"))
    members = scorer.rows([held_out.examples[int(e)][0] for e in held_out.groups[held_out.groups >= 0]])
    scores = {rule: np.asarray(heads.combine(members, rule)) for rule in ("mean", "min", "mean_minus_std")}
    lengths = held_out.lengths[held_out.groups >= 0]
    results = {"prompts": len(held_out), "disagreement": float(members.std(axis=1).mean())}
    for name, values in {**scores, "longer wins": lengths, "shorter wins": -lengths}.items():
        right = _share_right(values, held_out)
        results[name] = f"{right.mean():.3f} ± {right.std() / np.sqrt(len(right)):.3f}"
    return results


def _share_right(values: np.ndarray, held_out: Responses) -> np.ndarray:
    """For each prompt, the share of its pairs whose better response has the larger value; a tie counts half."""
    present, table = held_out.groups >= 0, np.full(held_out.groups.shape, np.nan)
    table[present] = values
    ranks = held_out.columns.get("ranks", np.broadcast_to(np.arange(present.shape[1]), present.shape))
    shares = []
    for row, rank in zip(table, ranks, strict=True):
        better = (rank[:, None] < rank[None]) & np.isfinite(row[:, None] - row[None])
        difference = (row[:, None] - row[None])[better]
        if len(difference):
            shares.append(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return np.array(shares)


def main() -> int:
    from jaxalign.commands import reward

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args()
    for name in SETS:
        config = reward_model(args.folder, args.output, name)
        if status := reward.main(config):
            return status
        print(name, json.dumps(report(config), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
