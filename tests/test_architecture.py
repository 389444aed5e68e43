"""The rooms of the house: imports point down, and importing the package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_doge

PACKAGE = Path(hf_doge.__file__).parent

COMMON = {"checks", "text"}  # what arguments must be, and how text of others is shown; every room may ask

# Which rooms each room may import from.
BELOW = {
    "functional": set(),
    "gradients": {"functional"},
    "sampling": set(),
    "artifacts": {"functional", "gradients", "sampling", "plots", "_version"},
    "evaluation": {"functional", "artifacts", "plots", "_version"},
    "mixing": {"functional", "sampling", "artifacts", "_version"},
    "plots": {"artifacts"},
    "influence_plots": {"plots"},
    "training": {"functional", "gradients", "sampling", "artifacts", "evaluation", "mixing", "plots", "_version"},
    "tracing": {"functional", "gradients", "sampling", "artifacts", "evaluation", "_version"},
    "cli": {
        *("functional", "gradients", "sampling", "artifacts", "evaluation", "training", "tracing", "mixing"),
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


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    for module in imported_modules(path):
        root, _, rest = module.partition(".")
        if root == "hf_doge" and rest:
            assert rest.split(".")[0] in BELOW[room] | {room} | COMMON, f"{path.name} imports {module}"
        if room not in ("training", "tracing", "cli"):
            assert root not in ("transformers", "accelerate"), f"{path.name} imports {module}"
        if room == "functional":
            assert root in ("torch", "hf_doge", "collections", "dataclasses", "typing", "math"), module


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
TEST_TREES = {path: ast.parse(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}


def called_names(node):
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield call, call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_every_expected_error_is_told_by_its_message():
    """Without `match` another error of the same class passes: a typing error in the test, the fault of a library."""
    without = [
        f"{path.name}:{call.lineno}"
        for path, tree in TEST_TREES.items()
        for call, name in called_names(tree)
        if name == "raises" and not any(keyword.arg == "match" for keyword in call.keywords)
    ]
    assert without == []


def test_every_test_asserts_something():
    """By itself, or by calling a function of the tests that does."""
    functions = [node for tree in TEST_TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    asserting = {"raises", "warns", "fail", "assert_close", "assert_allclose", "assert_array_equal"}
    asserting |= {one.name for one in functions if any(isinstance(node, ast.Assert) for node in ast.walk(one))}
    while True:
        callers = {one.name for one in functions if any(name in asserting for _, name in called_names(one))}
        if callers <= asserting:
            break
        asserting |= callers
    assert [one.name for one in functions if one.name.startswith("test_") and one.name not in asserting] == []
