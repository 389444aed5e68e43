"""Tiny models and data for the tests: built from configs, no download."""

from functools import cache

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 32


# Options of one plain step, whose weights show what was scored.
ONE_STEP = {
    "per_device_train_batch_size": 12,
    "max_steps": 1,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "mu": 0.1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def tiny_llama(*, dtype=torch.float32, tied=True, seed=0, num_layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_gpt2(*, dropout=0.0, dtype=torch.float32, seed=0, num_layers=2):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=num_layers,
        n_head=2,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def _bert_config(num_layers=2, **kwargs):
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )


def tiny_bert(*, dtype=torch.float32, seed=0, num_layers=2):
    torch.manual_seed(seed)
    return BertForMaskedLM(_bert_config(num_layers)).to(dtype)


def tiny_classifier(*, dtype=torch.float32, seed=0, num_labels=3, num_layers=2):
    torch.manual_seed(seed)
    return BertForSequenceClassification(_bert_config(num_layers, num_labels=num_labels)).to(dtype)


def tiny_t5(*, dtype=torch.float32, seed=0, num_layers=1):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=num_layers,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def tokens(num_examples, *, low=1, high=VOCAB, length=8, seed=0):
    """Rows of random tokens from [low, high), so that domains can have vocabularies of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num_examples, length), generator=generator)


def language_model_rows(num_examples, *, masked=0.0, seed=0, **kwargs):
    """`input_ids` and `labels`, a share of the labels masked out, a different one in each row."""
    ids = tokens(num_examples, seed=seed, **kwargs)
    labels = ids.clone()
    generator = torch.Generator().manual_seed(seed + 1)
    labels[torch.rand(ids.shape, generator=generator) < masked] = -100
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def three_domains(num_examples=4, *, masked=0.0):
    """Three domains over three parts of the vocabulary."""
    lows = {"arxiv": 1, "books": 9, "code": 19}
    return {name: _domain(num_examples, low, masked, seed) for seed, (name, low) in enumerate(lows.items())}


@cache  # to make a dataset is to hash it, which takes more time than most of what is done to it
def _domain(num_examples, low, masked, seed):
    return Dataset.from_dict(language_model_rows(num_examples, low=low, high=low + 12, masked=masked, seed=seed))


def classifier_domains(num_examples=4):
    generator = torch.Generator().manual_seed(7)
    domains = three_domains(num_examples)
    return {
        name: dataset.remove_columns("labels").add_column(
            "labels", torch.randint(0, 3, (num_examples,), generator=generator).tolist()
        )
        for name, dataset in domains.items()
    }


def tiny_tokenizer():
    """Thirty-two words, with padding, mask and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<mask>", "<eos>", "<unk>"]
    vocab = {word: i for i, word in enumerate(specials + [f"w{i}" for i in range(28)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>", unk_token="<unk>"
    )


def float64_causal_loss(outputs, labels, num_items_in_batch=None):
    """The causal loss without the cast to float32 that transformers puts into its own."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
