"""
Which training examples, and which words in them, made a model predict what it predicts.

    score(x, x') = sum over checkpoints c of learning_rate_c * sum over tokens w in both of <g_w(x), g_w(x')>

(TracIn-WE, https://huggingface.co/papers/2202.11844.) A large positive score: `x'` is a proponent, training on it
lowered the loss of `x`. The paper writes a minus in front, and its notebook prints the lowest end as proponents; we
follow TracIn's own sign.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from hf_doge.artifacts.influence.lexical_search import LexicalIndex
from hf_doge.checks import check_choice, check_count, check_path, show
from hf_doge.files import prepare_file, write_atomically
from hf_doge.gradients.layers import virtual_rows
from hf_doge.tracing.hits import (
    add_example_columns,
    make_hits,
    missing_columns,
    query_hits,
    text_columns,
)
from hf_doge.tracing.html import Shown, render_fragment, render_page
from hf_doge.tracing.lexical import LexicalScorer, lexical_index, text_query
from hf_doge.tracing.models import checkpoint_folders
from hf_doge.tracing.processes import build_on_each_machine, share_work
from hf_doge.tracing.queries import (
    VIRTUAL,
    Queries,
    SearchOptions,
    check_options,
    check_queries,
)
from hf_doge.tracing.query_rows import QueryRecorder
from hf_doge.tracing.refusals import refuse_metric, refuse_nothing_left
from hf_doge.tracing.saved_index import SavedIndex
from hf_doge.tracing.scoring import QueryScorer, select_extremes
from hf_doge.tracing.search_defaults import sentence_end_ids
from hf_doge.tracing.targets import ALL, targets_of

REDUCTIONS = ("mean", "sum")


class InfluenceIndex(SavedIndex):
    """
    The gradient rows of all training examples at some checkpoints, to be searched with predictions.

    ```python
    index = InfluenceIndex.from_pretrained("influence")
    hits = index.search(["Stocks rallied on Friday."], top_k=10)
    index.to_html(hits, "hits.html")
    ```

    Made by [`~InfluenceIndex.from_pretrained`]. Queries may be

    - a `datasets.Dataset` with `input_ids` (and `labels` or `label`), as the model is trained on;
    - a text or a list of texts, or dictionaries with one text (`text`) or a pair (`premise`, `hypothesis`, ...) and perhaps
      a `label`, all tokenised with `processing_class` and cut where the model's input ends;
    - for a language model dictionaries with `prompt` and `completion`, or `messages`, as trl's SFTTrainer takes them: they go
      through the chat template, and are masked, ended and cut as the training examples were;
    - a batch, a dictionary of tensors as the model is fed.

    A query without a label is traced for what the model predicts at the last checkpoint: its class, or for a language model
    the tokens of the text itself (padding left out).

    Their gradients are computed at the recorded checkpoints, one of which is in memory at a time; models that take at most
    4 GiB in all stay there for the next search.

    Under `accelerate launch` all processes must call [`~InfluenceIndex.search`], [`~InfluenceIndex.scores`] and
    [`~InfluenceIndex.self_influence`] alike: each takes a share of the queries (of the checkpoints for self-influence), and
    each gets the whole answer, that of one process up to the rounding of float32. If one fails or is killed, the others
    end with an error that names it, see [`run_on_all_processes`]. All other methods run independently on every process.

    Attributes:
        reader ([`IndexReader`]): The files.
        config (`dict`): Settings and checkpoints, as in config.json.
        examples (`datasets.Dataset`): What is known of the training examples; row `i` is example `i`.
    """

    def search(
        self,
        queries: Queries,
        *,
        top_k: int = 10,
        exclude: Sequence[int] = (),
        **options: Unpack[SearchOptions],
    ) -> Dataset:
        """
        The strongest proponents and opponents of each query among all training examples. Exact.

        Args:
            queries: See above.
            top_k (`int`): At most so many of each kind, `>= 1`. An example that scores 0 is neither.
            exclude (`Sequence[int]`): Ids of examples to leave out, such as that of the query itself.
            recipe, special_tokens, sentence_ends, virtual, layers, next_tokens, target, batch_size, scorer, cosine, kernel, synonym_threshold: See [`SearchOptions`].

        Returns:
            [`Hits`], a `datasets.Dataset`: for each query its proponents from the strongest on, then its opponents, with columns

            - `query` (position), `rank` (from 1), `kind` (`"proponent"` or `"opponent"`), `example_id`, `score`;
            - `checkpoint_scores`: what each checkpoint adds to the score, its learning rate included;
            - `special_token_share`: part of the sum of all tokens' absolute parts that special tokens hold (0 where they are
              left out);
            - `words`, `word_scores`: words of the query that the example shares, or has a synonym of, by the size of their
              part. They add up to the score, but for tokens that are hidden. A token's part is shared equally by the positions that hold it, pieces of a
              word are joined. In an index recorded with `tied="own"` (or `"full"`) a token's part has two sides, the word
              as it is read and as it is predicted, in the query and in the example: it may come from a text in which the
              word moves nothing as an input (the last one of a text), or from places where the model expected it in vain;
            - `token_ids`, `token_scores`: the same by token;
            - `example_token_ids`, `example_token_scores`: the same by the token of the example;
            - `hidden_token_ids`: those of them that count and are no words, see `special_tokens` and `sentence_ends`;
            - `query_label`, `query_text`, `query_token_ids`: what was asked; `query_target`: what was traced of it, where that is
              what the model said, or a part of the answer;
            - every column that the index keeps of its examples, such as `text` and `label`.

        Raises:
            ValueError: An option or the queries are bad, or a checkpoint is another than the recorded one.
            FileNotFoundError: A checkpoint is gone.
            TypeError: An option is unknown.
        """
        excluded = self._checked_ids(exclude)
        records = self._records(queries, options)
        chosen = check_options(options, self.reader)
        top_k = check_count("top_k", top_k)

        def work(start: int, stop: int) -> list[dict[str, Any]]:
            scorer = self._scorer(records[start:stop], chosen, first_position=start)
            hidden = frozenset(self._tokens("hide", chosen))
            found: list[dict[str, Any]] = []
            for first, block in scorer.blocks():
                block[:, excluded] = 0
                for position, scores in enumerate(block, start=first):
                    parts = scorer.token_parts(position, select_extremes(scores, top_k))
                    found += query_hits(
                        start + position,
                        scorer.queries[position],
                        parts,
                        self.config["special_token_ids"],
                        self.processing_class,
                        hidden=hidden,
                    )
            return found

        if chosen["scorer"] != "bm25":
            build_on_each_machine(len(self.reader.checkpoints), self.reader.build_map)
        hits = share_work(len(records), work)
        return make_hits(hits, self.reader.examples_of([hit["example_id"] for hit in hits]), self.processing_class)

    def scores(self, queries: Queries, **options: Unpack[SearchOptions]) -> np.ndarray:
        """
        The scores of all queries with all training examples.

        Args:
            queries: See above.
            recipe, special_tokens, sentence_ends, virtual, layers, next_tokens, target, batch_size, scorer, cosine, kernel, synonym_threshold: See [`SearchOptions`].

        Returns:
            `numpy.ndarray` of shape `(num_queries, num_examples)`, float32. [`~InfluenceIndex.iter_scores`] gives it in
            pieces.
        """
        records, chosen = self._records(queries, options), check_options(options, self.reader)

        def work(start: int, stop: int) -> list[np.ndarray]:
            scorer = self._scorer(records[start:stop], chosen, first_position=start)
            return [block for _, block in scorer.blocks()]

        if chosen["scorer"] != "bm25":
            build_on_each_machine(len(self.reader.checkpoints), self.reader.build_map)
        return np.concatenate(share_work(len(records), work))

    def iter_scores(self, queries: Queries, **options: Unpack[SearchOptions]) -> Iterator[tuple[range, np.ndarray]]:
        """
        [`~InfluenceIndex.scores`] in pieces of at most 64 MiB (or one query), all of them on this process.

        Yields:
            `tuple[range, numpy.ndarray]`: positions of some queries, and their scores `(len(range), num_examples)`.
        """
        for first, block in self._scorer(
            self._records(queries, options), check_options(options, self.reader)
        ).blocks():
            yield range(first, first + len(block)), block

    def self_influence(self, *, special_tokens: str = "count", virtual: str | None = None) -> Dataset:
        """
        How much each training example pushes its own prediction, the largest first: wrong labels tend to stand on top.

        `sum_c learning_rate_c * |g_c(x)|^2`, in the metric of the index, which needs no model.

        Args:
            special_tokens (`str`): `"count"` or `"drop"`.
            virtual (`str`, *optional*): Of what was frozen, see [`SearchOptions`].

        Returns:
            `datasets.Dataset`: `rank` (from 1), `example_id`, `score`, and what the index keeps of the example.

        Raises:
            ValueError: The rows of the index do not tell (it was recorded online, or by an earlier version with
                `second_moment=True`).
        """
        check_choice("special_tokens", special_tokens, ("count", "drop"))
        check_choice("virtual", virtual, VIRTUAL, optional=True)
        if virtual == "drop":
            refuse_nothing_left(self.reader)
        refuse_metric("Self-influence", self.reader)
        self.reader.require_whole("Self-influence")
        if self.config.get("record") == "online":
            raise ValueError(
                "Self-influence needs an index with `record='checkpoint'`: online rows are sums of gradients times learning "
                "rates. Search with the examples as queries instead."
            )
        excluded = list(self.config["special_token_ids"]) if special_tokens == "drop" else []
        excluded += self._virtual_rows(virtual)

        def work(start: int, stop: int) -> list[np.ndarray]:
            return [
                checkpoint["learning_rate"] * self.reader.self_influence(position, exclude_tokens=excluded)
                for position, checkpoint in enumerate(self.reader.checkpoints[start:stop], start=start)
            ]

        build_on_each_machine(len(self.reader.checkpoints), self.reader.build_map)
        scores = np.add.reduce(share_work(len(self.reader.checkpoints), work))
        order = np.argsort(-scores, kind="stable")
        rows = {"rank": np.arange(1, len(order) + 1), "example_id": order, "score": scores[order]}
        return add_example_columns(Dataset.from_dict(rows), self.reader.examples_of(order))

    def domain_influence(
        self,
        queries: Queries,
        column: str,
        *,
        reduction: str = "mean",
        **options: Unpack[SearchOptions],
    ) -> Dataset:
        """
        Which kind of training examples pushed each prediction: DoGE's question, put to single predictions.

        Args:
            queries: See above.
            column (`str`): Column of the examples that names their domain (or label, source, ...).
            reduction (`str`): `"mean"` score of a domain's examples, or their `"sum"`, which grows with the domain.
            recipe, special_tokens, sentence_ends, virtual, layers, next_tokens, target, batch_size, scorer, cosine, kernel, synonym_threshold: See [`SearchOptions`].

        Returns:
            `datasets.Dataset`: `query`, `domain`, `score`, `num_examples`; one row for each query and domain.

        Raises:
            ValueError: The examples have no such column.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        domains, members = self._domains(column)
        counts = np.bincount(members, minlength=len(domains))
        table: dict[str, list] = {"query": [], "domain": [], "score": [], "num_examples": []}
        for positions, block in self.iter_scores(queries, **options):
            for position, scores in zip(positions, block, strict=True):
                sums = np.bincount(members, weights=scores, minlength=len(domains))
                table["query"] += [position] * len(domains)
                table["domain"] += domains
                table["score"] += (sums / counts if reduction == "mean" else sums).tolist()
                table["num_examples"] += counts.tolist()
        return Dataset.from_dict(table)

    def to_html(self, hits: Dataset, path: str | os.PathLike | None = None) -> str:
        """
        One page that shows queries and their hits, words shaded by their part: green for, red against.

        Args:
            hits (`datasets.Dataset`): From [`~InfluenceIndex.search`], whole or filtered.
            path (`str` or `os.PathLike`, *optional*): Where to write it.

        Returns:
            `str`: The page. It needs no other file and runs no script.
        """
        check_path("path", path, optional=True)
        page = render_page(hits, self.processing_class, self._text_columns(hits))
        if path is not None:
            write_atomically(prepare_file(path), page.encode())
        return page

    def show(self, hits: Dataset) -> Shown:
        """
        What a notebook shows of hits: the queries and their examples, words shaded as in [`~InfluenceIndex.to_html`].

        Args:
            hits (`datasets.Dataset`): From [`~InfluenceIndex.search`], whole or filtered.
        """
        return Shown(render_fragment(hits, self.processing_class, self._text_columns(hits)))

    def _text_columns(self, hits: Dataset) -> list[str]:
        if not isinstance(hits, Dataset):
            raise ValueError(
                "`hits` must come from `InfluenceIndex.search`, a `datasets.Dataset`, whole or filtered, but is a"
                f" {type(hits).__name__}."
            )
        if missing := missing_columns(hits):
            raise ValueError(
                f"`hits` must come from `InfluenceIndex.search`, but has no columns {missing}. Keep all of its columns."
            )
        return text_columns(self.reader.examples_of([]).features)

    def _records(self, queries: Queries, options: SearchOptions) -> list[dict[str, Any]]:
        tokenizer, folder, missing = self.processing_class, self.reader.folder, []
        if tokenizer is None:
            named = [checkpoint for checkpoint in self.reader.checkpoints if checkpoint["path"]]
            missing = [str(folder / one["path"]) for one in named if not any(checkpoint_folders(one, folder))]
        continued, num_words = options.get("next_tokens") is not None, self.reader.embedding_shape[0]
        records = check_queries(queries, tokenizer, vocabulary_size=num_words, missing=missing, continued=continued)
        if "target" in options:
            options["target"] = targets_of(options["target"], len(records)) or ALL
        return records

    @cached_property
    def _recorder(self) -> QueryRecorder:
        return QueryRecorder(self.reader, self.processing_class, self._encoding, **self._loading)

    def _scorer(
        self, records: Sequence[Mapping[str, Any]], options: SearchOptions, *, first_position: int = 0
    ) -> QueryScorer | LexicalScorer:
        """Queries with their rows at all checkpoints, ready to be scored; with BM25 with their tokens."""
        if options["scorer"] == "bm25":
            return self._lexical_scorer(records, options["next_tokens"], first_position)
        excluded = [*self._tokens("drop", options), *self._virtual_rows(options["virtual"])]
        target = options["target"]
        recorded = self._recorder.record(
            records,
            batch_size=options["batch_size"],
            drop_token_ids=excluded,
            synonym_threshold=options["synonym_threshold"] if options["kernel"] == "synonym" else None,
            first_position=first_position,
            next_tokens=options["next_tokens"],
            targets=target[first_position:][: len(records)] if isinstance(target, list) else None,
        )
        cosine, layers = bool(options["cosine"]), options["layers"] or "count"
        return QueryScorer(self.reader, recorded, excluded_tokens=excluded, cosine=cosine, layers=layers)

    @cached_property
    def _lexical_index(self) -> LexicalIndex:
        return lexical_index(self.reader, self.processing_class)

    def _lexical_scorer(
        self, records: Sequence[Mapping[str, Any]], next_tokens: int | None, first_position: int
    ) -> LexicalScorer:
        index = self._lexical_index
        if next_tokens is None:
            queries = [text_query(record, self.processing_class) for record in records]
        else:
            queries = self._recorder.say_next(records, next_tokens, first_position)
        return LexicalScorer(index, queries, self.config["special_token_ids"])

    def _tokens(self, fate: str, options: SearchOptions) -> list[int]:
        """Ids of the special tokens, and of the ends of sentences, that are to `"hide"` or `"drop"` by the options."""
        found = list(self.config["special_token_ids"]) if options["special_tokens"] == fate else []
        if options["sentence_ends"] != fate:
            return found
        search = self.config["metadata"].get("search")
        ends = search.get("sentence_end_ids") if isinstance(search, dict) else None
        if not isinstance(ends, list):  # recorded by an earlier version
            ends = sentence_end_ids(self.processing_class)
        return sorted({*found, *(token for token in ends if isinstance(token, int))})

    def _virtual_rows(self, fate: str | None) -> list[int]:
        """The rows of what was frozen next to what was trained, unless they are to `"count"`."""
        parts = self.config["metadata"].get("virtual_parts")
        return virtual_rows(self.config, parts) if isinstance(parts, list) and parts and fate != "count" else []

    def _domains(self, column: str) -> tuple[list[Any], np.ndarray]:
        """Names of the domains in order of appearance, and the domain of each example."""
        if not isinstance(column, str) or column not in self.examples.column_names:
            raise ValueError(
                f"`column` must be one of {self.examples.column_names}, but got {show(column)}. The Trainer drops columns that the"
                " model does not take: an index keeps them that is recorded with `TracInWECallback(dataset=...)`, the train"
                " dataset with its columns, or by `hf-doge index`."
            )
        values = self.examples.with_format("arrow")[column]
        distinct = pc.unique(values)
        names = distinct.to_pylist()
        feature = self.examples.features[column]
        if isinstance(feature, ClassLabel):
            names = [None if name is None else feature.int2str(name) for name in names]
        return names, pc.index_in(values, value_set=distinct).to_numpy()

    def _checked_ids(self, ids: Sequence[int]) -> np.ndarray:
        try:
            found = np.asarray(ids if isinstance(ids, np.ndarray) or not isinstance(ids, Iterable) else list(ids))
        except (TypeError, ValueError):  # lists of several lengths, a tensor without a length
            found = np.asarray(None)
        whole = found.ndim == 1 and (found.dtype.kind in "iu" or not len(found)) and not isinstance(ids, str | bytes)
        if not whole or (len(found) and not 0 <= found.min() <= found.max() < len(self)):
            raise ValueError(f"`exclude` must hold ids of examples, 0 to {len(self) - 1}, but got {show(ids)}.")
        return found.astype(np.int64)
