"""
From what a user asks about to batches a model takes: tokenised examples, raw texts, or a ready batch.

Every query becomes a dictionary of what the model is fed for it alone, unpadded (the padding of a ready batch stays).
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_doge.checks import show
from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX, logits_of
from hf_doge.tracing.encoding import Encoding, check_dialogue, is_dialogue
from hf_doge.tracing.limits import label_law, num_classes, num_positions, takes_padding, wants_fractions
from hf_doge.tracing.words import Reading, read_ids, read_text

TEXT_FIELDS = (
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "context"),
    ("sentence",),
)
LABEL_FIELDS = ("labels", "label", "label_ids")

_USUAL_ARGUMENTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"}
_LONGEST = 1_000_000  # a tokenizer that knows no limit has a much larger one


@dataclass
class Query:
    """
    One prediction to trace.

    Attributes:
        features (`dict[str, torch.Tensor]`): What the model takes, without a batch axis. Labels may be missing at first.
        reading (`Reading`): Its text and tokens, for people.
    """

    features: dict[str, Tensor]
    reading: Reading

    @property
    def label(self) -> int | float | None:
        """The label, where it is a single number."""
        labels = self.features.get("labels")
        return labels.item() if labels is not None and labels.numel() == 1 else None


def check_queries(
    queries: Any, tokenizer: PreTrainedTokenizerBase | None, *, vocabulary_size: int, missing: Sequence[str] = ()
) -> list[dict] | Dataset:
    """
    Bring queries into one of two forms, before any model is loaded: raw records, or features with `input_ids`.

    Args:
        queries: A tokenised `datasets.Dataset`, text or texts (`str`, or dictionaries with text fields and perhaps a
            label), or a batch (a dictionary of tensors, as a model is fed).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed by texts.
        vocabulary_size (`int`): Number of rows of the embedding matrix.
        missing (`Sequence[str]`): Folders of checkpoints that are not there, where there is no tokenizer.

    Returns:
        `list[dict]`: one per query. With `input_ids`, the other values are tensors.

    Raises:
        ValueError: There are none, some have no token or no label that counts, tokens out of the vocabulary, ready
            embeddings, or texts without a tokenizer.
        TypeError: They are nothing of the above.
    """
    if isinstance(queries, Dataset):
        records = _dataset_records(queries)
    elif isinstance(queries, str):
        records = [{"text": queries}]
    elif isinstance(queries, Mapping):
        alone = queries and all(isinstance(value, str | int) for value in queries.values())
        records = [dict(queries)] if alone else _split(queries)
    elif isinstance(queries, Sequence) and all(isinstance(query, str | Mapping) for query in queries):
        records = [{"text": query} if isinstance(query, str) else dict(query) for query in queries]
    else:
        raise TypeError(
            "`queries` must be a tokenised `datasets.Dataset`, a text, a list of texts or of dictionaries, or a batch, "
            f"but got a {type(queries).__name__}."
        )
    if not records:
        raise ValueError("`queries` must hold at least one prediction to trace, but it is empty.")
    if any(record.get("inputs_embeds") is not None for record in records):
        raise ValueError(
            "`queries` must hold token ids and no ready `inputs_embeds`: TracIn-WE needs to know which token each "
            "embedding belongs to. Pass `input_ids`."
        )
    if any("input_ids" in record for record in records):
        records = [_tensors(record) for record in records]
        _check_tokens(records, vocabulary_size)
    elif tokenizer is not None:
        _check_texts(records)
    else:
        cause = f", of which {missing[0]!r} was moved or deleted since it was recorded" if missing else ""
        raise ValueError(
            f"Queries in words need the tokenizer of the model, but the index found none with its checkpoints{cause}. Pass "
            "`processing_class` to `InfluenceIndex.from_pretrained`, or queries with `input_ids`."
        )
    _check_labels(records)
    return records


def make_queries(
    records: Sequence[dict[str, Any]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int,
    first_position: int = 0,
    encoding: Encoding | None = None,
    check_kind: bool = True,
) -> list[Query]:
    """
    Tokenise texts, keep what the model takes, and give labels to queries that have none.

    Such a label is what the model predicts: of a classifier its class (for several labels at once, those above 0.5), of
    one that classifies tokens a class per token. A language model's labels are the tokens of the text themselves.

    Args:
        records (`Sequence[dict]`): From [`check_queries`].
        model (`nn.Module`): At the last checkpoint.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): See [`check_queries`].
        batch_size (`int`): For predicting.
        first_position (`int`): What errors call the first of them, where they are a part of what was asked.
        encoding ([`Encoding`], *optional*): How the words of the recorded examples became tokens and labels.
        check_kind (`bool`): Whether labels must be those of the model's own loss.
    """
    accepted = accepted_arguments(model)
    encoding = encoding or Encoding()
    queries = [_make_query(record, model, tokenizer, accepted, encoding) for record in records]
    vocabulary_size = len(model.get_input_embeddings().weight)
    for position, query in enumerate(queries, start=first_position):
        largest = int(query.features["input_ids"].max())
        if largest >= vocabulary_size:
            raise ValueError(
                f"The tokenizer makes token {largest} of query {position}, but the model has embeddings for {vocabulary_size}"
                " tokens only. Pass the tokenizer of the training as `processing_class`."
            )
        _check_length(query, model, position)
        _check_label(query, model, position, check_kind=check_kind)
    unlabelled = [query for query in queries if not {"labels", *ANSWERS} & set(query.features)]
    for start in range(0, len(unlabelled), batch_size):
        _predict_labels(unlabelled[start : start + batch_size], model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        for query in queries:
            labels = query.features.get("labels")
            targets = query.features["input_ids"][:0] if labels is None else labels.flatten()
            ids = [*query.features["input_ids"].tolist(), *targets[targets != IGNORE_INDEX].tolist()]
            query.reading = read_ids(tokenizer, ids)
    return queries


def batches(queries: Sequence[Query], model: nn.Module, *, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The queries in order, padded on the right; one by one where the model takes no `attention_mask`."""
    pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    if not 0 <= pad_token_id < len(model.get_input_embeddings().weight):
        pad_token_id = 0  # masked in any case
    # Where an answer is, models look for among padding as well.
    masked = accepts(model, "attention_mask") and takes_padding(model)
    masked = masked and not any(accepts(model, name) for name in ANSWERS)
    start = 0
    while start < len(queries):
        few = [query.features for query in queries[start : start + (batch_size if masked else 1)]]
        features = list(takewhile(lambda one: one.keys() == few[0].keys(), few))  # noqa: B023
        start += len(features)
        yield _collate(features, pad_token_id=pad_token_id, masked=masked)


def accepted_arguments(model: nn.Module) -> set[str]:
    """Names of what the model's `forward` takes; of the model inside an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(inspect.signature(inner.forward).parameters)
    return names if "input_ids" in names else names | _USUAL_ARGUMENTS  # a wrapper that passes on what it gets


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` takes this argument."""
    return name in accepted_arguments(model)


def text_fields(record: Mapping[str, Any]) -> list[str]:
    """
    Which fields of a record hold what the model reads: one text, or a pair.

    Raises:
        ValueError: if there is none, or too many to tell.
    """
    strings = [name for name, value in record.items() if isinstance(value, str)]
    for names in TEXT_FIELDS:
        if set(names) <= set(strings):
            return list(names)
    others = [name for name in strings if not name.startswith("label")]
    if not 1 <= len(others) <= 2:
        raise ValueError(
            f"A query in words must have a text or a pair of texts, but its text fields are {others}. Keep only what the "
            "model reads, and `label`."
        )
    return others


def _dataset_records(dataset: Dataset) -> list[dict[str, Any]]:
    if "input_ids" in dataset.column_names:
        texts = ("string", "large_string")
        for_people = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", None) in texts]
        dataset = dataset.remove_columns([name for name in for_people if name not in LABEL_FIELDS])
    return dataset.with_format(None).to_list()


def _split(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The queries of a batch; what is not one value per query goes to each."""
    ids = batch.get("input_ids")
    alone = isinstance(ids, Tensor | np.ndarray | Sequence) and len(ids) > 0 and np.ndim(ids[0]) == 0
    if batch.get("inputs_embeds") is not None or ids is None or alone:
        return [dict(batch)] if batch else []
    size = len(ids)
    return [
        {
            name: value[position] if _has_lines(value, size) else value
            for name, value in batch.items()
            if value is not None
        }
        for position in range(size)
    ]


def _has_lines(value: Any, size: int) -> bool:
    """Whether a value of a batch has one line per query."""
    return isinstance(value, Tensor | np.ndarray | Sequence) and np.ndim(value) > 0 and len(value) == size


def _tensors(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("input_ids") is None:
        raise ValueError("Queries must all have `input_ids`, or none of them, but one of several has none.")
    label = _label_field(record)
    tensors = {"input_ids": record["input_ids"]}
    for name, value in record.items():
        if name in LABEL_FIELDS:
            if name == label:
                tensors["labels"] = value if isinstance(value, str) else _numbers(value)
        elif value is not None and not isinstance(value, str):
            try:
                tensors[name] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                continue  # columns for people, such as lists of texts
    return tensors


def _numbers(label: Any) -> Tensor:
    try:
        return torch.as_tensor(str(label) if isinstance(label, complex) else label)  # torch would take that too
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"The label of a query must be a number, numbers or a name, but got {show(label)}."
        ) from error


def _label_field(record: Mapping[str, Any]) -> str | None:
    """The field of the label: of several the first of `LABEL_FIELDS`, as for the recorded examples."""
    return next((name for name in LABEL_FIELDS if record.get(name) is not None), None)


def _check_texts(records: Sequence[Mapping[str, Any]]) -> None:
    for position, record in enumerate(records):
        wrong = check_dialogue(record) if is_dialogue(record) else None
        if wrong is not None:
            raise ValueError(f"Query {position} must {wrong}, but got {show(record)}.")
        names = ("prompt", "completion") if is_dialogue(record) else text_fields(record)
        texts = [record[name] for name in names if isinstance(record.get(name), str)]
        if texts and not any(text.strip() for text in texts):
            raise ValueError(f"Every query must have a text, but query {position} is empty. Drop it.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Queries must be Unicode, but query {position} has half of a character: {error}."
            ) from error


def _check_tokens(records: Sequence[Mapping[str, Any]], vocabulary_size: int) -> None:
    for position, record in enumerate(records):
        ids, mask = record["input_ids"], record.get("attention_mask")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.ndim == ids.ndim and mask.shape != ids.shape:
            raise ValueError(
                f"The `attention_mask` of query {position} must have the shape of its `input_ids`, {tuple(ids.shape)}, "
                f"but its shape is {tuple(mask.shape)}."
            )
        masked = isinstance(mask, Tensor) and mask.numel() > 0 and not bool(mask.any())
        if masked or (isinstance(ids, Tensor) and ids.numel() == 0):
            raise ValueError(f"Every query must have tokens, but query {position} has none. Drop it.")
        whole = isinstance(ids, Tensor) and ids.ndim > 0 and ids.dtype != torch.bool and not ids.is_floating_point()
        if not whole or ids.min() < 0 or ids.max() >= vocabulary_size:
            found = f"{ids.min().item()} to {ids.max().item()}" if isinstance(ids, Tensor) else f"{ids!r:.80}"
            raise ValueError(
                f"Tokens of queries must be whole numbers from 0 to {vocabulary_size - 1}, the vocabulary of the index, "
                f"but query {position} has {found}. Tokenise them with the tokenizer of the recorded model."
            )


def _check_length(query: Query, model: nn.Module, position: int) -> None:
    """Texts are cut; tokens are the caller's, and too many of them end a GPU's process without a word."""
    length, limit = query.features["input_ids"].shape[-1], num_positions(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"Every query must fit into the model: query {position} has {length} tokens, but the model has positions for "
            f"{limit}. Cut it as the training examples were."
        )
    config = getattr(model, "config", None)
    if query.features["input_ids"].ndim != 1 and num_classes(model) is not None:
        raise ValueError(
            f"Query {position} must have one list of `input_ids`, but has a nested one. Give one query for each."
        )
    for name, end in (("token_type_ids", getattr(config, "type_vocab_size", None)), ("position_ids", limit)):
        values = query.features.get(name)
        if values is None:
            continue
        if values.shape[-1] != length or values.min() < 0 or (end and values.max() >= end):
            raise ValueError(
                f"The `{name}` of query {position} must be one for each of its {length} tokens"
                + (f", from 0 to {end - 1}" if end else "")
                + f", but got {values.tolist()!r:.80}."
            )


def _check_label(query: Query, model: nn.Module, position: int, *, check_kind: bool) -> None:
    """The class of a text must be one that the model has, as a whole number; it may come as a float, as from pandas."""
    classes, label = num_classes(model), query.features.get("labels")
    if label is None:
        return
    if classes is None:
        ids = query.features["input_ids"]
        wrong = label_law(model)(label.numpy(), ids.shape[-1]) if check_kind else None
        if wrong is not None:
            raise ValueError(
                f"The labels of query {position} must {wrong}. Label it as the recorded examples, or leave its labels out"
                " to trace what the model predicts."
            )
        if check_kind and wants_fractions(model):
            query.features["labels"] = label.float()
        return
    value = label.item() if label.numel() == 1 else math.nan
    if not (math.isfinite(value) and value == int(value) and 0 <= value < classes):
        raise ValueError(
            f"The label of query {position} must be a whole number from 0 to {classes - 1}, the classes of the model, but "
            f"got {label.tolist()}."
        )
    query.features["labels"] = torch.tensor(int(value))


def _check_labels(records: Sequence[Mapping[str, Any]]) -> None:
    silent = []
    for position, record in enumerate(records):
        labels = record.get(_label_field(record))
        if isinstance(labels, int | float):
            labels = _numbers(labels)
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORE_INDEX).all()):
            silent.append(position)
    if silent:
        raise ValueError(
            f"Every query must have a label that counts, but queries {silent[:10]} ({len(silent)} in all) have none but "
            f"{IGNORE_INDEX}. Label them, or leave their labels out to trace what the model predicts."
        )


def _make_query(
    record: Mapping[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    accepted: set[str],
    encoding: Encoding,
) -> Query:
    if "input_ids" in record:
        features = {name: value for name, value in record.items() if name in accepted or name == "labels"}
        if isinstance(features.get("labels"), str):
            features["labels"] = _label_tensor(features["labels"], model, tokenizer)
        ids, mask = features["input_ids"], features.get("attention_mask")
        counted = ids.flatten() if mask is None or mask.shape != ids.shape else ids[mask.bool()]
        return Query(features, read_ids(tokenizer, counted.tolist()))
    if is_dialogue(record) and _continues_texts(model):
        ids, labels = encoding.encode(record, tokenizer)
        return Query({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}, read_ids(tokenizer, ids))
    texts = [record[name] for name in text_fields(record)]
    if not _continues_texts(model):
        encoding = replace(encoding, ends=False)
    limits = (find_max_length(model, tokenizer), encoding.max_length if encoding.truncation == "tokenizer" else None)
    max_length = min((limit for limit in limits if limit is not None), default=None)
    encoded = tokenizer(*texts, truncation=max_length is not None, max_length=max_length)
    fed = accepted if encoding.inputs is None else accepted & {"input_ids", *encoding.inputs}
    features = {name: torch.tensor(value) for name, value in encoded.items() if name in fed}
    if features["input_ids"].numel() == 0:
        raise ValueError(f"Every query must have tokens, but {texts} have none. Drop it.")
    label = _label_field(record)
    if label is not None:
        features["labels"] = _label_tensor(record[label], model, tokenizer)
    return _finished(
        Query(features, read_text(tokenizer, texts, max_length=max_length)), tokenizer, encoding, max_length
    )


def _finished(query: Query, tokenizer: Any, encoding: Encoding, max_length: int | None) -> Query:
    """A text with the end that the recorded examples have, cut as they were."""
    ids, end, reading = query.features["input_ids"], tokenizer.eos_token_id, query.reading
    if encoding.ends and int(ids[-1]) != end and (max_length is None or len(ids) < max_length):
        longer = {name: torch.cat([value, value[-1:]]) for name, value in query.features.items() if value.ndim}
        query.features |= {**longer, "input_ids": torch.cat([ids, torch.tensor([end])])}
        tokens = [*reading.tokens, tokenizer.eos_token]
        reading = Reading(reading.text, [*reading.token_ids, end], [*reading.spans, None], tokens)
    part = encoding.part(len(query.features["input_ids"])) if encoding.truncation != "tokenizer" else slice(None)
    query.features = {name: value[part] if value.ndim else value for name, value in query.features.items()}
    query.reading = Reading(reading.text, reading.token_ids[part], reading.spans[part], reading.tokens[part])
    return query


def _continues_texts(model: nn.Module) -> bool:
    """Whether it predicts each next token of what it reads, as far as its class and configuration tell."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decides = type(inner).__name__.endswith(("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM"))
    return not decides and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)


def _label_tensor(label: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    writes = tokenizer is not None and type(model).__name__.endswith("ForConditionalGeneration")
    if isinstance(label, str) and writes and getattr(model.config, "is_encoder_decoder", False):
        return torch.tensor(tokenizer(text_target=label, verbose=False)["input_ids"])
    if isinstance(label, str):
        names = getattr(getattr(model, "config", None), "label2id", None) or {}
        if label not in names:
            raise ValueError(
                f"A label must be a number or one of the model's labels {sorted(names)}, but got {label!r}. Give its "
                "number."
            )
        label = names[label]
    return _numbers(label)


def find_max_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens the model reads at most, as far as it or the tokenizer knows."""
    limits = [tokenizer.model_max_length]
    for name in ("max_position_embeddings", "n_positions"):
        limits.append(getattr(getattr(model, "config", None), name, None) or _LONGEST)
    longest = min(*limits, num_positions(model) or _LONGEST)
    return None if longest >= _LONGEST else longest


@torch.no_grad()
def _predict_labels(queries: Sequence[Query], model: nn.Module) -> None:
    """Give each query the label that the model predicts for it."""
    config = getattr(model, "config", None)
    if queries and getattr(config, "is_encoder_decoder", False) and getattr(model, "can_generate", bool)():
        raise _no_prediction(model)  # it does not even run without a target
    training = model.training
    model.eval()
    try:
        done = 0
        for batch in batches(queries, model, batch_size=len(queries)):
            outputs = model(**{name: value.to(_device(model)) for name, value in batch.items()})
            logits = logits_of(outputs)
            for row in range(len(batch["input_ids"])):
                features = queries[done].features
                if getattr(outputs, "end_logits", None) is not None:
                    for name, scores in zip(ANSWERS, (outputs.start_logits, outputs.end_logits), strict=True):
                        features[name] = scores[row].argmax().cpu()
                    done += 1
                    continue
                scores = logits[row].cpu() if isinstance(logits, Tensor) else None
                features["labels"] = _predicted(scores, features, model)
                done += 1
    finally:
        model.train(training)


def _predicted(logits: Tensor | None, features: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """The label of one query, from its logits: `(num_classes,)`, or `(num_positions, num_classes)` with its padding."""
    config, ids = getattr(model, "config", None), features["input_ids"]
    if logits is not None and logits.ndim == 1 and len(logits) > 1:
        multiple = getattr(config, "problem_type", None) == "multi_label_classification"
        return (logits > 0).float() if multiple else logits.argmax()
    if logits is not None and logits.ndim == 2 and ids.ndim == 1 and len(logits) >= len(ids):
        generative = logits.shape[1] >= getattr(config, "vocab_size", torch.inf)
        mask = features.get("attention_mask", torch.ones_like(ids)).bool()
        return (ids if generative else logits[: len(ids)].argmax(dim=1)).masked_fill(~mask, IGNORE_INDEX)
    raise _no_prediction(model)


def _no_prediction(model: nn.Module) -> ValueError:
    return ValueError(
        f"Queries without labels can be traced for classifiers and language models, but `{type(model).__name__}` is "
        "neither, so what it predicts is no label. Give the queries `labels`."
    )


def _collate(features: Sequence[Mapping[str, Tensor]], *, pad_token_id: int, masked: bool) -> dict[str, Tensor]:
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    batch = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        else:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=fills.get(name, 0))
    if masked and "attention_mask" not in batch and batch["input_ids"].ndim == 2:
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
