"""Sentiment that DPO gains at a given KL from the reference: the controlled task of the DPO paper, in miniature.

Paper:     Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 6.1 and figure 2, left; reviews of Maas et
           al. 2011, https://aclanthology.org/P11-1015.
Command:   python experiments/dpo_imdb_sentiment.py FOLDER --output runs/imdb
           FOLDER holds imdb/train.jsonl.gz and imdb/test.jsonl.gz (text, label). --quick is a smoke run.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the score rises with KL for every β. After the same number of steps a smaller β is further from the
           reference. Below a KL of 10 nats the score gains one standard deviation of the reference's samples or more.
Observed:  (0e2d622, two CPU cores with other work beside it, 30 minutes: reference 14, its 7,200 samples 2.5, DPO 9)
           The reference (1.05M parameters, 2.8M tokens of pieces) has a held-out loss of 3.99 nats a token, 7.66 before
           training. The scorer labels 70.8 % of pieces of test reviews correctly, and 85.9 % of whole reviews. 512
           fresh samples of the reference score 0.504 ± 0.007 (s.d. 0.168). 73 % of all its samples are used: they end
           by themselves, and their text has the same tokens.

           Score at KL in nats; standard errors are 0.007 and 0.1 to 0.3:

               β      step 24        step 48        step 72        step 96
               0.05   0.578 at 2.5   0.618 at 7.4   0.714 at 12.8  0.720 at 14.4
               0.1    0.577 at 2.4   0.631 at 6.7   0.730 at 11.7  0.749 at 15.1
               0.3    0.574 at 2.0   0.638 at 5.0   0.705 at 8.4   0.721 at 11.0
               1      0.564 at 1.5   0.610 at 3.6   0.655 at 6.0   0.676 at 8.7

           Largest gains below 10 nats: +1.19 s.d. with β = 0.3, +1.02 with 1, +0.75 with 0.1, and +0.67 with 0.05,
           whose next point is beyond 10 nats (figures/imdb_frontier.png). Part of the gain is length: at β = 0.3 and
           step 72 responses have 42 tokens, the reference's 29, and 40 % reach the limit of 48, of the reference's 5 %.
           Their first 16 words alone score 0.667, those of the reference 0.512 (s.d. 0.157). The chosen responses of
           the 1,189 pairs score 0.679, and the best of six samples has a KL of at most log 6 - 5/6 = 0.96 nats: most of
           the KL spent here gains no sentiment. So small a model writes hardly any correct English, before and after.
"""

from imdb_frontier import Setup, feedback_config, start, trace

from jaxalign.commands import dpo
from jaxalign.config.offline import DPOAlgorithm, DPOConfig


def dpo_config(setup: Setup, beta: float) -> DPOConfig:
    """DPO on the best and the worst sample of each prompt."""
    algorithm = DPOAlgorithm(f"dpo(beta={beta})")
    return feedback_config(
        DPOConfig, setup, f"dpo-{beta}", setup.task.pairs, setup.size.batch, 3e-4, algorithm=algorithm
    )


def main() -> int:
    setup = start(__doc__)
    trace("dpo", setup, dpo.main, lambda beta: dpo_config(setup, beta))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
