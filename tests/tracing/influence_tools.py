"""A tiny text classifier and language model, trained and recorded in seconds, for the tests of the influence index."""

import random

from datasets import ClassLabel, Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_doge.tracing.callback import TracInWECallback

WORDS = {
    "sport": ["match", "goal", "team", "runner", "winning", "stadium", "coach", "cup"],
    "money": ["stocks", "market", "bank", "shares", "trader", "profit", "bond", "fund"],
    "space": ["rocket", "orbit", "moon", "star", "launching", "probe", "comet", "crater"],
}
TOPICS = list(WORDS)


def sentences(count, seed=0):
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % len(TOPICS)
        words = draw.choices(WORDS[TOPICS[label]], k=4) + draw.choices(["the", "a", "is", "new"], k=2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words).capitalize() + ".", "label": label})
    return rows


def wordpiece_tokenizer(texts=None, vocab_size=70):
    """A tokenizer whose pieces and their order are the same in every process."""
    texts = texts or [row["text"] for row in sentences(60)]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    # The trainer would number the letters within words in an order of chance, which then decides between equally frequent pairs.
    letters = [*sorted({*"".join(words)}), *sorted({f"##{letter}" for word in words for letter in word[1:]})]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*specials, *letters], show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def byte_level_tokenizer(texts=None, vocab_size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [row["text"] for row in sentences(60)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def sentencepiece_tokenizer(texts=None, *, pre_tokenized=True, vocab_size=330):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if pre_tokenized:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:  # as Llama 2: the whole text is one word to the tokenizer
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts or [row["text"] for row in sentences(60)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def classifier(tokenizer, seed=0):
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=len(TOPICS),
        initializer_range=0.3,  # so that words, and not [CLS] alone, have gradients
        id2label=dict(enumerate(TOPICS)),
        label2id={name: number for number, name in enumerate(TOPICS)},
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForSequenceClassification(config)


def language_model(tokenizer, seed=0):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def tokenised(rows, tokenizer):
    dataset = Dataset.from_list(rows)
    if "label" in dataset.column_names:
        dataset = dataset.cast_column("label", ClassLabel(names=TOPICS))
    return dataset.map(lambda row: tokenizer(row["text"]))


def train(
    folder, model, tokenizer, dataset, *, language=False, epochs=2, index="index", callback=TracInWECallback, **options
):
    """Train with a callback, by the paper's recipe where `options` do not decide; returns the folder of the index."""
    decided = {"tied", "metric", "special_tokens", "second_moment", "recipe"} & set(options)
    options = {**({} if decided else {"recipe": "paper"}), **options}
    args = TrainingArguments(
        folder / "run",
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    collator = (
        DataCollatorForLanguageModeling(tokenizer, mlm=False) if language else DataCollatorWithPadding(tokenizer)
    )
    callback = callback(folder / index, dataset=dataset, **{"dtype": "float32", **options})
    trainer = Trainer(
        model,
        args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    return folder / index
