"""
What a user may ask about, and how it is scored: tokenised examples, raw texts, dialogues, or a ready batch, each brought to
one record, and the options of a search.

No model is needed for it: what becomes of a record depends on the model, see `query_rows`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.metric import metric_of
from hf_doge.checks import check_choice, check_count, check_flag, check_number, show
from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.tracing import refusals
from hf_doge.tracing.layer_options import decide_layers
from hf_doge.tracing.targets import ALL, Target
from hf_doge.tracing.token_queries import (
    LABEL_FIELDS,
    check_tokens,
    dataset_records,
    label_tensor,
    split_batch,
)
from hf_doge.tracing.words import Reading

TEXT_FIELDS = (
    ("text", "text_pair"),
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "context"),
    ("sentence",),
)

SPECIAL_TOKENS = ("count", "hide", "drop")  # and ends of sentences
VIRTUAL = ("count", "drop")
KERNELS = ("token", "synonym")
SCORERS = ("tracin_we", "bm25")

# What a query may be: `datasets.Dataset`, texts, dictionaries of one or of several, see [`check_queries`].
Queries = Dataset | str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


@dataclass
class Query:
    """
    One prediction to trace.

    Attributes:
        features (`dict[str, torch.Tensor]`): What the model takes, without a batch axis. Labels may be missing at first.
        reading (`Reading`): Its text and tokens, for people.
        target (`str`, *optional*): What is traced, where that is what the model said, or a part of an answer.
    """

    features: dict[str, Tensor]
    reading: Reading
    target: str | None = None


class SearchOptions(TypedDict, total=False):
    """
    How queries are scored; all keywords of [`InfluenceIndex.search`] and its relatives, all optional.

    Args:
        recipe (`str`):
            `"paper"`: `special_tokens="count"`, `sentence_ends="count"`, `cosine=False` and `layers="drop"`. If left out, these are what the
            index was begun with, see [`search_defaults`]; indices of before they were have those of the paper.
        special_tokens (`str`):
            `"count"`: tokens such as [CLS] count like any other. They are in every text, and their gradients carry much of
            a sentence. `"hide"`: they count, but are not among the `words` of a hit, which explain nothing by them;
            `token_scores` tell their part, `hidden_token_ids` which they are. `"drop"`: they do not count, neither in queries nor in examples.
            Default: what the index says.
        sentence_ends (`str`): The same of tokens that are nothing but the end of a sentence, `.`, `?` or `!`.
        virtual (`str`):
            What was frozen in training has gradients, and no example ever moved it. `"drop"`: such parts of an index do not
            count, as those of the words next to trained adapters. `"count"`: they do. Default: `"drop"` where the index
            has anything that was trained.
        layers (`str`):
            How the rows of layers count in an index that has them next to those of words. `"count"`: all rows are one gradient,
            whose inner products add up. `"mean"`: words and each layer have a score of their own, with `cosine` divided by norms
            of their own, and the score is the mean of these. `"drop"`: the words alone; `"only"`: the layers alone. Default: what
            the index says; of `recipe="paper"`, `"drop"`.
        next_tokens (`int`):
            Trace what the model of the last checkpoint says next, the likeliest token at each step until it ends its text, and
            at most so many. Queries are then texts, `{"prompt": ...}`, `{"messages": ...}` or tokens without an answer. What
            it said is `query_target` of the hits. For language models, and from text to text.
        target (`str`, `tuple[int, int]` or `list`):
            Which tokens of the answer are traced: `"all"` that are scored in training (default), or those that hold some
            characters of a part of it, given as the part or as `(start, stop)`, counted in the completion, the last message,
            the text, or what the model says next. A list has one for each query.
        batch_size (`int`): Queries per forward and backward. Default: 32.
        scorer (`str`):
            `"tracin_we"` (default): the influence of gradients. `"bm25"`: what a search engine finds by the tokens that texts
            share, for comparison; it asks no model and knows no opponents, and no other option but `next_tokens` goes
            with it. Needs `pip install 'hf-doge[evaluate-influence]'`.
        cosine (`bool`):
            Divide the score at each checkpoint by the norms of both gradients, before the learning rate weighs it.
            Not in the paper. Default: what the index says, on for classifiers. Needs the whole index: where it is read
            from the Hub in parts, the default is off.
        kernel (`str`):
            Which tokens answer each other. `"token"` (default): equal ones alone, TracIn-WE. `"synonym"`,
            TracIn-WE-Syn: those that both texts hold, and of the rest each token of the query one of the example that
            means the same, so that texts without a common word can score. From the paper comes, as far as we know it,
            that synonyms are told by the cosine of the model's own word embeddings. Ours, for want of its detail:
            those at each checkpoint, and the rules of [`synonym_similarity`] (a match counts 1, one to one, greedily).
        synonym_threshold (`float`):
            Smallest cosine of a synonym, in [-1, 1]; the time of a search grows as it falls. Ours. Default: 0.5.
    """

    recipe: Literal["paper"] | None
    special_tokens: Literal["count", "hide", "drop"] | None
    sentence_ends: Literal["count", "hide", "drop"] | None
    virtual: Literal["count", "drop"] | None
    layers: Literal["count", "mean", "drop", "only"] | None
    next_tokens: int | None
    target: Target | list[Target] | list[Target | None]
    batch_size: int
    scorer: Literal["tracin_we", "bm25"]
    cosine: bool | None
    kernel: Literal["token", "synonym"]
    synonym_threshold: float


SEARCH_DEFAULTS = SearchOptions(
    recipe=None,
    special_tokens=None,
    sentence_ends=None,
    virtual=None,
    layers=None,
    next_tokens=None,
    target=ALL,
    batch_size=32,
    scorer="tracin_we",
    cosine=None,
    kernel="token",
    synonym_threshold=0.5,
)
PAPER = SearchOptions(special_tokens="count", sentence_ends="count", cosine=False)


def check_options(given: SearchOptions, reader: IndexReader) -> SearchOptions:
    """
    All options of a search, those that were not given at their defaults.

    Raises:
        TypeError: One is unknown.
        ValueError: A value is out of its range, or the index does not hold what it needs.
    """
    unknown = sorted(set(given) - set(SEARCH_DEFAULTS))
    if unknown:
        raise TypeError(f"Options of a search are {sorted(SEARCH_DEFAULTS)}, but got an unexpected {unknown[0]!r}.")
    options: SearchOptions = {**SEARCH_DEFAULTS, **given}
    if options["scorer"] == "bm25":
        refusals.refuse_with_bm25(given, SEARCH_DEFAULTS)
    else:
        _fill(options, reader)
        _check_scored(options, reader)
    check_count("next_tokens", options["next_tokens"], optional=True)
    check_count("batch_size", options["batch_size"])
    return options


def _check_scored(options: SearchOptions, reader: IndexReader) -> None:
    check_choice("scorer", options["scorer"], SCORERS)
    check_choice("recipe", options["recipe"], ("paper",), optional=True)
    check_choice("special_tokens", options["special_tokens"], SPECIAL_TOKENS)
    check_choice("sentence_ends", options["sentence_ends"], SPECIAL_TOKENS)
    check_choice("virtual", options["virtual"], VIRTUAL, optional=True)
    if options["virtual"] == "drop":
        refusals.refuse_nothing_left(reader)
    check_flag("cosine", options["cosine"])
    check_choice("kernel", options["kernel"], KERNELS)
    check_number("synonym_threshold", options["synonym_threshold"], least=-1, most=1)
    if options["cosine"]:
        refusals.refuse_metric("`cosine`", reader)
        reader.require_whole("`cosine`")


def _fill(options: SearchOptions, reader: IndexReader) -> None:
    """Decide what was left to the recipe, or to the index."""
    recorded = reader.config["metadata"].get("search")
    recorded = recorded if isinstance(recorded, dict) and options["recipe"] is None else PAPER
    if options["layers"] is not None or reader.config.get("layers") is not None:
        options["layers"] = decide_layers(options, reader)  # before others are filled in
    given_cosine, asked = options["cosine"], options["recipe"]
    is_paper = isinstance(asked, str) and asked == "paper"
    for name, paper in PAPER.items():
        given = options[name]  # type: ignore[literal-required]
        if is_paper and given is not None and given != paper:
            raise ValueError(
                f"`recipe='paper'` means `{name}={paper!r}`, but got `{name}={given!r}`. Leave out one of the two."
            )
        if given is None:
            value = recorded.get(name, paper)
            known = isinstance(value, bool) if name == "cosine" else value in SPECIAL_TOKENS
            options[name] = value if known else paper  # type: ignore[literal-required]
    if given_cosine is None and options["cosine"]:
        options["cosine"] = _can_divide(reader)


def _can_divide(reader: IndexReader) -> bool:
    """Whether norms can be had where nobody asked for them."""
    if metric_of(reader.config) == "one-sided":
        return False
    if not reader.is_whole:
        warnings.warn(
            "This index is searched by cosine once it is downloaded, but with `streaming=True` its norms are not here, so"
            " scores are not divided by them. Download it, or pass `cosine=False` to be told no more.",
            stacklevel=5,
        )
    return reader.is_whole


def check_queries(
    queries: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocabulary_size: int,
    missing: Sequence[str] = (),
    continued: bool = False,
) -> list[dict]:
    """
    Bring queries into one of two forms, before any model is loaded: raw records, or features with `input_ids`.

    Args:
        queries: A tokenised `datasets.Dataset`, text or texts (`str`, or dictionaries with text fields and perhaps a
            label), or a batch (a dictionary of tensors, as a model is fed).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed by texts.
        vocabulary_size (`int`): Number of rows of the embedding matrix.
        missing (`Sequence[str]`): Folders of checkpoints that are not there, where there is no tokenizer.
        continued (`bool`): Whether they are prompts, traced for what the model says next.

    Returns:
        `list[dict]`: one per query. With `input_ids`, the other values are tensors.

    Raises:
        ValueError: There are none, some have no token or no label that counts, tokens out of the vocabulary, ready
            embeddings, or texts without a tokenizer.
        TypeError: They are nothing of the above.
    """
    if isinstance(queries, Dataset):
        records = dataset_records(queries)
    elif isinstance(queries, str):
        records = [{"text": queries}]
    elif isinstance(queries, Mapping):
        alone = queries and all(isinstance(value, str | int) for value in queries.values())
        records = [dict(queries)] if alone else split_batch(queries)
    elif isinstance(queries, Sequence) and all(isinstance(query, str | Mapping) for query in queries):
        records = [{"text": query} if isinstance(query, str) else dict(query) for query in queries]
    else:
        raise TypeError(
            "`queries` must be a tokenised `datasets.Dataset`, a text, a list of texts or of dictionaries, or a batch, "
            f"but got a {type(queries).__name__}."
        )
    unsaid = ("completion",) if continued else ()
    records = [{name: one[name] for name in one if name not in unsaid or one[name] is not None} for one in records]
    if not records:
        raise ValueError("`queries` must hold at least one prediction to trace, but it is empty.")
    if any(record.get("inputs_embeds") is not None for record in records):
        raise ValueError(
            "`queries` must hold token ids and no ready `inputs_embeds`: TracIn-WE needs to know which token each "
            "embedding belongs to. Pass `input_ids`."
        )
    if any("input_ids" in record for record in records):
        records = [_tensors(record) for record in records]
        records = check_tokens(records, vocabulary_size)
    elif tokenizer is not None:
        _check_texts(records, continued)
    else:
        cause = f", of which {missing[0]!r} was moved or deleted since it was recorded" if missing else ""
        raise ValueError(
            f"Queries in words need the tokenizer of the model, but the index found none with its checkpoints{cause}. Pass "
            "`processing_class` to `InfluenceIndex.from_pretrained`, or queries with `input_ids`."
        )
    _check_labels(records)
    return records


def text_fields(record: Mapping[str, Any]) -> list[str]:
    """
    Which fields of a record hold what the model reads: one text, or a pair.

    Raises:
        ValueError: if there is none, or too many to tell, or another text that models read next to those, such as a prompt.
    """
    strings = [name for name, value in record.items() if isinstance(value, str)]
    for names in TEXT_FIELDS:
        if set(names) <= set(strings):
            read = ("prompt", "completion", *(name for fields in TEXT_FIELDS for name in fields if name in strings))
            unread = [name for name in read if name not in names and record.get(name)]
            if unread:
                raise refusals.several_texts(unread[0], names)
            return list(names)
    others = [name for name in strings if not name.startswith("label")]
    if not 1 <= len(others) <= 2:
        raise ValueError(
            f"A query in words must have a text or a pair of texts, but its text fields are {others}. Keep only what the "
            "model reads, and `label`."
        )
    return others


def dialogue_kind(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The fields of a dialogue, `("messages",)` before `("prompt", "completion")`; `None` if the record is a text or a pair."""
    if record.get("messages") is not None:
        return ("messages",)
    return ("prompt", "completion") if {"prompt", "completion"} <= set(record) else None


def is_dialogue(record: Mapping[str, Any]) -> bool:
    """Whether a record has a prompt and its completion, or messages, rather than a text or a pair."""
    return dialogue_kind(record) is not None


def check_dialogue(record: Mapping[str, Any]) -> str | None:
    """What a prompt with its completion, or messages, must be, if they are not."""
    names = dialogue_kind(record)
    assert names is not None, "no dialogue"
    values = [record[name] for name in names]
    if all(isinstance(value, str) for value in values):
        return "be a list of messages under `messages`" if names == ("messages",) else None
    good = all(
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in value)
        for value in values
        if not isinstance(value, str)
    ) and not any(isinstance(value, str) for value in values)
    return None if good else f"have two texts, or lists of messages with `role` and `content`, under {list(names)}"


def _tensors(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("input_ids") is None:
        raise ValueError("Queries must all have `input_ids`, or none of them, but one of several has none.")
    label = label_field(record)
    tensors = {"input_ids": record["input_ids"]}
    for name, value in record.items():
        if name in LABEL_FIELDS:
            if name == label:
                tensors["labels"] = value if isinstance(value, str) else label_tensor(value)
        elif value is not None and not isinstance(value, str):
            try:
                tensors[name] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                continue  # columns for people, such as lists of texts
    return tensors


def label_field(record: Mapping[str, Any]) -> str | None:
    """The field of the label: of several that agree the first of `LABEL_FIELDS`, as for the recorded examples."""
    given = {name: record[name] for name in LABEL_FIELDS if record.get(name) is not None}
    if len(given) > 1:
        refusals.refuse_other_labels(given)
    return next(iter(given), None)


def _check_texts(records: Sequence[Mapping[str, Any]], continued: bool) -> None:
    for position, record in enumerate(records):
        wrong = check_dialogue(record) if is_dialogue(record) else None
        if isinstance(record.get("prompt"), list) and not is_dialogue(record):
            wrong = "have a `completion`, or be asked with `next_tokens`"
            if continued and (wrong := check_dialogue({"messages": record["prompt"]})) is None:
                continue
        if wrong is not None:
            raise ValueError(f"Query {position} must {wrong}, but got {show(record)}.")
        is_continued = continued and bool(record.get("prompt"))
        names = ("prompt", "completion") if is_dialogue(record) or is_continued else text_fields(record)
        texts = [record[name] for name in names if isinstance(record.get(name), str)]
        if texts and not any(text.strip() for text in texts):
            raise ValueError(f"Every query must have a text, but query {position} is empty. Drop it.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Queries must be Unicode, but query {position} has half of a character: {error}."
            ) from error


def _check_labels(records: Sequence[Mapping[str, Any]]) -> None:
    silent = []
    for position, record in enumerate(records):
        name = label_field(record)
        labels = None if name is None else record[name]
        if isinstance(labels, int | float):
            labels = label_tensor(labels)
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORE_INDEX).all()):
            silent.append(position)
    if silent:
        raise ValueError(
            f"Every query must have a label that counts, but queries {silent[:10]} ({len(silent)} in all) have none but "
            f"{IGNORE_INDEX}. Label them, or leave their labels out to trace what the model predicts."
        )
