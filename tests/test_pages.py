"""The README's code runs, the pages lead somewhere, and what stands on them is taken from where it is."""

import ast
import gzip
import json
import random
import re
from pathlib import Path

import pytest
import yaml

from hf_doge.artifacts.export import FORMS
from hf_doge.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
SITE = {
    "results.md",
    "reproductions.md",
    "changelog.md",
    "commands.md",
}  # made when the site is built, see docs/pages.py


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def named(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """The anchors of headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        found = (page.parent / target).resolve() if target else page
        if found.name in SITE and found.parent == ROOT / "docs":
            continue  # mkdocs looks at those
        assert found.exists(), f"{named(page)} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor[1:] in anchors(found), f"{named(page)} links to {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_of_python_is_python(page):
    for block in blocks(page, "python"):
        assert ast.parse(block).body


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_shell_block_is_there(page):
    for block in blocks(page, "bash"):
        for command in re.findall(r"^hf-doge (\S+)", block, flags=re.MULTILINE):
            assert command in COMMANDS, f"{named(page)}: hf-doge {command}"


def test_every_trainer_of_the_table_names_a_test_and_every_trainer_of_trl_is_in_it():
    text = (
        (ROOT / "docs" / "train.md")
        .read_text(encoding="utf-8")
        .partition("## trl's trainers")[2]
        .partition("\n## ")[0]
    )
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for row in rows:
        file, name = re.fullmatch(r"`(\w+\.py)::(test_\w+)`", row.split("|")[-2].strip()).groups()
        assert f"def {name}(" in (ROOT / "tests" / "training" / file).read_text(encoding="utf-8"), row
    trl = pytest.importorskip("trl", minversion="1.16")
    trainers = {name for name in dir(trl) if re.fullmatch(r"[A-Z]\w+Trainer", name)}
    assert {name for row in rows for name in re.findall(r"`(\w+Trainer)`", row)} == trainers


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_interval_of_the_readme_is_measured_where_it_says():
    rows = re.findall(r"^\|(.*\[[-+.\d]+, [-+.\d]+\].*)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 10
    source = ROOT
    for row in rows:
        if link := LINK.search(row):  # else "the same" as the row above
            source = ROOT / link[1]
        for interval in re.findall(r"\[[-+.\d]+, [-+.\d]+\]", row):
            assert interval in source.read_text(encoding="utf-8"), row


def test_every_page_is_in_the_navigation_once():
    class Loader(yaml.SafeLoader):
        """Reads `mkdocs.yml`, which may name Python objects."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Loader)["nav"]
    listed = re.findall(r"[\w/]+\.md", json.dumps(nav))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(there | SITE)


def test_the_page_of_exports_names_every_format():
    named_there = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "exports.md").read_text(), flags=re.MULTILINE)
    assert sorted(named_there) == sorted([*FORMS, "format"])


def test_citation_names_the_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'__version__ = "(.*)"', (ROOT / "hf_doge" / "_version.py").read_text())[1]
    assert citation["version"] == version
    identifiers = [one["identifiers"][0]["value"] for one in citation["references"]]
    assert identifiers == ["arXiv:2310.15393", "arXiv:2202.11844"]


# The README, run


def write_corpus(folder):
    """Text as the demo writes it: documents with the words of their domain."""
    folder.mkdir(parents=True)
    for name in ("cpp_headers", "documentation", "licences", "python_code", "readmes"):
        draw = random.Random(name)
        words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(30)]
        rows = [{"text": " ".join(draw.choices(words, k=60)), "source": name} for _ in range(24)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Every block but those that push, in one go, with fewer steps; what a reader has is made here."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from tests.tracing.influence_tools import classifier, sentences, wordpiece_tokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_corpus(tmp_path / "demo" / "corpus")
    learn, use, trace, share = blocks(ROOT / "README.md", "python")
    assert "push_to_hub" in share

    scope = {}
    exec(learn.replace("max_steps=100", "max_steps=2, report_to=[]"), scope)
    assert set(scope["estimated"].names) == set(scope["names"]) - {"readmes"}
    assert "python_code" in capsys.readouterr().out

    scope["model"] = scope["proxy"]
    scope["args"] = TrainingArguments("model", max_steps=2, report_to=[], use_cpu=True)
    scope["domain_of_each_row"] = [name for name in scope["sources"] for _ in range(3)]
    scope["streams"] = {name: rows.to_iterable_dataset() for name, rows in scope["sources"].items()}
    scope["paths"] = {name: f"/data/{name}" for name in scope["sources"]}
    exec(use, scope)
    assert "/data/licences" in capsys.readouterr().out
    scope["trainer"].train()
    assert next(iter(scope["stream"]))["input_ids"]
    assert len(list(scope["sampler"])) == 12

    tokenizer = wordpiece_tokenizer()
    scope |= {
        "tokenizer": tokenizer,
        "texts": Dataset.from_list(sentences(12)),
        "classifier": classifier(tokenizer),
    }
    scope["arguments"] = TrainingArguments("run", max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    exec(trace, scope)
    assert "<mark" in (tmp_path / "hits.html").read_text()


# The notebooks


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["mix", "trace"])
def test_a_notebook_runs_and_shows_what_it_says(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    html = "".join(data.get("text/html", "") for data in shown)
    if name == "mix":
        assert "linear-gradient" in html
        assert "Validation perplexity" in html
        assert any("image/png" in data for data in shown)
    else:
        assert html.count('class="hf-doge"') == 2
        assert "<mark" in html


@pytest.mark.parametrize("name", ["mix", "trace"])
def test_a_notebook_in_the_repository_has_no_output(name):
    notebook = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook["cells"])
