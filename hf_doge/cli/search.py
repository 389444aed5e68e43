"""`hf-doge search`: which training examples, and which of their words, made a model predict what it predicts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from hf_doge.cli.console import say
from hf_doge.cli.parser import parse
from hf_doge.cli.records import check_text_fields, read_records
from hf_doge.files import prepare_file
from hf_doge.text import printable
from hf_doge.tracing.encoding import DIALOGUE_FIELDS, MASKINGS
from hf_doge.tracing.html import LEAST_SHARE, domain_of, hidden_share
from hf_doge.tracing.index import InfluenceIndex
from hf_doge.tracing.layer_options import LAYERS
from hf_doge.tracing.pretrained import load_tokenizer
from hf_doge.tracing.processes import process_index
from hf_doge.tracing.queries import (
    KERNELS,
    SCORERS,
    SPECIAL_TOKENS,
    TEXT_FIELDS,
    VIRTUAL,
    is_dialogue,
    text_fields,
)
from hf_doge.tracing.targets import ALL

NUM_WORDS = 6
TEXT_WIDTH = 90
JSON_COLUMNS_LEFT_OUT = ("query_token_ids", "example_token_ids", "example_token_scores", "input_ids")


@dataclass
class SearchArguments:
    """What is asked, of which index."""

    _argument_group_name = "search"

    index: str = field(metadata={"help": "Folder of `hf-doge index` or TracInWECallback, or a Hub name."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of an index on the Hub."})
    streaming: bool = field(
        default=False, metadata={"help": "Fetch from the Hub only the rows that the queries touch."}
    )
    query: list[str] | None = field(default=None, metadata={"help": "Texts to trace the predictions of."})
    queries: Path | None = field(
        default=None,
        metadata={
            "help": "JSONL file of them instead (.gz or not): a field text, or premise and hypothesis, and perhaps a label; "
            "or prompt and completion, or messages."
        },
    )
    text_field: list[str] | None = field(
        default=None, metadata={"help": "Field of the text in it, or the two of a pair."}
    )
    label_field: str = field(
        default="label",
        metadata={"help": "Field of the label in it, if it has one. 'none' traces what the model predicts."},
    )
    next_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Trace what the model says next, at most so many tokens; queries are texts, prompts or messages without an answer."
        },
    )
    target: str | None = field(
        default=None, metadata={"help": "The part of the answers that is traced. Default: all of them."}
    )
    target_field: str | None = field(
        default=None, metadata={"help": "Field of it in the file, for each query its own."}
    )
    top_k: int = field(default=10, metadata={"help": "Examples of each kind, at least 1."})
    recipe: str | None = field(
        default=None,
        metadata={
            "choices": ["paper"],
            "help": "paper: all tokens count, and nothing is divided by norms. Default: what the index was begun with.",
        },
    )
    special_tokens: str | None = field(
        default=None,
        metadata={
            "choices": SPECIAL_TOKENS,
            "help": "Whether tokens such as [CLS] count, and if so whether words show them. Default: as the index says.",
        },
    )
    sentence_ends: str | None = field(
        default=None,
        metadata={
            "choices": SPECIAL_TOKENS,
            "help": "The same of the ends of sentences (. ? !).",
        },
    )
    virtual: str | None = field(
        default=None,
        metadata={
            "choices": VIRTUAL,
            "help": "Whether what was frozen in training counts. Default: drop, where the index has anything that was trained.",
        },
    )
    layers: str | None = field(
        default=None,
        metadata={
            "choices": LAYERS,
            "help": "How layers of the index count next to words: as one gradient (count), each with a score of its own, of which "
            "the mean is taken (mean), not (drop), or alone (only). Default: as the index says.",
        },
    )
    scorer: str = field(
        default="tracin_we",
        metadata={"choices": SCORERS, "help": "bm25: what a search engine finds by shared words, for comparison."},
    )
    cosine: bool | None = field(
        default=None,
        metadata={
            "switch": True,
            "help": "Divide scores by the norms of both gradients. Default: as the index says.",
        },
    )
    kernel: str = field(
        default="token",
        metadata={"choices": KERNELS, "help": "Whether words of like meaning answer each other too."},
    )
    synonym_threshold: float = field(default=0.5, metadata={"help": "Smallest cosine of such words."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name. Default: the one of the checkpoints."}
    )
    masking: str | None = field(
        default=None,
        metadata={
            "choices": MASKINGS,
            "help": "Which tokens of prompt and completion, or of messages, are scored. Default: as the examples were masked.",
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Queries at once."})
    html: Path | None = field(default=None, metadata={"help": "Write a page with shaded words to this file."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object for each hit."})


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        SearchArguments,
        prog="hf-doge search",
        description=(
            "Find the training examples that pushed a prediction (proponents) and those that pushed against it "
            "(opponents), with the words they did it through. A query without a label is traced for what the model "
            "predicts."
        ),
    )
    if args.html is not None:
        prepare_file(args.html, name="--html")  # before the work
    targets: list[Any] = []
    queries = _read_queries(args, targets)
    index = InfluenceIndex.from_pretrained(
        args.index,
        revision=args.revision,
        streaming=args.streaming,
        processing_class=None if args.tokenizer is None else load_tokenizer(args.tokenizer),
        masking=args.masking,
    )
    hits = index.search(
        queries,
        next_tokens=args.next_tokens,
        target=targets or (ALL if args.target is None else args.target),
        top_k=args.top_k,
        recipe=args.recipe,
        special_tokens=args.special_tokens,
        sentence_ends=args.sentence_ends,
        virtual=args.virtual,
        layers=args.layers,
        batch_size=args.batch_size,
        scorer=args.scorer,
        cosine=args.cosine,
        kernel=args.kernel,
        synonym_threshold=args.synonym_threshold,
    )
    if process_index() > 0:
        return 0  # all processes have all hits, and one says so
    if args.html is not None:
        index.to_html(hits, args.html)
    if args.json:
        for hit in hits:
            kept = {name: value for name, value in hit.items() if name not in JSON_COLUMNS_LEFT_OUT}
            say(json.dumps(kept, ensure_ascii=False, default=str))
        return 0
    say("\n".join(_lines(hits)))
    if args.html is not None:
        say(f"Page: {args.html}")
    return 0


def _read_queries(args: SearchArguments, targets: list[Any]) -> list[Any]:
    """The queries; to `targets` what each is traced for, if the file says so."""
    if (args.query is None) == (args.queries is None):
        raise ValueError("Give either `--query`, texts, or `--queries`, a file of them.")
    if args.target_field is not None and (args.target is not None or args.queries is None):
        raise ValueError("`--target_field` is a field of `--queries`, in place of `--target`. Give one of the two.")
    if args.query is not None:
        return args.query
    assert args.queries is not None
    queries, text_names = [], check_text_fields(args.text_field)
    records = list(read_records(args.queries))
    if args.target_field is not None and not any(args.target_field in record for record in records):
        raise ValueError(
            f"`--target_field` must be a field of {str(args.queries)!r}, but no line has {args.target_field!r}."
        )
    for number, record in enumerate(records, start=1):
        if args.target_field is not None:
            targets.append(ALL if (target := record.get(args.target_field)) is None else target)
        is_prompt = args.next_tokens is not None and "prompt" in record
        if args.text_field is None and (is_dialogue(record) or is_prompt):
            # A text or label next to a prompt is passed on to be refused: a prompt is traced for what is said next.
            names_asked = (*DIALOGUE_FIELDS, "text") if is_prompt else DIALOGUE_FIELDS
            asked = {name: record[name] for name in names_asked if name in record}
            label = record.get(args.label_field) if is_prompt else None
            queries.append(asked if label is None else {**asked, "label": label})
            continue
        try:
            names = text_names or text_fields(record)
        except ValueError as error:
            raise ValueError(f"Line {number} of {str(args.queries)!r}: {error}") from error
        missing = [name for name in names if not isinstance(record.get(name), str)]
        if missing:
            raise ValueError(
                f"Every query must have a text in {missing[0]!r}, but line {number} of {str(args.queries)!r} has none."
            )
        query = _named_texts([record[name] for name in names])
        if record.get(args.label_field) is not None:
            query["label"] = record[args.label_field]
        queries.append(query)
    return queries


def _named_texts(texts: Sequence[str]) -> dict[str, Any]:
    return {"text": texts[0]} if len(texts) == 1 else dict(zip(("sentence1", "sentence2"), texts, strict=True))


def _lines(hits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a person reads in a terminal."""
    for number, group in groupby(hits, key=lambda hit: hit["query"]):
        rows = list(group)
        yield f"Query {number}: {_one_line(rows[0]['query_text'])}"
        if rows[0]["query_target"] is not None:
            yield f"  traced: {_one_line(rows[0]['query_target'])}"
        for kind, found in groupby(rows, key=lambda hit: hit["kind"]):
            yield f"  {kind}s"
            for hit in found:
                told = (hit.get("label_name", hit.get("label")), domain_of(hit))
                facts = ", ".join(
                    [f"example {hit['example_id']}", *(_one_line(str(one)) for one in told if one is not None)]
                )
                yield f"  {hit['rank']:>4}  {hit['score']:+.3g}  {facts}  {_one_line(_text_of(hit))}"
                words = zip(hit["words"][:NUM_WORDS], hit["word_scores"], strict=False)
                shown = [f"{_one_line(word)} {part:+.2g}" for word, part in words]
                share = hidden_share(hit)
                hidden = [f"special tokens and ends of sentences {share:.0%}"] if share >= LEAST_SHARE else []
                yield "        " + "; ".join(filter(None, [", ".join(shown), *hidden]))
    if len(hits) == 0:
        yield "No training example has a score other than 0."


def _text_of(hit: Mapping[str, Any]) -> str:
    """What there is to read of an example."""
    names = [
        names
        for names in (*TEXT_FIELDS, ("prompt", "completion"))
        if all(isinstance(hit.get(name), str) for name in names)
    ]
    return " ".join(hit[name] for name in names[0]) if names else ""


def _one_line(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 3] + "..."
