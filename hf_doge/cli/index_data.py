"""The training examples of `hf-doge index`: records of texts, chats or tokens, as the model of the checkpoints is fed them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from datasets import ClassLabel, Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_doge.artifacts.influence.examples import read_examples
from hf_doge.artifacts.influence.manifest import EXAMPLES_FILE, read_config
from hf_doge.cli.records import check_text_fields, read_records, select_fields
from hf_doge.data.encoding import ROWS_PER_CALL, RecordEncoder, require_chat_template
from hf_doge.data.mixture import MixtureConfig
from hf_doge.data.records import open_mixture, readable
from hf_doge.sampling.lengths import IGNORED_LABEL
from hf_doge.tracing.encoding import DIALOGUE_FIELDS, Encoding
from hf_doge.tracing.examples import LABEL_COLUMNS, Examples
from hf_doge.tracing.pretrained import saved_model
from hf_doge.tracing.queries import check_dialogue, dialogue_kind, is_dialogue, text_fields

# What comes with `input_ids`; the model says which of them it takes.
_FED = ("labels", "label", "label_ids", "start_positions", "end_positions", "decoder_input_ids", "token_type_ids")
_OWN = ("input_ids", "attention_mask", "labels", "example_id", "content_hash")
_CONTINUES, _ANSWERS = ("ForCausalLM", "LMHeadModel"), ("ForConditionalGeneration",)

Rows = list[dict[str, Any]]


class IndexSource(Protocol):
    """What is indexed: the arguments of `hf-doge index`."""

    checkpoints: list[Path]
    data: Path | None
    output_dir: Path
    text_field: list[str] | None
    label_field: str
    masking: str | None
    max_length: int | None
    domains: list[str] | None

    def get_mixture(self, *, of_folder: bool = False, train_only: bool = False) -> MixtureConfig | None:
        """The data sets, where they are given instead of `data`."""


def load_examples(args: IndexSource, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, dict[str, Any]]:
    """
    Args:
        args (`IndexSource`): The arguments of `hf-doge index`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.

    Returns:
        `tuple[Examples, dict]`: the examples, with whatever else their records hold, and what is known of how they were made.

    Raises:
        ValueError: A record is not what the model of the last checkpoint can be fed, or its label is none that it has.
    """
    model_class, config = saved_model(args.checkpoints[-1])
    name, told = model_class.__name__, {}
    continues = name.endswith(_CONTINUES) and not getattr(config, "is_encoder_decoder", False)
    mixture = args.get_mixture(of_folder=True, train_only=True)
    if mixture is not None and not continues:
        raise ValueError(
            f"A mixture is of language models, but {str(args.checkpoints[-1])!r} holds a `{name}`. Give its examples as `--data`."
        )
    if mixture is not None and (args.masking is not None or args.text_field is not None):
        raise ValueError(
            "`--masking` and `--text_field` are of `--data`. A mixture file says both, by `columns` and masks."
        )
    if mixture is None:
        records = read_records(args.data)
    else:
        records = encode_mixture(mixture, tokenizer, args.max_length, domains=args.domains)
    data = repr(str(args.data)) if mixture is None else "the data"
    places = [f"line {number} of {data}" for number in range(1, len(records) + 1)]
    if args.max_length is not None:
        told = {"max_length": args.max_length, "truncation": "tokenizer" if mixture is None else "keep_start"}
    written = _written(args)
    if "input_ids" in records[0]:
        rows = _tokenised(records, places)
        if continues and "labels" not in rows[0]:
            rows = [{**row, "labels": row["input_ids"]} for row in rows]
    elif continues and args.text_field is None and is_dialogue(records[0]):
        _refuse_unmasked(args, records[0])
        rows, told = _dialogues(args, records, places, tokenizer, written)
    elif continues or name.endswith((*_ANSWERS, "ForSequenceClassification")):
        rows = _texts(args, records, places, tokenizer, None if continues else config, answers=name.endswith(_ANSWERS))
    else:
        raise ValueError(
            f"Labels are made for classifiers of texts and for language models, but {str(args.checkpoints[-1])!r} holds a"
            f" `{name}`. Give records with `input_ids` and its labels, tokenised as for training, or record in training by"
            " `TracInWECallback`."
        )
    fed = sorted({*rows[0]} & {*tokenizer.model_input_names, "input_ids", "attention_mask", *_FED})
    others = _other_columns(records, written)
    dataset = _dataset([{**other, **row} for other, row in zip(others, rows, strict=True)], args)
    if written is not None:  # goes on in the order of columns that it was begun with
        begun = [column for column in written.column_names if column in dataset.column_names]
        dataset = dataset.select_columns([*begun, *(one for one in dataset.column_names if one not in begun)])
    if isinstance(rows[0].get("label"), int) and _has_label_names(config):
        names = [config.id2label[number] for number in range(config.num_labels)]
        dataset = dataset.cast_column("label", ClassLabel(names=names))
    return Examples(dataset.select_columns(fed), dataset), told


def encode_mixture(
    mixture: MixtureConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    domains: Sequence[str] | None = None,
) -> Rows:
    """
    The train rows of the data sets, or of some `domains` of them, as tokens and labels, as training makes them, with their text and domain for people.

    Raises:
        ValueError: A row cannot be encoded, or has no token with a loss within `max_length`.
    """
    rows: Rows = []
    found = open_mixture(mixture, train_only=True)
    names = list(found) if domains is None else list(domains)
    if not set(names) <= set(found):
        raise ValueError(f"`--domains` must be among {list(found)}, but got {names}.")
    for name in names:
        records = found[name]
        what = f"data set {name!r}"
        require_chat_template(records, tokenizer)
        encoder = RecordEncoder(tokenizer, records.kind, records.masks, what)
        for batch in records.train.iter(batch_size=ROWS_PER_CALL):
            encoded = encoder({column: batch[column] for column in encoder.columns(batch)})
            labels = encoded.get("labels", encoded["input_ids"])
            for position, (ids, kept) in enumerate(zip(encoded["input_ids"], labels, strict=True)):
                ids, kept = ids[:max_length], kept[:max_length]
                if all(label == IGNORED_LABEL for label in kept):
                    raise ValueError(
                        f"Every row must have a token with a loss, but one of {what} has none among its first {len(ids)}. Raise "
                        "`--max_length` or remove that row."
                    )
                row = {column: values[position] for column, values in batch.items() if column not in (*_OWN, *_FED)}
                text = readable(row, records.kind)
                kept_columns = {one: value for one, value in row.items() if isinstance(value, str | int | float)}
                rows.append({**kept_columns, "text": text, "domain": name, "input_ids": ids, "labels": kept})
    return rows


def _tokenised(records: Rows, places: Sequence[str]) -> Rows:
    for record, place in zip(records, places, strict=True):
        ids = record.get("input_ids")
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise ValueError(
                f"Every record must have whole numbers under `input_ids`, as the first has, but {place} has {ids!r:.60}."
            )
    return [{name: value for name, value in record.items() if name in (*_OWN[:3], *_FED)} for record in records]


def _refuse_unmasked(args: IndexSource, record: dict[str, Any]) -> None:
    """An earlier hf_doge indexed prompt and completion as two texts, both with a loss: such rows are not continued by others."""
    metadata = read_config(args.output_dir)["metadata"] if (args.output_dir / EXAMPLES_FILE).is_file() else None
    if "messages" in record or metadata is None or metadata.keys() & {"encoding", "collator_seed"}:
        return
    raise ValueError(
        f"The index in {str(args.output_dir)!r} was recorded by an earlier hf_doge, with a loss of prompt and completion, and now"
        " the completion alone has one. Pass `--text_field prompt completion` to continue it as it was begun, or choose another"
        " folder."
    )


def _dialogues(
    args: IndexSource,
    records: Rows,
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    written: pa.Table | None,
) -> tuple[Rows, dict[str, Any]]:
    """Prompts with completions, or messages, as trl's SFTTrainer makes tokens and labels of them."""
    kind = dialogue_kind(records[0])
    masking = args.masking or ("none" if kind == ("messages",) else "completion")
    masks = () if masking == "none" else (masking,)
    told = {
        "masks": list(masks),
        "ends": isinstance(records[0].get("completion"), str) and tokenizer.eos_token is not None,
    }
    told |= {} if args.max_length is None else {"max_length": args.max_length, "truncation": "keep_start"}
    encoding, rows = Encoding(**{**told, "masks": masks}), []
    # An index that was begun without texts goes on without them.
    with_text = not isinstance(records[0][kind[-1]], str) and (written is None or "text" in written.column_names)
    with_text &= not all(isinstance(record.get("text"), str) for record in records)  # of their own
    for record, place in zip(records, places, strict=True):
        wrong = check_dialogue(record) if is_dialogue(record) else "have the fields of the first record"
        if wrong is not None:
            raise ValueError(f"Every record must {wrong}, but {place} has {record!r:.100}.")
        try:
            ids, labels = encoding.encode(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"{place[0].upper()}{place[1:]} cannot be an example: {error}") from error
        shown = {name: record[name] for name in DIALOGUE_FIELDS[:3] if name in record}
        if with_text:
            shown["text"] = readable(record, dialogue_kind(record))
        rows.append({**shown, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows, told


def _texts(
    args: IndexSource,
    records: Rows,
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    *,
    answers: bool,
) -> Rows:
    """Texts: with their labels for a classifier of this configuration, or with the texts that answer them."""
    names = check_text_fields(args.text_field) or _text_fields(records[0], args.label_field, places[0])
    limits = {"truncation": args.max_length is not None, "max_length": args.max_length}
    rows = []
    for record, place in zip(records, places, strict=True):
        if args.text_field is None:
            _refuse_other_texts(record, names, args.label_field, place)
        label_field = None if config is None else args.label_field
        row = select_fields(record, text_fields=names, label_field=label_field, where=place)
        row |= tokenizer(*(row[name] for name in names), **limits)
        if config is None:
            row["labels"] = row["input_ids"]
        elif answers:
            answer = row.pop("label")
            if not isinstance(answer, str):
                raise ValueError(
                    f"Every record must have the text that answers it in {args.label_field!r}, but {place} has {answer!r}."
                )
            row |= {"target": answer, "labels": tokenizer(text_target=answer, **limits)["input_ids"]}
        else:
            row["label"] = _label(row["label"], config, place)
        rows.append(row)
    return rows


def _text_fields(record: dict[str, Any], label_field: str, place: str) -> list[str]:
    try:
        return text_fields({key: value for key, value in record.items() if key != label_field})
    except ValueError as error:
        raise ValueError(f"{place[0].upper()}{place[1:]}: {error}") from error


def _refuse_other_texts(record: dict[str, Any], names: Sequence[str], label_field: str, place: str) -> None:
    """What is read is decided by the first record, and no other may hold more of it."""
    if not all(isinstance(record.get(name), str) for name in names):
        return  # refused by what is missing
    found = _text_fields(record, label_field, place)
    if found != list(names):
        raise ValueError(
            f"Every record must have its texts in the fields of the first, {list(names)}, but {place} has them in {found}. Name the"
            " fields that are read with `--text_field`."
        )


def _label(label: Any, config: PretrainedConfig, place: str) -> int | float | list[float]:
    """The class of a label; the numbers of a regression or of several labels as they are."""
    several = config.problem_type == "multi_label_classification"
    if several or config.num_labels == 1:
        values = label if isinstance(label, list) and several else [label]
        if len(values) != config.num_labels or not all(isinstance(value, int | float) for value in values):
            raise ValueError(
                f"Labels must be {config.num_labels} number(s) for this model, but {place} has {label!r:.60}."
            )
        return [float(value) for value in values] if several else float(label)
    numbers = config.label2id
    spellings = (label, str(label), str(label).lower()) if isinstance(label, bool) else (label,)
    named = next((numbers[one] for one in spellings if isinstance(one, str) and one in numbers), None)
    whole = isinstance(label, bool) or (isinstance(label, float) and label.is_integer())
    number = named if named is not None else int(label) if whole else label
    if not isinstance(number, int) or not 0 <= number < config.num_labels:
        raise ValueError(
            f"Labels must be numbers from 0 to {config.num_labels - 1} or names that the model knows, {sorted(numbers)}, but"
            f" {place} has {label!r:.60}."
        )
    return number


def _written(args: IndexSource) -> pa.Table | None:
    """The examples of an index that is there already."""
    if not (args.output_dir / EXAMPLES_FILE).is_file():
        return None
    return read_examples(args.output_dir, read_config(args.output_dir))


def _other_columns(records: Rows, written: pa.Table | None) -> Rows:
    """
    What else a person can read of the records, such as their source, where it is of one kind in all of them. An index that is
    there keeps the columns that it was begun with, and the values in them that records do not have.
    """
    kept = []
    for name in {name: None for record in records for name in record}:
        kinds = {type(record.get(name)) for record in records} - {type(None)}
        if name in (*_OWN, *LABEL_COLUMNS) or (written is not None and name not in written.column_names):
            continue
        if kinds in ({str}, {bool}, {float}, {int}, {int, float}):
            kept.append(name)
    others = [{name: record.get(name) for name in kept} for record in records]
    known = set().union(*records) | {*_OWN, *LABEL_COLUMNS, "target", "label_name"}
    for name in () if written is None else set(written.column_names) - known:
        values = written[name].to_pylist()
        for other, value in zip(others, [*values, *[None] * len(others)], strict=False):
            other[name] = value
    return others


def _dataset(rows: Rows, args: IndexSource) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise ValueError(
            f"Every field must hold values of one kind in all records, but those of {str(args.data)!r} do not: {error!s:.200}"
        ) from error


def _has_label_names(config: PretrainedConfig) -> bool:
    """Whether somebody named the model's labels."""
    return config.label2id.keys() != {f"LABEL_{number}" for number in range(config.num_labels)}
