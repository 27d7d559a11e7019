"""Laws of the house: modules are floors without cycles, folders and functions are small, prose is plain."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY / "jaxalign"
FILES = sorted(ROOT.rglob("*.py"))
OUTSIDE = sorted(
    file for folder in ("experiments", "tests", "examples") for file in (REPOSITORY / folder).rglob("*.py")
)
FLOORS = {
    "__init__": 0,
    "mistake": 0,
    "outside": 0.2,
    "types": 0.2,
    "select": 0.6,
    "config": 0.5,
    "hosts": 0.5,
    "clock": 0.5,
    "kernels": 1,
    "ops": 2,
    "losses": 3,
    "models": 4,
    "data": 4,
    "algorithms": 5,
    "rollout": 5,
    "training": 6,
    "run": 7,
    "constitutional": 8,
    "evaluation": 8,
    "commands": 9,
    "planning": 10,
    "report": 10,
    "quickstart": 11,
    "cli": 12,
    "__main__": 13,
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(REPOSITORY)}:{node.lineno}"


def module_name(path: Path) -> str:
    """`jaxalign.losses.pairs` for jaxalign/losses/pairs/__init__.py, and so on."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room(name: str) -> str:
    """First part of a module's name below jaxalign, which has the floor."""
    return name.split(".")[1] if "." in name else "__init__"


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, those inside functions too: `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path, node)}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, or imports a name from."""
    names = {name if name in MODULES else name.rpartition(".")[0] for name in imports(path)}
    return names & set(MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only_and_never_to_a_neighbour_on_the_same_floor(path):
    here = room(module_name(path))
    for there in map(room, imported_modules(path)):
        assert there == here or FLOORS[there] < FLOORS[here], (
            f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
        )


def test_no_modules_import_each_other_in_a_circle_even_inside_functions():
    graphlib.TopologicalSorter({name: imported_modules(path) for name, path in MODULES.items()}).prepare()


def test_settings_need_the_standard_library_alone():
    names = {name for path in (ROOT / "config").rglob("*.py") for name in imports(path)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"jaxalign"}


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "jax", "flax", "transformers", "datasets", "orbax", "grain", "numpy"
    code = f"import jaxalign, jaxalign.cli.main, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_folder_has_at_most_twelve_modules():
    sizes = {}
    for path in FILES:
        if path.name != "__init__.py":
            sizes[path.parent.relative_to(REPOSITORY)] = sizes.get(path.parent.relative_to(REPOSITORY), 0) + 1
    assert not {str(folder): size for folder, size in sizes.items() if size > 12}


def private_uses(path: Path) -> list[str]:
    """Places where a file imports a private name of the package, or reads one of a module that it imported."""
    tree, bound, uses = tree_of(path), {"jaxalign": "jaxalign"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if alias.asname or prefix:
                    bound[alias.asname or alias.name] = prefix + alias.name
                if prefix.startswith("jaxalign.") and is_private(alias.name):
                    uses.append(f"{place(path, node)} {prefix}{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            first, dot, rest = ast.unparse(node.value).partition(".")
            if bound.get(first, "") + dot + rest in MODULES:
                uses.append(f"{place(path, node)} {ast.unparse(node)}")
    return uses


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_nothing_outside_the_package_uses_a_private_name_of_it():
    assert not [use for path in OUTSIDE for use in private_uses(path)]


def test_no_test_module_imports_from_another():
    names = [(path, name) for path in OUTSIDE for name in imports(path) if name.startswith("tests.")]
    assert not [(str(path), name) for path, name in names if re.search(r"\.(test_\w+|conftest)\b", name)]


def functions():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_no_function_is_longer_than_a_hundred_lines():
    lengths = {f"{place(path, node)} {node.name}": node.end_lineno - node.lineno + 1 for path, node in functions()}
    assert not {name: length for name, length in lengths.items() if length > 100}


def test_no_function_but_formulas_and_kernels_has_more_than_twelve_parameters():
    counts = {}
    for path, node in functions():
        if room(module_name(path)) not in ("kernels", "losses"):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            counts[f"{place(path, node)} {node.name}"] = len(set(names) - {"self", "cls"})
    assert not {name: count for name, count in counts.items() if count > 12}


def docstrings(path: Path):
    """(place, text) of the docstrings of a file, those under the fields of its classes too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield place(path, node.body[0]), text
            for field, following in zip(node.body, node.body[1:], strict=False):
                match field, following:
                    case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                        yield place(path, following), text


def test_docstrings_begin_with_what_they_are_about_and_not_with_a_clause():
    texts = [docstring for path in FILES for docstring in docstrings(path)]
    clauses = [at for at, text in texts if re.match(r"\W*(What|Of|That|Which|Who|Whose)\b", text)]
    assert len(clauses) <= 0.01 * len(texts), clauses


def test_no_lambda_is_named_and_no_fixture_imported_behind_the_linters_back():
    lines = [(path, line) for path in (*FILES, *OUTSIDE) for line in path.read_text().splitlines()]
    assert not [(str(path), line) for path, line in lines if re.search(r"#\s*noqa:.*\b(E731|F811)\b", line)]
