"""Scores against the distance from the reference, d = √KL: best of n, the fits of Gao et al. 2022, and the picture.

Reference: Gao, Schulman and Hilton 2022, https://arxiv.org/abs/2210.10760, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special


def best_of_n_kl(n: Any) -> Any:
    """KL(best of n ‖ reference) = log n - (n - 1)/n in nats, if no two samples have the same score; 0 for n = 1.

    Reference: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix G.3.
    """
    return np.log(n) - (n - 1) / n


def best_of_n_weights(count: int, n: int) -> np.ndarray:
    """Probability, Float64[count], that the i-th lowest of `count` samples is the best of n drawn without replacement.

    C(i - 1, n - 1) / C(count, n) for i = 1 .. count; n / count for the best sample.

    Reference: Nakano et al. 2021, https://arxiv.org/abs/2112.09332, appendix I; used by Gao et al. 2022.
    """
    ranks = np.arange(count, 1, -1)
    # C(i - 2, n - 1) / C(i - 1, n - 1) = (i - n)/(i - 1), from the best downwards
    ratios = np.maximum(ranks - n, 0) / (ranks - 1)
    return (n / count * np.cumprod(np.concatenate([[1.0], ratios])))[::-1]


def best_of_n(values: np.ndarray, scores: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """Expected value of the best-scored of n samples, Float64[len(ns)]; unbiased, over all subsets of n at once.

    Args:
      values: Float[P N], of N samples for each of P prompts; the mean over prompts is returned.
      scores: Float[P N], by which the best is chosen.
      ns: numbers of samples, at most N.
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
    """Least-squares fit of α and β. The rewards are 0 at d = 0, which adds no information."""
    (alpha, beta), *_ = np.linalg.lstsq(FORMS[form](d), rewards, rcond=None)
    return Fit(float(alpha), float(beta))


def predicted(form: str, fitted: Fit, d: np.ndarray) -> np.ndarray:
    """R(d) [N]."""
    return FORMS[form](d) @ np.array(fitted)


def peak(form: str, fitted: Fit) -> float:
    """The d at which R is largest: α/2β, or exp(α/β - 1); infinite if R never falls."""
    if fitted.beta <= 0:
        return np.inf
    return fitted.alpha / (2 * fitted.beta) if form == "best-of-n" else float(np.exp(fitted.alpha / fitted.beta - 1))


def spread(form: str, d: np.ndarray, rewards: np.ndarray) -> Fit:
    """Standard errors of α and β: standard deviations over S resampled curves, d and rewards [S N]."""
    fits = np.array([fit(form, *curve) for curve in zip(d, rewards, strict=True)])
    return Fit(*(float(x) for x in fits.std(axis=0, ddof=1)))


class Curve(NamedTuple):
    """Scores along the optimisation of one proxy, in standard deviations of the reference's samples from their mean."""

    form: str
    proxy: str
    d: list[float]
    proxy_scores: list[float]
    gold_scores: list[float]
    gold_errors: list[float]  # standard errors
    fit: Fit
    fit_errors: Fit


def top(curve: Curve) -> float:
    """Largest gold score of the fit within the measured distances."""
    return float(predicted(curve.form, curve.fit, np.linspace(0.0, max(curve.d), 500)).max())


def within(curve: Curve, low: float, high: float) -> tuple[float, float]:
    """(mean, its standard error) of the gold scores at low <= d < high, whose errors must be independent."""
    inside = (np.array(curve.d) >= low) & (np.array(curve.d) < high)
    if not inside.any():
        return np.nan, np.nan
    values, errors = np.array(curve.gold_scores)[inside], np.array(curve.gold_errors)[inside]
    return float(values.mean()), float(np.sqrt(np.sum(errors**2)) / len(errors))


def line(c: Curve) -> str:
    where = peak(c.form, c.fit)
    off = np.std(np.array(c.gold_scores) - predicted(c.form, c.fit, np.array(c.d)))
    return (
        f"{c.form:9s} {c.proxy:20s} α {c.fit.alpha:6.3f} ± {c.fit_errors.alpha:.3f}, β {c.fit.beta:6.3f} ± "
        f"{c.fit_errors.beta:.3f}, fit error {off:.2f}, maximum {top(c):+.2f}, peak at d = {where:.2f}; at the end, "
        f"d = {c.d[-1]:.2f}, gold {c.gold_scores[-1]:+.2f} ± {c.gold_errors[-1]:.2f}, "
        f"proxy {c.proxy_scores[-1]:+.2f}"
    )


def draw(panels: Sequence[tuple[str, list[Curve], list[Curve]]], path: Path) -> None:
    """Draws panels (title, curves in colour, curves in grey): gold scores with fitted lines, proxy scores dashed."""
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
        # the proxies' scores leave the panel, and so may grey curves
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
