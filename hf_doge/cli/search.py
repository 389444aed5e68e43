"""`hf-doge search`: which training examples, and which of their words, made a model predict what it predicts."""

import json
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hf_doge.cli.console import say
from hf_doge.cli.parser import parse_once
from hf_doge.cli.records import check_text_fields, read_records
from hf_doge.text import printable
from hf_doge.tracing.encoding import DIALOGUE_FIELDS, MASKINGS
from hf_doge.tracing.index import InfluenceIndex
from hf_doge.tracing.pretrained import load_tokenizer
from hf_doge.tracing.processes import process_index
from hf_doge.tracing.queries import KERNELS, SPECIAL_TOKENS, is_dialogue, text_fields

NUM_WORDS = 6
TEXT_WIDTH = 90
JSON_COLUMNS_LEFT_OUT = ("query_token_ids", "example_token_ids", "example_token_scores", "input_ids")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parse(argv)
    queries = _read_queries(args)
    index = InfluenceIndex.from_pretrained(
        args.index,
        revision=args.revision,
        streaming=args.streaming,
        processing_class=None if args.tokenizer is None else load_tokenizer(args.tokenizer),
        masking=args.masking,
    )
    hits = index.search(
        queries,
        top_k=args.top_k,
        recipe=args.recipe,
        special_tokens=args.special_tokens,
        sentence_ends=args.sentence_ends,
        batch_size=args.batch_size,
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


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="hf-doge search",
        description=(
            "Find the training examples that pushed a prediction (proponents) and those that pushed against it "
            "(opponents), with the words they did it through. A query without a label is traced for what the model "
            "predicts."
        ),
    )
    parser.add_argument("--index", required=True, help="Folder of `hf-doge index` or TracInWECallback, or a Hub name.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit of an index on the Hub.")
    parser.add_argument(
        "--streaming", action="store_true", help="Fetch from the Hub only the rows that the queries touch."
    )
    parser.add_argument("--query", nargs="+", default=None, help="Texts to trace the predictions of.")
    parser.add_argument(
        "--queries",
        type=Path,
        default=None,
        help=(
            "JSONL file of them instead (.gz or not): a field text, or premise and hypothesis, and perhaps a label; or prompt "
            "and completion, or messages."
        ),
    )
    parser.add_argument("--text_field", nargs="+", default=None, help="Field of the text in it, or the two of a pair.")
    parser.add_argument(
        "--label_field",
        default="label",
        help="Field of the label in it, if it has one. 'none' traces what the model predicts. Default: label.",
    )
    parser.add_argument("--top_k", type=int, default=10, help="Examples of each kind, at least 1. Default: 10.")
    _add_scoring_flags(parser)
    parser.add_argument("--tokenizer", default=None, help="Folder or Hub name. Default: the one of the checkpoints.")
    parser.add_argument(
        "--masking",
        default=None,
        choices=MASKINGS,
        help="Which tokens of prompt and completion, or of messages, are scored. Default: as the examples were masked.",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="Queries at once. Default: 32.")
    parser.add_argument("--html", type=Path, default=None, help="Write a page with shaded words to this file.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object for each hit.")
    return parse_once(parser, argv)


def _add_scoring_flags(parser: ArgumentParser) -> None:
    """What counts in a score."""
    parser.add_argument(
        "--recipe",
        default=None,
        choices=["paper"],
        help="paper: all tokens count, and nothing is divided by norms. Default: what the index was begun with.",
    )
    parser.add_argument(
        "--special_tokens",
        default=None,
        choices=SPECIAL_TOKENS,
        help="Whether tokens such as [CLS] count. Default: as the index says.",
    )
    parser.add_argument(
        "--sentence_ends",
        default=None,
        choices=SPECIAL_TOKENS,
        help="Whether the ends of sentences (. ? !) count. Default: as the index says.",
    )
    parser.add_argument(
        "--cosine",
        action=BooleanOptionalAction,
        default=None,
        help="Divide scores by the norms of both gradients. Default: as the index says.",
    )
    parser.add_argument(
        "--kernel", default="token", choices=KERNELS, help="Whether words of like meaning answer each other too."
    )
    parser.add_argument(
        "--synonym_threshold", type=float, default=0.5, help="Smallest cosine of such words. Default: 0.5."
    )


def _read_queries(args: Namespace) -> list[Any]:
    if (args.query is None) == (args.queries is None):
        raise ValueError("Give either `--query`, texts, or `--queries`, a file of them.")
    if args.query is not None:
        return args.query
    queries, text_names = [], check_text_fields(args.text_field)
    for number, record in enumerate(read_records(args.queries), start=1):
        if args.text_field is None and is_dialogue(record):
            queries.append({name: record[name] for name in DIALOGUE_FIELDS if name in record})
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
        for kind, found in groupby(rows, key=lambda hit: hit["kind"]):
            yield f"  {kind}s"
            for hit in found:
                label = hit.get("label_name", hit.get("label"))
                facts = f"example {hit['example_id']}" + ("" if label is None else f", {_one_line(str(label))}")
                yield f"  {hit['rank']:>4}  {hit['score']:+.3g}  {facts}  {_one_line(str(hit.get('text') or ''))}"
                words = zip(hit["words"][:NUM_WORDS], hit["word_scores"], strict=False)
                yield "        " + ", ".join(f"{_one_line(word)} {part:+.2g}" for word, part in words)
    if len(hits) == 0:
        yield "No training example has a score other than 0."


def _one_line(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 3] + "..."
