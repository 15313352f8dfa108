"""Rules of the layout: imports go one way, one step can be read alone, and every name means one thing in its package."""

import ast
import sys
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
    assert "safetensors.safe_open" in imports(ROOT / "models" / "formats" / "containers.py")
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


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("loss", set()),
        ("reward", {"data.numbers"}),
        ("errors", set()),
        ("config", {"grpo.errors"}),
        ("reports/consensus", set()),
    ],
)
def test_the_leaves_of_the_algorithm_import_next_to_nothing(name, allowed):
    path = ROOT / "grpo" / f"{name}.py"
    assert {module_of(file) for file in first_party(path)} == allowed
    foreign = tops(path) - ours(path) - set(sys.stdlib_module_names)
    assert foreign <= ({"jax"} if name == "loss" else {"scipy"} if "consensus" in name else set())


@pytest.mark.parametrize("path", sorted((ROOT / "grpo").rglob("*.py")), ids=name_of)
def test_only_checkpoints_know_orbax(path):
    assert ("orbax" in tops(path)) == (path == ROOT / "grpo" / "runs" / "checkpoint.py")


# ------------------------------------------------------------------------------------------------- one step read alone


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def first_party(path: Path) -> set[Path]:
    """The files of ours that a file imports, anywhere in it; `__init__.py` files are not counted."""
    found = set()
    for name in imports(path):
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if name.split(".")[0] in PACKAGES and file.is_file():
            found.add(file)
    return found


def closure(path: Path) -> set[Path]:
    """Everything of ours that one must have to run a file: itself, and what it imports, directly or not."""
    reached, ahead = set(), {path}
    while ahead:
        reached |= ahead
        ahead = {file for one in ahead for file in first_party(one)} - reached
    return reached


@pytest.mark.parametrize(
    ("name", "files", "lines"),
    [
        ("grpo/loss.py", 1, 150), ("grpo/config.py", 2, 400), ("grpo/update.py", 7, 1990), ("grpo/step.py", 16, 3475),
        ("scripts/report.py", 13, 3050),
    ],
)  # fmt: skip
def test_what_one_must_read_is_bounded(name, files, lines, record_property):
    reached = closure(ROOT / name)
    count = sum(len(path.read_text("utf-8").splitlines()) for path in reached)
    record_property("closure", f"{name}: {len(reached)} files, {count} lines")  # printed at the end (conftest.py)
    assert len(reached) <= files and count <= lines, sorted(map(name_of, reached))


def test_a_step_is_a_page():
    assert len((ROOT / "grpo" / "step.py").read_text("utf-8").splitlines()) < 100


@pytest.mark.parametrize("path", sorted((ROOT / "grpo").glob("*.py")), ids=name_of)
def test_the_algorithm_knows_nothing_of_runs_and_reports(path):
    """But for `notebook.load`, which prepares a run and loads its weights as train.py does."""
    above = {name for name in imports(path) if name.startswith(("grpo.runs", "grpo.reports"))}
    allowed = {"grpo.runs.setup"} | {f"grpo.runs.setup.{name}" for name in ("prepare", "load_base")}
    assert above == (allowed if path.name == "notebook.py" else set())


def test_reports_know_no_jax_and_no_runs():
    for path in (ROOT / "grpo" / "reports").rglob("*.py"):
        for file in closure(path):
            assert not tops(file) & {"jax", "flax", "optax", "orbax"}, (name_of(path), name_of(file))
            assert not module_of(file).startswith("grpo.runs"), (name_of(path), name_of(file))


def test_imports_have_no_circle():
    """At run time: an import that only a type checker follows is none."""

    def imported(path: Path) -> set[Path]:
        tree = ast.parse(path.read_text("utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        for node in top:
            if isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names}
        return {file for file in files if file.is_file()}

    graph = {path: imported(path) for path in SOURCES}
    assert graph[ROOT / "grpo" / "step.py"]
    while graph:
        leaves = {path for path, needed in graph.items() if not needed & graph.keys()}
        assert leaves, sorted(map(name_of, graph))
        graph = {path: needed for path, needed in graph.items() if path not in leaves}


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants that a file defines for others."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_") and len(name) > 1}


@pytest.mark.parametrize("package", ["grpo", "models", "data"])
def test_no_public_name_is_defined_twice_in_a_package(package):
    """But for the five calls of grpo/notebook.py, which are named as what they call."""
    notebook = ROOT / "grpo" / "notebook.py"
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == package and path != notebook:
            for name in public_names(path):
                where.setdefault(name, []).append(name_of(path))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_condition_is_written_as_a_product(path):
    """`[x] * condition` and `for x in y if c else ()` hide an `if`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [node.left, node.right]
            texts = [
                isinstance(side, ast.List | ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in sides
            ]
            truths = [isinstance(side, ast.Compare | ast.BoolOp) or ast.unparse(side).startswith("bool(") for side in sides]
            assert not (any(texts) and any(truths)), f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.IfExp):
            empty = node.iter.orelse
            assert not (isinstance(empty, ast.Tuple) and not empty.elts), f"{name_of(path)}: {ast.unparse(node.iter)}"


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
