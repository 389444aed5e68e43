"""
Gradient rows of queries at every recorded checkpoint, made as the rows of the index were.

A record of [`check_queries`] becomes a [`Query`], what one model takes for it alone, with the label that the model
predicts where it has none; queries are padded to batches, and recorded at one checkpoint after the other.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.synonym_search import Neighbours
from hf_doge.functional.synonyms import synonym_neighbours
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import input_embedding_matrix
from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX, LossFunction, logits_of
from hf_doge.gradients.layers import recorded_layers
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.answers import keep_targets, make_prompt, no_prediction, read_label, say_next
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.limits import ModelInputs, label_law, wants_fractions
from hf_doge.tracing.models import LoadModel, has_fingerprint, load_checkpoint
from hf_doge.tracing.queries import Query, is_dialogue, label_field, text_fields
from hf_doge.tracing.refusals import refuse_other_loss
from hf_doge.tracing.settings import padding_token_id, qualified_name
from hf_doge.tracing.targets import Target
from hf_doge.tracing.token_queries import attended
from hf_doge.tracing.words import Reading, read_ids, read_text

_KEPT_BYTES = 4 * 2**30  # of models that stay in memory


@dataclass
class RecordedQueries:
    """
    Queries with what a search needs of them.

    Attributes:
        queries (`list[Query]`): What the models were fed.
        rows (`list[TokenRows]`): Their gradient rows at each checkpoint, on the CPU.
        synonyms (`list[Neighbours]`): Synonyms of their tokens at each checkpoint, if any were asked for.
    """

    queries: list[Query] = field(default_factory=list)
    rows: list[TokenRows] = field(default_factory=list)
    synonyms: list[Neighbours] = field(default_factory=list)


@dataclass
class QueryRecorder:
    """
    Records queries at the checkpoints of an index, one after the other.

    A checkpoint's model is loaded when it is needed. Models that take at most 4 GiB in all stay for the next queries;
    only one of the others is in memory at a time.

    Attributes:
        reader ([`IndexReader`]): The index: its settings apply to queries as they did to training examples.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one of the model.
        encoding ([`Encoding`]): How words become tokens and labels.
        model, load_model, token: See [`load_checkpoint`].
        loss_fn (`Callable`, *optional*): What the index was recorded with, if it was not the model's own loss.
    """

    reader: IndexReader
    tokenizer: PreTrainedTokenizerBase | None
    encoding: Encoding
    model: nn.Module | None = None
    load_model: LoadModel | None = None
    loss_fn: LossFunction | None = None
    token: str | bool | None = None
    _kept: dict[int, tuple[nn.Module, ModelInputs]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        recorded = self.reader.config.get("loss_fn")
        if recorded is not None or self.loss_fn is not None:
            refuse_other_loss(recorded, qualified_name(self.loss_fn))

    def record(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        drop_token_ids: Sequence[int] = (),
        synonym_threshold: float | None = None,
        first_position: int = 0,
        next_tokens: int | None = None,
        targets: Sequence[Target | None] | None = None,
    ) -> RecordedQueries:
        """
        Make queries of records, and their rows at each checkpoint.

        Args:
            records (`Sequence[Mapping]`): From [`check_queries`].
            batch_size (`int`): How many at once.
            drop_token_ids (`Sequence[int]`): Tokens whose rows are left out after all is done (top-k too).
            synonym_threshold (`float`, *optional*): Look for synonyms of the queries' tokens, of at least this cosine.
            first_position (`int`): What errors call the first query.
            next_tokens (`int`, *optional*), targets (`Sequence`, *optional*): See [`SearchOptions`]; a target for each query.
        """
        found = RecordedQueries()
        for position in reversed(range(len(self.reader.checkpoints))):
            model, inputs = self._load(position)
            first = not found.queries
            if first:  # what the last checkpoint predicts is the label of a query without one
                found.queries = self._make_queries(records, model, inputs, batch_size, first_position, next_tokens)
                if targets is not None:
                    asked = (model, inputs, self.tokenizer, self.encoding)
                    keep_targets(found.queries, targets, records, asked=asked, first_position=first_position)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The .* of the model are frozen")  # said before
                with EmbeddingGradientRecorder(model, **self._options, verify=first) as recorder:
                    parts = [
                        recorder.record(batch).on_cpu().without(drop_token_ids)
                        for batch in batches(found.queries, inputs, batch_size=batch_size)
                    ]
                    found.rows.insert(0, TokenRows.join(parts))
            if synonym_threshold is not None:
                found.synonyms.insert(0, _find_synonyms(model, found.rows[0].tokens, synonym_threshold))
        return found

    def say_next(self, records: Sequence[Mapping[str, Any]], num_tokens: int, first_position: int) -> list[Query]:
        """Queries with what the last checkpoint says next, without any row."""
        model, inputs = self._load(len(self.reader.checkpoints) - 1)
        return self._make_queries(records, model, inputs, 1, first_position, num_tokens)

    def _load(self, position: int) -> tuple[nn.Module, ModelInputs]:
        """The model of a checkpoint, with what it takes: the given one where it is that, else the recorded one, loaded."""
        if position in self._kept:
            return self._kept[position]
        checkpoint, model = self.reader.checkpoints[position], self.model
        if model is None or not has_fingerprint(model, checkpoint["fingerprint"]):
            self.reader.fetch_model(position)
            model = load_checkpoint(
                checkpoint,
                folder=self.reader.folder,
                model=self.model,
                load_model=self.load_model,
                vocabulary_size=self.reader.embedding_shape[0],
                token=self.token,
            )
        shape, expected = tuple(input_embedding_matrix(model).shape), self.reader.embedding_shape
        if shape != expected:
            raise ValueError(
                f"The embeddings of checkpoint {checkpoint['name']!r} must have the shape that the index has, {expected},"
                f" but theirs is {shape}. Load the model without resizing its embeddings."
            )
        inputs = ModelInputs.of(model, self.tokenizer)
        own = model is not self.model and self.load_model is None  # nobody else holds it, or changes its weights
        models = [model, *(kept for kept, _ in self._kept.values())]
        if own and sum(_num_bytes(one) for one in models) <= _KEPT_BYTES:
            self._kept[position] = model, inputs
        return model, inputs

    def _make_queries(
        self,
        records: Sequence[Mapping[str, Any]],
        model: nn.Module,
        inputs: ModelInputs,
        batch_size: int,
        first_position: int,
        next_tokens: int | None,
    ) -> list[Query]:
        """
        Tokenise texts, keep what the model takes, and give labels to queries that have none.

        Such a label is what the model predicts: of a classifier its class (for several labels at once, those above 0.5), of
        one that classifies tokens a class per token. A language model's are the tokens of the text, or what it says next.
        """
        queries = [
            _make_query(record, model, inputs, self.tokenizer, self.encoding)
            if next_tokens is None
            else make_prompt(record, self.tokenizer, self.encoding, model, position)
            for position, record in enumerate(records, start=first_position)
        ]
        for position, query in enumerate(queries, start=first_position):
            _check_fits(query, model, inputs, position)
            _check_label(query, model, inputs, position, check_kind=self.loss_fn is None)
            if next_tokens is not None:
                say_next(query, next_tokens, model, inputs, self.tokenizer, position)
        unlabelled = [query for query in queries if not {"labels", *ANSWERS} & set(query.features)]
        for start in range(0, len(unlabelled), batch_size):
            _predict_labels(unlabelled[start : start + batch_size], model, inputs)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            for query in queries:
                labels = query.features.get("labels")
                targets = query.features["input_ids"][:0] if labels is None else labels.flatten()
                ids = [*query.features["input_ids"].tolist(), *targets[targets != IGNORE_INDEX].tolist()]
                query.reading = read_ids(self.tokenizer, ids)
        return queries

    @cached_property
    def _options(self) -> dict[str, Any]:
        config = self.reader.config
        dropped = config["special_token_ids"] if config.get("special_tokens") == "drop" else ()
        return {
            "loss_fn": self.loss_fn,
            "loss_reduction": config.get("loss_reduction") or "sum",
            "tied": config.get("tied") or "input",
            "top_k": config.get("top_k"),
            "top_k_unit": config.get("top_k_unit") or "position",
            "pad_token_id": padding_token_id(self.tokenizer),
            "drop_token_ids": dropped,
            "layers": recorded_layers(config),
        }


def _num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _find_synonyms(model: nn.Module, tokens: Tensor, threshold: float) -> Neighbours:
    matrix = input_embedding_matrix(model).detach()
    tokens = tokens[tokens < len(matrix)].unique()
    found = synonym_neighbours(tokens.to(matrix.device), matrix, threshold=threshold)
    return {
        token: (ids.cpu().numpy(), cosines.cpu().numpy())
        for token, (ids, cosines) in zip(tokens.tolist(), found, strict=True)
    }


def batches(queries: Sequence[Query], inputs: ModelInputs, *, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The queries in order, padded on the right; one by one where the model takes no padding."""
    start = 0
    while start < len(queries):
        few = [query.features for query in queries[start : start + (batch_size if inputs.pads else 1)]]
        features = list(takewhile(lambda one: one.keys() == few[0].keys(), few))  # noqa: B023
        start += len(features)
        yield _collate(features, inputs)


def _make_query(
    record: Mapping[str, Any],
    model: nn.Module,
    inputs: ModelInputs,
    tokenizer: Any,
    encoding: Encoding,
) -> Query:
    if "input_ids" in record:
        features = {name: value for name, value in record.items() if name in inputs.names or name == "labels"}
        if isinstance(features.get("labels"), str):
            features["labels"] = read_label(features["labels"], model, tokenizer)
        counted = attended(features["input_ids"], features.get("attention_mask")).flatten()
        return Query(features, read_ids(tokenizer, counted.tolist()))
    if is_dialogue(record) and inputs.continues_texts:
        ids, labels = encoding.encode(record, tokenizer)
        return Query({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}, read_ids(tokenizer, ids))
    texts = [record[name] for name in text_fields(record)]
    if not inputs.continues_texts:
        encoding = replace(encoding, ends=False)
    limits = (inputs.max_length, encoding.max_length if encoding.truncation == "tokenizer" else None)
    max_length = min((limit for limit in limits if limit is not None), default=None)
    encoded = tokenizer(*texts, truncation=max_length is not None, max_length=max_length)
    fed = inputs.names if encoding.inputs is None else inputs.names & {"input_ids", *encoding.inputs}
    features = {name: torch.tensor(value) for name, value in encoded.items() if name in fed}
    if features["input_ids"].numel() == 0:
        raise ValueError(f"Every query must have tokens, but {texts} have none. Drop it.")
    label = label_field(record)
    if label is not None:
        features["labels"] = read_label(record[label], model, tokenizer)
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


def _check_fits(query: Query, model: nn.Module, inputs: ModelInputs, position: int) -> None:
    """Texts are cut; tokens are the caller's, and too many of them end a GPU's process without a word."""
    ids, limit = query.features["input_ids"], inputs.num_positions
    length, largest = ids.shape[-1], int(ids.max())
    if largest >= inputs.vocabulary_size:
        raise ValueError(
            f"The tokenizer makes token {largest} of query {position}, but the model has embeddings for"
            f" {inputs.vocabulary_size} tokens only. Pass the tokenizer of the training as `processing_class`."
        )
    if limit is not None and length > limit:
        raise ValueError(
            f"Every query must fit into the model: query {position} has {length} tokens, but the model has positions for "
            f"{limit}. Cut it as the training examples were."
        )
    config = getattr(model, "config", None)
    if ids.ndim != 1 and inputs.num_classes is not None:
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


def _check_label(query: Query, model: nn.Module, inputs: ModelInputs, position: int, *, check_kind: bool) -> None:
    """The class of a text must be one that the model has, as a whole number; it may come as a float, as from pandas."""
    classes, label = inputs.num_classes, query.features.get("labels")
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


@torch.no_grad()
def _predict_labels(queries: Sequence[Query], model: nn.Module, inputs: ModelInputs) -> None:
    """Give each query the label that the model predicts for it."""
    config = getattr(model, "config", None)
    if queries and getattr(config, "is_encoder_decoder", False) and getattr(model, "can_generate", bool)():
        raise no_prediction(model)  # it does not even run without a target
    training = model.training
    model.eval()
    try:
        device, done = next(model.parameters()).device, 0
        for batch in batches(queries, inputs, batch_size=len(queries)):
            outputs = model(**{name: value.to(device) for name, value in batch.items()})
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
    raise no_prediction(model)


def _collate(features: Sequence[Mapping[str, Tensor]], inputs: ModelInputs) -> dict[str, Tensor]:
    fills = {"input_ids": inputs.pad_token_id, "labels": IGNORE_INDEX}
    batch = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        else:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=fills.get(name, 0))
    if inputs.pads and "attention_mask" not in batch and batch["input_ids"].ndim == 2:
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch
