"""Draws score against KL of the runs of {ppo,grpo}_tinystories_sentiment.py: all together, and each in its folder.

Command:   python experiments/rl_curves.py RUN [RUN ...] --output curves.png        (pip install -e '.[plot]')
Observed:  experiments/figures/rl_tinystories.png.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from jaxalign.training.metrics import read_rows

COLOURS = {"ppo": "#b3541e", "grpo": "#1f5f8b", "rloo": "#3c7a3a"}


def course(run: Path) -> tuple[list[float], list[float]]:
    """(KLs in nats per response, mean scores) of the steps."""
    rows = read_rows(run / "metrics.jsonl")
    return [row["kl"] for row in rows], [row["score"] for row in rows]


def draw(runs: list[Path], output: Path) -> None:
    """Draws the runs into one picture, a line for each."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    named: set[str] = set()
    for run in runs:
        method = json.loads((run / "config.json").read_text())["command"]
        label = None if method in named else method.upper()
        named.add(method)
        axes.plot(*course(run), color=COLOURS[method], marker="o", markersize=3, linewidth=1, label=label)
    start = course(runs[0])[1][0]
    axes.axhline(start + 3.6, color="#888", linewidth=0.8, linestyle="--")
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
    axes.annotate("one standard deviation above the start", (1.0, start + 3.4), color="#666", fontsize=8, **place)
    axes.set_xlabel("KL(policy || reference), nats per response")
    axes.set_ylabel("mean VADER score of a step's stories")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for run in args.runs:
        draw([run], run / "curve.png")
    draw(args.runs, args.output)


if __name__ == "__main__":
    main()
