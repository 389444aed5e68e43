import gzip
import importlib.util
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import BartConfig, BartForConditionalGeneration, MambaConfig, MambaForCausalLM, TrainingArguments

from hf_doge.artifacts import DomainWeights
from hf_doge.cli import COMMANDS, main
from hf_doge.cli.arguments import DataArguments, ModelArguments, get_resume
from hf_doge.cli.models import get_config, make_model
from hf_doge.cli.parser import parse
from hf_doge.data.domain_data import load_domain_data
from hf_doge.training.config import DoGEConfig
from tests.forks import Fork
from tests.launch import REPOSITORY, launch_environment
from tests.tiny import tiny_bert, tiny_classifier, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

TINY = [
    "--block_size=16",
    "--model_size=nano",
    "--per_device_train_batch_size=6",
    "--max_steps=3",
    "--use_cpu",
    "--disable_tqdm=true",
]


def write_domain(folder, domain, *, num_documents=40, suffix="jsonl", nested=False):
    """Documents of words of the domain's own, from a seed of its own."""
    draw = random.Random(domain)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(30)]
    for split, size in (("train", num_documents), ("validation", 10)):
        path = folder / domain / f"{split}.{suffix}" if nested else folder / f"{domain}.{split}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(draw.choices(words, k=20)) for _ in range(size)]
        content = "".join(json.dumps({"text": text, "source": "test"}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith("gz") else content)


def write_data(folder):
    write_domain(folder, "code")
    write_domain(folder, "prose", num_documents=80, suffix="jsonl.gz")
    write_domain(folder, "wiki", nested=True)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data_dir(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    data_dir = write_data(folder / "data")
    flags = [f"--data_dir={data_dir}", f"--output_dir={folder / 'proxy'}", "--train_tokenizer_vocab=300", *TINY]
    assert main(["learn", *flags]) == 0
    return folder / "proxy"


@pytest.fixture
def learned(learned_once, tmp_path):
    """Output folder of `hf-doge learn` on `data_dir`, a copy for each test."""
    return shutil.copytree(learned_once, tmp_path / "proxy")


def flags_of(data_dir, learned, output_dir):
    return [f"--data_dir={data_dir}", f"--tokenizer={learned / 'tokenizer'}", f"--output_dir={output_dir}", *TINY]


def instead(flags, *others):
    """The flags without those that the others give another value."""
    given = {word.partition("=")[0] for word in others if word.startswith("--")}
    return [*(word for word in flags if word.partition("=")[0] not in given), *others]


def refusal(capsys, *argv):
    """The one line that a command refuses with."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert ": error: " in line
    assert "Traceback" not in captured.err
    return line


# The commands


def test_learn_saves_weights_on_the_simplex_plot_and_tokenizer(learned):
    weights = DomainWeights.from_pretrained(learned / "domain_weights")
    assert set(weights.mean) == {"code", "prose", "wiki"}
    assert sum(weights.mean.values()) == pytest.approx(1)
    assert len(weights.trajectory.steps) == 3
    assert weights.domains["prose"]["num_tokens"] > weights.domains["code"]["num_tokens"]
    assert (learned / "domain_weights.png").stat().st_size > 10_000
    assert (learned / "tokenizer" / "tokenizer.json").exists()


def test_learn_prints_the_summary_and_where_the_weights_are(data_dir, learned, tmp_path, capsys):
    assert main(["learn", *flags_of(data_dir, learned, tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("code", "prose", "wiki"))
    assert str(tmp_path / "again" / "domain_weights") in printed


def test_learn_twice_gives_the_same_weights_and_makes_the_blocks_once(data_dir, learned):
    first = DomainWeights.from_pretrained(learned / "domain_weights")
    before = {path: path.stat().st_mtime_ns for path in (learned / "blocks").glob("*.arrow")}
    flags = [f"--data_dir={data_dir}", f"--output_dir={learned}", "--train_tokenizer_vocab=300", *TINY]
    assert main(["learn", *flags]) == 0
    assert DomainWeights.from_pretrained(learned / "domain_weights").mean == first.mean
    assert {path: path.stat().st_mtime_ns for path in (learned / "blocks").glob("*.arrow")} == before


def test_learn_keeps_a_target_domain_out_of_the_mixture(data_dir, learned, tmp_path):
    flags = ["--target", "wiki", "--max_target_tokens=64", *flags_of(data_dir, learned, tmp_path / "ood")]
    assert main(["learn", *flags]) == 0
    weights = DomainWeights.from_pretrained(tmp_path / "ood" / "domain_weights")
    assert set(weights.mean) == {"code", "prose"}


def test_learn_carves_a_heldout_mix_out_of_the_training_domains(data_dir, learned, tmp_path):
    flags = ["--target", "heldout_mix", "--recipe=official", *flags_of(data_dir, learned, tmp_path / "mix")]
    assert main(["learn", *flags]) == 0
    plain = DomainWeights.from_pretrained(learned / "domain_weights")
    mixed = DomainWeights.from_pretrained(tmp_path / "mix" / "domain_weights")
    given = {name: plain.domains[name]["num_rows"] - mixed.domains[name]["num_rows"] for name in plain.mean}
    assert len(set(given.values())) == 1
    assert given["code"] == max(1, round(0.1 * min(domain["num_rows"] for domain in plain.domains.values())))
    assert mixed.recipe["name"] == "official"


def test_learn_resumes_from_the_last_checkpoint_to_the_same_weights(data_dir, learned, tmp_path):
    flags = ["--save_steps=2", *flags_of(data_dir, learned, tmp_path / "whole")]
    assert main(["learn", *flags]) == 0
    whole = DomainWeights.from_pretrained(tmp_path / "whole" / "domain_weights")
    artifact = contents(tmp_path / "whole" / "domain_weights")
    assert main(["learn", *flags, "--resume_from_checkpoint=True"]) == 0  # finished: nothing to do
    assert contents(tmp_path / "whole" / "domain_weights") == artifact
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "later")
    assert main(["learn", *flags, "--resume_from_checkpoint=last"]) == 0
    assert DomainWeights.from_pretrained(tmp_path / "whole" / "domain_weights").mean == whole.mean


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("file", ["optimizer.pt", "domain_sampler.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_last_whole_checkpoint(
    data_dir, learned, tmp_path, capsys, file
):
    run = tmp_path / "run"
    flags = ["--save_steps=1", *flags_of(data_dir, learned, run)]
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoint-2" / file).symlink_to("/dev/full")
    assert main(["learn", *flags]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert "hf-doge learn: error: a file could not be written, since the disk is full or a quota is used up (" in line
    assert "Traceback" not in said
    (run / "checkpoint-2" / file).unlink()
    assert main(["learn", *flags, "--resume_from_checkpoint=last"]) == 0
    assert len(DomainWeights.from_pretrained(run / "domain_weights").trajectory.steps) == 3


@pytest.mark.parametrize(
    ("given", "meant"),
    [("false", None), ("False", None), ("none", None), ("None", None), ("true", True), ("last", True), (".", ".")],
)
def test_what_to_resume_from_is_said_in_words_or_by_a_folder(tmp_path, given, meant):
    assert get_resume(TrainingArguments(str(tmp_path), resume_from_checkpoint=given)) == meant
    assert get_resume(TrainingArguments(str(tmp_path))) is None


def test_learn_stopped_by_sigterm_saves_a_checkpoint_and_goes_on_from_it(data_dir, learned, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*flags_of(data_dir, learned, run), "--save_steps=2", "--enable_jit_checkpoint"]
    flags = instead(flags, "--max_steps=40")

    def terminate_after_a_checkpoint():
        while not (run / "checkpoint-2" / "trainer_state.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should it come too late, the tests live on
    watcher = threading.Thread(target=terminate_after_a_checkpoint)
    try:
        watcher.start()
        assert main(["learn", *flags]) == 143
    finally:
        watcher.join(timeout=60)
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert "of 40, with a checkpoint. Go on with `--resume_from_checkpoint last`." in said
    assert "Weights:" not in said
    assert not (run / "domain_weights").exists()
    assert main(["learn", *flags, "--resume_from_checkpoint=last"]) == 0
    assert len(DomainWeights.from_pretrained(run / "domain_weights").trajectory.steps) == 40


def test_flags_come_from_a_config_file_and_later_flags_win(data_dir, learned, tmp_path):
    config = tmp_path / "config.yaml"
    lines = ["mu: 5e-1", "eval_strategy: no", "seed: 7", "domains: [code, prose]", "lr_scheduler_kwargs:"]
    config.write_text("\n".join(lines) + "\n")
    assert main(["learn", str(config), *flags_of(data_dir, learned, tmp_path / "a"), "--mu=0.25"]) == 0
    weights = DomainWeights.from_pretrained(tmp_path / "a" / "domain_weights")
    assert weights.recipe["mu"] == 0.25
    assert weights.metadata["training"]["seed"] == 7
    assert set(weights.mean) == {"code", "prose"}


def test_train_draws_by_the_learned_weights_and_evaluates_every_domain(data_dir, learned, tmp_path, capsys):
    output_dir = tmp_path / "model"
    assert main(["train", "--weights", str(learned), *flags_of(data_dir, learned, output_dir)]) == 0
    results = json.loads((output_dir / "domain_results.json").read_text())
    weights = DomainWeights.from_pretrained(learned / "domain_weights")
    assert results["domain_weights"] == pytest.approx(weights.mean)
    assert set(results["perplexity"]) == {"code", "prose", "wiki"}
    assert (output_dir / "model.safetensors").exists()
    assert "perplexity" in capsys.readouterr().out
    before = contents(output_dir)
    finished = ["--weights", str(learned), *flags_of(data_dir, learned, output_dir), "--resume_from_checkpoint=last"]
    assert main(["train", *finished]) == 0
    assert contents(output_dir) == before


@pytest.mark.parametrize("weights", ["uniform", "natural"])
def test_train_takes_baseline_weights_and_evaluates_a_target_it_does_not_train_on(
    data_dir, learned, tmp_path, weights
):
    flags = ["--weights", weights, "--target", "wiki", *flags_of(data_dir, learned, tmp_path / "model")]
    assert main(["train", *flags]) == 0
    results = json.loads((tmp_path / "model" / "domain_results.json").read_text())
    assert set(results["epochs"]) == {"code", "prose"}
    assert set(results["perplexity"]) == {"code", "prose", "wiki"}
    assert (results["domain_weights"]["prose"] > 0.6) == (weights == "natural")


def compare_flags(data_dir, learned, output_dir):
    return [
        "compare",
        "--weights",
        f"learned={learned}",
        "--seeds",
        "1",
        "2",
        *flags_of(data_dir, learned, output_dir),
    ]


def test_compare_tabulates_uniform_natural_and_learned_over_seeds(data_dir, learned, tmp_path, capsys):
    output_dir = tmp_path / "comparison"
    assert main(compare_flags(data_dir, learned, output_dir)) == 0
    printed = capsys.readouterr().out
    assert (output_dir / "comparison.md").read_text().strip() in printed
    assert "learned against uniform" in printed
    assert (output_dir / "comparison.png").stat().st_size > 10_000
    table = pq.read_table(output_dir / "comparison.parquet").to_pylist()
    assert len(table) == 3 * 2 * 3
    assert {row["train_tokens"] for row in table} == {3 * 6 * 16}
    drawn = {row["mixture"]: {} for row in table}
    rows = DomainWeights.from_pretrained(learned / "domain_weights").domains
    for row in table:
        drawn[row["mixture"]][row["domain"]] = row["epochs"] * rows[row["domain"]]["num_rows"]
    assert drawn["uniform"] == pytest.approx({"code": 6, "prose": 6, "wiki": 6})
    assert all(sum(counts.values()) == pytest.approx(18) for counts in drawn.values())


def test_compare_evaluates_a_target_that_no_model_trains_on(data_dir, learned, tmp_path):
    output_dir = tmp_path / "comparison"
    flags = ["--target", "wiki", "--seeds", "1", *flags_of(data_dir, learned, output_dir)]
    assert main(["compare", *flags]) == 0
    table = pq.read_table(output_dir / "comparison.parquet").to_pylist()
    assert {row["domain"] for row in table if row["is_target"]} == {"wiki"}
    assert all(row["epochs"] is None for row in table if row["is_target"])


def test_a_small_run_repeats_each_domain_as_often_as_the_full_training(data_dir, tmp_path):
    output_dir = tmp_path / "comparison"
    full = 5 * 6 * 16 * 3  # five times the tokens of a run
    flags = ["--train_tokenizer_vocab=300", *TINY, f"--data_dir={data_dir}", f"--output_dir={output_dir}", "--seeds=1"]
    assert main(["compare", *flags, "--mixtures=uniform", f"--full_tokens={full}", "--match_repetition"]) == 0
    whole = load_domain_data(DataArguments(str(data_dir), train_tokenizer_vocab=300, block_size=16), output_dir).train
    table = {row["domain"]: row for row in pq.read_table(output_dir / "comparison.parquet").to_pylist()}
    for name, rows in whole.items():
        in_full = full / 3 / (16 * len(rows))
        assert table[name]["epochs"] == pytest.approx(in_full, abs=in_full / (len(rows) // 5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--match_repetition"], "must be given together"),
        (["--full_tokens=1000"], "must be given together"),
        (["--match_repetition", "--full_tokens=100"], "must be at least the 288 tokens of a run"),
        (["--match_repetition", "--full_tokens=100000000"], r"['code', 'prose', 'wiki'] would have none"),
        (["--match_repetition", "--full_tokens=1000", "--max_steps=-1"], "`--max_steps` is not given"),
    ],
)
def test_a_repetition_that_cannot_be_matched_is_refused(data_dir, tmp_path, capsys, flags, message):
    common = ["--train_tokenizer_vocab=300", *TINY, f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'out'}"]
    for flag in flags:
        common = [one for one in common if one.partition("=")[0] != flag.partition("=")[0]]
    assert main(["compare", *common, "--seeds=1", "--mixtures=uniform", *flags]) == 2
    assert message in capsys.readouterr().err


def test_learning_for_a_target_prints_the_estimate_next_to_it(data_dir, tmp_path, capsys):
    flags = ["--train_tokenizer_vocab=300", *TINY, f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["learn", *flags, "--target", "wiki"]) == 0
    printed = capsys.readouterr().out
    learned = DomainWeights.from_pretrained(tmp_path / "out" / "domain_weights").mean
    rows = dict(re.findall(r"^(code|prose)\s+([\d.]+)\s+[\d.]+$", printed, re.M))
    assert {name: float(weight) for name, weight in rows.items()} == pytest.approx(learned, abs=5e-4)
    assert "Weight placed differently" in printed


def test_compare_trains_again_only_what_was_interrupted(data_dir, learned, tmp_path, monkeypatch, capsys):
    from hf_doge.training import compare

    trained = []

    def train_and_stop(*args, mixture, **kwargs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(mixture)
        return original(*args, mixture=mixture, **kwargs)

    original = compare._train
    monkeypatch.setattr(compare, "_train", train_and_stop)
    output_dir = tmp_path / "comparison"
    assert main(compare_flags(data_dir, learned, output_dir)) == 130
    finished = {path: path.read_bytes() for path in (output_dir / "runs").glob("*.json")}
    assert sorted(path.stem for path in finished) == ["natural-seed1", "uniform-seed1"]

    trained.clear()
    monkeypatch.setattr(compare, "_train", lambda *a, **k: trained.append(k["mixture"]) or original(*a, **k))
    assert main(compare_flags(data_dir, learned, output_dir)) == 0
    assert trained == ["learned", "uniform", "natural", "learned"]
    assert all(path.read_bytes() == content for path, content in finished.items())
    interrupted = (output_dir / "comparison.md").read_text()

    trained.clear()
    assert main(compare_flags(data_dir, learned, output_dir)) == 0
    assert trained == []
    assert (output_dir / "comparison.md").read_text() == interrupted

    assert main(compare_flags(data_dir, learned, tmp_path / "uninterrupted")) == 0
    assert (tmp_path / "uninterrupted" / "comparison.md").read_text() == interrupted


def test_compare_trains_again_a_run_made_with_other_arguments(data_dir, learned, tmp_path, caplog):
    output_dir = tmp_path / "comparison"
    flags = ["--seeds", "1", *flags_of(data_dir, learned, output_dir)]
    assert main(["compare", *flags]) == 0
    before = json.loads((output_dir / "runs" / "uniform-seed1.json").read_text())
    caplog.clear()
    assert main(["compare", *flags, "--learning_rate=1e-2"]) == 0
    assert "uniform-seed1 was made with other arguments" in caplog.text
    assert "training.learning_rate differ" in caplog.text
    after = json.loads((output_dir / "runs" / "uniform-seed1.json").read_text())
    assert after["losses"] != before["losses"]


def test_report_shows_weights_and_table_and_needs_no_other_file(data_dir, learned, tmp_path, capsys):
    assert main(compare_flags(data_dir, learned, learned / "comparison")) == 0
    capsys.readouterr()
    assert main(["report", str(learned)]) == 0
    printed = capsys.readouterr().out
    table = (learned / "comparison" / "comparison.md").read_text().strip()
    assert table in printed
    assert "base64" not in printed
    report = (learned / "report.md").read_text()
    assert table in report
    assert report.count("data:image/png;base64,") == 2
    assert DomainWeights.from_pretrained(learned / "domain_weights").summary() in report


def test_report_shows_the_result_and_not_every_checkpoint(data_dir, learned, tmp_path, capsys):
    output_dir = tmp_path / "checkpoint-like" / "proxy"
    assert main(["learn", "--save_steps=1", *flags_of(data_dir, learned, output_dir)]) == 0
    capsys.readouterr()
    assert main(["report", str(output_dir)]) == 0
    assert capsys.readouterr().out.count("## ") == 1


def test_report_shows_no_plain_ratios(tmp_path, capsys):
    (tmp_path / "domain_weights.json").write_text('{"wiki": 0.5, "web": 0.5}')
    assert "holds neither" in refusal(capsys, "report", tmp_path)
    DomainWeights({"wiki": 0.25, "web": 0.75}).save_pretrained(tmp_path / "domain_weights")
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("## ") == 1
    assert "0.250" in shown


def test_demo_goes_from_a_corpus_to_a_report(data_dir, tmp_path, monkeypatch, capsys):
    from hf_doge.cli import demo, demo_influence
    from hf_doge.cli.demo_corpus import Split

    def copy_data(folder):
        shutil.copytree(data_dir, folder)
        return {"code": {"train": Split(), "validation": Split()}}

    monkeypatch.setattr(demo, "build_demo_corpus", copy_data)
    monkeypatch.setattr(demo, "SHARED_FLAGS", TINY)
    monkeypatch.setattr(demo, "LEARN_FLAGS", ["--train_tokenizer_vocab=300"])
    monkeypatch.setattr(demo, "COMPARE_FLAGS", ["--seeds", "1"])
    monkeypatch.setattr(demo_influence, "BLOCK_SIZE", 16)
    monkeypatch.setattr(demo_influence, "NUM_STEPS", 2)
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    weights, table = ("proxy/domain_weights", "proxy/domain_weights.png"), "comparison/comparison.md"
    for path in (*weights, table, "tracing/influence.html", "report.md"):
        assert (folder / path).exists()
        assert str(folder / path) in printed
    assert "proponent 1" in printed
    assert "Mean influence of an example, by domain" in printed
    assert printed.count("learned against uniform, geometric mean") == 1
    assert (folder / "report.md").read_text().count("data:image/png;base64,") == 2


def test_the_flags_of_the_demo_are_those_of_the_commands():
    from hf_doge.cli import compare, demo, learn
    from hf_doge.cli.arguments import DataArguments, ModelArguments
    from hf_doge.cli.parser import parse
    from hf_doge.training.config import DoGEConfig

    shared = ["--data_dir=x", "--use_cpu", *demo.SHARED_FLAGS]
    common = {"prog": "x", "description": "", "defaults": {}}
    parse([*shared, *demo.LEARN_FLAGS], DataArguments, ModelArguments, learn.TargetArguments, DoGEConfig, **common)
    *_, comparison_args, args = parse(
        [*shared, *demo.COMPARE_FLAGS],
        DataArguments,
        ModelArguments,
        compare.ComparisonArguments,
        compare.TrainingArguments,
        **common,
    )
    assert len(comparison_args.seeds) >= 2
    assert args.max_steps > 0


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    for domain in ("code", "prose"):
        write_domain(tmp_path / "data", domain)
    examples = REPOSITORY / "examples"
    shared = ["--data_dir", str(tmp_path / "data"), "--max_steps", "2", "--block_size", "16"]
    proxy = tmp_path / "proxy"
    learned = ["--domain_weights", str(proxy / "domain_weights"), "--tokenizer", str(proxy / "tokenizer")]
    for name, flags in (
        ("learn_domain_weights", ["--output_dir", str(proxy)]),
        ("train_with_domain_weights", ["--output_dir", str(tmp_path / "model"), *learned]),
    ):
        monkeypatch.setattr(sys, "argv", [name, *shared, *flags])
        runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    assert sum(DomainWeights.from_pretrained(proxy / "domain_weights").mean.values()) == pytest.approx(1)
    assert "validation perplexity" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").exists()


# What is written on the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_renders(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"hf-doge {command}" in capsys.readouterr().out


def test_help_without_a_command_imports_no_heavy_library():
    code = (
        "import sys; from hf_doge.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); sys.exit(code or bool(heavy))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert all(command in finished.stdout for command in COMMANDS)


def test_the_package_runs_as_a_module():
    finished = subprocess.run([sys.executable, "-m", "hf_doge", "--version"], capture_output=True, text=True)
    assert finished.returncode == 0
    assert finished.stdout.startswith("hf-doge ")


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_doge.cli.report.main", interrupt)
    assert main(["report"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "hf-doge report: interrupted. What was saved is kept."


def test_an_unknown_command_is_refused(capsys):
    assert f"must be one of {', '.join(COMMANDS)}, but got 'lern'" in refusal(capsys, "lern")


def test_an_unknown_flag_is_refused(data_dir, capsys):
    assert main(["learn", f"--data_dir={data_dir}", "--mue=1"]) == 2
    assert "--mue" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must map flags to values"),
        ("just words", "must map flags to values"),
        ("{unclosed", "must be YAML or JSON"),
        ('{"mue": 1}', "it has 'mue', that is `--mue`. Did you mean 'mu'?"),
        ("max_step: 3", "it has 'max_step'"),  # no key is completed
        ("mu: 1\nmu: 2\n", "'mu' stands twice"),
        ('{"mu": 1, "mu": 1}', "'mu' stands twice"),
        ("accelerator_config:\n  split_batches: true\n  split_batches: false\n", "'split_batches' stands twice"),
        ("learning_rate: 1\nlearning-rate: 2\n", "'learning_rate' and 'learning-rate' are the same"),
        ("domains: [[a]]", "under 'domains', but got ['a']"),
        ('{"output_dir": "\\ud800"}', ("under 'output_dir'", "invalid Unicode")),  # the second: PyYAML 6.0.0
        ("mu: \xff", "must be YAML or JSON"),
    ],
)
def test_a_config_file_that_means_something_else_than_it_says_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    line = refusal(capsys, "learn", tmp_path / "config.yaml")
    assert "config.yaml' must" in line
    assert any(words in line for words in ([message] if isinstance(message, str) else message))


def test_what_a_score_compares_is_a_flag(data_dir, learned, tmp_path):
    for flags, self_term, metric in (
        (["--self_term", "same", "--score_metric", "optimizer", "--mu=1"], True, "optimizer"),
        (["--self-term=none"], False, None),
    ):
        out = tmp_path / str(self_term)
        assert main(["learn", *flags_of(data_dir, learned, out), *flags]) == 0
        weights = DomainWeights.from_pretrained(out / "domain_weights")
        assert (weights.recipe["self_term"], weights.recipe.get("score_metric")) == (self_term, metric)
        plain = DomainWeights.from_pretrained(learned / "domain_weights")
        assert weights.trajectory.scores[0] != pytest.approx(plain.trajectory.scores[0], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ([], True),
        (["--self_term"], True),
        (["--self_term", "same"], True),
        (["--self_term", "True"], True),
        (["--self_term=no"], False),
        (["--no_self_term"], False),
        (["--self_term=none"], False),
        (["self_term: none"], False),
        (["self_term: independent"], "independent"),
    ],
)
def test_a_self_term_is_a_word_or_a_truth_value_as_before(flags, meant, tmp_path):
    if flags and ":" in flags[0]:
        config = tmp_path / "config.yaml"
        config.write_text(flags[0])
        flags = [str(config)]
    (args,) = parse(
        [*flags, "--recipe=paper", f"--output_dir={tmp_path}"], DoGEConfig, prog="learn", description="", defaults={}
    )
    assert args.get_recipe().self_term == meant


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--self_term=half", "must be one of same, none, independent, true or false, but got 'half'"),
        ("--score_metric=adam", "`score_metric` must be one of ['gradient', 'optimizer'], but got 'adam'"),
    ],
)
def test_an_unknown_word_for_what_a_score_compares_is_refused(flag, message, data_dir, tmp_path, capsys):
    assert message in learn_refusal(capsys, data_dir, tmp_path, TOKENIZER, flag)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mu=1", "--mu=2"],
        ["--mu", "1", "--mu=2"],
        ["--learning-rate=1", "--learning_rate=2"],
        ["--self_term", "--no_self_term"],
    ],
)
def test_a_flag_given_twice_is_refused_unless_it_says_the_same(flags, data_dir, tmp_path, capsys):
    assert "A flag must be given once" in learn_refusal(capsys, data_dir, tmp_path, *flags)
    assert "Give either `--tokenizer`" in learn_refusal(capsys, data_dir, tmp_path, "--mu=1", "--mu=1")


def test_a_missing_config_file_is_refused(tmp_path, capsys):
    assert "missing.yaml" in refusal(capsys, "learn", tmp_path / "missing.yaml")


# The data folder

TOKENIZER = "--train_tokenizer_vocab=300"


def learn_refusal(capsys, data_dir, tmp_path, *flags):
    flags = instead(TINY, *flags)
    return refusal(capsys, "learn", f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'out'}", *flags)


def test_a_report_to_what_is_not_installed_is_refused_before_the_data_are_read(tmp_path, capsys):
    found = [name for name in ("wandb", "trackio", "comet_ml", "mlflow") if importlib.util.find_spec(name) is None]
    if not found:
        pytest.skip("every tracker is installed")
    line = learn_refusal(capsys, tmp_path / "no", tmp_path, TOKENIZER, f"--report_to={found[0]}")
    assert f"`--report_to` names {found[0]}, which cannot be used here" in line


def test_a_model_to_start_from_brings_its_tokenizer(data_dir, learned, tmp_path):
    """As for any script of Hugging Face; what is asked for counts more."""
    train = [f"--data_dir={data_dir}", *TINY, f"--weights={learned}", "--save_strategy=no"]
    assert main(["train", *train, f"--tokenizer={learned / 'tokenizer'}", f"--output_dir={tmp_path / 'one'}"]) == 0
    shape = ("--model_size", "--model_type", "--model_config")
    flags = [flag for flag in TINY if not flag.startswith(shape)]
    start = [f"--data_dir={data_dir}", *flags, f"--model_name_or_path={tmp_path / 'one'}"]
    assert main(["learn", *start, f"--output_dir={tmp_path / 'two'}"]) == 0
    assert not (tmp_path / "two" / "tokenizer").exists()
    assert DomainWeights.from_pretrained(tmp_path / "two" / "domain_weights").mean


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert "must be a folder, but" in learn_refusal(capsys, tmp_path / "no", tmp_path, TOKENIZER)


def test_a_folder_without_pairs_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("x")
    assert "holds none" in learn_refusal(capsys, tmp_path / "data", tmp_path, TOKENIZER)


def test_a_domain_without_validation_is_refused_by_name(data_dir, tmp_path, capsys):
    (data_dir / "code.validation.jsonl").unlink()
    line = learn_refusal(capsys, data_dir, tmp_path, TOKENIZER)
    assert "'code' must have a train and a validation file, but it has no validation file" in line


def test_a_split_that_is_there_twice_is_refused(data_dir, tmp_path, capsys):
    (data_dir / "wiki.train.jsonl").write_text("")
    assert "'wiki' must have one train file" in learn_refusal(capsys, data_dir, tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--domains", "code", "web"], r"`--domains` must name domains of the data"),
        (["--target", "web"], r"`--target` must name domains of the data"),
        (["--domains", "code", "code"], r"['code'] are repeated"),
        (["--domains", "code", "prose", "--target", "code"], r"['code'] are in both"),
        (["--target", "code", "prose", "wiki"], "Drop a target"),
        (["--target", "heldout_mix", "code"], "Drop one of the two"),
        (["--target", "heldout_mix", "--heldout_fraction=0.999"], "must keep a block to train on"),
        (["--heldout_fraction=1"], "must be in (0, 1), but got 1.0"),
        (["--mu=0"], "`mu` must be in [1e-30, 1e+30], but got 0.0"),
        (["--block_size=1"], "at least 2 tokens, but got 1"),
        (["--block_size=100000"], "code.train.jsonl' gives"),
        (["--max_train_tokens=10"], "code.train.jsonl' gives 10"),
        (["--model_size=huge"], "must be one of ['nano'"),
        (["--model_type=bert"], "must be one of ['llama', 'gpt2']"),
        (["--tokenizer=x"], "Give either `--tokenizer`"),
        (["--train_tokenizer_vocab=100"], "at least 257"),
        (["--model_config=missing.json"], "missing.json"),
        (["--resume_from_checkpoint=last"], "No whole checkpoint found"),
        (["--resume_from_checkpoint=True"], "No whole checkpoint found"),
        (
            ["--resume_from_checkpoint=newest"],
            "must be last (or true), none (or false), or the folder of a checkpoint, but got",
        ),
    ],
)
def test_bad_flags_are_refused_with_what_to_do(flags, message, data_dir, tmp_path, capsys):
    assert message in learn_refusal(capsys, data_dir, tmp_path, *instead([TOKENIZER], *flags))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "fine"}\n{"words": "x"}\n', "line 2 of"),
        ('{"text": "fine"}\nnot json\n', "line 2 of"),
        ('{"text": 3}\n', "in line 1 of"),
        ("[1, 2]\n", "line 1 of"),
        ('{"text": "a"}\n\n{"text": "b"}\n', "line 2 of"),
        ('{"text": "fine"}\n{"text": "\\ud800"}\n', "lone surrogate"),
        ('{"text": "fine"}\n{"text": "a", "n": {"m": ["\\udc00"]}}\n', "line 2 of"),
        ('{"text": "a", "text": "b"}\n', "the key 'text' stands twice"),
        ('{"text": "a", "n": NaN}\n', "JSON knows no NaN"),
        ('{"text": "fine"}\n{"text": "\xff"}\n', "line 2 of"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}\n", "line 1 of"),
        ('{"text": "a", "n": ' + "[" * 10**5 + "]" * 10**5 + "}\n", "line 1 of"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(content, message, data_dir, tmp_path, capsys):
    (data_dir / "code.train.jsonl").write_bytes(content.encode("latin-1"))
    line = learn_refusal(capsys, data_dir, tmp_path, TOKENIZER)
    assert message in line
    assert "code.train.jsonl" in line


def test_a_truncated_gzip_file_is_refused_by_name(data_dir, tmp_path, capsys):
    path = data_dir / "prose.train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert "prose.train.jsonl.gz" in learn_refusal(capsys, data_dir, tmp_path, TOKENIZER)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "must be a JSON file"),
        ('{"hidden_size": 8}', 'Add for example "model_type": "llama"'),
        ('{"model_type": "llama", "vocab_size": 7}', "`vocab_size` is 7"),
        ('{"model_type": "llama", "max_position_embeddings": 4}', "`max_position_embeddings` is 4"),
    ],
)
def test_a_model_config_that_does_not_fit_is_refused(config, message, data_dir, tmp_path, capsys):
    (tmp_path / "model.json").write_text(config)
    line = learn_refusal(capsys, data_dir, tmp_path, TOKENIZER, f"--model_config={tmp_path / 'model.json'}")
    assert message in line


# Weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "nowhere"], "nowhere"),
        (["--weights", "a=uniform", "a=natural"], "'a' in 'a=natural'"),
        (["--weights", "a/b=uniform"], "'a/b' in"),
        (
            ["--mixtures", "doremi"],
            "must be among uniform, natural, temperature:T, unimax:EPOCHS and estimated, but got 'doremi'",
        ),
        (["--mixtures", "estimated"], "An estimate needs a target"),
        (["--mixtures", "temperature:0"], "'temperature:0' cannot be computed"),
        (["--mixtures", "temperature"], "'temperature' cannot be computed"),
        (["--weights", "a=unimax"], "'unimax' cannot be computed"),
        (["--mixtures", "unimax:1:2:3"], "'unimax:1:2:3' cannot be computed"),
        (["--mixtures", "uniform:2"], "but got 'uniform:2'"),
        (["--seeds", "1", "1"], "distinct seeds"),
    ],
)
def test_bad_mixtures_are_refused(flags, message, data_dir, learned, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "compare", *flags_of(data_dir, learned, tmp_path / "c"), *flags)


def test_weights_of_other_domains_are_refused_by_name(data_dir, learned, tmp_path, capsys):
    (tmp_path / "weights.json").write_text(json.dumps({"code": 0.5, "web": 0.5}))
    line = refusal(
        capsys, "train", f"--weights={tmp_path / 'weights.json'}", *flags_of(data_dir, learned, tmp_path / "m")
    )
    assert "['code', 'prose', 'wiki'], but" in line
    assert "['code', 'web']" in line


def test_report_of_a_folder_without_results_is_refused(tmp_path, capsys):
    assert "holds neither" in refusal(capsys, "report", tmp_path)
    assert "does not" in refusal(capsys, "report", tmp_path / "missing")


# Whoever reads


# A command whose output goes to a pipe that takes letters of ASCII alone, as with `PYTHONIOENCODING=ascii`.
PIPED = """
import os, sys
from hf_doge.cli import main

os.dup2(os.open(sys.argv[1], os.O_WRONLY), 1)
sys.stdout = open(1, "w", encoding="ascii", closefd=False)
sys.exit(main(sys.argv[2:]))
"""


def test_a_reader_that_knows_no_letters_and_stops_is_no_error(tmp_path):
    # few domains, which are soon drawn, with names so long that no pipe holds the table
    weights = DomainWeights({f"Wörter{number}" + 3500 * "s": 1 / 20 for number in range(20)})
    weights.save_pretrained(tmp_path / "é" / "domain_weights")
    os.mkfifo(tmp_path / "pipe")
    process = Fork(["-c", PIPED, tmp_path / "pipe", "report", tmp_path / "é"], env=launch_environment(LANG="C"))
    with (tmp_path / "pipe").open("rb") as pipe:
        line = pipe.readline()
    errors, _ = process.communicate(timeout=100)
    assert (process.returncode, line[:18]) == (0, b"## Learned weights")
    assert "error" not in errors.lower()
    assert "Traceback" not in errors
    assert (tmp_path / "é" / "report.md").exists()


def test_output_that_was_closed_before_is_no_error(tmp_path):
    DomainWeights.uniform(["a", "b"]).save_pretrained(tmp_path / "domain_weights")
    command = f"{shlex.quote(sys.executable)} -m hf_doge report {shlex.quote(str(tmp_path))} >&- 2>&-"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert (tmp_path / "report.md").exists()


# A command that finds one of its streams as Python leaves it that was closed before: without number and `None`.
CLOSED = """
import os, sys
from hf_doge.cli import main

name, number = sys.argv[1], {"stdout": 1, "stderr": 2}[sys.argv[1]]
os.close(number)
setattr(sys, name, None)
setattr(sys, f"__{name}__", None)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_one_stream_that_was_closed_before_is_no_error(closed, tmp_path):
    code = f"import sys; sys.exit(sys.{closed} is not None or sys.__{closed}__ is not None)"
    redirect = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    assert subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} -IS -c '{code}' {redirect}"]).returncode == 0
    DomainWeights.uniform(["a", "b"]).save_pretrained(tmp_path / "domain_weights")
    process = Fork(["-c", CLOSED, closed, "report", tmp_path], env=launch_environment(), separate_errors=True)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "report.md").exists()
    assert bool(output) == (closed == "stderr")


def tiny_bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=32, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
    )


def tiny_mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_bert, "but in a model of type 'bert' tokens see those behind them"),
        (tiny_classifier, "but in a model of type 'bert' tokens see those behind them"),
        (tiny_t5, "must be a causal language model, but is a model of type 't5'"),
        (tiny_bart, "must be a causal language model, but is an encoder and decoder"),
        (tiny_llama, None),
        (tiny_gpt2, None),
        (tiny_mamba, None),
    ],
)
def test_only_causal_language_models_are_trained(make, message, tmp_path):
    make().save_pretrained(tmp_path / "model")
    if message is None:
        assert not make_model(str(tmp_path / "model"), None).training
    else:
        with pytest.raises(ValueError, match=message):
            make_model(str(tmp_path / "model"), None)


def test_a_configuration_of_an_encoder_is_refused(data_dir, learned, tmp_path, capsys):
    file = tmp_path / "config.json"
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    file.write_text(json.dumps({"model_type": "roberta", **shape}))
    flags = instead(flags_of(data_dir, learned, tmp_path / "out"), f"--model_config={file}")
    for command, weights in (("learn", []), ("train", ["--weights=uniform"])):
        assert "tokens see those behind them" in refusal(capsys, command, *flags, *weights)
    file.write_text(json.dumps({"model_type": "roberta", "is_decoder": True, **shape}))
    assert make_model(None, get_config(ModelArguments(model_config=str(file)), tiny_tokenizer(), 8)) is not None
