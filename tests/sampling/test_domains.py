"""Which rows belong to which domain, and what is refused."""

import pickle
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

from hf_doge.sampling.domains import DomainIndex, merge_domains
from hf_doge.sampling.transforms import refuse_lost_transforms


def rows_by_domain(index):
    return {
        name: index.rows(np.full(size, number), np.arange(size)).tolist()
        for number, (name, size) in enumerate(zip(index.names, index.sizes, strict=True))
    }


LABELS = ["wiki", "code", "wiki", "arxiv", "code", "wiki"]
ROWS = {"arxiv": [3], "code": [1, 4], "wiki": [0, 2, 5]}


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        tuple(LABELS),
        np.array(LABELS),
        pa.array(LABELS),
        pa.chunked_array([LABELS[:2], LABELS[2:]]),
        pa.array(LABELS, pa.large_string()),
        Dataset.from_dict({"domain": LABELS})["domain"],
        Dataset.from_dict({"meta": [{"domain": label} for label in LABELS]})["meta"]["domain"],
        concatenate_datasets([Dataset.from_dict({"d": LABELS[:3]}), Dataset.from_dict({"d": LABELS[3:]})])["d"],
        Dataset.from_dict({"d": ["code", *LABELS, "books"]}).select([1, 2, 3, 4, 5, 6])["d"],
        Dataset.from_dict({"d": LABELS[::-1]}).select([5, 4, 3, 2, 1, 0])["d"],
    ],
)
def test_labels_give_the_rows_of_each_domain_in_dataset_order(labels):
    index = DomainIndex.from_labels(labels)
    assert rows_by_domain(index) == ROWS
    assert index.num_rows == 6


def test_labels_may_be_a_column_of_pandas():
    index = DomainIndex.from_labels(pd.Series(LABELS, index=range(6, 0, -1)))
    assert rows_by_domain(index) == ROWS


@pytest.mark.parametrize("labels", [[10, 2, 10], np.array([10, 2, 10], np.int8), torch.tensor([10, 2, 10])])
def test_integer_labels_are_sorted_as_numbers_and_named_by_their_digits(labels):
    assert rows_by_domain(DomainIndex.from_labels(labels)) == {"2": [1], "10": [0, 2]}


def test_names_keep_their_order_and_may_have_no_rows():
    index = DomainIndex.from_labels([2, 0, 2], names=["wiki", "code", "arxiv"])
    assert rows_by_domain(index) == {"wiki": [1], "code": [], "arxiv": [0, 2]}
    index = DomainIndex.from_labels(["b", "a"], names=["b", "a", "c"])
    assert rows_by_domain(index) == {"b": [0], "a": [1], "c": []}


def test_a_class_label_column_brings_its_names():
    dataset = Dataset.from_dict({"domain": [1, 0, 1]}).cast_column("domain", ClassLabel(names=["wiki", "code"]))
    assert rows_by_domain(DomainIndex.from_labels(dataset["domain"])) == {"wiki": [1], "code": [0, 2]}


def test_domains_that_lie_in_one_run_take_no_memory_per_row():
    index = DomainIndex.from_labels(np.repeat([7, 3, 5], [2, 3, 1]))
    assert rows_by_domain(index) == {"3": [2, 3, 4], "5": [5], "7": [0, 1]}
    assert index._grouped_rows is None
    assert DomainIndex.from_labels([0, 1, 0])._grouped_rows is not None


def test_sizes_give_ranges_in_their_order():
    index = DomainIndex.from_sizes({"wiki": 2, "none": 0, "code": np.int64(3)})
    assert rows_by_domain(index) == {"wiki": [0, 1], "none": [], "code": [2, 3, 4]}
    assert index.names == ("wiki", "none", "code")
    assert index.sizes.dtype == np.int64
    assert repr(index) == "DomainIndex({'wiki': 2, 'none': 0, 'code': 3})"


def test_millions_of_labels_are_indexed_without_a_python_loop():
    labels = np.random.default_rng(0).integers(0, 50, 2_000_000)
    start = time.perf_counter()
    index = DomainIndex.from_labels(labels)
    assert time.perf_counter() - start < 2
    assert index.num_rows == 2_000_000
    assert index.rows(np.array([3]), np.array([0])) == np.flatnonzero(labels == 3)[0]


def test_rows_of_random_labels_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    for num_domains in (1, 2, 9, 300):
        labels = rng.integers(0, num_domains, 500)
        for name, rows in rows_by_domain(DomainIndex.from_labels(labels)).items():
            assert rows == np.flatnonzero(labels == int(name)).tolist()


@pytest.mark.parametrize(
    ("labels", "names", "error", "message"),
    [
        ([], None, ValueError, "must have rows"),
        (["a", None, None], None, ValueError, "2 rows have none, the first of them row 1"),
        ([1, "a"], None, TypeError, "all strings or all integers"),
        ([0.5], None, TypeError, "strings or integers, but got double"),
        ([0, 3, -1], ["a", "b"], ValueError, r"domains \['a', 'b'\], but got \[-1, 3\]"),
        (["a", "z"], ["a", "b"], ValueError, r"domains \['a', 'b'\], but got \['z'\]"),
        (["a", "b"], ["a", "b", "a"], ValueError, r"different, but \['a'\] appear more than once"),
        ([0, 1], [0, 1], ValueError, "must be non-empty strings, but got 0"),
    ],
)
def test_bad_labels_are_named(labels, names, error, message):
    with pytest.raises(error, match=message):
        DomainIndex.from_labels(labels, names=names)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"a": 3, "b": -1}, ValueError, "`size of domain 'b'` must be at least 0, but got -1"),
        ({"a": 1.5}, ValueError, "`size of domain 'a'` must be a whole number, but got 1.5"),
        ({"a": 0, "b": 0}, ValueError, r"the domains \['a', 'b'\] have none"),
        ({}, ValueError, "Domain names must be given, but got none"),
        ({1: 2}, ValueError, "must be non-empty strings, but got 1"),
    ],
)
def test_bad_sizes_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        DomainIndex.from_sizes(sizes)


def test_a_dataset_with_a_domain_column_is_left_as_it_is():
    dataset = Dataset.from_dict({"domain": LABELS, "text": list("abcdef")})
    merged, index = merge_domains(dataset, "domain")
    assert merged is dataset
    assert rows_by_domain(index) == ROWS


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_one_dataset_per_domain_becomes_one_with_a_class_label(kind):
    domains = kind({"wiki": Dataset.from_dict({"text": ["a", "b"]}), "code": Dataset.from_dict({"text": ["c"]})})
    merged, index = merge_domains(domains, "domain")
    assert merged["text"][:] == ["a", "b", "c"]
    assert merged.features["domain"] == ClassLabel(names=["wiki", "code"])
    assert [index.names[label] for label in merged["domain"]] == ["wiki", "wiki", "code"]
    assert rows_by_domain(index) == {"wiki": [0, 1], "code": [2]}


def test_shuffled_datasets_are_merged_in_the_order_they_show():
    shuffled = Dataset.from_dict({"text": list("abcde")}).shuffle(seed=0)
    merged, _ = merge_domains({"wiki": shuffled, "code": Dataset.from_dict({"text": ["z"]})}, "domain")
    assert merged["text"][:] == [*shuffled["text"], "z"]
    assert merged["domain"][:] == [0] * 5 + [1]


def shout(batch):
    return {"text": [text.upper() for text in batch["text"]]}


def test_every_row_goes_through_the_transform_of_its_own_domain():
    def double(batch):
        assert list(batch) == ["text"]  # as it would be without other domains
        return {"text": [text * 2 for text in batch["text"]]}

    plain = Dataset.from_dict({"text": ["a", "b"], "note": [1, 2]})
    narrow = {"columns": ["text"], "output_all_columns": True}
    domains = {
        "wiki": plain.with_transform(double, **narrow),
        "code": plain,
        "books": plain.with_transform(shout, **narrow),
    }
    merged, _ = merge_domains(domains, "domain")
    expected = [{**domains[name][row], "domain": k} for k, name in enumerate(domains) for row in range(2)]
    assert [merged[row] for row in range(6)] == expected
    assert merged.__getitems__([5, 0, 3, 1]) == [expected[row] for row in (5, 0, 3, 1)]
    assert pickle.loads(pickle.dumps(merged.with_transform(shout)))[4]["text"] == "A"


def test_one_transform_of_all_domains_needs_no_column_that_tells_whose_it_is():
    plain = Dataset.from_dict({"ids": [[1], [2]]})
    same, other = (plain.with_transform(lambda batch, by=by: {"ids": [[by] for _ in batch["ids"]]}) for by in (1, 2))
    refuse_lost_transforms({"wiki": same, "code": same})
    with pytest.raises(ValueError, match=r"the format of \['code'\] is not that of the other domains"):
        refuse_lost_transforms({"wiki": same, "code": other})


def test_rows_that_do_not_fit_together_once_they_are_transformed_are_refused():
    plain = Dataset.from_dict({"text": ["a"]})
    merged, _ = merge_domains({"wiki": plain, "code": plain.with_transform(lambda batch: {"ids": [0]})}, "domain")
    with pytest.raises(
        ValueError, match=r"those of 'code' have \['domain', 'ids'\] and those of 'wiki' \['domain', 'text'\]"
    ):
        merged[:]
    with pytest.raises(ValueError, match="must keep its column 'domain', which tells whose transform"):
        merged.remove_columns("domain")[0]


WIKI = Dataset.from_dict({"text": ["a"]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WIKI, r"must have a column 'domain'.* but its columns are \['text'\]"),
        (Dataset.from_dict({"domain": []}), "the one given is empty"),
        ({}, "at least one domain, but got an empty dict"),
        ({"wiki": WIKI, "code": Dataset.from_dict({"text": []})}, r"must have examples, but \['code'\] have none"),
        ({"wiki": WIKI, "code": Dataset.from_dict({"text": [1]})}, "same features, but 'code' has"),
        ({"wiki": WIKI, "code": Dataset.from_dict({"body": ["a"]})}, "same features, but 'code' has"),
        ({"wiki": WIKI.add_column("domain", ["w"])}, "get a column 'domain', but they have one already"),
    ],
)
def test_datasets_that_cannot_be_merged_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        merge_domains(data, "domain")
