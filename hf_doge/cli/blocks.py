"""Documents to blocks of tokens, kept in the output folder so that the next run finds them."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_doge.cli.domain_files import read_documents

logger = logging.getLogger(__name__)

DOCUMENTS_PER_CALL = 256
ROWS_PER_CHUNK = 1000


@dataclass(frozen=True)
class BlockMaker:
    """
    Cuts files of documents into blocks of tokens.

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
        cached = self.cache_dir / f"{name}-{self.fingerprint(path, max_tokens=max_tokens)}.arrow"
        if not cached.exists():
            self._write(self._cut(path, max_tokens), cached)
        return Dataset.from_file(str(cached))

    def fingerprint(self, path: Path, *, max_tokens: int | None = None) -> str:
        """Name of the contents: the same text, tokenizer, block size and limit give the same 16 hex digits."""
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        key = (content, fingerprint_tokenizer(self.tokenizer), self.block_size, max_tokens)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def _write(self, blocks: np.ndarray, cached: Path) -> None:
        """Write blocks, shape `(num_blocks, block_size)`, whole or not at all."""
        logger.info("%s: %d blocks of %d tokens.", cached.stem.rpartition("-")[0], *blocks.shape)
        features = Features({"input_ids": List(Value("int32"), length=self.block_size)})
        table = Dataset.from_dict({"input_ids": blocks}, features=features).data.table
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_CHUNK)
        partial.replace(cached)

    def _cut(self, path: Path, max_tokens: int | None) -> np.ndarray:
        pieces, num_tokens = [], 0
        limit = float("inf") if max_tokens is None else max_tokens
        for tokens in self._tokenize(path):
            pieces.append(tokens)
            num_tokens += len(tokens)
            if num_tokens >= limit:
                break
        num_blocks = int(min(num_tokens, limit)) // self.block_size
        if num_blocks == 0:
            raise ValueError(
                f"Every domain must fill one block of {self.block_size} tokens, but {str(path)!r} gives "
                f"{int(min(num_tokens, limit))}. Lower `--block_size`, add text or leave the domain out with `--domains`."
            )
        return np.concatenate(pieces)[: num_blocks * self.block_size].reshape(num_blocks, self.block_size)

    def _tokenize(self, path: Path) -> Iterator[np.ndarray]:
        """Token ids of a batch of documents at a time."""
        documents = read_documents(path)
        end_of_text = self.tokenizer.eos_token_id
        while batch := list(islice(documents, DOCUMENTS_PER_CALL)):
            # `verbose=False`: a document longer than the model's context is no mistake here.
            encoded = self.tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield np.concatenate([np.array([*ids, end_of_text], dtype=np.int32) for ids in encoded["input_ids"]])


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a tokenizer's contents, wherever it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        contents = [path.read_bytes() for path in files if path.name != "tokenizer_config.json"]  # it says where from
    return hashlib.sha256(repr((contents, tokenizer.eos_token_id)).encode()).hexdigest()


def collate_blocks(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack blocks of one length into `input_ids` and equal `labels`, shape `(batch, block_size)`."""
    input_ids = torch.tensor([example["input_ids"] for example in examples], dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids.clone()}
