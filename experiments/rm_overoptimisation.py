"""A proxy reward that is optimised too far: Gao et al.'s curves in miniature, for proxies that grow and for ensembles.

Papers:    Gao, Schulman and Hilton 2022, https://arxiv.org/abs/2210.10760; Coste et al. 2023 (ensembles, and the 25 %
           of labels that are wrong), https://arxiv.org/abs/2310.02743.
Command:   python experiments/rm_overoptimisation.py FOLDER --output runs/overoptimisation
           FOLDER holds models/stories260K and lexicons/vader_lexicon.txt. --quick is a smoke run.
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  proxies say that their policies grow better without end, while gold rises, turns and falls: d (α - β d) of
           the best of n, d (α - β log d) of reinforcement learning, d = √KL. Larger proxies and ensembles fall later.
Observed:  (f48576e, two CPU cores that others worked on too; one seed where none is named, the same pairs for all)
           Rewards are in standard deviations of the reference's samples, 3.55, from their mean, 0.65. All proxies
           (5,664, 14,368 and 80,160 parameters) order 64 to 65 % of its pairs as gold does, the ensembles 66 to 67 %.
           Best of n (figures/rm_overoptimisation.png): the fits are off by 0.03. Of 1,024, at d = 2.44, gold is 0.83,
           0.75 and 1.15 ± 0.16 for widths 8, 16 and 48, where the proxies say 2.3, 2.3 and 2.0. β is 0.16, 0.18 and
           0.07 ± 0.05: larger is better by two standard errors at most. The four members of width 16 reach 0.75 to
           1.01, their ensembles 0.94 (mean), 1.04 (min) and 1.06 (mean_minus_std): not told apart from the best
           member. Gold flattens; whether it falls, n up to 1,024 does not say.
           Reinforcement learning: it does fall, for all eight. Mean gold of the steps at d from 1 to 3, 3 to 5, 5 to 7,
           with standard errors of 0.03 to 0.06 over responses, none over runs:

               width 8            0.62   1.01   0.97        mean of 4             0.59   0.99   0.84
               width 48           0.72   1.01   0.32        min of 4              0.57   0.90   0.85
               width 16           0.60   0.81   0.18        mean_minus_std of 4   0.65   0.95   0.72
               width 16, seed 1   0.57   0.82   0.95
               width 16, seed 2   0.68   0.78   0.08

           Policies on ensembles reach 0.1 to 0.2 more than on a member alone, and keep it where two members of three
           have lost it; at the end, d = 7.5 to 8.3, they have lost it too (-0.1 to 0.1, and their proxies say 2.9 to
           3.6). The worst member ends at -7.8 ± 0.2, d = 16.9, and says +4.0. No order by width is seen. The fits are
           off by 0.16 to 0.32, and flatter than what they fit, which falls suddenly: α 0.56 and β 0.23 ± 0.02 (width
           8), 0.56 and 0.28 (16), 0.70 and 0.35 (48), 0.66 and 0.31 ± 0.03 (mean of 4).
           Width 16's policy writes "Lily loved to play with her friends. One day, she loved to play with her friends."
           What this cannot show: how α and β grow with size, over a factor of 14 and one seed each; what gold is to
           people. That proxies miss stammering is by construction: their pairs hold little of it. Some policies had 48
           or 60 steps and are read up to 45, which at a constant rate is the same as stopping there.
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

from jaxalign.config.on_policy import RLOOConfig
from jaxalign.config.shared import CheckpointConfig, OptimizerConfig
from jaxalign.run import devices, rl
from jaxalign.training.metrics import read_rows

log = logging.getLogger("jaxalign.experiments")

RESAMPLED = 100  # curves that standard errors are of


def optimise(task: Task, name: str, folders: list[str], rule: str) -> list[dict]:
    """Reinforcement learning of the reference on a proxy, without a KL term: a row for each step's responses.

    A row has `d`, and `proxy` and `gold`, [mean, its standard error] each.
    """
    output = task.output / f"rl-{name}"
    openings, notes = task.output / "openings.jsonl", task.output / f"rl-{name}.jsonl"
    write(openings, [{"prompt": opening} for opening in OPENINGS])
    told = {"folders": tuple(folders), "rule": rule, "lexicon_path": str(task.lexicon), "notes": str(notes)}
    config = RLOOConfig(
        model=str(task.model),
        data=str(openings),
        output=output,
        reward=f"overoptimisation_rewards:proxy({', '.join(f'{k}={v!r}' for k, v in told.items())})",
        steps=task.size.steps,
        batch_size=len(OPENINGS),
        n=task.size.n,
        max_length=LENGTH,
        max_new_tokens=RESPONSE,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=1.5e-4, schedule="constant", warmup_steps=2),
        checkpoint=CheckpointConfig(every=0),
    )
    finish(rl.run_rloo(config))
    steps = read_rows(output / "metrics.jsonl")
    rows = [json.loads(row) for row in notes.read_text().splitlines()][-len(steps) :]  # an earlier start's come first
    # the mean of log π/π_ref over few responses may be below 0, the KL that it estimates may not
    return [{"d": max(step["kl"], 0.0) ** 0.5, **row} for step, row in zip(steps, rows, strict=True)]


def best_of_n_curve(pool: Pool, name: str, ns: tuple[int, ...]) -> Curve:
    """Standard errors are over pools drawn again from the pool."""
    d = np.sqrt(curves.best_of_n_kl(np.array(ns)))
    known, scores = pool.normal(pool.gold), pool.normal(pool.scores[name], name)
    draw, again = np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        chosen = draw.integers(known.shape[1], size=known.shape)
        part = lambda values, chosen=chosen: np.take_along_axis(values, chosen, axis=1)  # noqa: E731
        again.append(curves.best_of_n(part(known), part(scores), ns))
    found = curves.best_of_n(known, scores, ns)
    return Curve(
        "best-of-n", name, d.tolist(), curves.best_of_n(scores, scores, ns).tolist(), found.tolist(),
        np.std(again, axis=0, ddof=1).tolist(), curves.fit("best-of-n", d, found),
        curves.spread("best-of-n", np.broadcast_to(d, (RESAMPLED, len(d))), np.array(again)),
    )  # fmt: skip


def rl_curve(pool: Pool, name: str, rows: list[dict]) -> Curve:
    """Standard errors of the fit are over steps drawn again from the steps."""
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
    """The largest gold reward of the fits, of each rule and of members alone; and what was measured along the way."""
    lines = []
    for form in curves.FORMS:
        tops = {c.proxy: curves.top(c) for c in traced if c.form == form}
        alone = np.array([tops[name] for name in members if name in tops])
        said = ", ".join(f"{name} {tops[name]:+.2f}" for name in rules)
        lines.append(
            f"{form}: members alone {alone.min():+.2f} to {alone.max():+.2f}, mean {alone.mean():+.2f}; {said}"
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
    for form, said in {"best-of-n": "best of n", "rl": "reinforcement learning"}.items():
        of = lambda names, form=form: [c for name in names for c in traced if (c.form, c.proxy) == (form, name)]  # noqa: E731
        panels.append((f"{said}, proxies that grow", of(map(named, task.size.widths)), []))
        panels.append((f"{said}, ensembles of width {task.size.ensemble}", of(rules), of(members)))
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
    found = proxies(task)
    pool = score(task, found)
    traced = [best_of_n_curve(pool, name, task.size.ns) for name in found]
    for name in optimised(task.size):
        folders, rule = found[name]
        traced.append(rl_curve(pool, name, optimise(task, name.replace(" ", "-").replace(",", ""), folders, rule)))
    report(task, pool, traced)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
