"""How much positive sentiment does KTO buy for its KL, from single responses called good or bad?

Paper:     Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; the task is that of Rafailov et al. 2023,
           https://arxiv.org/abs/2305.18290, section 6.1, on reviews of Maas et al. 2011.
Command:   python experiments/kto_imdb_sentiment.py FOLDER --output runs/imdb
           FOLDER is that of dpo_imdb_sentiment.py; in the same OUTPUT both share the reference and its samples.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  as DPO: score rises with KL, a larger β stays nearer, and one standard deviation of the reference's samples
           is gained at a KL below 10 nats.
Observed:  @@OBSERVED@@
"""

from imdb_frontier import Told, feedback_config, start, trace

from jaxalign.runs.config import KTOAlgorithm, KTOConfig
from jaxalign.runs.preferences import run_kto


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
