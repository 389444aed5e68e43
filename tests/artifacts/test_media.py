"""An address in an index or in queries is text: reading, searching and showing fetch nothing."""

import http.server
import json
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Value

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence.examples import harmless_metadata
from hf_doge.files import sha256
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer


@pytest.fixture
def fetched():
    """Addresses that somebody asked for, and where to ask."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


MEDIA = Features(
    {
        "picture": Image(),
        "sound": Audio(),
        "pictures": List(Image()),
        "deep": {"one": {"picture": Image()}},
        "topic": ClassLabel(names=["a", "b"]),
    }
)


def media(address, count):
    one = {"bytes": None, "path": f"{address}/x.png"}
    row = {"picture": one, "sound": one, "pictures": [one, one], "deep": {"one": {"picture": one}}, "topic": 1}
    return {name: [value] * count for name, value in row.items()}


def with_media(table, address):
    """A table with further columns, as `datasets` notes their types."""
    columns = media(address, len(table))
    for name, kind in zip(MEDIA.arrow_schema.names, MEDIA.arrow_schema.types, strict=True):
        table = table.append_column(name, pa.array(columns[name], kind))
    noted = {"info": {"features": MEDIA.to_dict()}}
    return table.replace_schema_metadata({b"huggingface": json.dumps(noted).encode()})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    tokenizer = wordpiece_tokenizer()
    folder = tmp_path_factory.mktemp("recorded")
    return train(folder, classifier(tokenizer), tokenizer, tokenised(sentences(12), tokenizer)), tokenizer


def test_no_address_in_an_index_or_in_queries_is_fetched(tmp_path, recorded, fetched):
    asked, address = fetched
    folder, tokenizer = tmp_path / "index", recorded[1]
    shutil.copytree(recorded[0], folder)
    (path,) = (folder / "examples").iterdir()
    pq.write_table(with_media(pq.read_table(path, use_threads=False), address), path)
    config = json.loads((folder / "config.json").read_text())
    config["files"][f"examples/{path.name}"] = sha256(path)
    (folder / "config.json").write_text(json.dumps(config))
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    assert index.examples[0]["picture"] == {"bytes": None, "path": f"{address}/x.png"}
    assert index.examples.features["topic"].names == ["a", "b"]
    queries = tokenised(sentences(2, seed=1), tokenizer)
    asking = Dataset(with_media(queries.with_format("arrow")[:], address))
    assert isinstance(asking.features["sound"], Audio)
    for hits in (index.search(asking, top_k=2), index.search(["The match"], top_k=2)):
        assert len(list(hits)) >= 2
        index.to_html(hits, tmp_path / "page.html")
    index.domain_influence(queries, "topic")
    list(index.self_influence())
    assert asked == []


def test_what_is_noted_of_columns_is_kept_but_for_what_is_decoded():
    table = with_media(pa.table({"example_id": [0]}), "x")
    kept = Features.from_arrow_schema(table.replace_schema_metadata(harmless_metadata(table.schema)).schema)
    assert kept["topic"] == MEDIA["topic"]
    assert kept["picture"] == {"bytes": Value("binary"), "path": Value("string")}
    for strange in (b"{", b"[1]", b'{"info": 3}', b'{"info": {"features": [1]}}', b"[" * 100_000):
        assert harmless_metadata(pa.schema([], metadata={b"huggingface": strange})) == {}
