"""
Changes the code of the package in one place at a time and asks whether a test fails: mutants that live show where none
watches.

    for file in $(find tests -name "test_*.py"); do CALLS=calls/$(basename $file).json python -m pytest $file -p benchmarks.mutation.calls; done
    python -m benchmarks.mutation --calls calls --per_file 12 --output_dir outputs/mutation

`--calls` says which tests call the changed function. The quickest of them run first, up to `--seconds`, and for those that
live all of them up to three times as long. A sample, seeded by `--seed`, of the mutants of each file: those in statements that refuse,
compare checksums, lock, or write through to the disk are four times as likely. Texts and annotations are never changed.
Each mutant runs in a fork of one process that has imported the libraries, on a copy of the repository.

Last line: how many were `killed` and are `alive`, of how many `mutants` there are to draw from. `mutants.jsonl` has each.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILES = [
    "hf_doge/artifacts/**/*.py",
    "hf_doge/gradients/per_domain.py",
    "hf_doge/sampling/*.py",
    "hf_doge/training/learning_state.py",
]
# Code that runs in processes of its own, which the plugin does not see.
ELSEWHERE = {"hf_doge/artifacts/hub/": ["hub/test_push_faults", "hub/test_hub_refusals"]}
GUARDS = re.compile(
    r"raise |sha256|checksum|sync|lock|parent|revision|symlink|drive|absolute|version|require_|refuse|unlink|replace|\.\."
)
OPPOSITE = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.FloorDiv: ast.Mult},
}


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """What can be done to one node of a statement: words for it, and a function that does it."""
    if isinstance(node, ast.Compare):
        for position, operator in enumerate(node.ops):
            new = OPPOSITE[type(operator)]()
            yield "comparison", lambda at=position, new=new: node.ops.__setitem__(at, new)
    elif isinstance(node, ast.BoolOp) or (isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE):
        yield "operator", lambda: setattr(node, "op", OPPOSITE[type(node.op)]())
        if isinstance(node, ast.BoolOp):
            for position in range(len(node.values)):
                yield "condition dropped", lambda at=position: node.values.pop(at)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool, float):
        new = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", lambda: setattr(node, "value", new)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda: setattr(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(node, ast.Call):
        for position, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield f"argument {keyword.arg} dropped", lambda at=position: node.keywords.pop(at)
    elif isinstance(node, ast.If):
        if isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue):
            yield "never", lambda: setattr(node, "test", ast.Constant(value=False))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call dropped", lambda: setattr(node, "value", ast.Constant(value=None))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", lambda: setattr(node, "value", ast.Constant(value=None))


def walk(node: ast.AST, function: str, statement: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Every node but those of texts, annotations and decorators, with its function and its statement."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
                continue
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inner = f"{function}.{child.name}".strip(".") if named else function
            own = child if isinstance(child, ast.stmt) else statement
            yield child, inner, own
            yield from walk(child, inner, own)


def mutants_of(path: str, root: Path) -> list[dict]:
    """All mutants of a file, and how likely they are to be drawn."""
    found = []
    for number, (node, function, statement) in enumerate(walk(ast.parse((root / path).read_text()), "", None)):
        for which, (kind, _) in enumerate(changes(node)):
            facts = {"file": path, "line": node.lineno, "function": function, "kind": kind, "at": (number, which)}
            found.append({**facts, "weight": 4 if GUARDS.search(ast.unparse(statement)[:400]) else 1})
    return found


def code_of(mutant: dict, root: Path) -> str:
    """The file with its change, which is told in words under `change`."""
    number, which = mutant["at"]
    tree = ast.parse((root / mutant["file"]).read_text())
    node = next(itertools.islice(walk(tree, "", None), number, None))[0]
    before = ast.unparse(node)
    list(changes(node))[which][1]()
    first_lines = (text.splitlines()[0][:100] for text in (before, ast.unparse(node)))
    mutant["change"] = f"{mutant['kind']}: {' -> '.join(first_lines)}"
    return ast.unparse(tree)


def read_calls(folder: Path) -> tuple[dict[str, set[str]], dict[str, float]]:
    """Function -> tests, and test -> seconds."""
    calls, seconds = {}, {}
    for path in folder.glob("*.json"):
        told = json.loads(path.read_text())
        seconds |= told["seconds"]
        for name, tests in told["calls"].items():
            calls.setdefault(name, set()).update(tests)
    return calls, seconds


class Outcome:
    """A plugin that writes down the tests that there are, and the first that failed."""

    def __init__(self, failed: Path, collected: Path):
        self.failed, self.collected = failed, collected

    def fail(self, what: str) -> None:
        if not self.failed.exists():
            self.failed.write_text(what)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.fail(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.fail(f"collecting {report.nodeid}")

    def pytest_collection_finish(self, session):
        self.collected.write_text(json.dumps([item.nodeid for item in session.items]))


def run_tests(tree: Path, tests: list[str], seconds: float) -> str | None:
    """Which test failed, in a fork of this process that sees the copy; `None` if none did."""
    import pytest

    told, collected = tree / ".failed", tree / ".collected"
    told.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        os.setsid()
        os.chdir(tree)
        sys.path[0] = str(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]
        with open(os.devnull, "w") as silence:
            for stream in (1, 2):
                os.dup2(silence.fileno(), stream)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Outcome(told, collected)])
        if code != 0 and not told.exists():
            told.write_text(f"pytest ended with {code}")
        os._exit(0)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "a time-out"
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests left running
    return told.read_text() if told.exists() else None


def collect(tree: Path, files: list[str]) -> set[str]:
    """The tests that are in these files now. Each must be collected alone too, or it would kill all that meet it."""
    found = set()
    for file in files:
        if (tree / file).exists():
            problem = run_tests(tree, ["--collect-only", file], 600)
            assert problem is None, problem
            found |= set(json.loads((tree / ".collected").read_text()))
    return found


def tests_for(mutant: dict, calls: dict[str, set[str]], seconds: dict[str, float], budget: float) -> list[str]:
    """The quickest tests that call the function, as many as fit; for code of the module itself those of any function."""
    name = f"{mutant['file']}:{mutant['function']}"
    found = {test for key, tests in calls.items() if key.replace(".<locals>", "") == name for test in tests}
    if not found:
        found = {test for key, tests in calls.items() if key.startswith(f"{mutant['file']}:") for test in tests}
    # from few files, as each has to be imported for each mutant
    files = Counter(test.partition("::")[0] for test in found)
    kept = {file for file, _ in files.most_common(max(1, int(budget // 3)))}
    chosen, total = [], 0.0
    for test in sorted(found, key=lambda test: seconds[test]):
        total += seconds[test] * (test.partition("::")[0] in kept)
        if total > budget and chosen:
            break
        chosen += [test] * (test.partition("::")[0] in kept)
    for prefix, files in ELSEWHERE.items():
        if mutant["file"].startswith(prefix):
            chosen += [f"tests/{file}.py" for file in files]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--files", nargs="*", default=FILES)
    parser.add_argument("--per_file", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10.0, help="of tests for a mutant, as they took when called")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    root = Path.cwd()
    tree = Path(tempfile.mkdtemp(prefix="mutation-"))
    for name in subprocess.check_output(["git", "ls-files"], text=True).splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tree / name)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers.trainer", "datasets", "pyarrow.parquet", "huggingface_hub", "peft", "duckdb"):
        importlib.import_module(name)
    calls, seconds = read_calls(args.calls)
    present = collect(tree, sorted({test.partition("::")[0] for test in seconds}))
    calls = {name: tests & present for name, tests in calls.items()}

    paths = list(
        dict.fromkeys(str(path.relative_to(root)) for pattern in args.files for path in sorted(root.glob(pattern)))
    )
    draw = random.Random(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    counts = {"killed": 0, "alive": 0, "mutants": 0}
    for path in paths:
        all_mutants = mutants_of(path, tree)
        counts["mutants"] += len(all_mutants)
        order = sorted(all_mutants, key=lambda mutant: draw.random() ** (1 / mutant["weight"]), reverse=True)
        for mutant in order[: args.per_file]:
            original = (tree / path).read_text()
            (tree / path).write_text(code_of(mutant, tree))
            few = tests_for(mutant, calls, seconds, args.seconds)
            killer = run_tests(tree, few, args.timeout) if few else None
            if killer is None:
                more = [test for test in tests_for(mutant, calls, seconds, 3 * args.seconds) if test not in few]
                killer = run_tests(tree, more, args.timeout) if more else None
            (tree / path).write_text(original)
            counts["alive" if killer is None else "killed"] += 1
            mutant |= {"killed_by": killer, "num_tests": len(few)}
            print(f"{time.strftime('%X')} {mutant['file']}:{mutant['line']} {mutant['change']}: {killer}", flush=True)
            with (args.output_dir / "mutants.jsonl").open("a") as file:
                file.write(json.dumps(mutant) + "\n")
    shutil.rmtree(tree)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
