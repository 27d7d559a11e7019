"""The examples as modules, and the data that they learn from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_are_on_the_path(monkeypatch):
    """As `PYTHONPATH=examples` puts them there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("own_loss", "own_reward", "own_algorithm"):
        sys.modules.pop(name, None)


@pytest.fixture
def flags(tiny_model, tmp_path):
    """Flags of a tiny run, but for its data."""
    settings = ["--model", str(tiny_model), "--output", str(tmp_path / "run"), "--max-length", "16", "--remat", "none"]
    settings += ["--mesh.fsdp", "1", "--optimizer.schedule", "constant"]
    return settings


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Prompts with a response that names cats and one that names dogs."""
    rng = np.random.default_rng(0)

    def words(first):
        return " ".join([first, *rng.choice(["the", "a", "red", "blue"], rng.integers(1, 5))])

    rows = [{"prompt": "one ?", "chosen": words("cat"), "rejected": words("dog")} for _ in range(48)]
    return written(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Twelve prompts that name an animal."""
    rows = [{"prompt": f"{count} {animal} ?"} for count in ("one", "two") for animal in ("cat", "dog")]
    return written(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows * 3)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
