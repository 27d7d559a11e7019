"""Scores against the distance from the reference, d = √KL: the best of n, fits of Gao et al. 2022, and their picture.

Reference: Gao, Schulman and Hilton 2022, https://arxiv.org/abs/2210.10760, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special


def best_of_n_kl(n: Any) -> Any:
    """KL(best of n ‖ reference) = log n - (n - 1)/n in nats, where no two samples score the same; 0 for n = 1.

    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix G.3.
    """
    return np.log(n) - (n - 1) / n


def best_of_n_weights(count: int, n: int) -> np.ndarray:
    """Float64[count]: the chance that the i-th lowest of `count` samples is the best of n drawn without replacement.

    C(i - 1, n - 1) / C(count, n) for i = 1 .. count; n/count for the best of all.

    Reference: Nakano et al. 2021, https://arxiv.org/abs/2112.09332, appendix I; used by Gao et al. 2022.
    """
    ranks = np.arange(count, 1, -1)
    # C(i - 2, n - 1) / C(i - 1, n - 1) = (i - n)/(i - 1), from the best downwards
    ratios = np.maximum(ranks - n, 0) / (ranks - 1)
    return (n / count * np.cumprod(np.concatenate([[1.0], ratios])))[::-1]


def best_of_n(values: np.ndarray, scores: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """Float64[len(ns)], expected value of the best by score of n samples; unbiased, from all subsets of n at once.

    Args:
      values: Float[P N], of N samples to each of P prompts; the answer is the mean over prompts.
      scores: Float[P N], by which the best is chosen.
      ns: at most N each.
    """
    ordered = np.take_along_axis(values, np.argsort(scores, axis=1, kind="stable"), axis=1)
    weights = np.stack([best_of_n_weights(values.shape[1], n) for n in ns])
    return (weights @ ordered.T).mean(axis=1)


class Fit(NamedTuple):
    """R(d) = d (α - β d) of the best of n, or d (α - β log d) of reinforcement learning, d in √nats."""

    alpha: float
    beta: float


# d [N] -> the columns that α and β multiply, [N 2]
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "best-of-n": lambda d: np.stack([d, -d * d], axis=1),
    "rl": lambda d: np.stack([d, -special.xlogy(d, d)], axis=1),
}


def fit(form: str, d: np.ndarray, rewards: np.ndarray) -> Fit:
    """Least squares. The rewards are 0 at d = 0, where they say nothing."""
    (alpha, beta), *_ = np.linalg.lstsq(FORMS[form](d), rewards, rcond=None)
    return Fit(float(alpha), float(beta))


def predicted(form: str, found: Fit, d: np.ndarray) -> np.ndarray:
    """R(d) [N]."""
    return FORMS[form](d) @ np.array(found)


def peak(form: str, found: Fit) -> float:
    """The d at which R is largest: α/2β, or exp(α/β - 1); infinite where it does not turn over."""
    if found.beta <= 0:
        return np.inf
    return found.alpha / (2 * found.beta) if form == "best-of-n" else float(np.exp(found.alpha / found.beta - 1))


def spread(form: str, d: np.ndarray, rewards: np.ndarray) -> Fit:
    """Standard errors of α and β, over resampled curves: d and rewards are [S N]."""
    found = np.array([fit(form, one, r) for one, r in zip(d, rewards, strict=True)])
    return Fit(*(float(x) for x in found.std(axis=0, ddof=1)))


class Curve(NamedTuple):
    """Scores along one optimisation of one proxy, in standard deviations of the reference's samples from their mean."""

    form: str
    proxy: str
    d: list[float]
    proxy_scores: list[float]
    gold_scores: list[float]
    gold_errors: list[float]  # standard errors
    fit: Fit
    fit_errors: Fit


def top(curve: Curve) -> float:
    """The largest gold score that the fit has where it was measured."""
    return float(predicted(curve.form, curve.fit, np.linspace(0.0, max(curve.d), 500)).max())


def within(curve: Curve, low: float, high: float) -> tuple[float, float]:
    """(mean, its standard error) of the gold scores measured at low <= d < high; their errors must be independent."""
    here = (np.array(curve.d) >= low) & (np.array(curve.d) < high)
    if not here.any():
        return np.nan, np.nan
    values, errors = np.array(curve.gold_scores)[here], np.array(curve.gold_errors)[here]
    return float(values.mean()), float(np.sqrt(np.sum(errors**2)) / len(errors))


def line(c: Curve) -> str:
    where = peak(c.form, c.fit)
    off = np.std(np.array(c.gold_scores) - predicted(c.form, c.fit, np.array(c.d)))
    return (
        f"{c.form:9s} {c.proxy:20s} α {c.fit.alpha:6.3f} ± {c.fit_errors.alpha:.3f}, β {c.fit.beta:6.3f} ± "
        f"{c.fit_errors.beta:.3f}, off by {off:.2f}, {top(c):+.2f} at most, peak at d = {where:.2f}; at the end, "
        f"d = {c.d[-1]:.2f}, {c.gold_scores[-1]:+.2f} ± {c.gold_errors[-1]:.2f}, "
        f"and the proxy says {c.proxy_scores[-1]:+.2f}"
    )


def draw(panels: Sequence[tuple[str, list[Curve], list[Curve]]], path: Path) -> None:
    """Panels of (title, curves in colour, curves in grey): gold scores and their fits in full, proxies' dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(5.4 * columns, 8.4), squeeze=False, layout="constrained")
    for axis, (title, coloured, grey) in zip(axes.flat, panels, strict=True):
        for i, curve in enumerate(grey):
            _draw(axis, curve, "0.7", "" if i else "one model alone")
        for i, curve in enumerate(coloured):
            _draw(axis, curve, f"C{i}", f"{curve.proxy}: α {curve.fit.alpha:.2f}, β {curve.fit.beta:.2f}")
        reached = [value for curve in coloured for value in curve.gold_scores]
        axis.axhline(0.0, color="black", linewidth=0.7)
        # what the proxies say leaves the panel, and so may what is in grey
        axis.set_ylim(min(reached) - 0.5, 2.4 * max(reached))
        axis.set_xlim(-0.05 * max(map(_last, coloured)), 1.05 * max(map(_last, coloured)))
        axis.set_title(title)
        axis.set_xlabel("d = √KL(policy ‖ reference), √nats")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="upper left")
    for row in axes:
        row[0].set_ylabel("reward, s.d. of the reference's samples")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _last(curve: Curve) -> float:
    return max(curve.d)


def _draw(axis: Any, curve: Curve, colour: str, label: str) -> None:
    d = np.array(curve.d)
    axis.plot(d, curve.proxy_scores, color=colour, linestyle="--", linewidth=0.8)
    axis.errorbar(
        d, curve.gold_scores, yerr=curve.gold_errors, color=colour, linestyle="", marker="o", markersize=2.5,
        elinewidth=0.6, alpha=0.6,
    )  # fmt: skip
    dense = np.linspace(0.0, d.max(), 200)
    axis.plot(dense, predicted(curve.form, curve.fit, dense), color=colour, linewidth=1.6, label=label or None)
