"""The walk of the pages, as it stands, from an empty folder."""

import glob
import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout

import datasets
import pyarrow.parquet as pq
import pytest

from hf_doge import DomainWeights, InfluenceIndex
from hf_doge.cli import main, view
from tests.test_pages import ROOT
from tests.tracing.test_influence_html import Page

pytest.importorskip("trl", minversion="1.16")  # older ones lose labels where they pack, or log no loss of a domain

pytestmark = pytest.mark.timeout(600)  # all cells run in the setup of the first test that reads what they left
WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", WALK, flags=re.DOTALL | re.MULTILINE)
CELLS = [(language, block) for language, block in BLOCKS if language != "text"]  # that is what they print
TITLES = re.findall(r"^\*\*(\d+)\.", WALK, flags=re.MULTILINE)


def run_shell(cell):
    """Our commands in this process, without the seconds that an import takes; others by a shell."""
    if not cell.startswith("hf-doge "):
        subprocess.run(["bash", "-eu", "-c", cell], check=True)
        return
    _, *words = shlex.split(cell.replace("\\\n", " "))
    assert main([one for word in words for one in (sorted(glob.glob(word)) if "*" in word else [word])]) == 0


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which all cells have run, what each printed, and what the last one showed."""
    folder, shown, scope = tmp_path_factory.mktemp("walk"), [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(view, "require_gradio", lambda: None)
        patch.setattr(view, "make_page", lambda viewer: shown.append(viewer) or Served())
        patch.setattr(view, "serve", lambda page, **_: "here")
        printed = []
        for language, cell in CELLS:
            with redirect_stdout(io.StringIO()) as said:
                exec(cell, scope) if language == "python" else run_shell(cell)
            printed.append(said.getvalue())
        yield folder, printed, shown[0]


class Served:
    def block_thread(self):
        """As the page does until Ctrl-C."""


def test_ten_cells_go_from_an_empty_folder_to_the_page():
    assert [language for language, _ in CELLS].count("python") == 2
    assert [str(number) for number in range(1, 11)] == TITLES
    assert len(CELLS) == 10
    assert all(cell.count("hf-doge ") <= 1 for _, cell in CELLS)


def test_every_cell_leaves_what_the_next_ones_need(walked):
    folder, printed, _ = walked
    data, estimate, learn, compare, search = (printed[number] for number in (2, 3, 4, 5, 8))
    assert {line.split()[0] for line in data.splitlines()[2:5]} == {"chat", "tasks", "prose"}
    assert "epochs, uniform" in data
    assert set(DomainWeights.from_pretrained(folder / "estimate").mean) == {"tasks", "prose"}
    assert "Recipe: ngram_em" in estimate
    assert set(DomainWeights.from_pretrained(folder / "proxy").mean) == {"chat", "tasks", "prose"}
    assert "Recipe: doge_plus" in learn
    rows = pq.read_table(folder / "table" / "comparison.parquet").to_pylist()
    assert {row["mixture"] for row in rows} == {"uniform", "learned"}
    assert "learned against uniform" in compare
    assert re.search(r"example \d+, (chat|tasks|prose)", search)
    assert {"chat", "tasks", "prose"} <= set(InfluenceIndex.from_pretrained(folder / "influence").examples["domain"])


def test_the_model_was_trained_on_packed_tokens_by_the_learned_weights(walked):
    from transformers.trainer_callback import TrainerState

    folder, *_ = walked
    log = TrainerState.load_from_json(folder / "model" / "checkpoint-60" / "trainer_state.json").log_history
    tokens = {name: log[-1][f"domain_tokens/{name}"] for name in ("chat", "tasks", "prose")}
    weights = DomainWeights.from_pretrained(folder / "proxy").mean
    assert {name: one / sum(tokens.values()) for name, one in tokens.items()} == pytest.approx(weights, abs=0.02)


def test_the_page_answers(walked):
    folder, _, viewer = walked
    hits, domains = viewer.trace("the median of numeric data", top_k=3, cosine=True)
    assert Page(hits).marks == Page((folder / "hits.html").read_text(encoding="utf-8")).marks
    assert Page(hits).marks
    assert all(name in domains for name in ("chat", "tasks", "prose"))
    assert "What does" in viewer.listed()[0][0]
