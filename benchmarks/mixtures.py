"""
Does a mixture help? Each route to one beside equal parts, seed by seed, with what it costs.

    python -m benchmarks.mixtures catalan one_kin --data_dir ../shared/data --output_dir outputs/mixtures

For every setting, the commands a user would type: `hf-doge estimate`, `hf-doge learn` (one seed), with `--sweep` also
`hf-doge sweep`, then `hf-doge compare` of what they found on eight seeds that no route has seen, with an arm that should
lose as a control of the yardstick: half the weight on a source that is far from the target. A finished part is kept.

A model is a Llama of 2 layers of width 64, far below the 15M parameters from which on others find rankings of mixtures to
be reliable; `--model_size` and `--max_steps` take larger ones. There is no warm-up: with one of 20 steps some seeds stay on the
plateau of the first losses much longer than others, and the spread between seeds hides every difference. Settings:

- `catalan`, `dutch`: the other languages of `multilingual/` for a language that is not among them.
- `one_kin`: Catalan from three languages, of which one is near, and five kinds of English text.
- `universal`: the eight kinds of English text in `lm/`, for themselves.
- `continued`: as `one_kin`, but all training, that of the proxies too, goes on from one model that was trained on three other kinds of
  English text for 2,000 steps, as users come with a pretrained model. Such runs have no first plateau to leave at a time of their own.
- `left_out_books` and the like, eight: one kind of English text for which the other seven are to serve, going on from one model that was trained on
  the seven languages of `multilingual/`.
- `repeats`: the eight kinds of English text for themselves, of which four have about 12,000 characters, so that 150 steps by equal parts read them three to
  eight times; going on from the model of `left_out_*`. An arm more is `unimax:4`: equal parts, but nothing is read more than four times.
- `smollm2`: as `one_kin`, as a fine-tuning of all 135M parameters of SmolLM2 (read from a package, see `benchmarks.pretrained`) with its own tokenizer,
  in bfloat16 and blocks of 64 tokens. `--max_steps 24 --adapt_steps 8` and few seeds are what
  a core bears: a run takes four minutes.

`--plot FILE` draws what each route of a setting with a target gains, by each measure, over its CPU seconds.

The last line is JSON: for each setting the paired change of perplexity in percent against uniform with its 95 % interval, by
arm and measure, and the CPU seconds of each route (those of parts that this call found finished are read from their folder).
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.pretrained.packaged_models import MissingPackage, smollm2
from hf_doge import DomainWeights
from hf_doge.evaluation.comparison import Comparison

LANGUAGES = ("ca", "de", "en", "es", "fr", "it", "nl")
ENGLISH = ("arxiv_latex", "books", "code", "legal", "news", "qa", "web", "wikipedia")
BATCHES = (
    *("--block_size=128", "--per_device_train_batch_size=16", "--lr_scheduler_type=cosine"),
    *("--max_validation_tokens=30000", "--use_cpu", "--report_to=none", "--disable_tqdm=true"),
)
TRAINING = ("--train_tokenizer_vocab=2048", "--learning_rate=5e-3", *BATCHES)
SEEDS = tuple(range(11, 19))
# Sources, target, and the source that the control gives half the weight.
SETTINGS = {
    "catalan": (LANGUAGES, "ca", "en"),
    "dutch": (LANGUAGES, "nl", "it"),
    "one_kin": (("ca", "es", "de", "nl", "code", "arxiv_latex", "legal", "news", "qa"), "ca", "code"),
    "universal": (ENGLISH, None, "code"),
}
SETTINGS["continued"] = SETTINGS["smollm2"] = SETTINGS["one_kin"]
FINE_TUNING = (
    *("--block_size=64", "--per_device_train_batch_size=16", "--lr_scheduler_type=cosine", "--learning_rate=5e-5"),
    *("--bf16", "--max_validation_tokens=3000", "--use_cpu", "--report_to=none", "--disable_tqdm=true"),
)
SETTINGS |= {f"left_out_{name}": (ENGLISH, name, "legal" if name == "code" else "code") for name in ENGLISH}
SETTINGS["repeats"] = SETTINGS["universal"]
SMALL, LARGEST_SMALL = ("books", "code", "legal", "qa"), 12_000  # of `repeats`, in characters
PRETRAINING = ("books", "web", "wikipedia")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with `lm` and `multilingual`.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="Of the comparison.")
    parser.add_argument("--learn_seed", type=int, default=101)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--adapt_steps", type=int, nargs="+", default=[24, 98], help="Steps on a target's own text.")
    parser.add_argument("--model_size", default="nano")
    parser.add_argument("--without", nargs="+", default=[], choices=("natural", "control"), help="Arms to leave out.")
    parser.add_argument(
        "--recipes", nargs="*", default=["paper"], help="Recipes of `hf-doge learn` to compare, or RECIPE:MU."
    )
    parser.add_argument("--sweep", type=int, default=0, help="Mixtures of a sweep; 0 for none.")
    parser.add_argument("--sweep_seeds", type=int, nargs="+", default=[201])
    parser.add_argument("--plot", type=Path, help="Picture of the last setting's routes.")
    args = parser.parse_args()
    if not (args.data_dir / "lm").is_dir():
        print(f"Skipped: {args.data_dir} has no folder `lm`.\n{json.dumps({'skipped': str(args.data_dir)})}")
        return
    try:
        found = {name: run_setting(name, args) for name in args.settings}
    except MissingPackage as missing:
        print(f"{missing}\n{json.dumps({'skipped': str(missing)})}")
        return
    if args.plot:
        plot(found[args.settings[-1]], SETTINGS[args.settings[-1]][1], args.plot)
    print(json.dumps(found))


def run_setting(name: str, args: argparse.Namespace) -> dict:
    """All routes of a setting and their comparison."""
    names, target, far = SETTINGS[name]
    folder = args.output_dir / name
    sources = [one for one in names if one != target]
    start = [*TRAINING, f"--model_size={args.model_size}"]
    if name == "continued":
        others = tuple(name for name in dict.fromkeys((*LANGUAGES, *ENGLISH)) if name not in (target, "en"))
        start = pretrain(args, folder / "pretrained", on=PRETRAINING, tokenizer_on=others)
    if name.startswith("left_out") or name == "repeats":
        start = pretrain(args, args.output_dir / "languages", on=LANGUAGES, tokenizer_on=LANGUAGES)
    if name == "smollm2":
        smollm2(folder / "pretrained")
        start = [f"--tokenizer={folder / 'pretrained'}", f"--model_name_or_path={folder / 'pretrained'}", *FINE_TUNING]
    data = link_data(args.data_dir, folder / "data", names)
    if name == "repeats":
        for small in SMALL:
            cut(data / f"{small}.train.jsonl.gz", LARGEST_SMALL)
    common = [
        *(f"--data_dir={data}", *start, f"--max_steps={args.max_steps}"),
        *(["--target", target] if target else []),
    ]
    seconds = {}
    arms = []
    for asked in args.recipes:
        recipe, _, mu = asked.partition(":")
        arm = f"{recipe}-mu{mu}" if mu else recipe
        learned = folder / f"learn-{arm}"
        arms.append(f"{arm}={learned}")
        flags = [*common, f"--recipe={recipe}", f"--seed={args.learn_seed}", f"--output_dir={learned}"]
        seconds[arm] = run("learn", [*flags, f"--mu={mu}"] if mu else flags, learned)
    if target:
        estimate = folder / "estimate"
        kept = [
            flag
            for flag in common
            if flag.partition("=")[0] in ("--data_dir", "--train_tokenizer_vocab", "--tokenizer", "--block_size")
        ]
        seconds["estimated"] = run("estimate", [*kept, "--target", target, f"--output_dir={estimate}"], estimate)
    adapt = ["--adapt_steps", *map(str, args.adapt_steps)] if target else []
    if args.sweep:
        swept = folder / f"sweep-{args.sweep}"
        arms.append(f"sweep={swept}")
        seeds = ["--seeds", *map(str, args.sweep_seeds)]
        flags = [*common, *adapt, *seeds, f"--num_mixtures={args.sweep}", f"--output_dir={swept}"]
        seconds["sweep"] = run("sweep", flags, swept)
    known = list(arms)
    if "control" not in args.without:
        control = folder / "control.json"
        rest = 0.5 / (len(sources) - 1)
        control.write_text(json.dumps({one: 0.5 if one == far else rest for one in sources}))
        known.append(f"control={control}")
    compared = folder / "compare"
    rules = [
        rule
        for rule in ("uniform", "natural", "estimated")
        if rule not in args.without and (target or rule != "estimated")
    ] + (["unimax:4"] if name == "repeats" else [])
    flags = [*common, *adapt, "--mixtures", *rules, "--weights", *known]
    flags += ["--seeds", *map(str, args.seeds), f"--output_dir={compared}"]
    seconds["compare"] = run("compare", flags, compared)
    comparison = Comparison.load(compared)
    changes = {
        mixture: {
            row: [round(value, 2) if value is not None else None for value in (change.mean, change.low, change.high)]
            for row, change in comparison.paired_changes(mixture, "uniform").items()
        }
        for mixture in comparison.mixtures
        if mixture != "uniform"
    }
    weights = {arm.partition("=")[0]: weights_in(Path(arm.partition("=")[2])) for arm in arms}
    return {"seeds": len(comparison.seeds), "change_percent": changes, "cpu_seconds": seconds, "weights": weights}


def pretrain(
    args: argparse.Namespace, folder: Path, *, on: tuple[str, ...], tokenizer_on: tuple[str, ...]
) -> list[str]:
    """The flags of a training that goes on from a model, which is trained here on some domains, with a tokenizer made on some."""
    rest = ["--weights=uniform", f"--model_size={args.model_size}", "--save_strategy=no"]
    data = link_data(args.data_dir, folder / "all", tokenizer_on)
    few = ["--max_train_tokens=400000", "--max_steps=1", f"--data_dir={data}"]
    run("train", [*TRAINING[:1], *BATCHES, *few, *rest, f"--output_dir={folder / 'first'}"], folder / "first")
    tokenizer = f"--tokenizer={folder / 'first' / 'tokenizer'}"
    flags = [tokenizer, *BATCHES, f"--data_dir={link_data(args.data_dir, folder / 'seen', on)}", *rest]
    run("train", [*flags, "--learning_rate=5e-3", "--max_steps=2000", f"--output_dir={folder}"], folder)
    return [tokenizer, f"--model_name_or_path={folder}", *BATCHES, "--learning_rate=2e-3"]


def link_data(data_dir: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with links to the files of some domains."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        room = "multilingual" if name in LANGUAGES else "lm"
        for split in ("train", "validation"):
            link = folder / f"{name}.{split}.jsonl.gz"
            if not link.exists():
                link.symlink_to((data_dir / room / link.name).resolve())
    return folder


def cut(link: Path, num_characters: int) -> None:
    """Put a file of the first records, with so many characters of text, in the place of a link to all of them."""
    if not link.is_symlink():
        return
    kept, size = [], 0
    with gzip.open(link, "rt", encoding="utf-8") as file:
        for line in file:
            if size >= num_characters:
                break
            kept.append(line)
            size += len(json.loads(line)["text"])
    link.unlink()
    with gzip.open(link, "wt", encoding="utf-8") as file:
        file.writelines(kept)


def run(command: str, flags: list[str], folder: Path) -> float:
    """Run a command unless it has been; returns its CPU seconds, which are kept in its folder."""
    kept = folder / "cpu_seconds.json"
    asked = [flag for flag in flags if not flag.startswith(("--output_dir", "--data_dir"))]
    if kept.exists() and json.loads(kept.read_text())["flags"] == asked:
        return json.loads(kept.read_text())["seconds"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "hf_doge", command, *flags], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
    kept.write_text(json.dumps({"flags": asked, "seconds": seconds}))
    return seconds


def plot(found: dict, target: str, path: Path) -> None:
    """What each route costs and gains, with its interval."""
    from matplotlib.figure import Figure

    rows = next(iter(found["change_percent"].values()))
    measures = [row for row in rows if row == target or row.startswith(f"{target},")]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        for mark, (name, changes) in zip("os^Dvp*X", found["change_percent"].items(), strict=False):
            mean, low, high = changes[row]
            seconds = found["cpu_seconds"].get(name, 1)  # mixtures by a rule cost nothing
            axes.errorbar(seconds, mean, [[mean - low], [high - mean]], fmt=mark, capsize=3, label=name)
        axes.axhline(0, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        title = row.replace("calibrated", "at its own temperature").replace("adapted_", "steps on it: ")
        axes.set(xscale="log", xlim=(0.5, 5000), xlabel="CPU seconds of the route", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("perplexity against equal parts, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def weights_in(folder: Path) -> dict[str, float]:
    """What a route found."""
    found = DomainWeights.from_pretrained(folder / "domain_weights").mean
    return {name: round(weight, 4) for name, weight in found.items()}


if __name__ == "__main__":
    main()
