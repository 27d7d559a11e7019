"""The examples as modules, and the data that they learn from."""

import sys
from pathlib import Path

import pytest

from tests.commands.conftest import pairs, prompts  # noqa: F401

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
