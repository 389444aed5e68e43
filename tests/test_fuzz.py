"""
Odd values for every argument of every public entrance: a right answer, or an error of ours that names the argument or file.

Never a raw error of a library below, never silence where a value is not valid, never a hang. What is valid is stated here
apart from the package; `None` instead of yes or no means that either is right.
"""

import contextlib
import json
import random
import signal
import traceback
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_doge import (
    DoGEConfig,
    DomainWeightedSampler,
    DomainWeightedTrainer,
    DomainWeights,
    InfluenceIndex,
    TracInWECallback,
    interleave_domains,
)
from hf_doge.cli import main
from hf_doge.evaluation.influence.rank_metrics import recall_at, top_overlap
from hf_doge.evaluation.intervals import bootstrap_interval
from hf_doge.functional.doge import clamp_scores, update_domain_weights
from hf_doge.functional.tracin_we import top_k_rows
from tests.tiny import tiny_llama
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

SEED, VALUES_PER_ARGUMENT, LIMIT_SECONDS = 14, 45, 20
HUGE = 10**200
ODD = [
    *(None, True, False, 0, -1, 1, 2, 3, 1.7, 2.0, 0.5, "5", "", " ", "x", b"x", "\ud800", "a\0b"),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, HUGE, -HUGE, 10**5000, 2**63, 2**64),
    *(np.int64(2), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([1, 2]), np.array(3)),
    *(torch.tensor(2), torch.tensor([1.0, 2.0]), torch.tensor(True)),
    *([], [1], ["a", "a"], (), {}, {"a": 1}, {1: 2}, set(), range(3), object(), len, 1j, Fraction(1, 2), Decimal("1")),
]


# What is valid


def plain(value):
    return value.item() if getattr(value, "ndim", None) == 0 else value


def count(least=1, most=2**63 - 1, none=False):
    def valid(value):
        value = plain(value)
        return (none and value is None) or (type(value) is int and least <= value <= most)

    return valid


def number(fits, none=False):
    def valid(value):
        value = plain(value)
        if value is None:
            return none
        return type(value) in (int, float, Fraction) and abs(value) <= 1.797e308 and bool(fits(value))

    return valid


def infinite_too(fits, none=False):
    finite = number(fits, none)
    return lambda value: (
        finite(value)
        or (isinstance(plain(value), float) and plain(value) in (float("inf"), -float("inf")) and fits(plain(value)))
    )


def flag(none=False):
    return lambda value: type(plain(value)) is bool or (none and value is None)


def choice(*choices):
    return lambda value: any(value is one or (isinstance(value, str) and value == one) for one in choices)


def text(none=False):
    def valid(value):
        if isinstance(value, str) and "\0" in value:
            return False
        return (none and value is None) or (isinstance(value, str) and value.strip() != "" and value != "\ud800")

    return valid


def function(none=True):
    return lambda value: callable(value) or (none and value is None)


def either(value):
    return None


def pair(value):
    """Two numbers in an array are weights of two domains."""
    return None if getattr(value, "ndim", 0) == 1 else False


SEED_OF_64_BITS = count(-(2**63), 2**64 - 1)
RATE = 1e30


class TooSlowError(Exception):
    pass


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(call, names, valid, value):
    """What is wrong with how an entrance took a value; `None` if nothing is."""
    try:
        with time_limit():
            call()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(name in str(error) for name in names):
            return f"names none of {names}: {type(error).__name__}: {error}"
        if "hf_doge" not in Path(frames[-1].filename).parts and error.__cause__ is None:
            return f"raised in {frames[-1].filename}: {error}"
        return f"refused a valid value: {error}" if valid is True else None
    except TooSlowError:
        return "hangs"
    except Exception as error:  # what this test looks for
        return f"raw {type(error).__name__}: {error}"
    return "passed in silence" if valid is False else None


def fuzz(call, laws, also_named=()):
    draw, found = random.Random(SEED), []
    for argument, law in laws.items():
        for value in draw.sample(ODD, VALUES_PER_ARGUMENT):
            valid = law(value)
            problem = complaint(
                lambda argument=argument, value=value: call(**{argument: value}), [argument, *also_named], valid, value
            )
            if problem is not None:
                shown = "10**5000" if isinstance(value, int) and value > HUGE else repr(value)
                found.append(f"{argument}={shown}: {problem}")
    assert not found, "\n".join(found)


# The entrances

WEIGHTS = {"wiki": 0.75, "code": 0.25}
DOMAIN_WORDS = ("Domain", "domain", "eight")  # what messages call the argument


def tables():
    return {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(6)]}) for name in WEIGHTS}


def streams():
    return {name: dataset.to_iterable_dataset() for name, dataset in tables().items()}


DRAWS = {"seed": SEED_OF_64_BITS, "draw": choice("quota", "iid")}


def test_the_sampler():
    def call(domains=None, weights=WEIGHTS, **options):
        DomainWeightedSampler({"wiki": 6, "code": 6} if domains is None else domains, weights, **options).indices(0, 3)

    fuzz(call, {"domains": either, "weights": pair}, (*DOMAIN_WORDS, "mapping", "labels"))
    fuzz(
        call,
        {
            **DRAWS,
            "num_samples": count(1, 2**62, none=True),
            "num_epochs": number(lambda value: 0 < value <= 2**62 / 12),
            "max_epochs_per_domain": lambda value: None if infinite_too(lambda x: x > 0, True)(value) else False,
        },
    )


def test_the_places_of_the_sampler():
    def call(**place):
        sampler = DomainWeightedSampler({"wiki": 6, "code": 6}, WEIGHTS)
        ((name, value),) = place.items()
        getattr(sampler, {"epoch": "set_epoch", "draw": "seek"}.get(name, name))(value)

    fuzz(call, {"epoch": count(0, 2**62 // 12), "draw": count(0, 2**62)})


@pytest.mark.parametrize("make", [tables, streams])
def test_interleave_domains(make):
    def call(domains=None, weights=WEIGHTS, **options):
        mixed = interleave_domains(make() if domains is None else domains, weights, **options)
        if isinstance(mixed, IterableDataset):
            next(iter(mixed))

    fuzz(call, {"domains": lambda value: None if value is None else False, "weights": pair}, DOMAIN_WORDS)
    small = count(1, 2**12, none=True)
    fuzz(
        call,
        {
            **DRAWS,
            "num_samples": (lambda value: small(value)) if make is tables else count(1, 2**62, none=True),
            "stopping": choice(None, *(() if make is tables else ("all_exhausted", "first_exhausted"))),
            "domain_column": text(none=True),
        },
    )


def test_doge_config(tmp_path):
    def call(**options):
        DoGEConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)

    at_least_0 = infinite_too(lambda value: value >= 0, none=True)
    fuzz(
        call,
        {
            "mu": number(lambda value: 1 / RATE <= value <= RATE, none=True),
            "recipe": choice(None, "paper", "official", "doge_plus"),
            "mode": choice("proxy", "online"),
            "alignment": choice("auto", "single_pass", "per_domain", "streamed"),
            "normalization": choice(None, "none", "mean_norm", "cosine"),
            "score_min": infinite_too(lambda value: abs(value) <= RATE or value == -float("inf"), none=True),
            "score_max": infinite_too(lambda value: abs(value) <= RATE or value == float("inf"), none=True),
            "domain_max_grad_norm": at_least_0,
            "gradient_memory_budget": infinite_too(lambda value: value >= 0),
            "smoothing": number(lambda value: 0 <= value < 1),
            "self_term": flag(),
            "lagged_update": flag(),
            "burn_in_steps": count(0),
            "reweight_steps": count(),
            "sampler_lag_steps": count(none=True),
            "max_nonfinite_steps": count(),
            "trajectory_steps": count(),
            "per_device_target_batch_size": count(none=True),
            "domain_column": text(),
            "alignment_parameters": either,
            "hub_weights_id": either,
            "learning_rate": number(lambda value: 0 <= value / 0.01 <= RATE),
            "seed": count(0, 2**32 - 1),
            "data_seed": count(0, 2**32 - 1, none=True),
        },
    )


def test_the_callback():
    fuzz(
        lambda output_dir="index", **options: TracInWECallback(output_dir, **options),
        {
            "output_dir": text(),
            "collator": function(),
            "record_steps": lambda value: (
                None if isinstance(value, list | np.ndarray | torch.Tensor | range | dict) else count(none=True)(value)
            ),
            "top_k_tokens": count(none=True),
            "top_k_unit": choice("position", "token"),
            "dtype": choice("float16", "float32", "int8"),
            "projection_width": count(none=True),
            "projection_seed": SEED_OF_64_BITS,
            "special_tokens": choice("count", "drop"),
            "tied": choice("auto", "input", "output", "full", "own"),
            "recipe": choice(None, "paper"),
            "loss_reduction": choice("sum", "mean"),
            "loss_fn": function(),
            "metric": choice("optimizer", "gradient"),
            "second_moment": flag(none=True),
            "record": choice("checkpoint", "online"),
            "save_weights": flag(none=True),
            "batch_size": count(none=True),
            "max_segment_bytes": count(),
            "seed": SEED_OF_64_BITS,
            "hub_index_id": either,
            "redact_text": lambda value: None if plain(value) is True else flag()(value),
        },
    )


def test_domain_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(mean=WEIGHTS, **options):
        DomainWeights(mean, **options).summary()

    mapping = lambda value: None if isinstance(value, dict) or value is None else False  # noqa: E731
    fuzz(
        call,
        {
            "mean": lambda value: None if isinstance(value, dict) else False,
            "last": mapping,
            "trajectory": lambda value: value is None,
            "recipe": mapping,
            "domains": mapping,
            "metadata": mapping,
        },
        ("Domain names",),
    )
    fuzz(lambda ratios: DomainWeights.from_mapping(ratios), {"ratios": either}, ("Domain names",))
    fuzz(lambda domains: DomainWeights.uniform(domains), {"domains": either}, ("Domain names",))
    fuzz(lambda domains: DomainWeights.natural(domains), {"domains": either}, ("Domain names", "num_tokens"))
    known = DomainWeights(WEIGHTS, domains={name: {"num_tokens": 7} for name in WEIGHTS})
    fuzz(lambda num_tokens: known.expected_epochs(num_tokens), {"num_tokens": number(lambda value: value >= 0)})
    fuzz(lambda path: DomainWeights.from_file(path), {"path": lambda value: False}, ("weights file",))
    known.save_pretrained(tmp_path / "saved")

    def load(name_or_path=tmp_path / "saved", **options):
        DomainWeights.from_pretrained(name_or_path, **options)

    fuzz(
        load,
        {
            "name_or_path": lambda value: False,
            "revision": either,
            "cache_dir": either,
            "local_files_only": flag(),
            "force_download": flag(),
        },
        ("must be a folder or a dataset repository",),
    )
    fuzz(lambda **options: known.save_pretrained(**{"save_directory": tmp_path / "new", **options}), {"plot": flag()})


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    tokenizer, folder = wordpiece_tokenizer(), tmp_path_factory.mktemp("recorded")
    recorded = train(folder, classifier(tokenizer), tokenizer, tokenised(sentences(24), tokenizer), epochs=1)
    return InfluenceIndex.from_pretrained(recorded, cache_dir=folder / "maps")


def test_the_index(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def search(queries="new moon", **options):
        index.search(queries, **options)

    fuzz(
        search,
        {
            "top_k": count(),
            "batch_size": count(),
            "recipe": choice(None, "paper"),
            "special_tokens": choice(None, "count", "hide", "drop"),
            "sentence_ends": choice(None, "count", "hide", "drop"),
            "cosine": flag(none=True),
            "kernel": choice("token", "synonym"),
            "synonym_threshold": number(lambda value: -1 <= value <= 1),
            "exclude": either,
        },
    )
    fuzz(search, {"queries": either}, ("query", "Queries"))
    fuzz(lambda column: index.domain_influence("moon", column), {"column": lambda value: False})
    fuzz(
        lambda reduction: index.domain_influence("moon", "label", reduction=reduction),
        {"reduction": choice("mean", "sum")},
    )
    fuzz(
        lambda special_tokens: index.self_influence(special_tokens=special_tokens),
        {"special_tokens": choice("count", "drop")},
    )
    fuzz(lambda hits: index.to_html(hits), {"hits": lambda value: False})
    hits = index.search("new moon", top_k=1)
    fuzz(
        lambda path: index.to_html(hits, path),
        {"path": lambda value: None if isinstance(value, str) else value is None},
    )
    for label in draw_labels():
        valid = type(plain(label)) is bool or (type(plain(label)) in (int, float) and plain(label) in (0, 1, 2))
        call = lambda label=label: index.search([{"text": "new moon", "label": label}])  # noqa: E731
        also = label is None or isinstance(label, Decimal | list)  # one number in a list is that number
        underflows = isinstance(label, float) and abs(label) < 1e-300
        problem = complaint(call, ["label", "query"], None if also or valid or underflows else False, label)
        assert problem is None, (
            f"{type(label).__name__} {str(label)[:60] if not isinstance(label, int) else label % 10**9}: {problem}"
        )


def draw_labels():
    return random.Random(SEED).sample(ODD, 40)


def test_opening_an_index(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    fuzz(
        lambda **options: InfluenceIndex.from_pretrained(**{"name_or_path": index.reader.folder, **options}),
        {
            "name_or_path": lambda value: False,
            "verify": flag(),
            "streaming": flag(),
            "model": lambda value: value is None,
            "load_model": function(),
            "loss_fn": function(),
            "processing_class": either,
            "local_files_only": flag(),
            "token": either,
        },
        ("must be a folder or a dataset repository",),
    )


def test_the_trainer(tmp_path):
    args = DoGEConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    model, data = tiny_llama(), {name: Dataset.from_dict({"input_ids": [[1, 2]] * 6}) for name in WEIGHTS}

    def call(**options):
        DomainWeightedTrainer(model, args, **{"train_dataset": data, "domain_weights": WEIGHTS, **options})

    fuzz(call, {"train_dataset": lambda value: False, "domain_weights": pair}, DOMAIN_WORDS)
    fuzz(
        call,
        {
            "domain_column": text(),
            "draw": choice("quota", "iid"),
            "max_epochs_per_domain": lambda value: None if infinite_too(lambda x: x > 0, True)(value) else False,
        },
    )


def test_the_formulas():
    weights, scores = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0])

    def update(**options):
        update_domain_weights(**{"weights": weights, "scores": scores, "learning_rate": 0.1, "mu": 1.0, **options})

    fuzz(
        update,
        {
            "learning_rate": lambda value: None if number(lambda x: x >= 0)(value) else False,
            "mu": lambda value: None if number(lambda x: x > 0)(value) else False,
            "smoothing": number(lambda value: 0 <= value <= 1),
            "scores": either,
        },
    )
    bound = infinite_too(lambda value: abs(value) < 3.5e38 or abs(value) == float("inf"), none=True)
    fuzz(lambda **bounds: clamp_scores(scores, **bounds), {"score_min": bound, "score_max": bound})
    tokens, grads = torch.tensor([1, 2]), torch.ones(2, 3)
    fuzz(lambda k: top_k_rows(tokens, grads, k), {"k": count()})
    fuzz(lambda unit: top_k_rows(tokens, grads, 1, unit=unit), {"unit": choice("position", "token")})


def test_the_evaluation():
    first, second, positive = np.arange(4.0), np.arange(4.0)[::-1], np.array([True, False, True, False])
    fuzz(lambda k: top_overlap(first, second, k), {"k": count(1, 4)})
    fuzz(lambda fraction: recall_at(first, positive, fraction), {"fraction": number(lambda value: 0 < value <= 1)})
    fuzz(
        lambda **options: bootstrap_interval(first, **{"num_resamples": 10, **options}),
        {
            "confidence": number(lambda value: 0 < value < 1),
            "num_resamples": count(1, 10**6),
            "seed": count(0, 2**64 - 1),
        },
    )


# The command line and its files

FLAGS = (
    "mu",
    "learning_rate",
    "reweight_steps",
    "block_size",
    "max_train_tokens",
    "seed",
    "recipe",
    "heldout_fraction",
)
WORDS = ("nan", "inf", "-1", "1.5", "", "x", "1e308", "9" * 5000, "true", "\ud800", "[1]", "{", '{"a": 1, "a": 2}')


def told(capsys, *argv):
    """What a command says that cannot run; it must end with 2 and without a traceback."""
    with time_limit():
        code = main([str(word) for word in argv])
    captured = capsys.readouterr().err
    assert code == 2, argv
    assert "Traceback" not in captured
    return captured


def test_flags_and_config_files(tmp_path, capsys):
    draw = random.Random(SEED)
    for _ in range(60):
        name, word = draw.choice(FLAGS), draw.choice(WORDS)
        base = ["learn", "--data_dir=nowhere", f"--output_dir={tmp_path / 'out'}", "--use_cpu"]
        told(capsys, *base, f"--{name}={word}")  # if not for the flag, for the folder
        config = tmp_path / draw.choice(["c.yaml", "c.json"])
        lines = draw.choice([[f"{name}: {json.dumps(word)}"], [f"{name}: {json.dumps(word)}"] * 2, [f"{name}e: 1"]])
        config.write_text("\n".join(lines) + "\n")
        said = told(capsys, "learn", config)
        assert config.name in said or name in said or "data_dir" in said, said
        if len(lines) == 2 or f"{name}e:" in lines[0]:
            assert str(config) in said


def mutations(content, number):
    """A file with bytes gone, doubled or replaced by odd ones."""
    draw = random.Random(SEED)
    pieces = [
        b"\xff",
        b"\x00",
        b"\\ud800",
        b"NaN",
        b"[",
        b"{",
        b'"',
        b"\n\n",
        b"9" * 5000,
        b"[" * 10**4,
        b"null",
        b"\xef\xbb\xbf",
        b"",
    ]
    for _ in range(number):
        start = draw.randrange(len(content))
        yield content[:start] + draw.choice(pieces) + content[start + draw.randrange(4) :]


def test_files_of_records_and_of_weights(tmp_path, capsys):
    records = b'{"text": "new moon", "label": 1}\n' * 3
    for content in mutations(records, 60):
        path = tmp_path / "queries.jsonl"
        path.write_bytes(content)
        said = told(capsys, "search", f"--index={tmp_path / 'none'}", "--queries", path)
        assert "queries.jsonl" in said or "none" in said, (content, said)
    mixture = json.dumps({"train_domain_weights": {"wiki": 0.5, "code": 0.5}}).encode()
    for suffix in ("json", "yaml"):
        path = tmp_path / f"weights.{suffix}"
        for content in mutations(mixture, 40):
            path.write_bytes(content)
            problem = complaint(lambda path=path: DomainWeights.from_file(path), [str(path)], None, content)
            assert problem is None, (content[:80], problem)
