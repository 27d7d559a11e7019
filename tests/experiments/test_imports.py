"""Every experiment and benchmark can be imported, and uses public names of the package that exist."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FILES = sorted(EXPERIMENTS.rglob("*.py"))


def test_every_file_can_be_imported_where_no_peer_is_installed():
    """In a process of their own: some set the environment that JAX reads when it starts."""
    folders = {str(path.parent) for path in FILES}
    lines = [f"import sys; sys.path[:0] = {sorted(folders)}", "sys.modules |= dict.fromkeys(('trl', 'tunix', 'torch'))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, *(f"import {path.stem}" for path in FILES)])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_of_the_package_that_a_file_uses_exists_and_is_public(path):
    """Inside functions too, which run only where peers, data or hours of time are at hand."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("jaxalign")]
    values = {}
    for node in imports:
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
            values[alias.asname or alias.name] = getattr(module, alias.name)
            assert not alias.name.startswith("_"), f"{path.name} imports {node.module}.{alias.name}, which is private"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in values:
            used = f"{node.value.id}.{node.attr}"
            assert hasattr(values[node.value.id], node.attr), f"{path.name} uses {used}, which is gone"
            assert not node.attr.startswith("_"), f"{path.name} uses {used}, which is private"
