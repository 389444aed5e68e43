"""Running hf-doge commands from a benchmark, and finding what an earlier run of it left."""

import sys
from pathlib import Path

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.cli import main as hf_doge
from hf_doge.evaluation.comparison import Comparison, MixtureRun

QUIET = ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "100"]


def flags(arguments: dict) -> list[str]:
    """Arguments as command-line flags."""
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run_command(*words: str) -> None:
    """Run an hf-doge command; stop if it fails."""
    if code := hf_doge(list(words)):
        sys.exit(code)


def learn(folder: Path, seed: int, *words: str) -> DomainWeights:
    """The weights of one seed, learned now or found in the folder of an earlier run."""
    weights = folder / "domain_weights"
    if not weights.exists():
        run_command("learn", "--output_dir", str(folder), "--seed", str(seed), *words, *QUIET)
    return DomainWeights.from_pretrained(weights)


def compare(folder: Path, seed: int, *words: str) -> list[MixtureRun]:
    """The finished runs of one seed, one per mixture; those of an earlier call are kept."""
    run_command("compare", "--output_dir", str(folder), "--seeds", str(seed), *words, *QUIET)
    return Comparison.load(folder).runs
