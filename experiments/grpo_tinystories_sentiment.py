"""Happier stories from a real TinyStories model: GRPO and RLOO, rewarded by the summed VADER valence of the words.

Papers:    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300; Ahmadian et al. 2024 (RLOO),
           https://arxiv.org/abs/2402.14740; Hutto and Gilbert 2014 (VADER),
           https://doi.org/10.1609/icwsm.v8i1.14550.
Command:   python experiments/grpo_tinystories_sentiment.py FOLDER --output runs [--method rloo] [--kl-coef 0]
           FOLDER holds models/babyllama-char361 (969,216 parameters over characters, of EN10/BabyLlama, as a Hugging
           Face folder) and lexicons/vader_lexicon.txt.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the mean score rises by one standard deviation of the model's own samples (3.6) or more, at a KL from the
           reference of at most 15 nats per response. Without a KL term the stories become lists of happy words.
Observed:  (57b340a, two CPU cores with much other work beside it, 4 to 7 s a step of 64 stories;
           figures/rl_tinystories.png) The mean score of a step starts at 5.6, 4.8 and 5.2 for seeds 0, 1 and 2.
           --method grpo: it has risen by a standard deviation at 4.3, 3.2 and 2.2 nats per response (steps 9, 8 and 7;
           37 to 69 s). At the last step within 15 nats it is 15.8 (13.9 nats), 18.2 (14.9) and 17.2 (14.0); the budget
           of 15 nats then ends the run. --method rloo: by a standard deviation at 3.4, 3.3 and 3.7 nats (steps 8, 8 and
           7), and at the last step 17.0 (13.3), 16.8 (14.8) and 14.5 (12.9).
           At 18bc3cb, with a learning rate of 2e-4 and no budget, GRPO is at 59 and 228 nats after 49 steps, and writes
           "loved best friends loved to love best friends loved to fun fun".
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxalign.commands import grpo
from jaxalign.config.on_policy import GRPOAlgorithm, GRPOConfig, RLOOAlgorithm, RLOOConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig

OPENINGS = ("Once upon a time", "One day,", "There was a", "Lily and Tom")


def story_teller(folder: Path) -> dict[str, Any]:
    """Settings of the model, of its reward and of the length of its stories."""
    return {
        "model": str(folder / "models" / "babyllama-char361"),
        "reward": f"lexicon(path={str(folder / 'lexicons' / 'vader_lexicon.txt')!r})",
        "max_length": 256,
        "max_new_tokens": 224,
        "slots": 64,
    }


def write_openings(output: Path) -> str:
    """Writes the prompts, and returns the path of their file."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "openings.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in OPENINGS))
    return str(prompts)


def config(
    folder: Path, output: Path, *, method: str, kl_coef: float, kl_budget: float, steps: int, seed: int
) -> GRPOConfig:
    """Four openings per step, sixteen stories from each."""
    kind, algorithm = {"grpo": (GRPOConfig, GRPOAlgorithm), "rloo": (RLOOConfig, RLOOAlgorithm)}[method]
    return kind(
        **story_teller(folder),
        data=write_openings(output),
        output=output / f"{method}-kl{kl_coef:g}-seed{seed}",
        steps=steps,
        batch_size=len(OPENINGS),
        n=16,
        seed=seed,
        kl_budget=kl_budget,
        algorithm=algorithm(aggregate="sequence", kl_coef=kl_coef),
        eval_every=5,
        optimizer=OptimizerConfig(learning_rate=3e-5, schedule="constant", warmup_steps=5),
        checkpoint=CheckpointConfig(every=50),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--kl-budget", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = config(
        args.folder,
        args.output,
        method=args.method,
        kl_coef=args.kl_coef,
        kl_budget=args.kl_budget,
        steps=args.steps,
        seed=args.seed,
    )
    raise SystemExit(grpo.main(settings))


if __name__ == "__main__":
    main()
