"""Steer a real TinyStories model to happy stories with PPO: policy, reference, reward and critic, against KL.

Papers:    Schulman et al. 2017 (PPO), https://arxiv.org/abs/1707.06347; Ziegler et al. 2019 (the KL in the reward),
           https://arxiv.org/abs/1909.08593; Hutto and Gilbert 2014 (VADER), https://doi.org/10.1609/icwsm.v8i1.14550.
Command:   python experiments/ppo_tinystories_sentiment.py FOLDER --output runs [--seed 0] [--kl-coef 0 --kl-budget 300]
           FOLDER holds models/babyllama-char361 (969,216 parameters over characters, of EN10/BabyLlama, as a Hugging
           Face folder) and lexicons/vader_lexicon.txt.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the mean score rises by a standard deviation of the model's own samples (3.6) or more at a KL from the
           reference of at most 15 nats a response; without a KL term the stories end as lists of happy words.
Observed:  (57b340a, two CPU cores that did much else, 10 to 20 s a step of 64 stories; figures/rl_tinystories.png)
           mean score of a step, which starts at 5.6, 4.8 and 5.2 for seeds 0, 1 and 2: a standard deviation more at
           step 4, 3 and 3 (9.9 at 6.7 nats, 8.5 at 5.1, 9.0 at 6.0), after 60 s where little else ran; the last step
           within 15 nats is at 13.4 (14.0 nats, step 6), 13.8 (12.5, step 5) and 13.1 (11.9, step 5). The budget of 15
           nats then ends the run.
           Without a KL term (seed 0) it is at 8, 48 and 139 nats after 5, 13 and 21 steps, the mean score at 10, 32 and
           60, and every story at "They love to play and love fun. They love to play and love fun."
           With gae_lambda=0.95 the same seed is at 6.2 after 7.7 nats: the reward comes 200 characters late, 0.95^200
           is 3e-5, and what stands in for it is a critic that explains 3 % of the returns. Hence 1.
"""

import argparse
from pathlib import Path

from grpo_tinystories_sentiment import OPENINGS, asked, story_teller
from jaxalign.runs import ppo

from jaxalign.config.on_policy import CriticConfig, PPOAlgorithm, PPOConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig


def config(folder: Path, output: Path, *, kl_coef: float, kl_budget: float | None, steps: int, seed: int) -> PPOConfig:
    """Four openings a step, sixteen stories of each, two passes over them in halves."""
    return PPOConfig(
        **story_teller(folder),
        data=asked(output),
        output=output / f"ppo-kl{kl_coef:g}-seed{seed}",
        steps=steps,
        batch_size=len(OPENINGS),
        n=16,
        seed=seed,
        kl_budget=kl_budget,
        algorithm=PPOAlgorithm(
            kl_coef=kl_coef, gae_lambda=1.0, normalise_scores=True, value_coef=1.0, epochs=2, minibatches=2
        ),
        critic=CriticConfig(learning_rate=3e-4),
        eval_every=5,
        optimizer=OptimizerConfig(learning_rate=3e-5, schedule="constant"),
        checkpoint=CheckpointConfig(every=50),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--kl-budget", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = config(
        args.folder, args.output, kl_coef=args.kl_coef, kl_budget=args.kl_budget, steps=args.steps, seed=args.seed
    )
    raise SystemExit(ppo.run(made))


if __name__ == "__main__":
    main()
