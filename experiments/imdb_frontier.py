"""Score against KL from the reference, for several β along training: the frontier of the DPO paper's figure 2, left.

Every number is estimated from fresh samples: the policy draws one response to each held-out prompt at temperature 1,
the scorer scores it, and policy and reference compute its log-probability.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imdb_scorer
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from imdb_sentiment import LENGTH, QUICK, Policy, Sample, Size, Task, load_policy, prepare, sample

from jaxalign.commands import export
from jaxalign.config.inference import ExportConfig
from jaxalign.config.offline import FeedbackConfig
from jaxalign.config.shared import BestCheckpointConfig, OptimizerConfig
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.run import devices

log = logging.getLogger("jaxalign.experiments")

METHODS = {"dpo": "DPO", "kto": "KTO"}
WARMUP = 9  # steps; the learning rate is constant after them, so that a longer run continues a shorter one


class Point(NamedTuple):
    """A policy on the frontier; `_se` are standard errors of the means over prompts."""

    method: str
    beta: float  # 0 for the reference
    step: int
    score: float  # mean P(positive)
    score_se: float
    score_sd: float  # standard deviation over samples
    kl: float  # nats per response: mean of log π(y|x) - log π_ref(y|x), y ~ π
    kl_se: float
    tokens: float  # mean length of a response, its terminator included
    ended: float  # share of responses that ended by themselves
    distinct: float  # number of different words / number of words, over all responses


class Setup(NamedTuple):
    """Settings of the command line, and the task that was prepared with them."""

    task: Task
    output: Path
    size: Size


def start(doc: str) -> Setup:
    """Reads the command line, and prepares everything that comes before alignment."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/imdb"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute, whose numbers mean nothing")
    parser.add_argument(
        "--betas", type=float, nargs="+", help="values of β to trace, besides those that --output holds already"
    )
    parser.add_argument("--steps", type=int, help="steps of alignment; a longer run continues the shorter one")
    args = parser.parse_args()
    require_matplotlib()
    devices.start()
    devices.start_log()
    size = QUICK if args.quick else Size()
    size = size._replace(betas=tuple(args.betas or size.betas), steps=args.steps or size.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    return Setup(prepare(args.folder, args.output, size), args.output, size)


def require_matplotlib() -> None:
    """Ends the program before an hour of work if the picture could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("this experiment draws a picture: pip install matplotlib") from None


def feedback_config(kind: type, setup: Setup, name: str, data: Path, batch: int, rate: float, **settings: Any) -> Any:
    """Config of a run; all runs share these settings. Every evaluated step has a checkpoint, and all are kept."""
    size = setup.size
    config = kind(
        model=str(setup.task.reference),
        data=str(data),
        output=setup.output / name,
        steps=size.steps,
        batch_size=batch,
        max_length=LENGTH,
        packing=False,  # few pairs fit into one row of LENGTH tokens, and rows of one shape compile once
        remat="none",
        samples=0,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=min(WARMUP, size.steps - 1), schedule="constant"),
        checkpoint=BestCheckpointConfig(every=size.every, keep=size.steps),
        **settings,
    )
    assert isinstance(config, FeedbackConfig)
    return config


def trace(method: str, setup: Setup, run: Callable, config_of: Callable) -> list[Point]:
    """Trains once for each β and measures along the way; writes the points and the picture after every β.

    Runs and points that the output folder holds already are not computed again.

    Args:
      method: a key of METHODS.
      setup: the command line's settings and task.
      run: config -> exit status.
      config_of: β -> config.
    """
    ref = load_policy(setup.task.reference)
    measured = {(p.beta, p.step): p for p in read_points(setup.output).get(method, [])}

    def add(beta: float, step: int, policy_of: Callable[[], Policy]) -> None:
        if (beta, step) not in measured:
            measured[beta, step] = Point(method, beta, step, *measure(policy_of(), ref=ref, task=setup.task))
        log.info("%s", line(measured[beta, step]))

    add(0.0, 0, lambda: ref)
    for beta in setup.size.betas:
        config = config_of(beta)
        if status := run(config):
            raise SystemExit(status)
        for step in range(setup.size.every, setup.size.steps + 1, setup.size.every):
            add(beta, step, lambda config=config, step=step: load_policy(exported(config, step)))
        points = [measured[at] for at in sorted(measured)]
        _path(setup.output, method).write_text(json.dumps([p._asdict() for p in points], indent=1) + "\n")
        draw(read_points(setup.output), setup.output / "imdb_frontier.png")
    log.info("%s", summary(points))
    return points


def exported(config: FeedbackConfig, step: int) -> Path:
    """Hugging Face folder of a step's checkpoint, exported on the first call."""
    folder = Path(config.output) / f"step-{step}"
    if not folder.exists():
        export.main(ExportConfig(run=Path(config.output), output=folder, step=step))
    return folder


def measure(policy: Policy, *, ref: Policy, task: Task) -> tuple[float, ...]:
    """Fields of a Point from `score` on. All policies draw with the same key, which lowers the noise between them."""
    samples = sample(policy, task.prompts, jax.random.key(23))
    scores = task.scorer([s.text for s in samples])
    tokens, mask = rows_of(task.prompts, samples, policy.terminators[0])
    log_ratio = np.float64(response_logps(policy.graphdef, policy.params, tokens, mask))
    log_ratio -= np.float64(response_logps(ref.graphdef, ref.params, tokens, mask))
    words = [word for s in samples for word in imdb_scorer.WORD.findall(s.text)]
    return (
        float(scores.mean()), _error(scores), float(np.std(scores, ddof=1)),
        float(log_ratio.mean()), _error(log_ratio), float(mask.sum(axis=1).mean()),
        float(np.mean([s.ended for s in samples])), len(set(words)) / max(len(words), 1),
    )  # fmt: skip


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def rows_of(prompts: list[list[int]], samples: list[Sample], terminator: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [N LENGTH]. A row is prompt, response, and the terminator if drawn; the mask has the last two."""
    tokens, mask = np.zeros((len(samples), LENGTH), np.int32), np.zeros((len(samples), LENGTH), bool)
    for row, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        ids = [*prompt, *drawn.ids, *[terminator] * drawn.ended]
        tokens[row, : len(ids)], mask[row, len(prompt) : len(ids)] = ids, True
    return tokens, mask


@functools.partial(jax.jit, static_argnames="graphdef")
def response_logps(graphdef: Any, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probabilities log π(response | prompt) in nats, summed over the mask: Float32[N]."""
    model = nnx.merge(graphdef, params)
    return jnp.sum(next_token_logps(model(tokens), model.unembed(), tokens, mask).logps, axis=1)


def line(p: Point) -> str:
    return (
        f"{METHODS[p.method]} β={p.beta:<4g} step {p.step:3d}: score {p.score:.3f} ± {p.score_se:.3f}, "
        f"KL {p.kl:6.2f} ± {p.kl_se:.2f} nats, {p.tokens:.1f} tokens, {p.ended:.0%} ended, {p.distinct:.0%} distinct"
    )


def gains(points: list[Point]) -> list[tuple[float, Point]]:
    """(gain in standard deviations of the reference's samples, point) of every point but the reference."""
    ref = points[0]
    return [((p.score - ref.score) / ref.score_sd, p) for p in points[1:]]


def summary(points: list[Point], *, most_kl: float = 10.0) -> str:
    """Lines with the largest gain below a KL of `most_kl` nats, one for each β."""
    near = [(gain, p) for gain, p in gains(points) if p.kl < most_kl]
    best = [max((g for g in near if g[1].beta == beta), default=None) for beta in sorted({p.beta for p in points[1:]})]
    lines = [f"{line(p)}: {gain:+.2f} s.d." for gain, p in filter(None, best)]
    return "\n".join([f"largest gain at KL below {most_kl:g} nats, for each β:", *lines])


def _path(output: Path, method: str) -> Path:
    return output / f"imdb_frontier_{method}.json"


def read_points(output: Path) -> dict[str, list[Point]]:
    """Method -> its points, the reference first; only methods that have been traced."""
    paths = {method: _path(output, method) for method in METHODS}
    return {
        method: [Point(**row) for row in json.loads(path.read_text())]
        for method, path in paths.items()
        if path.exists()
    }


def draw(traced: dict[str, list[Point]], path: Path) -> None:
    """Draws a panel for each method and a curve for each β, its points in the order of steps, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(traced), figsize=(5.2 * len(traced), 4.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    betas = sorted({p.beta for points in traced.values() for p in points[1:]})
    for axis, (method, points) in zip(axes[0], traced.items(), strict=True):
        _panel(axis, method, points, {beta: f"C{i}" for i, beta in enumerate(betas)})
    axes[0, 0].set_ylabel("score: mean P(positive) of the response")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, method: str, points: list[Point], colours: dict[float, str]) -> None:
    ref = points[0]
    axis.axhline(ref.score, color="black", linewidth=1, label="reference")
    axis.axhline(ref.score + ref.score_sd, color="black", linewidth=1, linestyle=":", label="reference + 1 s.d.")
    for beta in sorted({p.beta for p in points[1:]}):
        curve = [ref._replace(kl_se=0.0), *[p for p in points[1:] if p.beta == beta]]
        axis.errorbar(
            [p.kl for p in curve],
            [p.score for p in curve],
            xerr=[p.kl_se for p in curve],
            yerr=[p.score_se for p in curve],
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.7,
            color=colours[beta],
            label=f"β = {beta:g}",
        )
    axis.set_title(METHODS[method])
    axis.set_xlabel("KL(policy ‖ reference), nats per response")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=8)
