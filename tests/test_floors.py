"""The package is a stack of floors: a module imports from its own package or from lower floors only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "jaxalign"
FLOORS = {
    "__init__": 0,
    "mistake": 0,
    "types": 0.2,
    "select": 0.5,
    "config": 0.5,
    "hosts": 0.5,
    "kernels": 1,
    "ops": 2,
    "losses": 3,
    "models": 4,
    "data": 4,
    "algorithms": 5,
    "rollout": 5,
    "training": 6,
    "run": 7,
    "evaluation": 8,
    "constitutional": 8,
    "commands": 9,
    "planning": 10,
    "report": 10,
    "quickstart": 11,
    "cli": 12,
    "__main__": 13,
}


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jaxalign.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = room(path)
    for there in imports(path):
        assert there == here or FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {there}"


def test_importing_the_command_line_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = "jax", "flax", "transformers", "datasets", "orbax", "grain", "numpy"
    code = f"import jaxalign, jaxalign.cli.main, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
