"""The example mixture, from the shell: what there is, estimate, learn, compare, train."""

import json
import re
import shutil

import datasets
import pyarrow.parquet as pq
import pytest

from hf_doge.artifacts import DomainWeights
from hf_doge.cli import main
from tests.data.made import write_jsonl, write_sets
from tests.launch import REPOSITORY

TRAINING = [
    "--model_size=nano",
    "--per_device_train_batch_size=6",
    "--max_steps=2",
    "--use_cpu",
    "--disable_tqdm=true",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The example's mixture and its data; a cache of `datasets` of their own."""
    folder = tmp_path_factory.mktemp("made")
    write_sets(folder / "data")
    shutil.copy(REPOSITORY / "examples" / "mixture" / "mixture.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def run(command, folder, output, *flags):
    mixture = f"--mixture={folder / 'mixture.yaml'}"
    return main([command, mixture, f"--output_dir={folder / output}", "--block_size=32", *flags])


@pytest.fixture(scope="module")
def estimated(made):
    assert run("estimate", made, "estimate", "--target=chat", "--train_tokenizer_vocab=300") == 0
    return made


def tokenizer_of(folder):
    return f"--tokenizer={folder / 'estimate' / 'tokenizer'}"


def test_an_estimate_for_a_chat_weighs_the_other_data_sets(estimated):
    assert set(DomainWeights.from_pretrained(estimated / "estimate" / "domain_weights").mean) == {"tasks", "prose"}


def test_a_rule_weighs_all_data_sets_and_the_old_flag_for_it_says_its_new_name(estimated, tmp_path, caplog):
    assert run("estimate", estimated, "rule", "--rule=uniform", tokenizer_of(estimated)) == 0
    assert DomainWeights.from_pretrained(estimated / "rule" / "domain_weights").mean["chat"] == pytest.approx(1 / 3)
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"a.{split}.jsonl", [{"text": "some words"}] * 50)
    flags = [f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}", "--block_size=16", tokenizer_of(estimated)]
    assert main(["estimate", *flags, "--mixture=uniform"]) == 0
    assert "Write `--rule`" in caplog.text


def test_the_mixture_is_learned_compared_and_trained_on(estimated):
    """Domains with and without masked tokens in one step."""
    shared = [tokenizer_of(estimated), *TRAINING]
    assert run("learn", estimated, "proxy", *shared) == 0
    learned = DomainWeights.from_pretrained(estimated / "proxy" / "domain_weights")
    assert set(learned.mean) == {"chat", "tasks", "prose"}
    weights = [f"--weights=learned={estimated / 'proxy'}", "given=mixture"]
    weights = ["--weights", weights[0].removeprefix("--weights="), weights[1]]
    assert run("compare", estimated, "table", *shared, *weights, "--mixtures=uniform", "--seeds=1") == 0
    table = pq.read_table(estimated / "table" / "comparison.parquet").to_pylist()
    assert {(row["mixture"], row["domain"]) for row in table} == {
        (mixture, domain) for mixture in ("uniform", "learned", "given") for domain in learned.mean
    }
    assert run("train", estimated, "model", *shared, "--weights=mixture") == 0
    results = json.loads((estimated / "model" / "domain_results.json").read_text())
    assert results["domain_weights"] == {"chat": 0.5, "prose": 0.25, "tasks": 0.25}


def test_the_loss_of_a_masked_domain_is_that_of_its_labelled_tokens(estimated):
    """What `train` says of the chat, computed from the saved model and the blocks' labels one by one."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_doge.cli.arguments import DataArguments
    from hf_doge.data.domain_data import load_domain_data

    assert run("train", estimated, "alone", tokenizer_of(estimated), *TRAINING, "--weights=mixture") == 0
    results = json.loads((estimated / "alone" / "domain_results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(estimated / "alone").eval()
    tokenizer = str(estimated / "estimate" / "tokenizer")
    args = DataArguments(mixture=str(estimated / "mixture.yaml"), tokenizer=tokenizer, block_size=32)
    rows = load_domain_data(args, estimated / "alone").validation["chat"].with_format("torch")
    losses = []  # mean over the labels of each batch of 8, as the Trainer evaluates
    for batch in rows.iter(batch_size=8):
        with torch.no_grad():
            logs = model(batch["input_ids"]).logits[:, :-1].log_softmax(dim=-1)
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        picked = logs.gather(2, labels.clamp(min=0)[..., None])[..., 0][kept]
        losses += [-picked.mean()] * len(labels)
    assert torch.stack(losses).mean().exp() == pytest.approx(results["perplexity"]["chat"], rel=1e-4)


@pytest.fixture
def table_of(estimated, capsys, monkeypatch):
    monkeypatch.chdir(estimated)

    def run_data(*flags):
        assert main(["data", *flags, tokenizer_of(estimated), "--block_size=32"]) == 0
        lines = capsys.readouterr().out.splitlines()
        cells = [re.split(r"  +", line.strip()) for line in lines if "----" not in line]
        return lines[-1], [dict(zip(cells[0], row, strict=False)) for row in cells[1:4]]

    return run_data


def test_the_table_tells_rows_tokens_lengths_and_epochs(table_of):
    last, table = table_of("mixture.yaml", "--max_steps=40", "--per_device_train_batch_size=8")
    assert last == "Epochs of a training on 10,240 tokens."
    assert [row["domain"] for row in table] == ["chat", "tasks", "prose"]
    assert [row["rows"] for row in table] == ["48", "64", "40"]  # 60, 80, and 50 by `max_examples`, less a fifth
    assert [row["held out"] for row in table] == ["12", "16", "10"]
    for row, weight in zip(table, (0.5, 0.25, 0.25), strict=True):
        tokens = int(row["tokens"].replace(",", ""))
        assert float(row["mean length"]) == pytest.approx(tokens / int(row["rows"]), abs=0.05)
        assert float(row["weight"]) == weight
        assert float(row["epochs, mixture"]) == pytest.approx(10240 * weight / tokens, abs=0.006)
        assert float(row["epochs, uniform"]) == pytest.approx(10240 / 3 / tokens, abs=0.006)
        losses = int(row["with a loss"].replace(",", ""))
        assert (losses == tokens) == (row["domain"] == "prose")


def test_a_data_folder_has_a_table_too(table_of, tmp_path):
    for name, number in (("a", 30), ("b", 20), ("c", 10)):
        for split in ("train", "validation"):
            write_jsonl(tmp_path / f"{name}.{split}.jsonl", [{"text": "some words"}] * number)
    _, table = table_of(f"--data_dir={tmp_path}")
    assert [(row["domain"], row["rows"]) for row in table] == [("a", "30"), ("b", "20"), ("c", "10")]
    assert "with a loss" not in table[0]
    assert [float(row["natural"]) for row in table] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=1e-4)


@pytest.mark.parametrize("command", ["data", "estimate", "learn", "sweep", "train", "compare"])
def test_every_command_names_the_unknown_key_of_a_mixture(command, estimated, tmp_path, capsys):
    path = tmp_path / "m.yaml"
    path.write_text("datasets:\n- path: a\n  colums: [text]\n")
    flags = [f"--mixture={path}", f"--output_dir={tmp_path / 'out'}", tokenizer_of(estimated)]
    assert main([command, *flags, *(["--weights=uniform"] if command == "train" else [])]) == 2
    told = capsys.readouterr().err
    assert "unknown key 'colums'; allowed are " in told
    assert "Did you mean 'columns'?" in told
    assert "Traceback" not in told


def test_weights_that_no_mixture_file_gives_are_refused(estimated, tmp_path, capsys):
    shutil.copytree(estimated / "data", tmp_path / "data")
    (tmp_path / "m.yaml").write_text("datasets: [{path: data/prose.jsonl}, {path: data/tasks.jsonl}]")
    flags = [f"--mixture={tmp_path / 'm.yaml'}", f"--output_dir={tmp_path / 'out'}", "--block_size=32", *TRAINING]
    assert main(["train", *flags, tokenizer_of(estimated), "--weights=mixture"]) == 2
    assert "but it gives none. Add a `weight` to each data set" in capsys.readouterr().err
