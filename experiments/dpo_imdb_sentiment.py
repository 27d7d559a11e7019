"""How much positive sentiment does DPO buy for its KL? The controlled task of the DPO paper, in miniature.

Paper:     Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 6.1 and figure 2, left; reviews of Maas et
           al. 2011, https://aclanthology.org/P11-1015.
Command:   python experiments/dpo_imdb_sentiment.py FOLDER --output runs/imdb
           FOLDER holds imdb/train.jsonl.gz and imdb/test.jsonl.gz (text, label).
"""

from imdb_frontier import Told, feedback_config, start, trace

from jaxalign.runs.config import DPOAlgorithm, DPOConfig
from jaxalign.runs.preferences import run_dpo


def dpo(told: Told, beta: float) -> DPOConfig:
    """On the best and the worst sample of each prompt."""
    algorithm = DPOAlgorithm(f"dpo(beta={beta})")
    return feedback_config(DPOConfig, told, f"dpo-{beta}", told.task.pairs, told.size.batch, 3e-4, algorithm=algorithm)


def main() -> int:
    told = start(__doc__)
    trace("dpo", told, run_dpo, lambda beta: dpo(told, beta))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
