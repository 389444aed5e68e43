"""Documents to blocks of tokens, kept in the output folder so that the next run finds them."""

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_doge.data.domain_files import read_documents
from hf_doge.sampling.lengths import IGNORED_LABEL

logger = logging.getLogger(__name__)

DOCUMENTS_PER_CALL = 256
ROWS_PER_CHUNK = 1000
_COLUMNS = ("input_ids", "labels")


@dataclass(frozen=True)
class BlockMaker:
    """
    Cuts documents into blocks of tokens.

    Documents are tokenised, each followed by the end-of-text token, put end to end and cut; the remainder is dropped.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with an end-of-text token.
        block_size (`int`): Tokens in a block, at least 2.
        cache_dir (`Path`): Where blocks are kept, one Arrow file for each text, tokenizer, block size and limit.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    cache_dir: Path

    def load(self, path: Path, *, name: str, max_tokens: int | None = None) -> Dataset:
        """
        The blocks of a file, as a dataset with a column `input_ids`.

        Args:
            path (`Path`): JSONL file of a domain.
            name (`str`): What to call it in the log and in the cache.
            max_tokens (`int`, *optional*): Use no more than this many tokens, from the start of the file.

        Raises:
            `ValueError`: if the file does not fill one block.
        """
        cached = self.locate(name, self.fingerprint(path, max_tokens=max_tokens))
        if not cached.exists():
            self._write(self._cut(self._tokenize(path), max_tokens, repr(str(path))), cached)
        return Dataset.from_file(str(cached))

    def fingerprint(self, path: Path, *, max_tokens: int | None = None) -> str:
        """Name of the contents: the same text, tokenizer, block size and limit give the same 16 hex digits."""
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return self._key(content, self.tokenizer_key, self.block_size, max_tokens)

    def load_encoded(self, encoded: Dataset, *, name: str, max_tokens: int | None = None) -> tuple[Dataset, str]:
        """
        The blocks of documents that are tokens already.

        Args:
            encoded (`Dataset`): Rows of `input_ids`, and of as many `labels` where some tokens have no loss. Blocks in which
                none has one are left out.
            name (`str`): What to call it in the log, in the cache and in errors.
            max_tokens (`int`, *optional*): Use no more than this many tokens, from the start.

        Returns:
            `tuple[Dataset, str]`: blocks with the same columns, and the name of their contents.

        Raises:
            `ValueError`: if the rows do not fill one block.
        """
        fingerprint = self._key(_digest(encoded), self.block_size, max_tokens)
        cached = self.locate(name, fingerprint)
        if not cached.exists():
            self._write(self._cut(_read_tokens(encoded), max_tokens, f"the data of {name!r}"), cached)
        return Dataset.from_file(str(cached)), fingerprint

    def locate(self, name: str, fingerprint: str) -> Path:
        """The file that blocks of a domain and split are kept in."""
        safe = re.sub(r"[^\w.-]", "_", name)
        return self.cache_dir / f"{safe}-{fingerprint}.arrow"

    @cached_property
    def tokenizer_key(self) -> str:
        """Name of the tokenizer's contents."""
        return fingerprint_tokenizer(self.tokenizer)

    @staticmethod
    def _key(*parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _write(self, blocks: np.ndarray, cached: Path) -> None:
        """Write blocks, shape `(num_columns, num_blocks, block_size)`, whole or not at all."""
        logger.info("%s: %d blocks of %d tokens.", cached.stem.rpartition("-")[0], *blocks.shape[1:])
        columns = dict(zip(_COLUMNS, blocks, strict=False))
        features = Features(dict.fromkeys(columns, List(Value("int32"), length=self.block_size)))
        table = Dataset.from_dict(columns, features=features).data.table
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_CHUNK)
        partial.replace(cached)

    def _cut(self, tokens: Iterable[np.ndarray], max_tokens: int | None, source: str) -> np.ndarray:
        """Blocks of tokens that come in pieces of shape `(num_columns, num_tokens)`."""
        pieces, num_tokens = [], 0
        limit = float("inf") if max_tokens is None else max_tokens
        for piece in tokens:
            pieces.append(piece)
            num_tokens += piece.shape[1]
            if num_tokens >= limit:
                break
        num_blocks = int(min(num_tokens, limit)) // self.block_size
        if num_blocks == 0:
            raise ValueError(
                f"Every domain must fill one block of {self.block_size} tokens, but {source} gives "
                f"{int(min(num_tokens, limit))}. Lower `--block_size`, add text or leave the domain out with `--domains`."
            )
        whole = np.concatenate(pieces, axis=1)[:, : num_blocks * self.block_size]
        blocks = whole.reshape(len(whole), num_blocks, self.block_size)
        if len(blocks) == 1:
            return blocks
        has_loss = (blocks[1][:, 1:] != IGNORED_LABEL).any(axis=1)  # nothing predicts the first token of a block
        if not has_loss.any():
            raise ValueError(
                f"Every domain must have a block with a loss, but {source} has {num_blocks} of {self.block_size} tokens without "
                "one. Raise `--block_size`, or give prompts a loss with `completion_only_loss: false`."
            )
        return blocks[:, has_loss]

    def _tokenize(self, path: Path) -> Iterator[np.ndarray]:
        """Token ids of a batch of documents at a time, shape `(1, num_tokens)`."""
        documents = read_documents(path)
        end_of_text = self.tokenizer.eos_token_id
        while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
            # `verbose=False`: a document longer than the model's context is no mistake here.
            encoded = self.tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = [np.array([*ids, end_of_text], dtype=np.int32) for ids in encoded["input_ids"]]
            yield np.concatenate(ids)[None]


def _read_tokens(encoded: Dataset) -> Iterator[np.ndarray]:
    """The numbers of all rows end to end, a batch of rows at a time, shape `(num_columns, num_tokens)`."""
    columns = [name for name in _COLUMNS if name in encoded.column_names]
    for table in encoded.with_format("arrow").iter(batch_size=ROWS_PER_CHUNK):
        yield np.stack([pa.compute.list_flatten(table.column(name)).to_numpy() for name in columns])


def _digest(encoded: Dataset) -> str:
    """Name of the contents, however they are stored."""
    digest = hashlib.sha256(repr([name for name in _COLUMNS if name in encoded.column_names]).encode())
    for piece in _read_tokens(encoded):
        digest.update(piece.T.tobytes())
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer's contents, wherever it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        contents = [path.read_bytes() for path in files if path.name != "tokenizer_config.json"]  # it says where from
    return hashlib.sha256(repr((contents, tokenizer.eos_token_id)).encode()).hexdigest()


def collate_blocks(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack blocks of one length into `input_ids` and `labels`, equal where none are given, shape `(batch, block_size)`."""
    names = ("input_ids", "labels" if "labels" in examples[0] else "input_ids")
    columns = (torch.tensor([example[name] for example in examples], dtype=torch.long) for name in names)
    return dict(zip(_COLUMNS, columns, strict=True))
