"""Which tokenizer: one that exists, or a small one trained on the data."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_doge.cli.domain_files import read_documents
from hf_doge.tracing.pretrained import load_tokenizer

END_OF_TEXT = "<|endoftext|>"
MAX_TRAINING_CHARS = 20_000_000


def get_tokenizer(
    name_or_path: str | None,
    train_vocab_size: int | None,
    *,
    files: Sequence[Path],
    save_directory: Path,
    is_trained: bool = False,
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer, or train one on an equal share of each file and save it.

    Args:
        name_or_path (`str`, *optional*): Folder or Hub name of a tokenizer.
        train_vocab_size (`int`, *optional*): Train a byte-level BPE of this many entries instead.
        files (`Sequence[Path]`): Train files, one per training domain.
        save_directory (`Path`): Where a trained tokenizer is kept.
        is_trained (`bool`): Whether another process of this run has just trained it, so that it is only read.

    Raises:
        `FileNotFoundError`: if another process trained it in a folder that this one does not see.
        `ValueError`: unless exactly one of the first two is given, and for a tokenizer without an end-of-text token.
    """
    if (name_or_path is None) == (train_vocab_size is None):
        raise ValueError(
            "Give either `--tokenizer`, a folder or Hub name, or `--train_tokenizer_vocab`, the size of one to train on "
            f"your data, but got {name_or_path!r} and {train_vocab_size!r}."
        )
    if name_or_path is not None:
        tokenizer = load_tokenizer(name_or_path)
    elif is_trained:
        if not save_directory.is_dir():
            raise FileNotFoundError(
                f"All processes must see the output folder, but this one does not find {str(save_directory)!r}, which the "
                "main process has just written. Put `--output_dir` on a file system that every machine mounts there."
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(save_directory, trust_remote_code=False)
    else:
        assert train_vocab_size is not None
        tokenizer = train_tokenizer(files, train_vocab_size)
        tokenizer.save_pretrained(save_directory)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer must have an end-of-text token to set documents apart, but {name_or_path!r} has none. "
            "Set its `eos_token` and save it again."
        )
    return tokenizer


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE on the same number of characters of each file.

    The share is the smallest file's text, and at most `20_000_000` characters over all files, so that no domain decides
    the vocabulary by its size.

    Raises:
        `ValueError`: if `vocab_size` cannot hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise ValueError(
            f"`--train_tokenizer_vocab` must be at least 257 (bytes and end of text), but got {vocab_size}."
        )
    limit = MAX_TRAINING_CHARS // len(files)
    share = min(sum(len(text) for text in _first_chars(path, limit)) for path in files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for path in files for text in _first_chars(path, share)), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _first_chars(path: Path, limit: int) -> Iterator[str]:
    """The texts of a file up to `limit` characters in all."""
    for text in read_documents(path):
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
