"""The rooms of the house: imports point down, and importing the package does no work."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_doge
from tests.conftest import LONGEST
from tests.hub.handle import HubServer, last_json, run_client

PACKAGE = Path(hf_doge.__file__).parent

# What arguments and the entries of files must be, how text of others is shown, how files are replaced as one; every room may ask.
COMMON = {"checks", "entries", "files", "text"}

# Which rooms each room may import from.
BELOW = {
    "functional": set(),
    "gradients": {"functional"},
    "sampling": set(),
    "artifacts": {"functional", "gradients", "plots", "_version"},
    "evaluation": {"functional", "gradients", "artifacts", "plots", "_version"},
    "mixing": {"functional", "sampling", "artifacts", "_version"},
    "figure_plots": set(),
    "plots": {"figure_plots"},
    "influence_plots": {"plots"},
    "training": {"functional", "gradients", "sampling", "artifacts", "evaluation", "mixing", "plots", "_version"},
    "tracing": {"functional", "gradients", "sampling", "artifacts", "_version"},
    "data": {"sampling", "artifacts", "tracing"},
    "cli": {
        *("functional", "gradients", "sampling", "artifacts", "evaluation", "training", "tracing", "mixing", "data"),
        *("plots", "influence_plots", "_version"),
    },
}
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem.endswith("plots"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_room_stands_above_itself():
    assert set(TopologicalSorter(BELOW).static_order()) >= BELOW.keys()  # raises where there is a circle


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    for module in imported_modules(path):
        root, _, rest = module.partition(".")
        if root == "hf_doge" and rest:
            assert rest.split(".")[0] in BELOW[room] | {room} | COMMON, f"{path.name} imports {module}"
        if room not in ("training", "tracing", "data", "cli"):
            assert root not in ("transformers", "accelerate"), f"{path.name} imports {module}"
        if room == "functional":
            assert root in ("torch", "hf_doge", "collections", "dataclasses", "typing", "math"), module


# Sizes


@cache
def trees(folder):
    """What is parsed of each module, by the process that looks at it."""
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


MAX_FILE, MAX_BODY, MAX_PARAMETERS = 400, 60, 12


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def functions():
    for path, tree in trees(PACKAGE).items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def lines_of_body(function):
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def number_of_parameters(function):
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def test_no_file_is_longer_than_400_lines():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in trees(PACKAGE)}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE} == {}


def test_no_function_is_longer_than_60_lines():
    lengths = {(name_of(path), one.name): lines_of_body(one) for path, one in functions()}
    assert {key: lines for key, lines in lengths.items() if lines > MAX_BODY} == {}


def test_no_function_has_more_than_12_parameters():
    counts = {f"{name_of(path)}:{one.name}": number_of_parameters(one) for path, one in functions()}
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}


# Circles


@cache
def imported_by():
    """
    Module -> modules of the package that it imports, wherever in it and for whatever purpose, and the packages that Python
    imports before those.
    """
    names = {
        ".".join(("hf_doge", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in trees(PACKAGE)
    }
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(trees(PACKAGE)[path]):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{one.name}" for one in node.names} & names.keys() or {node.module}
            elif isinstance(node, ast.Import):
                found |= {one.name for one in node.names}
        packages = {parent for one in found for parent in packages_of(one)} - {name, *packages_of(name)}
        graph[name] = (found | packages) & names.keys()
    return graph


def packages_of(name):
    """Those that hold a module, but for `hf_doge` itself, which imports nothing before it is asked."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(2, len(parts))}


def reachable(name):
    seen, waiting = set(), [name]
    while waiting:
        for other in imported_by()[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_no_modules_import_each_other():
    """Imports under `TYPE_CHECKING` count. So any of them can be the first that is imported."""
    reached = {name: reachable(name) for name in imported_by()}
    circle = sorted(name for name, others in reached.items() if name in others)
    assert circle == []


# Journeys: what a reader opens who follows a call (files, changes of file). Budgets are what is reached; they only shrink.

BUDGETS = {
    "training step": (12, 42),
    "push": (14, 39),
    "recording": (26, 74),
    "search": (16, 48),
    "evaluation": (16, 65),
}


@pytest.fixture(scope="module")
def journeys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journeys")
    with HubServer(folder / "hub") as hub:
        return last_json(run_client(hub, TESTS / "journeys.py", folder / "work"))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_reader_opens_few_files(journeys, name):
    files, moves = BUDGETS[name]
    assert len(journeys[name]["files"]) <= files, journeys[name]["files"]
    assert len(journeys[name]["moves"]) <= moves, journeys[name]["moves"]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_doge; print(*(m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules))"
    assert run_python(code).split() == []


def test_loading_and_sampling_weights_does_not_import_transformers():
    code = (
        "import sys\nfrom hf_doge import DomainWeights, DomainWeightedSampler, interleave_domains\n"
        "print(*(m for m in ('transformers', 'accelerate', 'matplotlib') if m in sys.modules))"
    )
    assert run_python(code).split() == []


def test_every_public_name_can_be_imported():
    for name in hf_doge.__all__:
        assert getattr(hf_doge, name) is not None
    assert hf_doge.__all__ == sorted(hf_doge.__all__)
    assert set(dir(hf_doge)) == set(hf_doge.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DoGe'"):
        _ = hf_doge.DoGe


# Tests that can fail

TESTS = Path(__file__).parent


def called_names(node):
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield call, call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_every_expected_error_is_told_by_its_message():
    """Without `match` another error of the same class passes: a typing error in the test, the fault of a library."""
    without = [
        f"{path.name}:{call.lineno}"
        for path, tree in trees(TESTS).items()
        for call, name in called_names(tree)
        if name == "raises" and not any(keyword.arg == "match" for keyword in call.keywords)
    ]
    assert without == []


def test_the_files_that_come_first_are_there():
    assert [name for name in LONGEST if not (TESTS / name).exists()] == []


def test_every_test_asserts_something():
    """By itself, or by calling a function of the tests that does."""
    functions = [
        node for tree in trees(TESTS).values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    asserting = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal"}
    asserting |= {one.name for one in functions if any(isinstance(node, ast.Assert) for node in ast.walk(one))}
    while True:
        callers = {one.name for one in functions if any(name in asserting for _, name in called_names(one))}
        if callers <= asserting:
            break
        asserting |= callers
    assert [one.name for one in functions if one.name.startswith("test_") and one.name not in asserting] == []


# Names that are there

SOURCES = [
    path
    for folder in ("hf_doge", "tests", "benchmarks", "examples", "docs", "model_cards")
    for path in sorted((TESTS.parent / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".jinja")
]
IMPORT = re.compile(r"from ((?:hf_doge|tests|benchmarks)[\w.]*) import (\([^)]*\)|[\w, ]+)")


def test_whatever_is_imported_by_code_in_texts_and_strings_too_is_there():
    """Linters see no import in a string that another process runs, nor one in a page."""
    exported = {module: set(names_in(path)) for path in PYTHON_FILES for module in [module_of(path)]}
    missing = []
    for path in SOURCES:
        for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
            for name in re.findall(r"\w+", re.sub(r"#.*| as \w+", "", names)):
                if module in exported and f"{module}.{name}" not in exported and name not in exported[module]:
                    missing.append(f"{path.relative_to(TESTS.parent)}: {module} has no {name}")
    assert missing == []


PYTHON_FILES = [path for path in SOURCES if path.suffix == ".py"]


def module_of(path):
    return ".".join(path.relative_to(TESTS.parent).with_suffix("").parts).removesuffix(".__init__")


def names_in(path):
    """What a module defines or imports at its top level; those of a package that are imported late are in `__all__`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (one.asname or one.name for one in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from (one.id for one in ast.walk(node) if isinstance(one, ast.Name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
