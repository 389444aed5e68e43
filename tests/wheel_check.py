"""
Whether an installed wheel is whole: run by `make dist` with the Python of an empty environment, outside the repository.

    python -I wheel_check.py HF_DOGE

`HF_DOGE` is the installed command. Only what the package itself brings along may be used here.
"""

import importlib.metadata
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hf_doge


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def check_files() -> None:
    package = Path(hf_doge.__file__).parent
    assert "site-packages" in package.parts, f"the wheel must be installed, but hf_doge is {package}"
    assert (package / "py.typed").is_file(), "type checkers look for py.typed"
    assert list(package.rglob("*.jinja")), "cards are rendered from templates"
    names = {name.partition("/")[0] for name in map(str, importlib.metadata.files("hf-doge"))}
    assert not names & {"tests", "benchmarks", "examples", "docs"}, names


def check_imports() -> None:
    """Every module, but for those whose extra is not installed."""
    for module in pkgutil.walk_packages(hf_doge.__path__, "hf_doge."):
        if not module.name.endswith(("__main__", "figure_plots")):
            importlib.import_module(module.name)


def check_work(command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = hf_doge.DomainWeights.from_mapping({"wiki": 3, "web": 1})
        weights.save_pretrained(folder)
        assert hf_doge.DomainWeights.from_pretrained(folder) == weights
        assert (Path(folder) / "README.md").is_file()
        text = run(command, "export", folder, "--format", "datasets")
        assert '"wiki"' in text, text
    assert run(command, "--version").strip() == f"hf-doge {importlib.metadata.version('hf-doge')}"
    assert "estimate" in run(command, "--help")


if __name__ == "__main__":
    check_files()
    check_imports()
    check_work(sys.argv[1])
    sys.stdout.write(f"hf-doge {hf_doge.__version__}: the wheel is whole\n")
