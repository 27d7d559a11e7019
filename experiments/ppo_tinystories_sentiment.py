"""Happier stories from a real TinyStories model with PPO: policy, reference, reward and critic; score against KL.

Papers:    Schulman et al. 2017 (PPO), https://arxiv.org/abs/1707.06347; Ziegler et al. 2019 (the KL in the reward),
           https://arxiv.org/abs/1909.08593; Hutto and Gilbert 2014 (VADER), https://doi.org/10.1609/icwsm.v8i1.14550.
Command:   python experiments/ppo_tinystories_sentiment.py FOLDER --output runs [--seed 0] [--kl-coef 0 --kl-budget 300]
           FOLDER holds models/babyllama-char361 (969,216 parameters over characters, of EN10/BabyLlama, as a Hugging
           Face folder) and lexicons/vader_lexicon.txt.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the mean score rises by one standard deviation of the model's own samples (3.6) or more, at a KL from the
           reference of at most 15 nats per response. Without a KL term the stories become lists of happy words.
Observed:  (57b340a, two CPU cores with much other work beside it, 10 to 20 s a step of 64 stories;
           figures/rl_tinystories.png) The mean score of a step starts at 5.6, 4.8 and 5.2 for seeds 0, 1 and 2. It has
           risen by a standard deviation at step 4, 3 and 3 (9.9 at 6.7 nats, 8.5 at 5.1, 9.0 at 6.0), after 60 s when
           little else ran. At the last step within 15 nats it is 13.4 (14.0 nats, step 6), 13.8 (12.5, step 5) and
           13.1 (11.9, step 5); the budget of 15 nats then ends the run.
           Without a KL term (seed 0) the KL is 8, 48 and 139 nats after 5, 13 and 21 steps, the mean score 10, 32 and
           60, and every story becomes "They love to play and love fun. They love to play and love fun."
           With gae_lambda=0.95 the same seed is at a score of 6.2 after 7.7 nats: the reward comes 200 characters late,
           0.95^200 is 3e-5, and the critic that stands in for it explains 3 % of the returns. Hence gae_lambda=1.
"""

import argparse
from pathlib import Path

from grpo_tinystories_sentiment import OPENINGS, story_teller, write_openings

from jaxalign.commands import ppo
from jaxalign.config.on_policy import CriticConfig, PPOAlgorithm, PPOConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig


def config(folder: Path, output: Path, *, kl_coef: float, kl_budget: float | None, steps: int, seed: int) -> PPOConfig:
    """Four openings per step, sixteen stories from each, two passes over them in two minibatches."""
    return PPOConfig(
        **story_teller(folder),
        data=write_openings(output),
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
    settings = config(
        args.folder, args.output, kl_coef=args.kl_coef, kl_budget=args.kl_budget, steps=args.steps, seed=args.seed
    )
    raise SystemExit(ppo.main(settings))


if __name__ == "__main__":
    main()
