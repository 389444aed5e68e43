import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest

from hf_doge.cli import demo_corpus
from hf_doge.cli.demo_corpus import Candidate, ParagraphFilter, build_demo_corpus

CAPS = {"train_chars": 30_000, "validation_chars": 10_000}


def read_split(folder, domain, split):
    with gzip.open(folder / f"{domain}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, build_demo_corpus(folder, **CAPS)


def test_this_machine_has_at_least_four_domains(corpus):
    folder, splits = corpus
    assert len(splits) >= 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{domain}.{split}.jsonl.gz" for domain in splits for split in ("train", "validation")
    )


def test_files_hold_what_is_returned_within_the_caps(corpus):
    folder, splits = corpus
    for domain in splits:
        for split, cap in (("train", 30_000), ("validation", 10_000)):
            documents = read_split(folder, domain, split)
            assert documents == splits[domain][split].documents
            num_chars = sum(len(document["text"]) for document in documents)
            assert num_chars == splits[domain][split].num_chars
            assert 2_000 <= num_chars <= cap + demo_corpus.MIN_DOCUMENT_CHARS


def test_no_document_is_in_two_splits_or_domains(corpus):
    sources = [d["source"] for splits in corpus[1].values() for split in splits.values() for d in split.documents]
    assert len(set(sources)) == len(sources)


def test_validation_shares_few_13_word_shingles_with_train(corpus):
    def shingles(text):
        words = text.lower().split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    train = {s for splits in corpus[1].values() for d in splits["train"].documents for s in shingles(d["text"])}
    for splits in corpus[1].values():
        for document in splits["validation"].documents:
            ours = shingles(document["text"])
            assert len(ours & train) <= 0.2 * len(ours), document["source"]


def test_domains_speak_differently(corpus):
    """
    The word frequencies of a domain's own train text fit its validation text better than any other domain's. One may
    fail: at these caps a domain is a dozen documents, and a README can be all code.
    """

    def words(split):
        return [word for document in split.documents for word in document["text"].split()]

    splits = corpus[1]
    counts = {domain: Counter(words(parts["train"])) for domain, parts in splits.items()}
    vocabulary_size = len(set().union(*counts.values()))
    recognised = 0
    for domain, parts in splits.items():
        fit = {
            name: sum(
                math.log((count[word] + 0.1) / (count.total() + 0.1 * vocabulary_size))
                for word in words(parts["validation"])
            )
            for name, count in counts.items()
        }
        recognised += max(fit, key=fit.get) == domain
    assert recognised >= len(splits) - 1


def test_the_same_machine_gives_the_same_bytes_in_another_process(corpus, tmp_path):
    code = f"from hf_doge.cli.demo_corpus import build_demo_corpus; build_demo_corpus({str(tmp_path)!r}, **{CAPS})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for path in corpus[0].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_repeated_paragraphs_are_dropped_and_short_ones_pass():
    drop_repetitions = ParagraphFilter()
    licence = "permission is hereby granted free of charge to any person obtaining a copy of this software"
    first = drop_repetitions(f"{licence}\n\n}}")
    assert first == f"{licence}\n\n}}"
    fresh = "an entirely new paragraph whose fourteen or more words nobody has ever put in this order before"
    assert drop_repetitions(f"{fresh}\n\n{licence}\n\n}}") == f"{fresh}\n\n}}"


def test_a_document_that_is_mostly_a_copy_is_dropped_and_forgotten():
    drop_repetitions = ParagraphFilter()
    copied = " ".join(f"word{i}" for i in range(100))
    fresh = " ".join(f"other{i}" for i in range(14))
    drop_repetitions(copied)
    assert drop_repetitions(f"{copied}\n\n{fresh}") == ""
    assert drop_repetitions(fresh) == fresh


def test_code_has_no_docstrings_and_documentation_nothing_else(tmp_path):
    docstring = " ".join(["Says a thing at length."] * 20)
    source = f'import os\n\n\nclass A:\n    """{docstring}"""\n\n    def f(self):\n        """Short."""\n        return os\n'
    path = tmp_path / "module.py"
    path.write_text(source)
    assert "Says" not in demo_corpus._code_only(path)
    assert "Short" not in demo_corpus._code_only(path)
    assert "return os" in demo_corpus._code_only(path)
    assert demo_corpus._docstrings_only(path) == docstring


def test_a_machine_with_too_few_domains_is_told_what_to_do(tmp_path, monkeypatch):
    text = " ".join(f"word{i}" for i in range(5_000))
    only = {"one": [Candidate(f"file{i}", lambda i=i: f"{i} {text}") for i in range(20)]}
    monkeypatch.setattr(demo_corpus, "find_candidates", lambda: only)
    with pytest.raises(FileNotFoundError, match=r"at least 4 domains, but this machine only has \['one'\]"):
        build_demo_corpus(tmp_path / "corpus", **CAPS)
    assert not (tmp_path / "corpus").exists()
