"""Over-optimisation of a proxy reward: Gao et al.'s curves in miniature, for proxies of several sizes and ensembles.

Papers:    Gao, Schulman and Hilton 2022, https://arxiv.org/abs/2210.10760; Coste et al. 2023 (ensembles, and the 25 %
           of labels that are wrong), https://arxiv.org/abs/2310.02743.
Command:   python experiments/rm_overoptimisation.py FOLDER --output runs/overoptimisation
           FOLDER holds models/stories260K and lexicons/vader_lexicon.txt. --quick is a smoke run.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the proxies' scores rise without end, while gold rises, turns and falls: as d (α - β d) for the best of n, as
           d (α - β log d) for reinforcement learning, with d = √KL. With larger proxies and ensembles it falls later.
Observed:  (f48576e, two CPU cores with other work beside it; one seed unless named, the same pairs for all)
           Rewards are in standard deviations of the reference's samples, 3.55, from their mean, 0.65. All proxies
           (5,664, 14,368 and 80,160 parameters) order 64 to 65 % of its pairs as gold does, the ensembles 66 to 67 %.
           Best of n (figures/rm_overoptimisation.png): the fits are off by 0.03. For the best of 1,024, at d = 2.44,
           gold is 0.83, 0.75 and 1.15 ± 0.16 for widths 8, 16 and 48, and the proxies' scores are 2.3, 2.3 and 2.0. β
           is 0.16, 0.18 and 0.07 ± 0.05: larger is better by two standard errors at most. The four members of width 16
           reach 0.75 to 1.01, their ensembles 0.94 (mean), 1.04 (min) and 1.06 (mean_minus_std), which does not differ
           significantly from the best member. Gold flattens; n up to 1,024 does not show whether it falls.
           Reinforcement learning: gold falls, for all eight. Mean gold of the steps at d from 1 to 3, 3 to 5, 5 to 7;
           standard errors are 0.03 to 0.06 over responses, and unknown over runs:

               width 8            0.62   1.01   0.97        mean of 4             0.59   0.99   0.84
               width 48           0.72   1.01   0.32        min of 4              0.57   0.90   0.85
               width 16           0.60   0.81   0.18        mean_minus_std of 4   0.65   0.95   0.72
               width 16, seed 1   0.57   0.82   0.95
               width 16, seed 2   0.68   0.78   0.08

           Policies on ensembles reach 0.1 to 0.2 more than on a member alone, and keep it at distances where two
           members of three have lost it. At the end, d = 7.5 to 8.3, they have lost it too: gold is -0.1 to 0.1, and
           the proxies' scores are 2.9 to 3.6. The worst member ends at gold -7.8 ± 0.2, d = 16.9, and a score of +4.0.
           No order by width is seen. The fits are off by 0.16 to 0.32 and flatter than the data, which fall suddenly: α
           0.56 and β 0.23 ± 0.02 (width 8), 0.56 and 0.28 (16), 0.70 and 0.35 (48), 0.66 and 0.31 ± 0.03 (mean of 4).
           Width 16's policy writes "Lily loved to play with her friends. One day, she loved to play with her friends."
           Limits: a factor of 14 in size with one seed each cannot show how α and β grow with size, and gold is a
           formula, not people's judgement. Proxies miss repeated words by construction: their pairs have few of them.
           Some policies had 48 or 60 steps and are read up to 45; at a constant rate that equals stopping there.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import overoptimisation_curves as curves
from overoptimisation_curves import Curve
from overoptimisation_proxies import (
    LENGTH,
    OPENINGS,
    QUICK,
    RESPONSE,
    Pool,
    Size,
    Task,
    accuracy,
    finish,
    named,
    optimised,
    proxies,
    score,
    write,
)  # fmt: skip

from jaxalign.commands import grpo
from jaxalign.config.on_policy import RLOOConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig
from jaxalign.run import devices
from jaxalign.training.metrics import read_rows

log = logging.getLogger("jaxalign.experiments")

RESAMPLED = 100  # resampled curves, for standard errors


def optimise(task: Task, name: str, folders: list[str], rule: str) -> list[dict]:
    """Optimises the reference on a proxy by RLOO without a KL term; returns a row for each step's responses.

    A row has `d`, and `proxy` and `gold`, each [mean, its standard error].
    """
    output = task.output / f"rl-{name}"
    openings, notes = task.output / "openings.jsonl", task.output / f"rl-{name}.jsonl"
    write(openings, [{"prompt": opening} for opening in OPENINGS])
    settings = {"folders": tuple(folders), "rule": rule, "lexicon_path": str(task.lexicon), "notes": str(notes)}
    config = RLOOConfig(
        model=str(task.model),
        data=str(openings),
        output=output,
        reward=f"overoptimisation_rewards:proxy({', '.join(f'{k}={v!r}' for k, v in settings.items())})",
        steps=task.size.steps,
        batch_size=len(OPENINGS),
        n=task.size.n,
        max_length=LENGTH,
        max_new_tokens=RESPONSE,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=1.5e-4, schedule="constant", warmup_steps=2),
        checkpoint=CheckpointConfig(every=0),
    )
    finish(grpo.main(config))
    steps = read_rows(output / "metrics.jsonl")
    rows = [json.loads(row) for row in notes.read_text().splitlines()][
        -len(steps) :
    ]  # rows of an earlier start come first
    # a mean of log π/π_ref over few responses may be below 0, but the KL that it estimates is not
    return [{"d": max(step["kl"], 0.0) ** 0.5, **row} for step, row in zip(steps, rows, strict=True)]


def best_of_n_curve(pool: Pool, name: str, ns: tuple[int, ...]) -> Curve:
    """Curve of the best of n by a proxy. Standard errors are over pools resampled from the pool."""
    d = np.sqrt(curves.best_of_n_kl(np.array(ns)))
    known, scores = pool.normal(pool.gold), pool.normal(pool.scores[name], name)
    draw, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        chosen = draw.integers(known.shape[1], size=known.shape)
        drawn = (np.take_along_axis(values, chosen, axis=1) for values in (known, scores))
        resampled.append(curves.best_of_n(*drawn, ns))
    means = curves.best_of_n(known, scores, ns)
    return Curve(
        "best-of-n", name, d.tolist(), curves.best_of_n(scores, scores, ns).tolist(), means.tolist(),
        np.std(resampled, axis=0, ddof=1).tolist(), curves.fit("best-of-n", d, means),
        curves.spread("best-of-n", np.broadcast_to(d, (RESAMPLED, len(d))), np.array(resampled)),
    )  # fmt: skip


def rl_curve(pool: Pool, name: str, rows: list[dict]) -> Curve:
    """Curve of reinforcement learning on a proxy. Standard errors of the fit are over resampled steps."""
    d, (known, errors), (scores, _) = (
        np.array([row["d"] for row in rows]),
        np.array([row["gold"] for row in rows]).T,
        np.array([row["proxy"] for row in rows]).T,
    )
    known, scores, errors = pool.normal(known), pool.normal(scores, name), errors / pool.gold.std()
    chosen = np.random.default_rng(0).integers(len(d), size=(RESAMPLED, len(d)))
    return Curve(
        "rl", name, d.tolist(), scores.tolist(), known.tolist(), errors.tolist(),
        curves.fit("rl", d, known), curves.spread("rl", d[chosen], known[chosen]),
    )  # fmt: skip


def summary(traced: list[Curve], members: list[str], rules: list[str]) -> str:
    """Largest gold rewards of the fits, by rule and by members alone, and mean gold rewards at three distances."""
    lines = []
    for form in curves.FORMS:
        tops = {c.proxy: curves.top(c) for c in traced if c.form == form}
        alone = np.array([tops[name] for name in members if name in tops])
        by_rule = ", ".join(f"{name} {tops[name]:+.2f}" for name in rules)
        lines.append(
            f"{form}: members alone {alone.min():+.2f} to {alone.max():+.2f}, mean {alone.mean():+.2f}; {by_rule}"
        )
    lines += ["gold reward of reinforcement learning, over the steps at d from 1 to 3, 3 to 5 and 5 to 7:"]
    for curve in (c for c in traced if c.form == "rl"):
        means = [curves.within(curve, low, low + 2) for low in (1, 3, 5)]
        lines.append(f"{curve.proxy:20s} " + ", ".join(f"{mean:+.2f} ± {error:.2f}" for mean, error in means))
    return "\n".join(["largest gold reward of the fits:", *lines])


def report(task: Task, pool: Pool, traced: list[Curve]) -> None:
    (task.output / "curves.json").write_text(json.dumps([c._asdict() for c in traced], indent=1) + "\n")
    log.info("gold reward of the reference's samples: %.2f ± %.2f (s.d.)", pool.gold.mean(), pool.gold.std())
    for name in pool.scores:
        log.info("%-24s orders %.1f%% of pairs as gold does", name, 100 * accuracy(pool, name))
    for curve in traced:
        log.info("%s", curves.line(curve))
    members = [named(task.size.ensemble, seed) for seed in range(task.size.members)]
    rules = [name for name in pool.scores if name.endswith(f" of {task.size.members}")]
    panels = []
    for form, title in {"best-of-n": "best of n", "rl": "reinforcement learning"}.items():
        by_name = {c.proxy: c for c in traced if c.form == form}
        grown, combined, alone = (
            [by_name[name] for name in names if name in by_name]
            for names in (map(named, task.size.widths), rules, members)
        )
        panels.append((f"{title}, proxies that grow", grown, []))
        panels.append((f"{title}, ensembles of width {task.size.ensemble}", combined, alone))
    log.info("%s", summary(traced, members, rules))
    curves.draw(panels, task.output / "rm_overoptimisation.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--quick", action="store_true", help="a smoke run, whose numbers mean nothing")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("this experiment draws a picture: pip install matplotlib") from None
    devices.start()
    devices.start_log()
    args.output.mkdir(parents=True, exist_ok=True)
    task = Task(
        args.folder / "models" / "stories260K", args.folder / "lexicons" / "vader_lexicon.txt", args.output,
        QUICK if args.quick else Size(),
    )  # fmt: skip
    rewards = proxies(task)
    pool = score(task, rewards)
    traced = [best_of_n_curve(pool, name, task.size.ns) for name in rewards]
    for name in optimised(task.size):
        folders, rule = rewards[name]
        traced.append(rl_curve(pool, name, optimise(task, name.replace(" ", "-").replace(",", ""), folders, rule)))
    report(task, pool, traced)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
