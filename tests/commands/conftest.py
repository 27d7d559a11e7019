"""Data of the tiny runs."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Prompts with a response that names cats and one that names dogs."""
    rng = np.random.default_rng(0)

    def words(first):
        return " ".join([first, *rng.choice(["the", "a", "red", "blue"], rng.integers(1, 5))])

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": "one ?", "chosen": words("cat"), "rejected": words("dog")} for _ in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Twelve prompts that name an animal, which is their answer too."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"prompt": f"{count} {animal} ?", "answer": animal} for count in ("one", "two") for animal in ("cat", "dog")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 3))
    return path
