"""Scores, cosines, self-influence and synonyms in the metric of Adam, against autograd on the whole matrix and its moments."""

import shutil
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_doge import InfluenceIndex
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.segments import recorded_projection
from hf_doge.functional.synonyms import synonym_score, synonym_similarity
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.second_moments import SecondMoments
from hf_doge.tracing.settings import RecordingSettings
from tests.reference_tracin_we import dense_gradient
from tests.tiny import tiny_classifier
from tests.tracing.influence_tools import classifier, language_model, sentences, tokenised, train, wordpiece_tokenizer
from tests.tracing.recorded_training import classification_data, single_examples

THRESHOLD = 0.3


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    """Examples, and queries that hold words which no example has."""
    rows = sentences(24)
    queries = [*sentences(4, seed=9), {"text": "quick zebra of the moon, qxz!", "label": 2}]
    return tokenised(rows, tokenizer), tokenised(queries, tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, data):
    """A classifier trained by AdamW, recorded in its metric."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, classifier(tokenizer), tokenizer, data[0], metric="optimizer")
    return folder


def checkpoints(folder):
    return sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def metric_at(path, number=0):
    """`sqrt(v) + eps` of the embedding matrix, from the file of the Trainer; `number` is its place there."""
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    state = saved["state"][number]
    group = next(group for group in saved["param_groups"] if number in group["params"])
    return (state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]


@pytest.fixture(scope="module")
def dense(run, data):
    """Of each checkpoint: the words' embeddings, `sqrt(v) + eps`, and the dense gradients of queries and of examples."""
    steps = []
    for path in checkpoints(run):
        model = AutoModelForSequenceClassification.from_pretrained(path).double()
        sides = [torch.stack([dense_gradient(model, one) for one in single_examples(part)]) for part in data[::-1]]
        steps.append((model.get_input_embeddings().weight.detach(), metric_at(path), *sides))
    return steps


class Reference:
    """Everything from dense gradients by autograd, one example at a time, and the saved optimizer."""

    def __init__(self, dense, examples, *, dropped=(), projection=None):
        held = torch.zeros(len(dense[0][0]), dtype=torch.bool)
        for ids in examples["input_ids"]:
            held[ids] = True
        held[list(dropped)] = False
        keep = held[:, None]
        self.steps = [(metric, queries * keep, rows * keep) for _, metric, queries, rows in dense]
        self.projection = projection

    def inner(self, one, other, metric):
        """`<g, g'> / (sqrt(v) + eps)`, or its estimate by the projection: `(Q, N)`."""
        one, other = (side / metric.sqrt() for side in (one, other))
        if self.projection is not None:
            one, other = one @ self.projection, other @ self.projection
        return one.flatten(1) @ other.flatten(1).T

    def scores(self, rates, *, cosine=False):
        total = 0
        for rate, (metric, queries, examples) in zip(rates, self.steps, strict=True):
            found = self.inner(queries, examples, metric)
            if cosine:
                found = found / self.sizes(queries, metric)[:, None] / self.sizes(examples, metric)
            total = total + rate * found
        return total.numpy()

    def sizes(self, rows, metric):
        return self.inner(rows, rows, metric).diagonal().sqrt()

    def self_influence(self, rates):
        found = [
            rate * self.sizes(rows, metric) ** 2 for rate, (metric, _, rows) in zip(rates, self.steps, strict=True)
        ]
        return sum(found).numpy()


def asked(**options):
    """Options of a search, none of them left to a default."""
    return {"special_tokens": "count", "sentence_ends": "count", "cosine": False, **options}


def rates_of(index):
    return [checkpoint["learning_rate"] for checkpoint in index.reader.checkpoints]


def again(folder, run, examples, tokenizer, **settings):
    record_dataset(
        folder / "again",
        checkpoints(run),
        examples,
        tokenizer=tokenizer,
        settings=RecordingSettings(**{"metric": "auto", "dtype": "float32", **settings}),
        learning_rates=[2.5e-3, 1e-3],
        progress=False,
    )
    return InfluenceIndex.from_pretrained(folder / "again", cache_dir=folder / "maps")


def assert_near(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def self_influences(index, **options):
    ranked = index.self_influence(**options)
    return np.array(ranked["score"])[np.argsort(ranked["example_id"])]


SETTINGS = {
    "callback": (None, 1e-4),
    "float32": ({}, 1e-4),
    "float16": ({"dtype": "float16"}, 3e-3),
    "int8": ({"dtype": "int8"}, 3e-2),
    "projected": ({"projection_width": 8, "projection_seed": 3}, 1e-4),
    "special tokens dropped": ({"special_tokens": "drop"}, 1e-4),
    "many segments": ({"max_segment_bytes": 2000}, 1e-4),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_scores_cosines_and_self_influence_are_those_of_autograd_in_adams_metric(
    tmp_path, run, data, dense, tokenizer, kind
):
    settings, tolerance = SETTINGS[kind]
    if settings is None:
        index = InfluenceIndex.from_pretrained(run / "index", cache_dir=tmp_path / "maps")
    else:
        index = again(tmp_path, run, data[0], tokenizer, **settings)
    assert index.config["metric"] == "optimizer"
    projection = recorded_projection(index.config)
    never = tokenizer.all_special_ids if kind == "special tokens dropped" else ()
    for special in ("count", "drop"):
        dropped = tokenizer.all_special_ids if special == "drop" else never
        reference = Reference(dense, data[0], dropped=dropped, projection=projection)
        rates, options = rates_of(index), {"special_tokens": special}
        assert_near(index.scores(data[1], **asked(**options)), reference.scores(rates), tolerance)
        cosines = reference.scores(rates, cosine=True)
        assert_near(index.scores(data[1], **asked(cosine=True, **options)), cosines, tolerance)
        assert np.abs(cosines).max() <= sum(rates) * 1.000001
        assert_near(self_influences(index, **options), reference.self_influence(rates), tolerance)
    hits = index.search(data[1], top_k=30, **asked(cosine=True, special_tokens="drop"))
    found = np.zeros((5, 24))
    found[hits["query"][:], hits["example_id"][:]] = hits["score"][:]
    assert_near(found, cosines, tolerance)
    for hit in hits:
        assert sum(hit["token_scores"]) == pytest.approx(hit["score"], rel=1e-5, abs=1e-9)


def test_the_metric_matters(run, data, dense, tmp_path):
    index = InfluenceIndex.from_pretrained(run / "index", cache_dir=tmp_path / "maps")
    in_metric = Reference(dense, data[0]).scores(rates_of(index), cosine=True)
    plain = [(words, torch.ones_like(metric), *sides) for words, metric, *sides in dense]
    plain = Reference(plain, data[0]).scores(rates_of(index), cosine=True)
    assert np.abs(plain - in_metric).max() > 0.1 * np.abs(in_metric).max()


@pytest.mark.parametrize("settings", [{}, {"projection_width": 8}])
def test_synonyms_are_measured_as_the_token_of_the_example(tmp_path, run, data, dense, tokenizer, settings):
    """`sum_{w, w'} S(w, w') <G(q)_w, G(x)_w' / (sqrt(v_w') + eps)>`: what the step on `x` would have done to the synonym."""
    index = again(tmp_path, run, data[0], tokenizer, **settings)
    projection = recorded_projection(index.config)
    projection = torch.eye(16, dtype=torch.float64) if projection is None else projection
    reference = Reference(dense, data[0], projection=projection)
    ids = [[torch.tensor(sorted(set(row))) for row in part["input_ids"]] for part in data[::-1]]
    held, lengthened = torch.cat(ids[1]).unique(), set()
    totals = {False: np.zeros((5, 24)), True: np.zeros((5, 24))}
    for rate, (words, metric, every, _), (_, queries, examples) in zip(
        rates_of(index), dense, reference.steps, strict=True
    ):
        sizes = [reference.sizes(rows, metric) for rows in (queries, examples)]
        for q, ids_q in enumerate(
            ids[0]
        ):  # a token that no example holds is as long as in the metric of its nearest synonym
            for token in set(ids_q.tolist()) - set(held.tolist()):
                similarity = synonym_similarity(torch.tensor([token]), held, words, threshold=THRESHOLD)[0]
                if similarity.max() > 0:
                    row = every[q, token] / metric[held[similarity.argmax()]].sqrt() @ projection
                    sizes[0][q] = (sizes[0][q] ** 2 + row.square().sum()).sqrt()
                    lengthened.add(q)
        for (q, ids_q), (x, ids_x) in product(*map(enumerate, ids)):
            similarity = synonym_similarity(ids_q, ids_x, words, threshold=THRESHOLD)
            found = 0
            for place, token in enumerate(ids_x.tolist()):
                rows = (every[q, ids_q], examples[x, token][None])
                rows = [row / metric[token].sqrt() @ projection for row in rows]
                found = found + synonym_score(*rows, similarity[:, place : place + 1])
            totals[False][q, x] += rate * found
            totals[True][q, x] += rate * found / (sizes[0][q] * sizes[1][x])
    assert lengthened
    for cosine, total in totals.items():
        options = asked(kernel="synonym", synonym_threshold=THRESHOLD, cosine=cosine)
        assert_near(index.scores(data[1], **options), total, 1e-4)
        assert np.abs(index.scores(data[1], **asked(cosine=cosine)) - total).max() > 1e-3 * np.abs(total).max()
    hits = index.search(data[1], top_k=30, **options)
    found = np.zeros((5, 24))
    found[hits["query"][:], hits["example_id"][:]] = hits["score"][:]
    assert_near(found, total, 1e-4)


def test_rows_in_float64_are_exact():
    model, dataset = tiny_classifier().double(), classification_data(6)
    matrix = model.get_input_embeddings().weight
    moments = SecondMoments(torch.rand(matrix.shape, dtype=torch.float64) ** 4, 1 - 0.999**3, 1e-6)
    metric = (moments.average / moments.correction).sqrt() + 1e-6
    examples = list(single_examples(dataset))
    dense = torch.stack([dense_gradient(model, one) for one in examples])
    expected = (dense / metric).flatten(1) @ dense.flatten(1).T
    with EmbeddingGradientRecorder(model) as recorder:
        rows = [recorder.record(one) for one in examples]
    measured = [moments.measure(one, one_sided=False) for one in rows]
    found = torch.zeros(6, *matrix.shape, dtype=torch.float64)
    for one, whole in zip(measured, found, strict=True):
        whole[one.tokens] = one.rows
    torch.testing.assert_close(
        found.flatten(1) @ found.flatten(1).T, expected, rtol=1e-12, atol=1e-12 * expected.max()
    )


def test_an_example_as_its_own_query_has_cosine_1(tmp_path, run, data):
    index = InfluenceIndex.from_pretrained(run / "index", cache_dir=tmp_path / "maps")
    np.testing.assert_allclose(np.diag(index.scores(data[0], **asked(cosine=True))), sum(rates_of(index)), rtol=1e-5)
    np.testing.assert_allclose(np.diag(index.scores(data[0], **asked())), self_influences(index), rtol=1e-4)


def test_a_grown_index_is_the_whole_one(tmp_path, run, data, tokenizer):
    few, whole = tmp_path / "few", again(tmp_path, run, data[0], tokenizer)
    few.mkdir()
    again(few, run, data[0].select(range(9)), tokenizer)
    record_dataset(
        few / "again",
        checkpoints(run),
        data[0],
        tokenizer=tokenizer,
        settings=RecordingSettings(metric="auto", dtype="float32"),
        progress=False,
        add_examples=True,
    )
    grown = InfluenceIndex.from_pretrained(few / "again", cache_dir=few / "grown maps")
    assert [len(entry["metric"]) for entry in grown.config["checkpoints"]] == [2, 2]
    for options in ({}, {"cosine": True}, {"kernel": "synonym"}):
        assert_near(grown.scores(data[1], **asked(**options)), whole.scores(data[1], **asked(**options)), 1e-6)
    assert_near(self_influences(grown), self_influences(whole), 1e-6)
    copy = tmp_path / "copy"
    grown.save_pretrained(copy)
    copied = InfluenceIndex.from_pretrained(copy, cache_dir=few / "copied maps")
    np.testing.assert_array_equal(copied.scores(data[1]), grown.scores(data[1]))


def test_a_language_model_with_tied_embeddings(tmp_path, tokenizer):
    data = tokenised(sentences(12), tokenizer).remove_columns("label")
    folder = train(tmp_path, language_model(tokenizer), tokenizer, data, language=True, metric="auto", tied="own")
    index = InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    assert index.config["metric"] == "optimizer"
    np.testing.assert_allclose(np.diag(index.scores(data, **asked())), self_influences(index), rtol=1e-4)
    np.testing.assert_allclose(np.diag(index.scores(data, **asked(cosine=True))), sum(rates_of(index)), rtol=1e-5)
    plain = train(tmp_path / "plain", language_model(tokenizer), tokenizer, data, language=True, tied="own")
    plain = IndexReader.open(plain, cache_dir=tmp_path / "maps")
    for position, path in enumerate(checkpoints(tmp_path)):
        metric = metric_at(path)
        pairs = [one.example_rows(position, range(12)) for one in (index.reader, plain)]
        for (tokens, rows), (_, values) in zip(*pairs, strict=True):
            torch.testing.assert_close(rows.double(), values / metric[tokens].sqrt(), rtol=1e-4, atol=1e-6)


def test_what_the_files_of_the_metric_say_is_not_believed(tmp_path, run):
    folder = shutil.copytree(run / "index", tmp_path / "index")
    path = next(folder.glob("metric/*/tokens.parquet"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"altered or cut short.*metric/"):
        InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files: \['metric/"):
        InfluenceIndex.from_pretrained(folder, cache_dir=tmp_path / "maps")
