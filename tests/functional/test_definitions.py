"""
What `functional/` defines and the package does not call: the papers' formulas for two examples or a few gradients, each
held equal to the path that computes them for all examples at once.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_doge
from hf_doge import DoGEConfig, DoGETrainer, functional
from hf_doge.artifacts.influence import IndexReader
from hf_doge.evaluation.influence.scorers.last_layer import TracInLastScorer, last_layer_factors
from hf_doge.evaluation.influence.small_models import make_classifier
from hf_doge.functional import (
    cosine_scores,
    generalization_scores,
    last_layer_score,
    self_influence,
    sum_checkpoints,
    synonym_neighbours,
    synonym_score,
    synonym_scores,
    synonym_similarity,
    tied_score,
    tracin_we_score,
    tracin_we_token_scores,
)
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.query_rows import RecordedQueries
from hf_doge.tracing.scoring import QueryScorer
from tests.artifacts.influence_rows import (
    NUM_EXAMPLES,
    VOCABULARY_SIZE,
    open_writer,
    random_rows,
    write_checkpoint,
)
from tests.reference import domain_loss, flat_gradient
from tests.tiny import three_domains, tiny_gpt2

NUM_QUERIES = 4
LEARNING_RATES = torch.tensor([0.5, 2.0], dtype=torch.float64)
PACKAGE = Path(hf_doge.__file__).parent


@pytest.fixture(scope="module")
def rows():
    return [random_rows(NUM_EXAMPLES, seed=seed, size=1.0) for seed in range(2)]


@pytest.fixture(scope="module")
def queries():
    return [random_rows(NUM_QUERIES, seed=7 + seed, size=1.0) for seed in range(2)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("definitions")
    writer = open_writer(folder / "index", num_examples=NUM_EXAMPLES, dtype="float32")
    for step, (recorded, rate) in enumerate(zip(rows, LEARNING_RATES.tolist(), strict=True)):
        write_checkpoint(writer, recorded, name=f"checkpoint-{step}", step=step, learning_rate=rate)
    return IndexReader.open(folder / "index", cache_dir=folder / "maps")


def assert_equal(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def pairs(queries, rows, score):
    """`score` of every query with every example, `(num_queries, num_examples)`."""
    return torch.stack([torch.stack([score(*query, *example) for example in rows]) for query in queries])


def test_a_search_is_tracin_we_summed_over_checkpoints(reader, rows, queries):
    """`tracin_we_score`, `sum_checkpoints` and `QueryScorer.scores`."""
    parts = torch.stack([pairs(*sides, tracin_we_score) for sides in zip(queries, rows, strict=True)])
    scorer = QueryScorer(reader, RecordedQueries([None] * NUM_QUERIES, queries))
    assert_equal(scorer.scores(0, NUM_QUERIES), sum_checkpoints(parts, LEARNING_RATES))


def test_self_influence_of_an_index_is_that_of_each_example(reader, rows):
    """`self_influence` and `IndexReader.self_influence`."""
    for checkpoint, recorded in enumerate(rows):
        assert_equal(reader.self_influence(checkpoint), [self_influence(values) for _, values in recorded])


def test_cosine_of_a_search_is_the_cosine_at_each_checkpoint(reader, rows, queries):
    """`cosine_scores` and `QueryScorer(cosine=True)`."""
    parts = []
    for asked, recorded in zip(queries, rows, strict=True):
        norms = [torch.stack([self_influence(values) for _, values in side]) for side in (asked, recorded)]
        parts.append(cosine_scores(pairs(asked, recorded, tracin_we_score), *norms))
    scorer = QueryScorer(reader, RecordedQueries([None] * NUM_QUERIES, queries), cosine=True)
    assert_equal(scorer.scores(0, NUM_QUERIES), sum_checkpoints(torch.stack(parts), LEARNING_RATES))


def test_words_of_a_hit_carry_the_word_gradient_similarities(reader, rows, queries):
    """`tracin_we_token_scores` and `QueryScorer.token_parts`."""
    ids = np.arange(NUM_EXAMPLES)
    for query in range(NUM_QUERIES):
        found = QueryScorer(reader, RecordedQueries([None] * NUM_QUERIES, queries)).token_parts(query, ids)
        for example in ids:
            expected = np.zeros((2, VOCABULARY_SIZE))
            for checkpoint in range(2):
                shared, parts = tracin_we_token_scores(*queries[checkpoint][query], *rows[checkpoint][example])
                expected[checkpoint, shared] = LEARNING_RATES[checkpoint] * parts
            assert_equal(found.parts[:, example], expected[:, found.tokens])


def test_synonyms_of_a_search_are_matched_as_those_of_two_examples(reader, rows, queries):
    """`synonym_similarity`, `synonym_scores`, `synonym_score` and `QueryScorer` with synonyms."""
    embeddings = torch.randn(VOCABULARY_SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    synonyms = []
    for asked in queries:
        tokens = asked.tokens.unique()
        found = synonym_neighbours(tokens, embeddings, threshold=0.6)
        near = zip(tokens.tolist(), found, strict=True)
        synonyms.append({token: (ids.numpy(), cosines.numpy()) for token, (ids, cosines) in near})

    def score(tokens_a, rows_a, tokens_b, rows_b):
        similarity = synonym_similarity(tokens_a, tokens_b, embeddings, threshold=0.6)
        whole = synonym_score(rows_a, rows_b, similarity)
        torch.testing.assert_close(synonym_scores(rows_a, rows_b, similarity).sum(), whole)
        return whole

    parts = torch.stack([pairs(*sides, score) for sides in zip(queries, rows, strict=True)])
    scorer = QueryScorer(reader, RecordedQueries([None] * NUM_QUERIES, queries, synonyms))
    assert_equal(scorer.scores(0, NUM_QUERIES), sum_checkpoints(parts, LEARNING_RATES))


def test_the_last_layer_of_a_classifier_is_scored_by_its_factors():
    """`last_layer_score` and `TracInLastScorer`."""
    model = make_classifier("cnn", 20, 3, width=8, seed=0)
    ids = torch.randint(1, 20, (5, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "labels": torch.arange(5) % 3}]
    factors = last_layer_factors(model, batches)
    examples = list(zip(factors.inputs, factors.deltas, strict=True))
    expected = [[last_layer_score(*one, *other, bias=True) for other in examples] for one in examples]
    assert_equal(TracInLastScorer([model], [1.0], bias=True).scores(batches, batches), expected)


def test_rows_of_a_tied_matrix_score_as_its_two_uses_do():
    """`tied_score` and `EmbeddingGradientRecorder(tied="full")`."""
    model = tiny_gpt2(dtype=torch.float64)
    ids = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(2))
    recorded = {}
    for tied in ("input", "full"):
        with EmbeddingGradientRecorder(model, tied=tied) as recorder:
            recorded[tied] = list(recorder.record({"input_ids": ids, "labels": ids}))
    outputs = []
    for example in ids:
        hidden = model.transformer(example[None]).last_hidden_state[0, :-1].detach()
        logits = model.lm_head(hidden).detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, example[1:], reduction="sum")
        outputs.append((hidden, torch.autograd.grad(loss, logits)[0]))
    inputs = recorded["input"]
    expected = tied_score(inputs[0], outputs[0], inputs[1], outputs[1])
    assert_equal(tracin_we_score(*recorded["full"][0], *recorded["full"][1]), expected)


def without_first_label(row):
    return {"labels": [-100, *row["labels"][1:]]}  # nothing predicts it, but the Trainer counts it


@pytest.mark.parametrize("alignment", ["single_pass", "per_domain", "streamed"])
def test_scores_of_a_training_step_are_the_generalization_estimation(tmp_path, alignment):
    """`generalization_scores` and what each alignment finds in one batch that holds all examples."""
    model = tiny_gpt2(dtype=torch.float64)
    domains = {name: dataset.map(without_first_label) for name, dataset in three_domains(2).items()}
    grads = torch.stack([flat_gradient(model, domain_loss(model, rows[:], "causal")) for rows in domains.values()])
    args = DoGEConfig(
        tmp_path, max_steps=1, per_device_train_batch_size=6, alignment=alignment, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, max_grad_norm=0.0, recipe="paper",
    )  # fmt: skip
    trainer = DoGETrainer(model, args, train_dataset=domains)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert_equal([logged[f"domain_score/{name}"] for name in domains], generalization_scores(grads, grads))


def test_all_formulas_are_exported_and_those_not_called_are_held_equal_here():
    defined = {
        node.name
        for path in (PACKAGE / "functional").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "check_"))
    }
    assert set(functional.__all__) == defined
    assert functional.__all__ == sorted(functional.__all__)
    called = {
        node.id
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "functional"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }
    held = {node.id for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Name)}
    assert defined - called - held == set()
