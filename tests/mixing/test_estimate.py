"""Weights without training: n-gram models of the domains, mixed so that a target is most likely, and fixed rules."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_doge import DomainWeights, estimate_domain_weights
from hf_doge.cli import main
from hf_doge.functional.mixture_weights import fit_mixture_weights
from tests.cli.test_cli import write_data
from tests.tiny import VOCAB, tiny_tokenizer, tokens

LANGUAGES = {"red": (1, 14), "green": (9, 23), "blue": (18, VOCAB)}  # overlapping thirds of the vocabulary


def sentences(low, high, *, num_rows=60, length=20, seed=0):
    return tokens(num_rows, low=low, high=high, length=length, seed=seed).tolist()


def domains(**kwargs):
    return {
        name: Dataset.from_dict({"input_ids": sentences(*ends, seed=seed, **kwargs)})
        for seed, (name, ends) in enumerate(LANGUAGES.items())
    }


def target_of(**num_rows):
    rows = [row for name, count in num_rows.items() for row in sentences(*LANGUAGES[name], num_rows=count, seed=77)]
    return Dataset.from_dict({"input_ids": rows})


def obvious_probability(rows, context, token, vocab_size):
    """The interpolated bigram of the docstring, counted one pair at a time."""
    unigrams = Counter(token for row in rows for token in row)
    bigrams = Counter((a, b) for row in rows for a, b in pairwise(row))
    p = (unigrams[token] + 1) / (sum(unigrams.values()) + vocab_size)
    followers = {pair for pair in bigrams if pair[0] == context}
    if context is None or not followers:
        return p
    total = sum(bigrams[pair] for pair in followers)
    return (bigrams[context, token] + len(followers) * p) / (total + len(followers))


def test_the_loss_of_each_domain_is_that_of_its_obvious_bigram_model():
    train, target = domains(num_rows=30), target_of(red=20, blue=20)
    weights = estimate_domain_weights(train, target, disable_tqdm=True)
    rows = target["input_ids"]
    for name, dataset in train.items():
        losses = [
            -np.log(obvious_probability(dataset["input_ids"], context, token, VOCAB))
            for row in rows
            for context, token in zip([None, *row], row, strict=False)
        ]
        assert weights.domains[name]["target_loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_a_mixed_target_gets_the_shares_that_it_was_mixed_by():
    weights = estimate_domain_weights(
        domains(num_rows=2000), target_of(red=300, blue=100), max_target_tokens=None, disable_tqdm=True
    )
    assert weights.mean["red"] == pytest.approx(0.75, abs=0.03)
    assert weights.mean["blue"] == pytest.approx(0.25, abs=0.03)
    assert weights.recipe["name"] == "ngram_em"
    assert weights.recipe["gap"] <= 1e-6


@pytest.mark.parametrize("order", [1, 2])
def test_no_other_weights_make_the_target_more_likely(order):
    generator = torch.Generator().manual_seed(3)
    likelihoods = torch.rand(50, 4, generator=generator, dtype=torch.float64) ** order + 1e-3
    counts = torch.randint(1, 9, (50,), generator=generator)
    fit = fit_mixture_weights(likelihoods, counts, tolerance=1e-9)
    others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((500,))
    values = (likelihoods @ others.T).log().T @ counts.double() / counts.sum()
    assert fit.gap <= 1e-9
    assert fit.log_likelihood >= float(values.max()) - fit.gap
    assert float(fit.weights.sum()) == pytest.approx(1)


def test_what_is_left_to_gain_is_bounded_by_the_gap_wherever_it_stops():
    likelihoods = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.05, 0.6]], dtype=torch.float64)
    counts = torch.tensor([5, 3, 1])
    best = fit_mixture_weights(likelihoods, counts, tolerance=1e-12).log_likelihood
    for steps in (1, 2, 5, 20):
        stopped = fit_mixture_weights(likelihoods, counts, tolerance=1e-15, max_iterations=steps)
        assert stopped.num_iterations <= steps
        assert -1e-12 <= best - stopped.log_likelihood <= stopped.gap + 1e-12


def test_streams_texts_and_padding_change_nothing():
    train, target = domains(), target_of(red=30, green=10)
    expected = estimate_domain_weights(train, target, disable_tqdm=True).mean
    streams = {name: dataset.to_iterable_dataset(num_shards=3) for name, dataset in train.items()}
    assert estimate_domain_weights(streams, target.to_iterable_dataset(), disable_tqdm=True).mean == expected

    def pad(row):
        ids, given = row["input_ids"], len(row["input_ids"])
        return {"input_ids": [0, 0, *ids, 0], "attention_mask": [0, 0, *[1] * given, 0]}

    padded = {name: dataset.map(pad) for name, dataset in train.items()}
    assert estimate_domain_weights(padded, target.map(pad), disable_tqdm=True).mean == expected
    tokenizer = tiny_tokenizer()
    words = tokenizer.convert_ids_to_tokens(range(VOCAB))

    def as_text(dataset):
        rows = [[token for token in row if token >= 4] for row in dataset["input_ids"]]
        texts = [" ".join(words[token] for token in row) for row in rows]
        return Dataset.from_dict({"input_ids": rows}), Dataset.from_dict({"story": texts})

    ids, texts = zip(*(as_text(dataset) for dataset in (*train.values(), target)), strict=True)
    of_ids = estimate_domain_weights(dict(zip(train, ids, strict=False)), ids[-1], disable_tqdm=True)
    of_texts = estimate_domain_weights(
        dict(zip(train, texts, strict=False)),
        texts[-1],
        processing_class=tokenizer,
        text_column="story",
        disable_tqdm=True,
    )
    assert of_texts.mean == of_ids.mean


def test_only_the_labelled_tokens_of_a_target_count():
    train = domains()
    rows = [a + b for a, b in zip(sentences(1, 14, seed=5), sentences(18, VOCAB, seed=6), strict=True)]
    labels = [[-100] * 20 + row[20:] for row in rows]
    answers = Dataset.from_dict({"input_ids": rows, "labels": labels})
    weights = estimate_domain_weights(train, answers, disable_tqdm=True)
    assert weights.recipe["num_target_tokens"] == 60 * 20
    assert weights.mean["blue"] > 0.9
    assert estimate_domain_weights(train, answers.remove_columns("labels"), disable_tqdm=True).mean["red"] > 0.3


def test_labels_of_whole_texts_do_not_count():
    """As those of a classifier: one number a row, of which n-grams see nothing."""
    train, target = domains(), target_of(red=40)
    labelled = target.add_column("labels", [0, 1] * 20)
    expected = estimate_domain_weights(train, target, disable_tqdm=True)
    assert estimate_domain_weights(train, labelled, disable_tqdm=True).mean == expected.mean


def test_reading_less_of_a_domain_is_recorded():
    weights = estimate_domain_weights(domains(), target_of(red=30), max_tokens=1000, disable_tqdm=True)
    assert weights.domains["red"]["num_tokens_read"] == 1000
    assert weights.domains["red"]["num_tokens"] is None
    assert (
        estimate_domain_weights(domains(), target_of(red=30), disable_tqdm=True).domains["red"]["num_tokens"] == 1200
    )


def test_many_pairs_are_merged_on_the_way(monkeypatch):
    expected = estimate_domain_weights(domains(), target_of(red=30, blue=30), disable_tqdm=True).mean
    monkeypatch.setattr("hf_doge.mixing.ngrams.MERGE_ABOVE", 10)
    monkeypatch.setattr("hf_doge.mixing.tokens.ROWS_AT_A_TIME", 7)
    assert estimate_domain_weights(domains(), target_of(red=30, blue=30), disable_tqdm=True).mean == expected


def test_the_estimate_is_an_artifact_like_any_other(tmp_path):
    weights = estimate_domain_weights(domains(), target_of(red=30, blue=10), disable_tqdm=True)
    weights.save_pretrained(tmp_path / "weights")
    assert DomainWeights.from_pretrained(tmp_path / "weights") == weights
    assert "n-gram models" in (tmp_path / "weights" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda train: {"target_dataset": train["red"]},
            "must not be one of the domains, but it is the data of 'red'",
        ),
        (
            lambda train: {"target_dataset": Dataset.from_dict({"input_ids": train["blue"]["input_ids"]})},
            "it is the data of 'blue'",
        ),
        (lambda train: {"target_dataset": target_of(red=3)}, "at least 500 tokens that count, but it has 60"),
        (lambda train: {"train_dataset": {}}, "Name at least one"),
        (lambda train: {"train_dataset": {**train, "empty": train["red"].select([])}}, "'empty' has none"),
        (lambda train: {"target_dataset": Dataset.from_dict({"text": ["w1 w2"] * 400})}, "a `processing_class`"),
        (lambda train: {"target_dataset": Dataset.from_dict({"input_ids": ["w1"] * 400})}, "lists of token ids"),
        (lambda train: {"target_dataset": Dataset.from_dict({"input_ids": [[0.5]] * 600})}, "whole numbers"),
        (lambda train: {"target_dataset": Dataset.from_dict({"input_ids": [[-1]] * 600})}, "Token ids must be in"),
        (lambda train: {"order": 3}, "`order` must be in"),
        (lambda train: {"max_tokens": 0}, "`max_tokens` must be"),
        (lambda train: {"max_target_tokens": 2.5}, "`max_target_tokens` must be"),
        (lambda train: {"tolerance": float("nan")}, "`tolerance` must be"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(change, message):
    train = domains()
    arguments = {"train_dataset": train, "target_dataset": target_of(red=30), "disable_tqdm": True, **change(train)}
    with pytest.raises(ValueError, match=message):
        estimate_domain_weights(arguments.pop("train_dataset"), arguments.pop("target_dataset"), **arguments)


SIZES = {"small": {"num_tokens": 100}, "middle": {"num_tokens": 400}, "large": {"num_tokens": 1600}}


def test_temperature_goes_from_natural_to_uniform():
    natural = DomainWeights.natural(SIZES).mean
    assert DomainWeights.from_temperature(SIZES, temperature=1).mean == pytest.approx(natural)
    assert DomainWeights.from_temperature(SIZES, temperature=2).mean == pytest.approx(
        {"small": 1 / 7, "middle": 2 / 7, "large": 4 / 7}
    )
    assert DomainWeights.from_temperature(SIZES, temperature=1e9).mean["small"] == pytest.approx(1 / 3, abs=1e-6)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        DomainWeights.from_temperature(SIZES, temperature=0)
    with pytest.raises(ValueError, match="need `num_tokens` of every domain"):
        DomainWeights.from_temperature({"a": {}}, temperature=2)


def test_unimax_gives_equal_parts_within_its_epochs():
    assert DomainWeights.unimax(SIZES, num_tokens=300, max_epochs=1).mean == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    weights = DomainWeights.unimax(SIZES, num_tokens=1500, max_epochs=2)
    assert {name: weights.mean[name] * 1500 for name in SIZES} == pytest.approx(
        {"small": 200, "middle": 650, "large": 650}
    )
    assert max(weights.expected_epochs(1500).values()) <= 2 + 1e-9
    with pytest.raises(ValueError, match="must fill the budget"):
        DomainWeights.unimax(SIZES, num_tokens=5000, max_epochs=2)


def test_the_command_estimates_for_a_target_and_by_rules(tmp_path, capsys):
    flags = [f"--data_dir={write_data(tmp_path / 'data')}", "--block_size=16", "--train_tokenizer_vocab=300"]
    assert main(["estimate", *flags, f"--output_dir={tmp_path / 'out'}", "--target", "wiki"]) == 0
    weights = DomainWeights.from_pretrained(tmp_path / "out" / "domain_weights")
    assert set(weights.mean) == {"code", "prose"}
    assert weights.recipe["name"] == "ngram_em"
    assert "ngram_em" in capsys.readouterr().out
    assert main(["estimate", *flags, f"--output_dir={tmp_path / 'rule'}", "--mixture", "temperature:2"]) == 0
    assert DomainWeights.from_pretrained(tmp_path / "rule" / "domain_weights").recipe["temperature"] == 2
    assert main(["estimate", *flags, f"--output_dir={tmp_path / 'bad'}", "--mixture", "unimax:2:1e12"]) == 2
    assert "must fill the budget" in capsys.readouterr().err
