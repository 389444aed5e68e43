import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_doge import InfluenceIndex
from hf_doge.functional.synonyms import synonym_score, synonym_similarity
from hf_doge.tracing import query_rows
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.hits import HIT_FEATURES
from hf_doge.tracing.models import load_checkpoint
from hf_doge.tracing.settings import RecordingSettings
from tests.reference_tracin_we import dense_gradient
from tests.tiny import language_model_rows, tiny_classifier, tiny_gpt2, tiny_t5
from tests.tracing.influence_tools import (
    TOPICS,
    byte_level_tokenizer,
    classifier,
    language_model,
    sentences,
    tokenised,
    train,
    wordpiece_tokenizer,
)
from tests.tracing.test_influence_html import Page

TEXTS = ["The runner is winning a match.", "Stocks of a rocket fund", "New moon"]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece_tokenizer()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer):
    """Folder of an index of 24 examples at two checkpoints."""
    folder = tmp_path_factory.mktemp("recorded")
    return train(folder, classifier(tokenizer), tokenizer, tokenised(sentences(24), tokenizer))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return tmp_path_factory.mktemp("maps")


@pytest.fixture
def index(recorded, maps):
    return InfluenceIndex.from_pretrained(recorded, cache_dir=maps)


def gradients(model, dataset):
    """Dense gradient of each example alone, `(N, V * D)`."""
    rows = []
    for row in dataset:
        example = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        example["labels"] = torch.tensor([row["label"]])
        rows.append(dense_gradient(model, example).flatten())
    return torch.stack(rows)


def brute_force(index, dataset, queries, *, dropped=(), cosine=False):
    """`sum_c lr_c <G_c(q), G_c(x)>` from autograd on the dense matrix."""
    total = 0
    for checkpoint in index.reader.checkpoints:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint["path"])
        sides = [gradients(model, part) for part in (queries, dataset)]
        for side in sides:
            side.view(len(side), index.reader.vocabulary_size, -1)[:, list(dropped)] = 0
        if cosine:
            sides = [side / side.norm(dim=1, keepdim=True) for side in sides]
        total = total + checkpoint["learning_rate"] * sides[0] @ sides[1].T
    return total.numpy()


def close(found, expected):
    return np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def train_set(tokenizer):
    return tokenised(sentences(24), tokenizer)


@pytest.fixture(scope="module")
def query_set(tokenizer):
    return tokenised(sentences(5, seed=9), tokenizer)


# Scores


def test_scores_are_dense_autograd_inner_products_weighted_by_learning_rates(index, train_set, query_set):
    expected = brute_force(index, train_set, query_set)
    assert index.scores(query_set).shape == (5, 24)
    assert close(index.scores(query_set), expected)


@pytest.mark.parametrize(
    "options", [{"special_tokens": "drop"}, {"cosine": True}, {"special_tokens": "drop", "cosine": True}]
)
def test_options_act_on_queries_and_examples_alike(index, tokenizer, train_set, query_set, options):
    dropped = tokenizer.all_special_ids if "special_tokens" in options else ()
    expected = brute_force(index, train_set, query_set, dropped=dropped, cosine="cosine" in options)
    assert close(index.scores(query_set, **options), expected)
    hits = index.search(query_set, top_k=30, **options)
    found = np.zeros((5, 24))
    found[hits["query"][:], hits["example_id"][:]] = hits["score"][:]
    assert close(found, expected)


def test_pieces_of_scores_make_up_the_whole(index, query_set, monkeypatch):
    monkeypatch.setattr("hf_doge.tracing.scoring._BLOCK_BYTES", 24 * 4 * 2)
    pieces = list(index.iter_scores(query_set))
    assert [positions for positions, _ in pieces] == [range(0, 2), range(2, 4), range(4, 5)]
    assert close(np.concatenate([block for _, block in pieces]), index.scores(query_set))


def test_small_models_are_loaded_once_and_large_ones_at_every_search(recorded, tmp_path, monkeypatch):
    loads = []

    def counted(checkpoint, **options):
        loads.append(checkpoint["name"])
        return load_checkpoint(checkpoint, **options)

    monkeypatch.setattr(query_rows, "load_checkpoint", counted)
    index = InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path)
    names = [checkpoint["name"] for checkpoint in index.reader.checkpoints]
    first = index.scores(TEXTS)
    assert np.array_equal(index.scores(TEXTS), first)
    assert loads == names[::-1]
    monkeypatch.setattr(query_rows, "_KEPT_BYTES", 0)
    loads.clear()
    other = InfluenceIndex.from_pretrained(recorded, cache_dir=tmp_path)
    assert np.array_equal(other.scores(TEXTS), first)
    assert np.array_equal(other.scores(TEXTS), first)
    assert loads == 2 * names[::-1]


def test_the_size_of_query_batches_changes_nothing(index):
    assert close(index.scores(TEXTS, batch_size=1), index.scores(TEXTS, batch_size=3))


def test_top_n_is_that_of_brute_force(index, train_set, query_set):
    expected = brute_force(index, train_set, query_set)
    hits = index.search(query_set, top_k=4)
    assert len(hits) == 5 * 2 * 4
    for query, scores in enumerate(expected):
        for kind, order in (("proponent", np.argsort(-scores)), ("opponent", np.argsort(scores))):
            mine = hits.filter(lambda hit: hit["query"] == query and hit["kind"] == kind)  # noqa: B023
            assert mine["rank"][:] == [1, 2, 3, 4]
            assert close(mine["score"][:], scores[order[:4]])
            assert mine["example_id"][:] == order[:4].tolist()


def test_a_step_on_a_proponent_lowers_the_loss_of_the_query(index, recorded, train_set, query_set):
    hits = index.search(query_set.select([0]), top_k=1)
    model = AutoModelForSequenceClassification.from_pretrained(index.reader.checkpoints[-1]["path"]).eval()

    def loss():
        row = query_set[0]
        return model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["label"]])).loss.item()

    before = loss()
    for hit, sign in zip(hits, (-1, 1), strict=True):
        row = train_set[hit["example_id"]]
        gradient = dense_gradient(
            model, {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["label"]])}
        )
        with torch.no_grad():
            model.get_input_embeddings().weight -= 1e-2 * gradient
        assert np.sign(loss() - before) == sign
        with torch.no_grad():
            model.get_input_embeddings().weight += 1e-2 * gradient


def slow_synonym_scores(index, dataset, queries, *, threshold, dropped=(), cosine=False):
    """`sum_c lr_c sum_{w, w'} S_c(w, w') <G_c(q)_w, G_c(x)_w'>`, pair by pair."""
    total = np.zeros((len(queries), len(dataset)))
    for checkpoint in index.reader.checkpoints:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint["path"])
        embeddings = model.get_input_embeddings().weight.detach().double()
        sides = []
        for part in (queries, dataset):
            dense = gradients(model, part).view(len(part), len(embeddings), -1).double()
            dense[:, list(dropped)] = 0
            if cosine:
                dense /= dense.flatten(1).norm(dim=1)[:, None, None]
            tokens = [torch.tensor(sorted(set(ids) - set(dropped))) for ids in part["input_ids"]]
            sides.append([(ids, matrix[ids]) for ids, matrix in zip(tokens, dense, strict=True)])
        for (q, (ids_q, rows_q)), (x, (ids_x, rows_x)) in product(*map(enumerate, sides)):
            similarity = synonym_similarity(ids_q, ids_x, embeddings, threshold=threshold)
            total[q, x] += checkpoint["learning_rate"] * synonym_score(rows_q, rows_x, similarity)
    return total


@pytest.mark.parametrize(
    "options", [{}, {"special_tokens": "drop"}, {"cosine": True}, {"special_tokens": "drop", "cosine": True}]
)
def test_synonym_scores_are_those_of_the_slow_reference(index, tokenizer, train_set, query_set, options):
    dropped = tokenizer.all_special_ids if "special_tokens" in options else ()
    reference = {"threshold": 0.3, "dropped": dropped, "cosine": "cosine" in options}
    expected = slow_synonym_scores(index, train_set, query_set, **reference)
    asked = {"kernel": "synonym", "synonym_threshold": 0.3, **options}
    assert close(index.scores(query_set, **asked), expected)
    assert not close(index.scores(query_set, **options), expected)  # there are synonyms
    found = np.zeros((5, 24))
    for hit in index.search(query_set, top_k=30, **asked):
        found[hit["query"], hit["example_id"]] = hit["score"]
        for parts in ("word_scores", "token_scores", "example_token_scores", "checkpoint_scores"):
            assert sum(hit[parts]) == pytest.approx(hit["score"], rel=1e-6, abs=1e-9)
        assert set(hit["token_ids"]) <= set(query_set[hit["query"]]["input_ids"])
        assert set(hit["example_token_ids"]) <= set(train_set[hit["example_id"]]["input_ids"])
    assert close(found, expected)


def test_the_token_kernel_is_the_synonym_kernel_without_synonyms(index, query_set):
    hits = index.search(query_set, top_k=30)
    assert len(hits) == 5 * 24
    for hit in hits:
        assert dict(zip(hit["token_ids"], hit["token_scores"], strict=True)) == pytest.approx(
            dict(zip(hit["example_token_ids"], hit["example_token_scores"], strict=True))
        )
    loose, strict = (index.domain_influence(query_set, "label", kernel=kernel) for kernel in ("synonym", "token"))
    assert not close(loose["score"][:], strict["score"][:])
    far = index.scores(query_set, kernel="synonym", synonym_threshold=1.0)
    assert close(far, index.scores(query_set))


def test_a_synonym_is_shaded_in_the_example(index):
    hits = index.search("goal", kernel="synonym", synonym_threshold=0.2, special_tokens="drop", top_k=24)
    other = next(hit for hit in hits if not set(hit["token_ids"]) & set(hit["example_token_ids"]))
    page = index.to_html(hits.filter(lambda hit: hit["example_id"] == other["example_id"]))
    article = page[page.index("<article") : page.index("<ul>")]
    assert "<mark" in article


# What a notebook shows


def test_a_notebook_shows_hits_as_the_page_does(index):
    hits = index.search(TEXTS, top_k=2)
    shown, page = hits._repr_html_(), index.to_html(hits)
    sections = re.findall(r"<section>.*?</section>", page, flags=re.DOTALL)
    assert len(sections) == len(TEXTS)
    assert re.findall(r"<section>.*?</section>", shown, flags=re.DOTALL) == sections
    assert "<mark" in shown
    assert index.show(hits)._repr_html_() == shown
    assert len(repr(index.show(hits))) < 80
    assert not {"html", "head", "body", "title", "script"} & set(Page(shown).tags)


def test_style_of_a_part_reaches_nothing_outside_it(index):
    style = re.search(r"<style>(.*?)</style>", index.search(TEXTS[0])._repr_html_(), flags=re.DOTALL)[1]
    assert all(line.startswith(".hf-doge ") for line in style.strip().splitlines())


def test_hits_are_a_dataset_and_what_is_chosen_of_them_is_shown(index):
    hits = index.search(TEXTS, top_k=3)
    assert isinstance(hits, Dataset)
    assert hits.to_list() == Dataset(hits.data).to_list()
    for chosen in (
        hits.select([0]),
        hits.filter(lambda hit: hit["query"] == 0 and hit["rank"] == 1 and hit["score"] > 0),
    ):
        assert chosen[0] == hits[0]
        assert index.show(chosen).html.count("<article") == 1
    with pytest.raises(ValueError, match=r"must come from `InfluenceIndex\.search`"):
        index.show(hits.remove_columns("words"))


@pytest.mark.parametrize("column", sorted({*HIT_FEATURES} - {"query_target"}))
def test_what_lacks_a_column_of_a_hit_is_refused_by_its_name_and_in_a_notebook_a_plain_data_set(index, column):
    rest = index.search(TEXTS, top_k=1).remove_columns(column)
    with pytest.raises(ValueError, match=rf"has no columns \['{column}'\]\. Keep all"):
        index.to_html(rest)
    if hasattr(rest, "_repr_html_"):
        assert rest._repr_html_() is None


def test_a_notebook_shows_the_checkpoints_of_an_index(index):
    page = Page(index._repr_html_())
    assert page.tags.count("tr") == 1 + len(index.config["checkpoints"])
    assert f"{len(index):,} training examples" in "".join(page.text)


# What a hit says


def test_parts_add_up_to_the_score(index):
    hits = index.search(TEXTS, top_k=24)
    assert len(hits) == 3 * 24
    for hit in hits:
        for parts in ("word_scores", "token_scores", "checkpoint_scores"):
            assert sum(hit[parts]) == pytest.approx(hit["score"], rel=1e-9, abs=1e-15)
        sizes = [abs(part) for part in hit["word_scores"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(hit["checkpoint_scores"]) == 2


def test_only_shared_words_have_a_part(index, tokenizer):
    hits = index.search(TEXTS, top_k=24, special_tokens="drop")
    assert len(hits) > 24
    assert all(hit["words"] for hit in hits)
    for hit in hits:
        assert set(hit["token_ids"]) <= set(tokenizer(hit["text"])["input_ids"])
        assert set(hit["token_ids"]) <= set(tokenizer(TEXTS[hit["query"]])["input_ids"])
        assert hit["special_token_share"] == 0
        assert not set(hit["words"]) & set(tokenizer.all_special_tokens)


def test_share_of_special_tokens_is_that_of_their_absolute_parts(index, tokenizer):
    hits = index.search(TEXTS, top_k=3)
    assert len(hits) == 3 * 2 * 3
    for hit in hits:
        special = [
            abs(p)
            for t, p in zip(hit["token_ids"], hit["token_scores"], strict=True)
            if t in tokenizer.all_special_ids
        ]
        assert hit["special_token_share"] == pytest.approx(sum(special) / sum(map(abs, hit["token_scores"])))
        assert "[CLS]" in hit["words"]


def test_hits_bring_what_the_index_knows_of_the_example(index, train_set):
    hits = index.search(TEXTS, top_k=2)
    assert len(hits) == 3 * 2 * 2
    for hit in hits:
        assert hit["text"] == train_set[hit["example_id"]]["text"]
        assert hit["label_name"] == TOPICS[hit["label"]]
        assert hit["query_text"] == TEXTS[hit["query"]]


def test_the_code_of_the_card_of_an_index_gives_hits(recorded, index):
    snippet = re.search(r"```python\n(from hf_doge .*?)\n```", (recorded / "README.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(snippet[1].replace("path/or/name", str(recorded)), names)
    assert names["hits"]["example_id"][:] == index.search(["some text to trace"], top_k=10)["example_id"][:]
    assert 10 < len(names["hits"]) <= 2 * 10  # by a training's numbers, nine examples may be all that speak against it


def test_excluded_examples_are_no_hits(index):
    best = index.search(TEXTS[:1], top_k=1)["example_id"][:]
    assert not set(best) & set(index.search(TEXTS[:1], top_k=24, exclude=best)["example_id"])


# Forms of queries


def test_texts_tokens_and_batches_ask_the_same(index, tokenizer, query_set):
    expected = index.scores(query_set)
    records = [{"text": row["text"], "label": row["label"]} for row in query_set]
    named = [{"text": row["text"], "label": TOPICS[row["label"]]} for row in query_set]
    batch = tokenizer(query_set["text"][:], padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor(query_set["label"][:])
    for queries in (records, named, batch, dict(batch), query_set.remove_columns("text")):
        assert close(index.scores(queries), expected)
    assert close(index.scores(records[0]), expected[:1])


def test_a_query_without_label_is_traced_for_what_the_model_predicts(index, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(index.reader.checkpoints[-1]["path"]).eval()
    predicted = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.argmax(dim=1).tolist()
    labelled = [{"text": text, "label": label} for text, label in zip(TEXTS, predicted, strict=True)]
    assert close(index.scores(TEXTS), index.scores(labelled))
    assert index.search(TEXTS, top_k=1)["query_label"][::2] == predicted


def test_a_long_text_is_cut_where_the_model_ends(index):
    assert index.scores(["market " * 500]).shape == (1, 24)


def test_a_language_model_is_traced_for_the_text_itself(tmp_path):
    tokenizer = byte_level_tokenizer()
    rows = tokenised([{"text": row["text"]} for row in sentences(10)], tokenizer)
    folder = train(tmp_path, language_model(tokenizer), tokenizer, rows, language=True, epochs=1, top_k_tokens=5)
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    texts = rows["text"][:3]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    scores = index.scores(texts)
    assert close(index.scores({**batch, "labels": labels}), scores)
    tokenizer.padding_side = "left"  # of positions that count from the first token that is none
    batch = tokenizer([texts[0], "market " * 12], padding=True, return_tensors="pt")
    assert not batch["attention_mask"][0, 0]
    for few in (batch, {name: value[:1] for name, value in batch.items()}):
        labels = few["input_ids"].masked_fill(few["attention_mask"] == 0, -100)
        for query in (few, {**few, "labels": labels}):
            assert close(index.scores(dict(query))[0], scores[0])
    assert (scores.argmax(axis=1) == [0, 1, 2]).all()  # the very text is its own strongest proponent
    kept = np.stack([index.reader.self_influence(0)[:3]])[0] * index.reader.checkpoints[0]["learning_rate"]
    assert close(np.diag(scores), kept)  # with top-k: the query is cut as the example was
    words = index.search(texts, top_k=1)[0]["words"]
    assert all(word == word.strip() for word in words)


# Other questions


def test_self_influence_is_the_squared_norm_and_finds_a_wrong_label(index, train_set, tmp_path, tokenizer):
    ranked = index.self_influence()
    expected = np.diag(brute_force(index, train_set, train_set))
    assert close(ranked["score"][:], np.sort(expected)[::-1])
    assert close(np.array(ranked["score"][:])[np.argsort(ranked["example_id"][:])], expected)
    assert ranked["rank"][:3] == [1, 2, 3]
    assert {"text", "label"} <= set(ranked.column_names)


def test_domain_influence_sums_the_scores_of_each_domain(index, query_set):
    scores = index.scores(query_set)
    labels = np.array(index.examples["label"][:])
    for reduction, reduce in (("mean", np.mean), ("sum", np.sum)):
        table = index.domain_influence(query_set, "label_name", reduction=reduction)
        assert len(table) == 5 * 3
        for row in table:
            members = labels == TOPICS.index(row["domain"])
            assert row["num_examples"] == members.sum()
            assert close(row["score"], reduce(scores[row["query"]][members]))


# The folder


def test_a_saved_copy_answers_the_same(index, recorded, tmp_path):
    index.save_pretrained(tmp_path / "copy")
    copied = InfluenceIndex.from_pretrained(tmp_path / "copy", cache_dir=tmp_path / "maps")
    assert close(copied.scores(TEXTS), index.scores(TEXTS))
    copied.save_pretrained(tmp_path / "copy")  # onto itself
    index.save_pretrained(tmp_path / "copy")  # replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "maps"]
    with pytest.raises(FileExistsError, match="must be new, empty or hold an index"):
        index.save_pretrained(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="does not belong to an influence index"):
        index.save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        index.save_pretrained(tmp_path / "file")


def test_a_copy_that_fails_leaves_the_old_one(index, tmp_path, monkeypatch):
    index.save_pretrained(tmp_path / "copy")

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_doge.tracing.saved_index.shutil.copyfile", no_space)
    with pytest.raises(OSError, match="No space left"):
        index.save_pretrained(tmp_path / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert len(InfluenceIndex.from_pretrained(tmp_path / "copy", cache_dir=tmp_path / "maps")) == 24


def test_models_inside_the_index_move_with_it(tmp_path, tokenizer, train_set):
    index_folder = train(tmp_path, classifier(tokenizer), tokenizer, train_set, epochs=1, save_weights=True)
    shutil.rmtree(tmp_path / "run")
    index = InfluenceIndex.from_pretrained(index_folder, cache_dir=tmp_path / "maps")
    scores = index.scores(TEXTS)
    index.save_pretrained(tmp_path / "elsewhere")
    shutil.rmtree(index_folder)
    assert close(
        InfluenceIndex.from_pretrained(tmp_path / "elsewhere", cache_dir=tmp_path / "maps").scores(TEXTS), scores
    )


# Checkpoints


@pytest.fixture
def movable(recorded, tmp_path):
    """A copy of the index whose checkpoints can be spoiled."""
    shutil.copytree(recorded.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "index" / "config.json"
    config.write_text(config.read_text().replace(str(recorded.parent), str(tmp_path / "copy")))
    return tmp_path / "copy" / "index"


def test_a_missing_checkpoint_is_named(movable, maps):
    index = InfluenceIndex.from_pretrained(movable, cache_dir=maps)
    shutil.rmtree(index.reader.checkpoints[0]["path"])
    with pytest.raises(FileNotFoundError, match="'checkpoint-3' of the index must be there"):
        index.scores(TEXTS)


def test_a_changed_checkpoint_is_named(movable, maps):
    index = InfluenceIndex.from_pretrained(movable, cache_dir=maps)
    path = index.reader.checkpoints[1]["path"]
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="'checkpoint-6' must hold the weights that were recorded"):
        index.scores(TEXTS)


class Bag(nn.Module):
    """A model of the user's own class."""

    def __init__(self, vocabulary_size):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, 8)
        self.head = nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None].float()
        pooled = torch.tanh((self.embedding(input_ids) * mask).sum(dim=1) / mask.sum(dim=1))
        logits = self.head(pooled)
        from transformers.modeling_outputs import SequenceClassifierOutput

        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_models_of_the_users_own_class(tmp_path, tokenizer, train_set):
    torch.manual_seed(0)
    folder = train(tmp_path, Bag(len(tokenizer)), tokenizer, train_set)
    with pytest.raises(ValueError, match="must be one of transformers, but it is 'Bag'"):
        InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps").scores(TEXTS)
    template = Bag(len(tokenizer))
    before = [parameter.clone() for parameter in template.parameters()]
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps", model=template)
    scores = index.scores(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(before, template.parameters(), strict=True))
    loads = []

    def load_model(path):
        loads.append(Path(path).name)
        return load_checkpoint(
            next(c for c in index.reader.checkpoints if c["path"] == path), folder=folder, model=Bag(len(tokenizer))
        )

    other = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps", load_model=load_model)
    assert close(other.scores(TEXTS), scores)
    assert loads == ["checkpoint-6", "checkpoint-3"]


# Bad input


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "at least one prediction"),
        (Dataset.from_dict({"input_ids": []}), "at least one prediction"),
        ({}, "at least one prediction"),
        (3, "must be a tokenised"),
        ([{"input_ids": [5, 6, 70]}], "from 0 to .* query 0 has 5 to 70"),
        ([{"input_ids": [5, 6]}, {"input_ids": []}], "query 1 has none"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}], r"queries \[0\] .* have none but -100"),
        ({"inputs_embeds": torch.zeros(1, 2, 16), "labels": torch.tensor([0])}, "no ready `inputs_embeds`"),
        ([{"a": "x", "b": "y", "c": "z"}], "text or a pair of texts"),
        ([{"text": "goal", "label": "weather"}], "one of the model's labels"),
        ("", "query 0 is empty"),
        (["goal", " \n"], "query 1 is empty"),
        ([{"text": "goal", "label": 3}], "label of query 0 must be a whole number from 0 to 2"),
        (["goal", {"text": "goal", "label": -1}], "label of query 1 must be a whole number from 0 to 2"),
        ([{"text": "goal", "label": 1.5}], "label of query 0 must be a whole number"),
        ([{"text": "goal", "label": float("nan")}], "label of query 0 must be a whole number"),
        ([{"text": "goal", "label": [0, 1]}], "label of query 0 must be a whole number"),
        ([{"input_ids": [5, 6], "label": 3}], "label of query 0 must be a whole number from 0 to 2"),
        ([{"text": "goal", "label": -100}], r"queries \[0\] .* have none but -100"),
        ([{"input_ids": [True, False]}], "must be whole numbers"),
        ([{"input_ids": "goal"}], "must be whole numbers"),
        ([{"input_ids": [[5, 6], [5]]}], "must be whole numbers"),
        ([{"input_ids": [5, 6], "attention_mask": [0, 0]}], "query 0 has none"),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1, 2, -1]}], "`attention_mask` of query 0 must hold 0 and 1"),
        ([{"input_ids": [5, 6], "attention_mask": [1, float("nan")]}], "`attention_mask` of query 0 must hold 0 and"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "`attention_mask` of query 0 must have the shape"),
        ([{"input_ids": [5] * 33}], "query 0 has 33 tokens, but the model has positions for 32"),
    ],
)
def test_bad_queries_are_refused(index, queries, message):
    with pytest.raises((ValueError, TypeError), match=message):
        index.search(queries)


def test_labels_of_any_number_type_are_taken(index):
    expected = index.scores([{"text": "goal", "label": 1}])
    for label in (1.0, True, np.int64(1), np.float32(1), torch.tensor(1)):
        assert close(index.scores([{"text": "goal", "label": label}]), expected)


def test_token_labels_come_before_a_label_beside_them(index):
    expected = index.scores([{"input_ids": [5, 6], "labels": 2}])
    for record in ({"label": [0], "labels": 2}, {"labels": 2, "label": [0]}):
        assert close(index.scores([{"input_ids": [5, 6], **record}]), expected)


def test_a_text_pair_is_read_as_the_tokenizer_reads_a_pair(index, tokenizer):
    pair = {
        "text": "the goal",
        "text_pair": "a coach",
        "label": 1,
        "title": "Other columns",
        "source": "are read past",
    }
    scores, tokens = index.scores([pair]), tokenizer("the goal", "a coach")
    assert close(scores, index.scores([{**tokens, "label": 1}]))
    assert not close(scores, index.scores([{"text": "the goal", "label": 1}]))


@pytest.mark.parametrize("other", ["premise", "sentence", "sentence2", "question", "completion", "prompt"])
def test_a_text_next_to_those_that_are_read_is_refused_by_its_name(index, other):
    with pytest.raises(ValueError, match=f"both `{other}` and 'text'. Keep one of them"):
        index.scores([{"text": TEXTS[0], other: TEXTS[1], "label": 1}])


def test_labels_that_disagree_are_refused_and_others_taken(index, query_set):
    text = {"text": TEXTS[0]}
    with pytest.raises(ValueError, match="one label, but `labels` is 1 and `label` is 2"):
        index.scores([{**text, "label": 2, "labels": 1}])
    with pytest.raises(ValueError, match="one label, but `labels` is 1 and `label` is 2"):
        index.scores([{"input_ids": query_set[0]["input_ids"], "label": 2, "labels": 1}])
    assert close(index.scores([{**text, "label": 1.0, "label_ids": 1}]), index.scores([{**text, "label": 1}]))


def test_one_query_and_arrays_are_batches_too(index):
    expected = index.scores([{"input_ids": [5, 6], "labels": 2}])
    for ids, labels in (([5, 6], 2), (torch.tensor([5, 6]), torch.tensor(2)), (np.array([[5, 6]]), np.array([2]))):
        assert close(index.scores({"input_ids": ids, "labels": labels}), expected)


def test_bad_options_are_refused(index):
    for options, message in (
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"special_tokens": "no"}, "`special_tokens` must be one of"),
        ({"exclude": [24]}, "`exclude` must hold ids of examples"),
        ({"exclude": [1.5]}, "`exclude` must hold ids of examples"),
        ({"exclude": 3}, "`exclude` must hold ids of examples"),
        ({"top_k": 1.5}, "`top_k` must be a whole number"),
        ({"top_k": "3"}, "`top_k` must be a whole number"),
        ({"top_k": None}, "`top_k` must be a whole number"),
        ({"batch_size": 1.5}, "`batch_size` must be a whole number"),
        ({"cosine": "no"}, "`cosine` must be True or False"),
        ({"kernel": "meaning"}, "`kernel` must be one of"),
        ({"synonym_threshold": 1.5}, r"`synonym_threshold` must be in \[-1, 1\]"),
        ({"synonym_threshold": None}, "`synonym_threshold` must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(TEXTS, **options)
    with pytest.raises(ValueError, match=r"`column` must be one of .* but got 'domain'"):
        index.domain_influence(TEXTS, "domain")
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        index.domain_influence(TEXTS, "label", reduction="max")
    with pytest.raises(ValueError, match=r"must come from `InfluenceIndex\.search`"):
        index.to_html(Dataset.from_dict({"query": [0]}))
    with pytest.raises(ValueError, match=r"a `datasets.Dataset`, whole or filtered, but is a list"):
        index.to_html(index.search(TEXTS, top_k=1).to_list())
    with pytest.raises(ValueError, match=r"must come from `InfluenceIndex\.search`"):
        index.to_html([])


def test_what_is_no_model_or_tokenizer_is_refused(recorded, maps):
    with pytest.raises(ValueError, match="`processing_class` must be a tokenizer"):
        InfluenceIndex.from_pretrained(recorded, cache_dir=maps, processing_class="bert-base-uncased")
    for options, message in (
        ({"model": "bert-base-uncased"}, r"`model` must be a torch\.nn\.Module"),
        ({"model": nn.Linear(2, 2)}, "'checkpoint-6' .* do not fit"),
        ({"load_model": lambda path: None}, "`load_model` must return a model"),
    ):
        with pytest.raises(ValueError, match=message):
            InfluenceIndex.from_pretrained(recorded, cache_dir=maps, **options).scores(TEXTS)


def test_another_tokenizer_is_refused(recorded, maps):
    with pytest.raises(ValueError, match="The tokenizer must be the one of the index"):
        InfluenceIndex.from_pretrained(recorded, cache_dir=maps, processing_class=byte_level_tokenizer())


def test_another_loss_is_refused(recorded, maps):
    index = InfluenceIndex.from_pretrained(recorded, cache_dir=maps, loss_fn=lambda outputs, batch: outputs.loss)
    with pytest.raises(ValueError, match=r"that of the model\. Leave `loss_fn` out"):
        index.scores(TEXTS)


def test_an_altered_index_is_refused(movable, tmp_path):
    segment = next(movable.glob("gradients/*/*.parquet"))
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"altered or cut short.*segment-00000"):
        InfluenceIndex.from_pretrained(movable, cache_dir=tmp_path / "maps")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        InfluenceIndex.from_pretrained("nobody/nothing", cache_dir=tmp_path / "hub")


# Compression and settings


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"dtype": "float16"}, 0.9999),
        ({"dtype": "int8"}, 0.999),
        ({"projection_width": 14}, 0.5),
        ({"top_k_tokens": 6}, 0.8),
    ],
)
def test_compressed_indexes_rank_nearly_alike(index, recorded, tokenizer, train_set, tmp_path, options, least):
    folders = [checkpoint["path"] for checkpoint in index.reader.checkpoints]
    rates = [checkpoint["learning_rate"] for checkpoint in index.reader.checkpoints]
    dataset = train_set.rename_column("label", "labels")
    settings = RecordingSettings(recipe="paper", **options)
    record_dataset(
        tmp_path / "i", folders, dataset, tokenizer=tokenizer, settings=settings, learning_rates=rates, progress=False
    )
    compressed = InfluenceIndex.from_pretrained(tmp_path / "i", cache_dir=tmp_path / "maps")
    exact, found = index.scores(TEXTS).ravel(), compressed.scores(TEXTS).ravel()
    assert np.corrcoef(exact, found)[0, 1] > least
    for hit in compressed.search(TEXTS, top_k=2):
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-9)


def test_recorded_without_special_tokens_equals_dropping_them(index, tokenizer, train_set, tmp_path):
    folders = [checkpoint["path"] for checkpoint in index.reader.checkpoints]
    rates = [checkpoint["learning_rate"] for checkpoint in index.reader.checkpoints]
    dataset = train_set.rename_column("label", "labels")
    settings = RecordingSettings(special_tokens="drop", dtype="float32")
    record_dataset(
        tmp_path / "i", folders, dataset, tokenizer=tokenizer, settings=settings, learning_rates=rates, progress=False
    )
    dropped = InfluenceIndex.from_pretrained(tmp_path / "i", cache_dir=tmp_path / "maps")
    assert close(dropped.scores(TEXTS, recipe="paper"), index.scores(TEXTS, special_tokens="drop"))


# Other kinds of models


def record(folder, models, dataset, **options):
    """An index of saved models, all of learning rate 1, and itself in `folder`."""
    rates = [1.0] * len(models)
    recipe = None if "tied" in options else "paper"
    settings = RecordingSettings(recipe=recipe, dtype="float32", **options)
    record_dataset(folder / "index", models, dataset, settings=settings, learning_rates=rates, progress=False)
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


def test_an_encoder_decoder_is_traced_through_both_its_sides(tmp_path):
    model = tiny_t5()
    model.save_pretrained(tmp_path / "model")
    rows = language_model_rows(6)
    rows["labels"] = [labels[:5] for labels in rows["labels"]]
    dataset = Dataset.from_dict(rows)
    index = record(tmp_path, [tmp_path / "model"], dataset)
    examples = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in dataset]
    sides = torch.stack([dense_gradient(model, example, num_terms=5).flatten() for example in examples])
    assert close(index.scores(dataset.select([0, 1])), (sides[:2] @ sides.T).numpy())
    hit = index.search(dataset.select([0]), top_k=1)[0]
    assert hit["example_id"] == 0
    assert sum(hit["word_scores"]) == pytest.approx(hit["score"])
    assert {f"#{token}" for token in rows["labels"][0][:-1]} <= set(hit["words"])
    with pytest.raises(ValueError, match="Give the queries `labels`"):
        index.scores(dataset.remove_columns("labels"))
    plain, (start, *read) = dataset[0], (0, *dataset[0]["labels"][:-1])
    expected = index.scores([plain])
    assert close(index.scores([{**plain, "decoder_input_ids": [start, *read]}]), expected)
    for message, given in {
        "whole numbers from 0 to 31, .* query 0 has": {"decoder_input_ids": [99, *read]},
        "whole numbers from 0 to 31, .* query 0 has -1": {"decoder_input_ids": [-1, *read]},
        "`decoder_input_ids` of query 0 must be one for each of its 5 labels, but are 1": {"decoder_input_ids": [0]},
        "`decoder_attention_mask` of query 0 must have the shape of its `labels`": {"decoder_attention_mask": [1]},
        "`decoder_attention_mask` of query 0 must hold 0 and 1": {"decoder_attention_mask": [1, 1, 1, 2, -1]},
    }.items():
        with pytest.raises(ValueError, match=message):
            index.scores([{**plain, **given}])


def test_scores_of_own_rows_are_inner_products_of_the_whole_gradient_at_the_tokens_of_each_text(tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "model")
    dataset = Dataset.from_dict(language_model_rows(6))
    index = record(tmp_path, [tmp_path / "model"], dataset, tied="own")
    examples = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in dataset]
    terms = [example["labels"].shape[1] - 1 for example in examples]
    sides = torch.stack(
        [
            dense_gradient(model, example, part="own", num_terms=count).flatten()
            for example, count in zip(examples, terms, strict=True)
        ]
    )
    assert close(index.scores(dataset.select([0, 1])), (sides[:2] @ sides.T).numpy())
    assert sum(file["num_rows"] for file in index.config["checkpoints"][0]["files"]) == sum(
        len(set(ids)) for ids in dataset["input_ids"]
    )
    assert index.config["tied"] == "own"
    for hit in index.search(dataset.select([0]), top_k=2):
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"])
        assert set(hit["token_ids"]) <= set(dataset[0]["input_ids"]) & set(dataset[hit["example_id"]]["input_ids"])


@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
def test_an_adapter_is_loaded_with_its_base(tmp_path):
    base = tiny_classifier()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    dataset = Dataset.from_dict({"input_ids": language_model_rows(6)["input_ids"], "labels": [0, 1, 2, 0, 1, 2]})
    index = record(tmp_path, [tmp_path / "adapter"], dataset)
    assert index.reader.checkpoints[0]["model_class"].startswith("Peft")
    assert index.config["virtual"]
    assert close(np.diag(index.scores(dataset)), index.reader.self_influence(0))
