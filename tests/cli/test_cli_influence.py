import gzip
import json
import re
import shutil

import pytest

from hf_doge.artifacts import DomainWeights
from hf_doge.cli import main
from tests.tracing.influence_tools import TOPICS, classifier, sentences, tokenised, train, wordpiece_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a classifier, and the JSONL file it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = wordpiece_tokenizer()
    rows = sentences(15)
    train(folder, classifier(tokenizer), tokenizer, tokenised(rows, tokenizer), epochs=2)
    named = [{**row, "label": TOPICS[row["label"]], "source": "test"} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in named)
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def indexed(trained):
    assert main(["index", *flags(trained), f"--output_dir={trained / 'influence'}"]) == 0
    return trained / "influence"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def flags(trained):
    checkpoints = sorted(str(path) for path in (trained / "run").glob("checkpoint-*"))
    return [
        "--checkpoints",
        *checkpoints,
        "--data",
        str(trained / "train.jsonl.gz"),
        "--learning_rates",
        "0.1",
        "0.05",
    ]


def refusal(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_index_then_search_prints_examples_and_words(indexed, capsys):
    assert main(["search", "--index", str(indexed), "--query", "The runner is winning", "--top_k", "2"]) == 0
    out = capsys.readouterr().out
    assert "Query 0: The runner is winning" in out
    assert "proponents" in out
    assert "opponents" in out
    assert re.search(r"example \d+, \w+, test  ", out)  # its label and source
    assert "[CLS]" not in out
    assert re.search(r"special tokens and ends of sentences \d+%", out)
    argv = ["search", "--index", str(indexed), "--query", "The runner is winning", "--top_k", "2", "--recipe=paper"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "[CLS]" in out
    assert "special tokens and ends of sentences" not in out  # nothing is hidden


def test_a_page_gets_its_folder_and_a_folder_is_refused_before_the_search(indexed, tmp_path, capsys):
    argv = ["search", "--index", str(indexed), "--query", "goal", "--html"]
    assert main([*argv, str(tmp_path / "new" / "folder" / "page.html")]) == 0
    assert (tmp_path / "new" / "folder" / "page.html").is_file()
    capsys.readouterr()
    assert main([*argv, str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert (told.out, f"`--html` must be a file, but {str(tmp_path)!r} is a folder" in told.err) == ("", True)
    with pytest.raises(IsADirectoryError, match="`path` must be a file"):
        DomainWeights.uniform(["a"]).export("datasets", path=tmp_path)
    with pytest.raises(IsADirectoryError, match="`path` must be a file"):
        DomainWeights.uniform(["a"]).plot(tmp_path)


def test_search_in_json_and_html(indexed, tmp_path, capsys):
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"text": "New moon", "label": "space"}\n{"text": "A market"}\n')
    page = tmp_path / "page.html"
    argv = ["search", "--index", str(indexed), "--queries", str(queries), "--top_k=1", "--json", "--html", str(page)]
    assert main([*argv, "--special_tokens=drop"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {hit["query"] for hit in hits} == {0, 1}
    assert hits[0]["query_label"] == 2
    assert sum(hits[0]["word_scores"]) == pytest.approx(hits[0]["score"])
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_index_continues_and_takes_options(trained, tmp_path, capsys):
    folder = tmp_path / "index"
    first, second = flags(trained)[1:3]
    rest = ["--data", str(trained / "train.jsonl.gz"), "--output_dir", str(folder), "--top_k_tokens=4", "--dtype=int8"]
    rest += ["--tied=own", "--top_k_unit=token"]
    assert main(["index", "--checkpoints", first, "--learning_rates", "0.1", *rest]) == 0
    assert main(["index", "--checkpoints", first, second, "--learning_rates", "0.1", "0.05", *rest]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert len(config["checkpoints"]) == 2
    assert config["top_k"] == 4
    assert config["tied"] == "own"
    assert config["num_examples"] == 15


def test_index_takes_the_papers_recipe_and_refuses_what_contradicts_it(trained, tmp_path, capsys):
    argv = ["index", *flags(trained), f"--output_dir={tmp_path / 'index'}", "--recipe=paper"]
    assert main([*argv, "--tied=own"]) == 2
    assert "`recipe='paper'` means `tied='input'`, but got `tied='own'`" in capsys.readouterr().err
    assert main(argv) == 0
    search = json.loads((tmp_path / "index" / "config.json").read_text())["metadata"]["search"]
    assert (search["special_tokens"], search["cosine"]) == ("count", False)


def test_index_divides_by_the_moments_that_the_trainer_saved(trained, indexed, tmp_path, capsys):
    folder = tmp_path / "index"
    argv = ["index", *flags(trained), f"--output_dir={folder}", "--metric=optimizer"]
    assert main(argv) == 0
    plain, divided = (json.loads((one / "config.json").read_text()) for one in (indexed, folder))
    assert (plain["second_moment"], divided["second_moment"]) == (False, True)
    assert ["second_moments" in entry for entry in plain["checkpoints"] + divided["checkpoints"]] == [False] * 2 + [
        True
    ] * 2
    assert main(["search", "--index", str(folder), "--query", "New moon", "--top_k=1"]) == 0
    without = shutil.copytree(trained / "run", tmp_path / "run")
    for file in without.glob("*/optimizer.pt"):
        file.unlink()
    checkpoints = sorted(without.glob("checkpoint-*"))
    argv = ["index", "--checkpoints", *checkpoints, *flags(trained)[3:], "--second_moment"]
    assert "needs optimizer.pt in every checkpoint" in refusal(capsys, *argv, f"--output_dir={tmp_path / 'i'}")


def test_examples_behind_those_of_an_index_are_added(trained, indexed, tmp_path, capsys):
    grown = shutil.copytree(indexed, tmp_path / "influence")
    rows = [{**row, "label": TOPICS[row["label"]]} for row in sentences(18)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["index", *flags(trained)[:3], "--data", str(tmp_path / "more.jsonl"), f"--output_dir={grown}"]
    assert "`num_examples` is 15, not 18" in refusal(capsys, *argv, "--learning_rates", "0.1", "0.05")
    assert main([*argv, "--add_examples"]) == 0
    assert main(["search", "--index", str(grown), "--query", rows[17]["text"], "--top_k=18", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {15, 16, 17} & {hit["example_id"] for hit in hits}


def test_refusals_are_one_line(trained, indexed, tmp_path, capsys):
    search = ["search", "--index", indexed]
    assert "Give either `--query`" in refusal(capsys, *search)
    assert "`top_k` must be at least 1" in refusal(capsys, *search, "--query", "moon", "--top_k", "0")
    assert "must exist" in refusal(capsys, *search, "--queries", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    assert "line 1 of" in refusal(capsys, *search, "--queries", tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "at least one record" in refusal(capsys, *search, "--queries", tmp_path / "empty.jsonl")
    assert "must hold config.json" in refusal(capsys, "search", "--index", tmp_path, "--query", "moon")
    index = ["index", *flags(trained), "--output_dir", tmp_path / "i"]
    assert "'--label_field'" in refusal(capsys, *index, "--label_field", "x").replace("`", "'")
    assert "`top_k_unit` must be 'token' with" in refusal(capsys, *index, "--tied", "own", "--top_k_tokens", "2")
    assert "must have a text in 'x'" in refusal(capsys, *index, "--text_field", "x")
    broken = tmp_path / "broken"
    shutil.copytree(indexed, broken)
    segment = next(broken.glob("gradients/*/*.parquet"))
    segment.write_bytes(b"")
    assert "altered or cut short" in refusal(capsys, "search", "--index", broken, "--query", "moon")
    assert "folders that a Trainer wrote" in refusal(capsys, "index", "--checkpoints", tmp_path / "no", "--data", "x")
