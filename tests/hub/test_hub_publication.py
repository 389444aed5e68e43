"""What of an index is published: nothing that should stay, and nothing altered that should not be."""

import datetime
import io
import json

import pyarrow.parquet as pq
import pytest

from hf_doge import DomainWeights, InfluenceIndex
from hf_doge.artifacts.cards.card import Card
from hf_doge.artifacts.cards.weights import draw_plot
from hf_doge.artifacts.domain_weights import weights_publication
from hf_doge.artifacts.hub.publication import Head, merge_card
from hf_doge.artifacts.influence.manifest import read_config
from hf_doge.tracing.publication import index_publication
from tests.artifacts.test_domain_weights import make_weights
from tests.hub.handle import HubServer, run_client
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

EXAMPLES = "examples/train-00000-of-00001.parquet"


def publish(folder, **options):
    return index_publication(folder, read_config(folder), "doge/index", **options)


def read(publication, path):
    source = publication.files[path]
    return source if isinstance(source, bytes) else source.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An index with columns of every kind, of a model whose labels and tokens look like paths."""
    folder, tokenizer = tmp_path_factory.mktemp("publication"), wordpiece_tokenizer()
    tokenizer.add_tokens(["/think", "\\begin"])
    model = classifier(tokenizer)
    model.config.id2label = {0: "/m/09x0r", 1: "~cat", 2: "/usr"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    rows = [
        row | {"user": number, "user_name": f"Ada {number}", "day": datetime.date(2026, 1, 1 + number)}
        for number, row in enumerate(sentences(6))
    ]
    return train(folder, model, tokenizer, tokenised(rows, tokenizer), epochs=1)


def test_a_redacted_column_of_texts_is_no_label_name_because_a_number_is_called_alike(folder):
    table = pq.read_table(io.BytesIO(read(publish(folder, redact_text=True), EXAMPLES)))
    assert table.column_names == ["example_id", "label", "user", "day", "label_name"]
    kept = publish(folder, redact_text=True, keep_columns="user_name")
    assert "user_name" in pq.read_table(io.BytesIO(read(kept, EXAMPLES))).column_names


def test_an_altered_table_of_examples_is_not_published_redacted_either(folder, tmp_path):
    altered = tmp_path / "index"
    InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps").save_pretrained(altered)
    pq.write_table(pq.read_table(altered / EXAMPLES).slice(0, 3), altered / EXAMPLES)
    with pytest.raises(ValueError, match="was altered since it was written"):
        publish(altered, redact_text=True)


def test_a_file_that_was_altered_since_it_was_written_is_not_published(folder, tmp_path):
    altered, empty = tmp_path / "index", Head("0" * 40, {})
    InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps").save_pretrained(altered)
    assert publish(altered).compare(empty, None).changed
    segment = next(altered.glob("gradients/*/*.parquet"))
    content = segment.read_bytes()
    segment.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(ValueError, match=rf"{segment.name}' was altered since it was written"):
        publish(altered).compare(empty, None)


def test_texts_go_over_an_index_without_them_only_by_an_explicit_word(folder):
    redacted = read(publish(folder, redact_text=True), "config.json")
    with pytest.raises(PermissionError, match=r"published without the texts.*`publish_text=True`.*--publish_text"):
        publish(folder).check_manifest(redacted)
    publish(folder, publish_text=True).check_manifest(redacted)
    publish(folder, redact_text=True).check_manifest(redacted)
    with pytest.raises(ValueError, match="`publish_text` must be True or False"):
        publish(folder, publish_text="no")


def test_redacting_what_was_published_with_its_texts_warns_of_the_history(folder):
    plain, redacted = publish(folder), publish(folder, redact_text=True)
    with pytest.warns(UserWarning, match="earlier commits of 'doge/index' still hold the texts"):
        redacted.check_manifest(read(plain, "config.json"))
    redacted.check_manifest(read(redacted, "config.json"))
    plain.check_manifest(read(plain, "config.json"))


def test_labels_and_tokens_that_look_like_paths_are_published_as_they_are(folder):
    publication = publish(folder)
    (path,) = [path for path in publication.files if path.startswith("models/") and path.endswith("/config.json")]
    assert json.loads(read(publication, path))["id2label"] == {"0": "/m/09x0r", "1": "~cat", "2": "/usr"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        where = path.replace("config.json", name)
        (source,) = (folder.parent / "run").glob(f"*/{name}")
        ours, theirs = json.loads(read(publication, where)), json.loads(source.read_bytes())
        assert ours == theirs


def test_files_of_others_in_our_folders_are_not_ours(folder):
    index, weights = publish(folder), weights_publication(make_weights(), "doge/mixture")
    for path in ("examples/demo.ipynb", "models/README.md", "gradients/notes.md", "notes.txt", "models/a/train.py"):
        assert not index.owned(path), path
    for path in (
        "examples/old.parquet",
        "gradients/step-1/segment-00000000.parquet",
        "models/step-1/model.safetensors",
    ):
        assert index.owned(path), path
    assert not weights.owned("weights/notes.txt")
    assert weights.owned("weights/old.parquet")


def test_models_that_the_trainer_saved_into_the_folder_of_the_index_go_where_readers_look(folder, tmp_path):
    moved = tmp_path / "index"
    InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps").save_pretrained(moved)
    config = read_config(moved)
    (checkpoint,) = config["checkpoints"]
    (source,) = (folder.parent / "run").glob("checkpoint-*")
    source.rename(moved / source.name)
    try:
        config["checkpoints"] = [{**checkpoint, "path": source.name}]
        publication = index_publication(moved, config, "doge/index")
    finally:
        (moved / source.name).rename(source)
    (published,) = json.loads(read(publication, "config.json"))["checkpoints"]
    assert published["path"] == f"models/{checkpoint['name']}"
    assert f"models/{checkpoint['name']}/model.safetensors" in publication.files


def test_a_card_that_is_not_in_utf8_is_kept_byte_by_byte():
    card, written = Card({"pretty_name": "Ours"}, "Ours", "block", ()), "# Größe\n".encode("latin-1")
    with pytest.warns(UserWarning, match="not in UTF-8, so it is kept"):
        assert merge_card(card, written) == written
    with pytest.warns(UserWarning, match="markers are gone"):
        assert merge_card(card, "# Größe\n".encode()) == "# Größe\n".encode()


def test_thousands_of_domains_are_not_drawn():
    assert draw_plot(DomainWeights.uniform(str(number) for number in range(10_000))) is None


def test_a_push_needs_no_cache(tmp_path):
    """Which may be read-only, as on a cluster: what a push reads of the repository is of no use to anybody later."""
    script = "from tests.artifacts.test_domain_weights import make_weights\nfor seed in (0, 1): make_weights(seed=seed).push_to_hub('doge/mixture')"
    (tmp_path / "file").touch()
    with HubServer(tmp_path / "state") as hub:
        run_client(hub, script, HF_HUB_CACHE=str(tmp_path / "file" / "cache"))
        assert len(hub.commits("doge/mixture")) == 3


def test_what_a_person_wrote_into_the_card_of_the_folder_goes_along_to_a_new_repository(folder, tmp_path):
    edited = tmp_path / "index"
    InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps").save_pretrained(edited)
    card = edited / "README.md"
    card.write_text(card.read_text() + "\nAsk Ada before you use it.\n")
    publication = publish(edited)
    assert "Ask Ada before you use it." in publication.card.merged_with(None)
    assert "Ask Ada" not in publication.card.merged_with("---\n{}\n---\nWhat is in the repository goes first.\n")
