"""
Which training examples, and which words in them, made a model predict what it predicts.

    score(x, x') = sum over checkpoints c of learning_rate_c * sum over tokens w in both of <g_w(x), g_w(x')>

(TracIn-WE, https://huggingface.co/papers/2202.11844.) A large positive score: `x'` is a proponent, training on it
lowered the loss of `x`. The paper writes a minus in front, and its notebook prints the lowest end as proponents; we
follow TracIn's own sign.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.influence import IndexReader
from hf_doge.artifacts.influence.remote import RemoteIndexReader
from hf_doge.checks import check_choice, check_count, check_flag, check_function, check_number, check_path, show
from hf_doge.files import write_atomically
from hf_doge.gradients.example_losses import LossFunction
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.fingerprints import tokenizer_fingerprint
from hf_doge.tracing.hits import (
    HIT_FEATURES,
    TokenParts,
    beside_examples,
    example_reading,
    make_hits,
    query_hits,
    query_reading,
    select_extremes,
)
from hf_doge.tracing.html import render_page
from hf_doge.tracing.index_folder import FETCHED_FILES, copy_index
from hf_doge.tracing.models import LoadModel, checkpoint_folders
from hf_doge.tracing.pretrained import load_tokenizer, tokenizer_place
from hf_doge.tracing.queries import TEXT_FIELDS, Query, check_queries
from hf_doge.tracing.query_rows import QueryRowMaker
from hf_doge.tracing.scoring import QueryScorer
from hf_doge.tracing.shares import build_on_each_machine, share_work

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SPECIAL_TOKENS = ("count", "drop")
REDUCTIONS = ("mean", "sum")
KERNELS = ("token", "synonym")


class InfluenceIndex:
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

    Their gradients are computed at the recorded checkpoints, one of which is in memory at a time.

    Under `accelerate launch` all processes must call [`~InfluenceIndex.search`], [`~InfluenceIndex.scores`] and
    [`~InfluenceIndex.self_influence`] alike: each takes a share of the queries (of the checkpoints for self-influence), and
    each gets the whole answer, that of one process up to the rounding of float32. If one fails or is killed, the others
    end with an error that names it, see [`run_on_all_processes`]. What else there is, each process does for itself.

    Attributes:
        reader ([`IndexReader`]): The files.
        config (`dict`): Settings and checkpoints, as in config.json.
        examples (`datasets.Dataset`): What is known of the training examples; row `i` is example `i`.
    """

    def __init__(
        self,
        reader: IndexReader,
        *,
        model: nn.Module | None = None,
        load_model: LoadModel | None = None,
        processing_class: Any | None = None,
        loss_fn: LossFunction | None = None,
        masking: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        self.reader = reader
        self.config = reader.config
        check_function("load_model", load_model, what="a function of a path", optional=True)
        check_function("loss_fn", loss_fn, what="a function of (outputs, batch)", optional=True)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(
                f"`model` must be a torch.nn.Module, but got {show(model)}. To load one, pass `load_model`."
            )
        self._given_tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self._given_tokenizer is not None:
            if not callable(self._given_tokenizer):
                raise ValueError(
                    f"`processing_class` must be a tokenizer, but got {processing_class!r:.80}. Load it by "
                    "`AutoTokenizer.from_pretrained`."
                )
            self._check_tokenizer(self._given_tokenizer)
        self._encoding = Encoding.of(self.config, masking)
        self._loading = {"model": model, "load_model": load_model, "loss_fn": loss_fn, "token": token}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        verify: bool = True,
        model: nn.Module | None = None,
        load_model: LoadModel | None = None,
        processing_class: Any | None = None,
        loss_fn: LossFunction | None = None,
        masking: str | None = None,
        streaming: bool = False,
    ) -> "InfluenceIndex":
        """
        Open an index.

        Args:
            name_or_path (`str` or `os.PathLike`):
                Folder, or name of a dataset repository on the Hub. When offline, its last download is opened.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): For private repositories.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Where a download and the memory maps go; by default the Hub's cache and `$HF_HOME/hf_doge`.
            local_files_only (`bool`): Ask nobody, open the last download.
            force_download (`bool`): Fetch again what is in the cache.
            verify (`bool`): Whether to check the sha256 of every file.
            model (`nn.Module`, *optional*):
                A model to take where it is the recorded one; where it is not, a copy of it gets each checkpoint's weights.
            load_model (`Callable`, *optional*):
                `load_model(path) -> nn.Module` for classes that are not of transformers. `path` is the checkpoint's.
            processing_class (`PreTrainedTokenizerBase`, *optional*):
                Tokenizer of the model. By default the one saved with the checkpoints.
            loss_fn (`Callable`, *optional*): The one the index was recorded with, if any.
            masking (`str`, *optional*):
                Which tokens of a prompt with its completion, or of messages, are scored: `"none"` is ignored, those of the
                `"completion"` alone, or of the `"assistant"` alone. By default as the training examples were masked.
            streaming (`bool`):
                Leave an index of the Hub there, and read of it what each query needs: the rows of its tokens, by ranges of
                bytes, once; and the examples and models when first needed. The answers are the same. A folder is read
                in place in any case. What needs all rows (`self_influence`, `cosine`) needs the download.

        Raises:
            FileNotFoundError: There is no such folder or repository, or a file of it is missing.
            PermissionError: The repository is private or gated, and the token may not read it.
            OSError: The disk is full, or the Hub could not be reached for too long.
            ValueError: A file was altered, no checkpoint is whole, or the tokenizer is another than the recorded one; or
                `streaming`, and the rows are int8, or it is asked for together with `local_files_only` or `force_download`.
        """
        reader: IndexReader
        check_path("name_or_path", name_or_path)
        check_flag("verify", verify)
        if check_flag("streaming", streaming) and (local_files_only or force_download):
            raise ValueError(
                "`streaming=True` reads from the Hub what is not in the cache, so it does not go with `local_files_only` or"
                " `force_download`. Leave one of them out."
            )
        if streaming and not Path(name_or_path).exists():
            reader = RemoteIndexReader.open(str(name_or_path), revision=revision, token=token, cache_dir=cache_dir)
        else:
            folder = fetch_folder(
                name_or_path,
                allow_patterns=FETCHED_FILES,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
            reader = IndexReader.open(folder, cache_dir=cache_dir, verify=verify)
        return cls(
            reader,
            model=model,
            load_model=load_model,
            processing_class=processing_class,
            loss_fn=loss_fn,
            masking=masking,
            token=token,
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Copy the index, with the models it holds, if any.

        Args:
            save_directory (`str` or `os.PathLike`):
                New, empty, or an index to replace, in one step: whoever reads it meanwhile finds the old or the new one. An
                interrupted copy leaves what was there before. Several processes may save to one folder.
        """
        check_path("save_directory", save_directory)
        self.reader.require_whole("`save_pretrained`")
        copy_index(self.reader.folder, Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        redact_text: bool = False,
        keep_columns: Sequence[str] = (),
        include_models: bool = True,
        publish_text: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> "CommitInfo | None":
        """
        Push to a dataset repository on the Hub, in one commit that everybody sees whole or not at all.

        An index reveals its training examples: the table of examples holds their text, and the gradient rows tell which
        tokens each of them has, also after `redact_text`. Share it only as you would share those.

        What the repository holds already is not sent again: a push that failed or was killed goes on by the same call, and
        further checkpoints or examples are further files. See [`DomainWeights.push_to_hub`] for the rest.

        Args:
            repo_id (`str`): `"user/name"`, or `"name"` of your own. Made if it does not exist.
            redact_text (`bool`):
                Leave out every column of the examples that can hold text: strings, token ids and whatever nests them,
                `content_hash` among them. Numbers, dates, labels and the names of labels stay.
            keep_columns (`Sequence[str]`): Columns to publish nevertheless, such as the domain.
            include_models (`bool`):
                Publish the weights and the tokenizer of each checkpoint that is on this machine, under `models/`, so that
                others can search at once. Otherwise they must pass `load_model` or `model`.
            publish_text (`bool`):
                Publish the texts also where the repository holds an index that was pushed with `redact_text`, which is
                refused otherwise.
            commit_message, commit_description, private, token, revision, create_pr, tag: See [`DomainWeights.push_to_hub`].

        Returns:
            `huggingface_hub.CommitInfo` or `None`: See [`DomainWeights.push_to_hub`].

        Raises:
            PermissionError: See [`DomainWeights.push_to_hub`]; or the repository holds the index without its texts.
            FileExistsError, PushError: See [`DomainWeights.push_to_hub`].
            ValueError: As there; or a file of the index was altered, or `keep_columns` names no column.
        """
        self.reader.require_whole("`push_to_hub`")
        # Only here: a folder needs no client of the Hub.
        from hf_doge.tracing.publication import push_index_folder

        return push_index_folder(
            self.reader.folder,
            repo_id,
            redact_text=redact_text,
            keep_columns=keep_columns,
            include_models=include_models,
            publish_text=publish_text,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
        )

    def __len__(self) -> int:
        """Number of training examples."""
        return self.reader.num_examples

    def __repr__(self) -> str:
        names = [checkpoint["name"] for checkpoint in self.reader.checkpoints]
        return f"InfluenceIndex({str(self.reader.folder)!r}, num_examples={len(self)}, checkpoints={names})"

    @property
    def examples(self) -> Dataset:
        """What is known of the training examples; row `i` is example `i`."""
        return self.reader.examples

    @cached_property
    def processing_class(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given, or the one saved with the checkpoints; `None` if there is none."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        for position, checkpoint in reversed(list(enumerate(self.reader.checkpoints))):
            self.reader.fetch_model(position)
            for path in checkpoint_folders(checkpoint, self.reader.folder):
                place = tokenizer_place(path)
                if place is not None:
                    tokenizer = load_tokenizer(place)
                    self._check_tokenizer(tokenizer)
                    return tokenizer
        return None

    def search(
        self,
        queries: Any,
        *,
        top_k: int = 10,
        special_tokens: str = "count",
        batch_size: int = 32,
        cosine: bool = False,
        exclude: Sequence[int] = (),
        kernel: str = "token",
        synonym_threshold: float = 0.5,
    ) -> Dataset:
        """
        The strongest proponents and opponents of each query among all training examples. Exact.

        Args:
            queries: See above.
            top_k (`int`): At most so many of each kind, `>= 1`. An example that scores 0 is neither.
            special_tokens (`str`):
                `"count"`: tokens such as [CLS] count like any other. They are in every text, and their gradients carry
                much of a sentence. `"drop"`: they do not count, neither in queries nor in examples.
            batch_size (`int`): Queries per forward and backward.
            cosine (`bool`):
                Divide the score at each checkpoint by the norms of both gradients, before the learning rate weighs it.
                Not in the paper.
            exclude (`Sequence[int]`): Ids of examples to leave out, such as the query itself.
            kernel (`str`):
                Which tokens answer each other. `"token"`: equal ones alone, TracIn-WE. `"synonym"`, TracIn-WE-Syn: those
                that both texts hold, and of the rest each token of the query one of the example that means the same,
                so that texts without a common word can score. Of the paper is, as far as we know it, that synonyms are
                told by the cosine of the model's own word embeddings. Ours, for want of its detail: those at each
                checkpoint, and the rules of [`synonym_similarity`] (a match counts 1, one to one, greedily).
            synonym_threshold (`float`):
                Smallest cosine of a synonym, in [-1, 1]; the time of a search grows as it falls. Ours.

        Returns:
            `datasets.Dataset`: for each query its proponents from the strongest on, then its opponents, with columns

            - `query` (position), `rank` (from 1), `kind` (`"proponent"` or `"opponent"`), `example_id`, `score`;
            - `checkpoint_scores`: what each checkpoint adds to the score, its learning rate included;
            - `special_token_share`: part of the sum of all tokens' absolute parts that special tokens hold;
            - `words`, `word_scores`: words of the query that the example shares, or has a synonym of, by the size of their
              part. They add up to the score. A token's part is shared equally by the positions that hold it, pieces of a
              word are joined. In an index recorded with `tied="own"` (or `"full"`) a token's part has two sides, the word
              as it is read and as it is predicted, in the query and in the example: it may come from a text in which the
              word moves nothing as an input (the last one of a text), or from places where the model expected it in vain;
            - `token_ids`, `token_scores`: the same by token;
            - `example_token_ids`, `example_token_scores`: the same by the token of the example;
            - `query_label`, `query_text`, `query_token_ids`: what was asked;
            - every column that the index keeps of its examples, such as `text` and `label`.

        Raises:
            ValueError: An option or the queries are bad, or a checkpoint is another than the recorded one.
            FileNotFoundError: A checkpoint is gone.
        """
        top_k = check_count("top_k", top_k)
        excluded = self._checked_ids(exclude)
        options = {
            "batch_size": batch_size,
            "special_tokens": special_tokens,
            "cosine": cosine,
            "kernel": kernel,
            "synonym_threshold": synonym_threshold,
        }
        self._check_options(**options)
        records = self._check(queries)

        def work(start: int, stop: int) -> list[dict[str, Any]]:
            asked, scorer = self._ask(records[start:stop], first_position=start, **options)
            found = []
            for first, block in scorer.blocks():
                block[:, excluded] = 0
                for position, scores in enumerate(block, start=first):
                    parts = scorer.token_parts(position, select_extremes(scores, top_k))
                    found += self._hits(start + position, asked[position], parts)
            return found

        self._build_maps()
        hits = share_work(len(records), work)
        return make_hits(hits, self._with_text(self.reader.examples_of([hit["example_id"] for hit in hits])))

    def scores(
        self,
        queries: Any,
        *,
        special_tokens: str = "count",
        batch_size: int = 32,
        cosine: bool = False,
        kernel: str = "token",
        synonym_threshold: float = 0.5,
    ) -> np.ndarray:
        """
        The scores of all queries with all training examples.

        Args:
            queries: See above.
            special_tokens, batch_size, cosine, kernel, synonym_threshold: See [`~InfluenceIndex.search`].

        Returns:
            `numpy.ndarray` of shape `(num_queries, num_examples)`, float32. [`~InfluenceIndex.iter_scores`] gives it in
            pieces.
        """
        options = {
            "batch_size": batch_size,
            "special_tokens": special_tokens,
            "cosine": cosine,
            "kernel": kernel,
            "synonym_threshold": synonym_threshold,
        }
        self._check_options(**options)
        records = self._check(queries)

        def work(start: int, stop: int) -> list[np.ndarray]:
            _, scorer = self._ask(records[start:stop], first_position=start, **options)
            return [block for _, block in scorer.blocks()]

        self._build_maps()
        return np.concatenate(share_work(len(records), work))

    def iter_scores(
        self,
        queries: Any,
        *,
        special_tokens: str = "count",
        batch_size: int = 32,
        cosine: bool = False,
        kernel: str = "token",
        synonym_threshold: float = 0.5,
    ) -> Iterator[tuple[range, np.ndarray]]:
        """
        [`~InfluenceIndex.scores`] in pieces of at most 64 MiB (or one query), all of them on this process.

        Yields:
            `tuple[range, numpy.ndarray]`: positions of some queries, and their scores `(len(range), num_examples)`.
        """
        options = {
            "batch_size": batch_size,
            "special_tokens": special_tokens,
            "cosine": cosine,
            "kernel": kernel,
            "synonym_threshold": synonym_threshold,
        }
        self._check_options(**options)
        _, scorer = self._ask(self._check(queries), **options)
        for first, block in scorer.blocks():
            yield range(first, first + len(block)), block

    def self_influence(self, *, special_tokens: str = "count") -> Dataset:
        """
        How much each training example pushes its own prediction, the largest first: wrong labels tend to stand on top.

        `sum_c learning_rate_c * |g_c(x)|^2`, which needs no model.

        Args:
            special_tokens (`str`): See [`~InfluenceIndex.search`].

        Returns:
            `datasets.Dataset`: `rank` (from 1), `example_id`, `score`, and what the index keeps of the example.

        Raises:
            ValueError: The rows of the index are not gradients of their examples (second moment, online recording).
        """
        check_choice("special_tokens", special_tokens, SPECIAL_TOKENS)
        self._refuse_metric("Self-influence")
        self.reader.require_whole("Self-influence")
        if self.config.get("record") == "online":
            raise ValueError(
                "Self-influence needs an index with `record='checkpoint'`: online rows are sums of gradients times learning "
                "rates. Search with the examples as queries instead."
            )
        excluded = self._excluded_tokens(special_tokens)

        def work(start: int, stop: int) -> list[np.ndarray]:
            return [
                checkpoint["learning_rate"] * self.reader.self_influence(position, exclude_tokens=excluded)
                for position, checkpoint in enumerate(self.reader.checkpoints[start:stop], start=start)
            ]

        self._build_maps()
        scores = sum(share_work(len(self.reader.checkpoints), work))
        order = np.argsort(-scores, kind="stable")
        rows = {"rank": np.arange(1, len(order) + 1), "example_id": order, "score": scores[order]}
        return beside_examples(Dataset.from_dict(rows), self.reader.examples_of(order))

    def domain_influence(
        self,
        queries: Any,
        column: str,
        *,
        reduction: str = "mean",
        special_tokens: str = "count",
        batch_size: int = 32,
        cosine: bool = False,
        kernel: str = "token",
        synonym_threshold: float = 0.5,
    ) -> Dataset:
        """
        Which kind of training examples pushed each prediction: DoGE's question, put to single predictions.

        Args:
            queries: See above.
            column (`str`): Column of the examples that names their domain (or label, source, ...).
            reduction (`str`): `"mean"` score of a domain's examples, or their `"sum"`, which grows with the domain.
            special_tokens, batch_size, cosine, kernel, synonym_threshold: See [`~InfluenceIndex.search`].

        Returns:
            `datasets.Dataset`: `query`, `domain`, `score`, `num_examples`; one row for each query and domain.

        Raises:
            ValueError: The examples have no such column.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        domains, members = self._domains(column)
        counts = np.bincount(members, minlength=len(domains))
        table: dict[str, list] = {"query": [], "domain": [], "score": [], "num_examples": []}
        scored = self.iter_scores(
            queries,
            special_tokens=special_tokens,
            batch_size=batch_size,
            cosine=cosine,
            kernel=kernel,
            synonym_threshold=synonym_threshold,
        )
        for positions, block in scored:
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
        missing = sorted(set(HIT_FEATURES) - set(getattr(hits, "column_names", None) or ()))
        if missing:
            raise ValueError(f"`hits` must come from `InfluenceIndex.search`, but has no columns {missing}.")
        tokenizer, fields = self.processing_class, self._text_fields()
        page = render_page(
            hits,
            read_query=lambda hit: query_reading(hit, tokenizer),
            read_example=lambda hit: example_reading(hit, tokenizer, fields),
        )
        if path is not None:
            write_atomically(Path(path), page.encode())
        return page

    def _with_text(self, examples: Dataset) -> Dataset:
        """Examples of which the index keeps no text, with the one that their tokens decode to."""
        tokenizer = self.processing_class
        if tokenizer is None or "input_ids" not in examples.column_names or "text" in examples.column_names:
            return examples
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in examples["input_ids"]]
        return examples.add_column("text", texts, feature=Value("string"))

    def _build_maps(self) -> None:
        build_on_each_machine(len(self.reader.checkpoints), self.reader.build_map)

    def _ask(
        self,
        records: Sequence[dict[str, Any]],
        *,
        batch_size: int,
        special_tokens: str,
        cosine: bool,
        kernel: str,
        synonym_threshold: float,
        first_position: int = 0,
    ) -> tuple[list[Query], QueryScorer]:
        """Queries with their rows at all checkpoints, ready to be scored."""
        excluded = self._excluded_tokens(special_tokens)
        maker = QueryRowMaker(
            self.config,
            self.reader.folder,
            tokenizer=self.processing_class,
            synonym_threshold=synonym_threshold if kernel == "synonym" else None,
            fetch_model=self.reader.fetch_model,
            encoding=self._encoding,
            **self._loading,
        )
        asked, rows = maker.record(
            records, batch_size=batch_size, drop_token_ids=excluded, first_position=first_position
        )
        return asked, QueryScorer(self.reader, rows, excluded_tokens=excluded, cosine=cosine, synonyms=maker.synonyms)

    def _hits(self, position: int, query: Query, parts: TokenParts) -> list[dict[str, Any]]:
        special = self.config["special_token_ids"]
        return list(query_hits(position, query, parts, special_tokens=special, tokenizer=self.processing_class))

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

    def _check(self, queries: Any) -> list[dict[str, Any]]:
        tokenizer, folder, missing = self.processing_class, self.reader.folder, []
        if tokenizer is None:
            named = [checkpoint for checkpoint in self.reader.checkpoints if checkpoint["path"]]
            missing = [str(folder / one["path"]) for one in named if not any(checkpoint_folders(one, folder))]
        return check_queries(queries, tokenizer, vocabulary_size=self.reader.vocabulary_size, missing=missing)

    def _check_options(
        self, *, special_tokens: str, batch_size: int, cosine: bool, kernel: str, synonym_threshold: float
    ) -> None:
        check_choice("special_tokens", special_tokens, SPECIAL_TOKENS)
        check_count("batch_size", batch_size)
        check_flag("cosine", cosine)
        check_choice("kernel", kernel, KERNELS)
        check_number("synonym_threshold", synonym_threshold, least=-1, most=1)
        if cosine:
            self._refuse_metric("`cosine`")
            self.reader.require_whole("`cosine`")
        if kernel == "synonym":  # Adam's metric is one of each token; between two there is none
            self._refuse_metric("`kernel='synonym'`")

    def _refuse_metric(self, what: str) -> None:
        if self.config.get("second_moment"):
            raise ValueError(
                f"{what} needs the gradients of the training examples, but this index was recorded with "
                "`second_moment=True`: its rows are divided by Adam's metric, the queries' are not. Record another "
                "index without it."
            )

    def _excluded_tokens(self, special_tokens: str) -> list[int]:
        return list(self.config["special_token_ids"]) if special_tokens == "drop" else []

    def _checked_ids(self, ids: Sequence[int]) -> np.ndarray:
        try:
            found = np.asarray(ids if isinstance(ids, np.ndarray) or not isinstance(ids, Iterable) else list(ids))
        except (TypeError, ValueError):  # lists of several lengths, a tensor without a length
            found = np.asarray(None)
        whole = found.ndim == 1 and (found.dtype.kind in "iu" or not len(found)) and not isinstance(ids, str | bytes)
        if not whole or (len(found) and not 0 <= found.min() <= found.max() < len(self)):
            raise ValueError(f"`exclude` must hold ids of examples, 0 to {len(self) - 1}, but got {ids!r:.80}.")
        return found.astype(np.int64)

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        recorded = self.config.get("tokenizer")
        if recorded is None or not hasattr(tokenizer, "get_vocab"):
            return
        if (
            len(tokenizer) != recorded["vocabulary_size"]
            or tokenizer_fingerprint(tokenizer) != recorded["fingerprint"]
        ):
            raise ValueError(
                f"The tokenizer must be the one of the index, {recorded['name']!r} with {recorded['vocabulary_size']} tokens,"
                f" but {getattr(tokenizer, 'name_or_path', '')!r} with {len(tokenizer)} tokens has another vocabulary. "
                "Pass the recorded model's own as `processing_class`."
            )

    def _text_fields(self) -> list[str]:
        """Columns of the examples that hold what the model read."""
        features = self.reader.examples_of([]).features
        strings = [name for name in features if getattr(features[name], "dtype", None) in ("string", "large_string")]
        for names in TEXT_FIELDS:
            if set(names) <= set(strings):
                return list(names)
        left = [
            name for name in strings if name != "content_hash" and not name.endswith(("_name", "source", "domain"))
        ]
        return left if len(left) <= 2 else []
