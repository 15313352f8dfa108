"""Imports go one way, as the layout promises: data and models know nothing above them, the loss knows nothing of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"grpo", "models", "data", "scripts", "tests"}
SOURCES = sorted(path for package in PACKAGES - {"tests"} for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module and name that a file imports, at the top or inside a function: "data.problems", "data.problems.Problem"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module and node.names[0].name != "*", f"{path}: a star import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def ours(path: Path) -> set[str]:
    return tops(path) & PACKAGES


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_walk_sees_imports_inside_functions_and_of_names():
    """What the other laws lean on, at three places known to have such imports."""
    assert "tokenizers" in imports(ROOT / "data" / "tokenizer.py")  # inside a function
    assert "safetensors.safe_open" in imports(ROOT / "models" / "containers.py")
    assert "data.DataError" in imports(ROOT / "data" / "problems.py")  # from data import DataError
    assert len(SOURCES) > 20 and len(TESTS) > 10


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_package_imports_only_what_lies_below_it(path):
    below = {
        "data": {"data"},
        "models": {"models"},
        "grpo": {"grpo", "models", "data"},
        "scripts": {"grpo", "models", "data"},
    }[path.relative_to(ROOT).parts[0]]
    assert ours(path) <= below


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.py")), ids=name_of)
def test_data_imports_no_jax(path):
    assert not tops(path) & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("name", ["loss", "reward", "config", "consensus"])
def test_the_leaves_of_the_algorithm_import_next_to_nothing(name):
    path = ROOT / "grpo" / f"{name}.py"
    assert ours(path) == ({"data"} if name == "config" else set())
    others = tops(path) - ours(path)
    assert others <= ({"jax"} if name == "loss" else STANDARD)


STANDARD = {
    "argparse", "collections", "dataclasses", "decimal", "difflib", "fractions", "itertools", "math", "pathlib", "re", "sys",
    "typing",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "grpo").glob("*.py")), ids=name_of)
def test_only_checkpoints_know_orbax(path):
    assert ("orbax" in tops(path)) == (path.name == "checkpoint.py")


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_nobody_unpickles(path):
    assert not tops(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_shardings_are_spelt_in_one_file(path):
    if path == ROOT / "models" / "sharding.py":
        assert "jax.sharding.PartitionSpec" in imports(path)
    else:
        assert "PartitionSpec" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_imports_the_tests_or_what_lies_outside(path):
    assert not any(name.split(".")[0] in ("tests", "conftest", "shared") or name.startswith("test_") for name in imports(path))
    assert "/shared/" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_says_what_it_is(path):
    assert len(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "") > 40
