"""Which tokenizer: one that exists, or a small one trained on the data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_doge.tracing.pretrained import load_tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# For tokenizers trained here: ChatML, with the assistant's turns marked for `assistant_only_loss`.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_TRAINING_CHARS = 20_000_000

Documents = Callable[[], Iterable[str]]  # gives the texts of a domain, from the first one each time


def get_tokenizer(
    name_or_path: str | None,
    train_vocab_size: int | None,
    *,
    documents: Sequence[Documents],
    save_directory: Path,
    is_trained: bool = False,
    for_chat: bool = False,
    chat_template_path: str | None = None,
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer, or train one on an equal share of each domain and save it.

    Args:
        name_or_path (`str`, *optional*): Folder or Hub name of a tokenizer.
        train_vocab_size (`int`, *optional*): Train a byte-level BPE of this many entries instead.
        documents (`Sequence[Documents]`): Train texts, one per training domain.
        save_directory (`Path`): Where a trained tokenizer is kept.
        is_trained (`bool`): Whether another process of this run has just trained it, so that it is only read.
        for_chat (`bool`): Whether a tokenizer trained here gets a chat template (ChatML) and its two tokens.
        chat_template_path (`str`, *optional*): Chat template that takes the place of the tokenizer's: a Jinja file, or a folder
            or Hub name of a tokenizer that has one.

    Raises:
        `FileNotFoundError`: if another process trained it in a folder that this one does not see.
        `ValueError`: unless exactly one of the first two is given, for a tokenizer without an end-of-text token, and for a
            chat template that is none.
    """
    if (name_or_path is None) == (train_vocab_size is None):
        raise ValueError(
            "Give either `--tokenizer`, a folder or Hub name, or `--train_tokenizer_vocab`, the size of one to train on "
            f"your data, but got {'neither' if name_or_path is None else 'both'}."
        )
    if name_or_path is not None:
        tokenizer = load_tokenizer(name_or_path)
    elif is_trained:
        if not save_directory.is_dir():
            raise FileNotFoundError(unseen_folder(save_directory))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(save_directory, trust_remote_code=False)
    else:
        assert train_vocab_size is not None
        tokenizer = train_tokenizer(documents, train_vocab_size, for_chat=for_chat)
    require_end(tokenizer, repr(name_or_path))
    if chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(chat_template_path)
    if name_or_path is None and not is_trained:
        tokenizer.save_pretrained(save_directory)  # with the template that it is used with
    return tokenizer


def require_end(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise a `ValueError` for a tokenizer without an end-of-text token; `what` names it."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer must have an end-of-text token to set documents apart, but {what} has none. "
            "Set its `eos_token` and save it again."
        )


def unseen_folder(folder: Path) -> str:
    """What to say where a process does not find what another one has just written."""
    return (
        f"All processes must see the output folder, but this one does not find {str(folder)!r}, which the "
        "main process has just written. Put `--output_dir` on a file system that every machine mounts there."
    )


def _read_chat_template(path: str) -> str:
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    if Path(path).suffix in (".jinja", ".jinja2", ".j2"):
        raise FileNotFoundError(f"`--chat_template_path` must be a file or a tokenizer, but there is no {path!r}.")
    template = load_tokenizer(path).chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"`--chat_template_path` must be a tokenizer with one chat template, but {path!r} has none or more."
        )
    return template


def train_tokenizer(
    documents: Sequence[Documents], vocab_size: int, *, for_chat: bool = False
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE on the same number of characters of each domain.

    The share is the smallest domain's text, and at most `20_000_000` characters over all domains, so that no domain decides
    the vocabulary by its size.

    Args:
        documents (`Sequence[Documents]`): Texts of each domain.
        vocab_size (`int`): Entries, at least 257.
        for_chat (`bool`): Whether two of the entries mark the turns of a dialogue, for a chat template.

    Raises:
        `ValueError`: if `vocab_size` cannot hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise ValueError(
            f"`--train_tokenizer_vocab` must be at least 257 (bytes and end of text), but got {vocab_size}."
        )
    limit = MAX_TRAINING_CHARS // len(documents)
    share = min(sum(len(text) for text in _first_chars(domain, limit)) for domain in documents)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *((TURN_START, TURN_END) if for_chat else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for domain in documents for text in _first_chars(domain, share)), trainer=trainer
    )
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    if for_chat:
        trained.chat_template = CHAT_TEMPLATE
    return trained


def _first_chars(documents: Documents, limit: int) -> Iterator[str]:
    """The texts of a domain up to `limit` characters in all."""
    for text in documents():
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
