"""Sentiment that KTO gains at a given KL from the reference, from single responses labelled good or bad.

Paper:     Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; the task is that of Rafailov et al. 2023,
           https://arxiv.org/abs/2305.18290, section 6.1, on reviews of Maas et al. 2011.
Command:   python experiments/kto_imdb_sentiment.py FOLDER --output runs/imdb
           FOLDER is that of dpo_imdb_sentiment.py. With the same --output both share the reference and its samples.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  as for DPO: the score rises with KL, a larger β stays nearer to the reference, and below 10 nats the score
           gains one standard deviation of the reference's samples.
Observed:  (0e2d622, two CPU cores with other work beside it; 13 minutes after the reference and its samples, then 6
           more with --betas 0.2 1.0 0.3 --steps 144) The reference scores 0.504 ± 0.007 (s.d. 0.168).
           Score at KL in nats; standard errors are 0.007 and 0.1 to 0.35:

               β      step 24       step 48       step 72        step 96        step 120      step 144
               0.05   0.575 at 3.4  0.630 at 7.3  0.693 at 14.6  0.701 at 18.7
               0.1    0.575 at 3.3  0.633 at 6.5  0.685 at 10.3  0.682 at 10.6
               0.2    0.577 at 3.2  0.623 at 5.3  0.669 at 7.3   0.659 at 7.1   0.677 at 7.3  0.670 at 6.6
               0.3    0.578 at 3.1  0.619 at 4.3  0.662 at 5.9   0.652 at 5.7   0.663 at 6.2  0.671 at 5.9
               1      0.572 at 2.6  0.589 at 3.5  0.621 at 4.7   0.621 at 4.9   0.634 at 5.9  0.620 at 5.7

           Largest gains below 10 nats: +1.03 s.d. with β = 0.2 and +0.99 with 0.3, with a standard error of 0.06. So
           one standard deviation is just reached; the four β that were traced first, for 96 steps, reached +0.93.
           Unlike DPO's, the responses grow no longer: 26 tokens at β = 0.2, step 120, the reference's 29.
"""

from imdb_frontier import Setup, feedback_config, start, trace

from jaxalign.commands import kto
from jaxalign.config.offline import KTOAlgorithm, KTOConfig


def kto_config(setup: Setup, beta: float) -> KTOConfig:
    """KTO on all samples, good if they score above the median. A batch has as many responses as one of DPO."""
    algorithm = KTOAlgorithm(f"kto(beta={beta})")
    return feedback_config(
        KTOConfig, setup, f"kto-{beta}", setup.task.rated, 2 * setup.size.batch, 3e-4, algorithm=algorithm
    )


def main() -> int:
    setup = start(__doc__)
    trace("kto", setup, kto.main, lambda beta: kto_config(setup, beta))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
