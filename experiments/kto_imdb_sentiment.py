"""How much positive sentiment does KTO buy for its KL, from single responses called good or bad?

Paper:     Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; the task is that of Rafailov et al. 2023,
           https://arxiv.org/abs/2305.18290, section 6.1, on reviews of Maas et al. 2011.
Command:   python experiments/kto_imdb_sentiment.py FOLDER --output runs/imdb
           FOLDER is that of dpo_imdb_sentiment.py; in the same OUTPUT both share the reference and its samples.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  as DPO: score rises with KL, a larger β stays nearer, and one standard deviation of the reference's samples
           is gained at a KL below 10 nats.
Observed:  (0e2d622, two CPU cores that others worked on too, 13 minutes after the reference and its samples; then, with
           --betas 0.2 1.0 0.3 --steps 144, 6 more) The reference scores 0.504 ± 0.007 (s.d. 0.168).
           Score at KL in nats, with standard errors of 0.007 and 0.1 to 0.35:

               β      step 24       step 48       step 72        step 96        step 120      step 144
               0.05   0.575 at 3.4  0.630 at 7.3  0.693 at 14.6  0.701 at 18.7
               0.1    0.575 at 3.3  0.633 at 6.5  0.685 at 10.3  0.682 at 10.6
               0.2    0.577 at 3.2  0.623 at 5.3  0.669 at 7.3   0.659 at 7.1   0.677 at 7.3  0.670 at 6.6
               0.3    0.578 at 3.1  0.619 at 4.3  0.662 at 5.9   0.652 at 5.7   0.663 at 6.2  0.671 at 5.9
               1      0.572 at 2.6  0.589 at 3.5  0.621 at 4.7   0.621 at 4.9   0.634 at 5.9  0.620 at 5.7

           Below 10 nats: +1.03 s.d. with β = 0.2 and +0.99 with 0.3, with a standard error of 0.06: one standard
           deviation is just reached, and not within 96 steps of the four β first traced (+0.93). Unlike DPO's, the
           responses grow no longer: 26 tokens at β = 0.2, step 120, where the reference's have 29.
"""

from imdb_frontier import Told, feedback_config, start, trace
from jaxalign.runs.preferences import run_kto

from jaxalign.config.offline import KTOAlgorithm, KTOConfig


def kto(told: Told, beta: float) -> KTOConfig:
    """On all samples, good where they score above the median; a batch has as many responses as one of DPO's."""
    algorithm = KTOAlgorithm(f"kto(beta={beta})")
    return feedback_config(
        KTOConfig, told, f"kto-{beta}", told.task.rated, 2 * told.size.batch, 3e-4, algorithm=algorithm
    )


def main() -> int:
    told = start(__doc__)
    trace("kto", told, run_kto, lambda beta: kto(told, beta))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
