"""The recorder on live models, against ordinary autograd on the dense embedding matrix, one example at a time."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_doge.functional.tracin_we import last_layer_score, self_influence, tied_score, top_k_rows, tracin_we_score
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.embedding_uses import EmbeddingUses
from tests.reference_tracin_we import dense, dense_gradient, tokens_read

V, PAD = 40, 1
BODY = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = {**BODY, "pad_token_id": PAD, "max_position_embeddings": 32, "initializer_range": 0.3}
LENGTHS = (6, 3, 8, 5)


def bert(**options):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER, num_labels=3, **options))


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER, num_labels=3))


def gpt2(*, tied=True):
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=2,
        eos_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied=True):
    # no pad token: as `padding_idx` it would be a row that autograd does not train
    config = transformers.LlamaConfig(
        **BODY, num_key_value_heads=1, bos_token_id=2, eos_token_id=3, tie_word_embeddings=tied, initializer_range=0.3
    )
    return transformers.LlamaForCausalLM(config)


def gemma():
    config = transformers.Gemma3TextConfig(
        **BODY, **IDS, num_key_value_heads=1, head_dim=8, sliding_window=4, initializer_range=0.3
    )
    return transformers.Gemma3ForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=PAD,
        decoder_start_token_id=PAD, eos_token_id=3, initializer_factor=1.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **IDS,
        decoder_start_token_id=3, forced_eos_token_id=None, scale_embedding=True, init_std=0.3,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.5))


def build(make, *, seed=0, **options):
    """A model with random weights, dropout on, as a Trainer would hold it."""
    torch.manual_seed(seed)
    return make(**options).train()


def causal_example(generator, length):
    input_ids = torch.randint(4, V, (1, length), generator=generator)
    labels = input_ids.clone()
    labels[0, 1] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def classification_example(generator, length):
    example = causal_example(generator, length)
    return {**example, "labels": torch.randint(3, (1,), generator=generator)}


def seq2seq_example(generator, length):
    example = causal_example(generator, length)
    return {**example, "labels": torch.randint(4, V, (1, 9 - length // 2), generator=generator)}


def examples_of(make_example, *, seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [make_example(generator, length) for length in lengths]


def collate(examples, *, side="right", labels_side=None, position_ids=False):
    """Pad and stack, as a tokenizer would."""
    values = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "token_type_ids": 0}
    batch = {}
    for key in examples[0]:
        parts = [example[key] for example in examples]
        if parts[0].ndim == 2 and not parts[0].is_floating_point():
            width = max(part.shape[1] for part in parts)
            gaps = [width - part.shape[1] for part in parts]
            left = (labels_side or side if key == "labels" else side) == "left"
            sides = [(gap, 0) if left else (0, gap) for gap in gaps]
            parts = [F.pad(p, s, value=values[key]) for p, s in zip(parts, sides, strict=True)]
        batch[key] = torch.cat(parts)
    if position_ids:
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return batch


def record(model, batch, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with EmbeddingGradientRecorder(model, **options) as recorder:
            return recorder.record(batch)


def num_terms(example, *, causal):
    labels = example["labels"]
    if labels.ndim == 1:
        return 1
    return int((labels[:, 1:] if causal else labels).ne(-100).sum())


def assert_same_rows(example_rows, gradient, *, tolerance=1e-5):
    """Equal up to `tolerance` of the whole gradient's norm."""
    difference = dense(*example_rows, len(gradient)).to(gradient) - gradient
    assert difference.norm() <= tolerance * gradient.norm()
    assert gradient.norm() > 0


class SoftmaxDtypes(TorchDispatchMode):
    """Notes in which dtypes attention takes its softmax."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def rounding(model, example):
    """
    What may separate two ways to the gradient of a model in float64: 1e-12 of its norm.

    Where this transformers takes the softmax of T5's attention in float32 whatever the model's dtype (5.0 does), it is what
    float32 leaves of a gradient, 1e-6.
    """
    with SoftmaxDtypes() as softmax, torch.no_grad():
        model(**example)
    is_t5 = isinstance(model, transformers.T5ForConditionalGeneration)
    return 1e-6 if is_t5 and torch.float32 in softmax.seen else 1e-12


# One batch is as many single examples


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("make", "options", "make_example", "position_ids"),
    [
        pytest.param(gpt2, {"tied": True}, causal_example, True, id="gpt2-tied"),
        pytest.param(gpt2, {"tied": False}, causal_example, True, id="gpt2-untied"),
        pytest.param(llama, {"tied": True}, causal_example, False, id="llama-tied"),
        pytest.param(llama, {"tied": False}, causal_example, False, id="llama-untied"),
        pytest.param(gemma, {}, causal_example, False, id="gemma-scaled"),
        pytest.param(t5, {}, seq2seq_example, False, id="t5"),
        pytest.param(lora, {}, causal_example, True, id="lora"),
    ],
)
def test_one_batch_gives_the_rows_of_single_examples(make, options, make_example, position_ids, side):
    model, examples = build(make, **options), examples_of(make_example)
    labels_side = "right" if make is t5 else side
    batch = collate(examples, side=side, labels_side=labels_side, position_ids=position_ids)
    recorded = record(model, batch)
    assert len(recorded) == len(examples)
    for rows, example in zip(recorded, examples, strict=True):
        terms = num_terms(example, causal=make_example is causal_example)
        assert_same_rows(rows, dense_gradient(model, example, num_terms=terms))


@pytest.mark.parametrize("make", [bert, roberta])
def test_one_batch_gives_the_rows_of_single_examples_for_classifiers(make):
    model, examples = build(make), examples_of(classification_example)
    for rows, example in zip(record(model, collate(examples)), examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example))


@pytest.mark.parametrize("make", [bert, roberta])
def test_a_classifier_padded_on_the_left_gives_the_rows_of_its_padded_examples(make):
    """Its pooled position then is a padding token, so a padded example is not the bare one; see the next test."""
    model, examples = build(make), examples_of(classification_example)
    batch = collate(examples, side="left")
    recorded = record(model, batch, verify=False)
    assert len(recorded) == len(examples)
    for i, rows in enumerate(recorded):
        gradient = dense_gradient(model, {key: value[i : i + 1] for key, value in batch.items()})
        gradient[PAD] = 0
        assert_same_rows(rows, gradient)


@pytest.mark.parametrize(
    ("make", "make_example"),
    [(bert, classification_example), (roberta, classification_example), (gpt2, causal_example), (t5, seq2seq_example)],
)
def test_padding_that_changes_the_gradient_is_refused(make, make_example):
    """
    BERT pools the first position, GPT-2 without `position_ids` counts padding as positions, and T5 makes the decoder's
    inputs of padded labels.
    """
    batch = collate(examples_of(make_example), side="left")
    with pytest.raises(ValueError, match="Padding must not change an example's gradient"):
        record(build(make), batch)


def test_bart_scales_and_shares_its_embedding_between_encoder_and_decoder():
    model, examples = build(bart), examples_of(seq2seq_example)
    for rows, example in zip(record(model, collate(examples)), examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example, num_terms=num_terms(example, causal=False)))
        assert 3 in rows[0].tolist()  # the decoder's start, which the encoder never reads


def test_the_start_of_a_decoder_counts_even_if_it_is_the_padding_token():
    model, examples = build(t5), examples_of(seq2seq_example)
    for rows, example in zip(record(model, collate(examples), pad_token_id=PAD), examples, strict=True):
        assert PAD in rows[0].tolist()
        assert_same_rows(rows, dense_gradient(model, example, num_terms=num_terms(example, causal=False)))


def masked_lm_example(generator, length):
    example = causal_example(generator, length)
    example["labels"] = example["labels"].where(torch.arange(length) % 3 == 2, -100)
    return example


@pytest.mark.parametrize(
    ("model_class", "make_example"),
    [(transformers.BertForMaskedLM, masked_lm_example), (transformers.BertForTokenClassification, masked_lm_example)],
)
def test_labels_of_their_own_position_are_told_from_causal_ones(model_class, make_example):
    model = build(lambda: model_class(transformers.BertConfig(**ENCODER, num_labels=V)))
    examples = examples_of(make_example)
    for rows, example in zip(record(model, collate(examples)), examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example, num_terms=num_terms(example, causal=False)))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_any_loss_over_examples_is_recorded(problem_type):
    model = build(bert, problem_type=problem_type)
    generator = torch.Generator().manual_seed(0)
    examples = examples_of(classification_example, lengths=(3, 2, 3))  # as long as there are classes
    for example in examples:
        example["labels"] = torch.rand(1, 3, generator=generator).round()
    for rows, example in zip(record(model, collate(examples)), examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example))


def test_the_choices_of_an_example_are_one_example():
    model = build(lambda: transformers.BertForMultipleChoice(transformers.BertConfig(**ENCODER)))
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(4, V, (3, 2, 5), generator=generator),
        "attention_mask": torch.ones(3, 2, 5, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    batch["attention_mask"][0, 1, 3:] = 0
    recorded = record(model, batch)
    assert len(recorded) == 3
    for i, rows in enumerate(recorded):
        assert_same_rows(rows, dense_gradient(model, {key: value[i : i + 1] for key, value in batch.items()}))


def test_the_mean_of_token_losses_divides_an_example_by_its_number_of_labels():
    model, examples = build(llama), examples_of(causal_example)
    for rows, example in zip(record(model, collate(examples), loss_reduction="mean"), examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example))


def test_the_first_token_of_a_text_is_not_predicted_from_the_padding_before_it():
    """Alone it has no prediction at all; eager attention even lets the padding see the text."""
    model, examples = build(llama), examples_of(causal_example)
    model.set_attn_implementation("eager")
    recorded = record(model, collate(examples, side="left"), loss_reduction="mean")
    for rows, example in zip(recorded, examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example))


def token_losses(outputs, batch):
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses.sum(dim=1)


def test_a_loss_function_replaces_the_loss_of_the_model():
    model, batch = build(llama), collate(examples_of(causal_example))
    own, given = record(model, batch), record(model, batch, loss_fn=lambda *args: 2 * token_losses(*args))
    assert torch.equal(own.tokens, given.tokens)
    torch.testing.assert_close(given.rows, 2 * own.rows, rtol=1e-4, atol=1e-5)  # of rows up to 14


class Twofold(nn.Module):
    """Two labels at each position."""

    def __init__(self):
        super().__init__()
        self.inner = llama(tied=False)
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = torch.stack([logits, 2 * logits], dim=2)
        predicted, expected = logits[:, :-1].flatten(end_dim=2), labels[:, 1:].flatten()
        return SimpleNamespace(loss=F.cross_entropy(predicted, expected), logits=logits)


def twofold_losses(outputs, batch):
    predicted, expected = outputs.logits[:, :-1].permute(0, 3, 1, 2), batch["labels"][:, 1:]
    return F.cross_entropy(predicted, expected, reduction="none").sum(dim=(1, 2))


def test_several_labels_at_a_position_need_a_loss_function():
    model, examples = build(Twofold), examples_of(causal_example)
    batch = collate(examples)
    batch["labels"] = torch.stack([batch["labels"], batch["labels"].where(batch["labels"] < 0, 7)], dim=2)
    with pytest.raises(ValueError, match=r"`labels` must be .* of shape \(4, 8, 2\). Pass `loss_fn"):
        record(model, batch)
    with EmbeddingGradientRecorder(model, loss_fn=twofold_losses) as recorder:
        recorder.record(batch)  # which shows that padding may be left out of what comes next
        recorded = recorder.record(batch)
    for place, (rows, example) in enumerate(zip(recorded, examples, strict=True)):
        alone = {**example, "labels": batch["labels"][place : place + 1, : example["input_ids"].shape[1]]}
        terms = int(alone["labels"][:, 1:].ne(-100).sum())
        assert_same_rows(rows, dense_gradient(model, alone, num_terms=terms))


def test_options_of_top_k_are_those_of_the_functions():
    model, batch = build(bert), collate(examples_of(classification_example, lengths=(12, 8, 12)))
    batch["input_ids"] = batch["input_ids"] % 4 + 4 * (batch["input_ids"] > 1)  # tokens repeat
    with EmbeddingUses(model.eval()) as uses:
        loss = 3 * model(**batch).loss
        (grads,) = torch.autograd.grad(loss, uses.lookups[0].output)
    for unit in ("position", "token"):
        recorded = record(model, batch, top_k=3, top_k_unit=unit)
        assert len(recorded) == 3
        for i, (tokens, rows) in enumerate(recorded):
            mask = batch["attention_mask"][i]
            expected_tokens, expected_rows = top_k_rows(batch["input_ids"][i], grads[i], 3, unit=unit, mask=mask)
            assert torch.equal(tokens, expected_tokens)
            torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-6)


# Golden facts, float64


def test_scores_of_recorded_rows_are_dense_autograd_inner_products():
    model = build(gpt2, tied=False).double()
    examples = examples_of(causal_example)
    recorded = record(model, collate(examples, position_ids=True))
    gradients = [dense_gradient(model, e, num_terms=num_terms(e, causal=True)) for e in examples]
    for a in range(len(examples)):
        assert_same_rows(recorded[a], gradients[a], tolerance=1e-12)
        for b in range(len(examples)):
            expected = (gradients[a] * gradients[b]).sum()
            torch.testing.assert_close(tracin_we_score(*recorded[a], *recorded[b]), expected, rtol=1e-12, atol=1e-12)


def test_rows_of_a_batch_add_up_to_the_gradient_of_its_summed_loss():
    model, examples = build(bert).double(), examples_of(classification_example)
    batch = collate(examples)
    total = sum(dense(*rows, V) for rows in record(model, batch))
    assert_same_rows((torch.arange(V), total), dense_gradient(model, batch, num_terms=4), tolerance=1e-12)


def test_a_loss_averaged_over_the_batch_divides_scores_by_its_square():
    model, batch = build(bert).double(), collate(examples_of(classification_example))

    def mean_share(outputs, batch):
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none") / 4

    own, shared = record(model, batch), record(model, batch, loss_fn=mean_share)
    torch.testing.assert_close(
        tracin_we_score(*shared[0], *shared[2]), tracin_we_score(*own[0], *own[2]) / 16, rtol=1e-12, atol=1e-14
    )


def test_padding_has_a_gradient_of_exactly_zero_and_no_row():
    model, batch = build(llama).eval(), collate(examples_of(causal_example))
    with EmbeddingUses(model) as uses:
        (grads,) = torch.autograd.grad(model(**batch).loss, uses.lookups[0].output)
    assert grads[batch["attention_mask"] == 0].count_nonzero() == 0
    assert PAD not in record(model, batch).tokens


def test_position_and_token_type_gradients_are_those_of_the_lookup():
    model = build(bert).double().eval()
    example = examples_of(classification_example, lengths=(7,))[0]
    with EmbeddingUses(model) as uses:
        loss = model(**example).loss
        embeddings = model.bert.embeddings
        wanted = (
            uses.lookups[0].output,
            embeddings.position_embeddings.weight,
            embeddings.token_type_embeddings.weight,
        )
        grads, positions, token_types = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(positions[:7], grads[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(token_types[0], grads[0].sum(dim=0), rtol=1e-12, atol=1e-15)


# Tied language models


@pytest.mark.parametrize("part", ["input", "output", "full"])
@pytest.mark.parametrize(
    ("make", "make_example", "position_ids"),
    [(gpt2, causal_example, True), (gemma, causal_example, False), (t5, seq2seq_example, False)],
)
def test_each_part_of_a_tied_matrix_is_its_dense_autograd_gradient(make, make_example, position_ids, part):
    model, examples = build(make).double(), examples_of(make_example)
    batch = collate(examples, position_ids=position_ids)
    recorded, tolerance = record(model, batch, tied=part), rounding(model, examples[0])
    for rows, example in zip(recorded, examples, strict=True):
        terms = num_terms(example, causal=make_example is causal_example)
        assert_same_rows(rows, dense_gradient(model, example, part=part, num_terms=terms), tolerance=tolerance)


def test_the_parts_of_a_masked_language_model_add_up_and_only_labelled_positions_predict():
    model = build(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))).double()
    batch = collate(examples_of(masked_lm_example))
    parts = {part: record(model, batch, tied=part, loss_reduction="mean") for part in ("input", "output", "full")}
    for i in range(len(LENGTHS)):
        given, predicted, full = (dense(*parts[part][i], V) for part in ("input", "output", "full"))
        assert_same_rows((torch.arange(V), given + predicted), full, tolerance=1e-12)
        assert torch.linalg.matrix_rank(predicted) == batch["labels"][i].ne(-100).sum()


def test_the_factored_kernel_of_a_tied_model_is_that_of_its_full_rows():
    model, examples = build(gpt2).double().eval(), examples_of(causal_example, lengths=(6, 8))
    inputs, outputs = [], []
    for example in examples:
        with EmbeddingUses(model, projections=True) as uses:
            loss = num_terms(example, causal=True) * model(**example).loss
            (logit_grads,) = torch.autograd.grad(loss, uses.projections[0].output)
            outputs.append((uses.projections[0].inputs[0], logit_grads[0]))
        inputs.append(record(model, example)[0])
    full = [record(model, example, tied="full")[0] for example in examples]
    output = [record(model, example, tied="output")[0] for example in examples]
    torch.testing.assert_close(
        tied_score(inputs[0], outputs[0], inputs[1], outputs[1]),
        tracin_we_score(*full[0], *full[1]),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        last_layer_score(*outputs[0], *outputs[1]), tracin_we_score(*output[0], *output[1]), rtol=1e-12, atol=1e-12
    )


def test_the_input_part_touches_only_tokens_of_the_example_and_not_the_last_one():
    """A causal model's last token predicts nothing, so its gradient is exactly 0."""
    model, example = build(gpt2), examples_of(causal_example, lengths=(6,))[0]
    example["input_ids"][0] = torch.tensor([4, 5, 6, 5, 7, 8])
    tokens, rows = record(model, example)[0]
    assert tokens.tolist() == [4, 5, 6, 7, 8]
    assert rows[-1].count_nonzero() == 0
    assert (rows[:-1].norm(dim=1) > 0).all()
    assert record(model, example, tied="output")[0][0].tolist() == list(range(V))


def test_top_k_of_the_full_matrix_keeps_whole_rows():
    model, batch = build(gpt2), collate(examples_of(causal_example), position_ids=True)
    full = record(model, batch, tied="full")
    kept = record(model, batch, tied="full", top_k=4, top_k_unit="token")
    for (tokens, rows), (kept_tokens, kept_rows) in zip(full, kept, strict=True):
        largest = rows.norm(dim=1).argsort(descending=True)[:4].sort().values
        assert torch.equal(kept_tokens, tokens[largest])
        assert torch.equal(kept_rows, rows[largest])


@pytest.mark.parametrize(
    ("make", "make_example", "side"),
    [
        (gpt2, causal_example, "right"),
        (gpt2, causal_example, "left"),
        (gemma, causal_example, "right"),
        (t5, seq2seq_example, "right"),
    ],
)
def test_own_rows_are_those_of_the_whole_gradient_at_the_tokens_of_the_example_and_no_others(make, make_example, side):
    model, examples = build(make).double(), examples_of(make_example)
    for example in examples:
        example["input_ids"] = example["input_ids"] % 4 + 4  # tokens repeat
    batch = collate(examples, side=side, position_ids=make is gpt2)
    recorded, tolerance = record(model, batch, tied="own"), rounding(model, examples[0])
    for (tokens, rows), example in zip(recorded, examples, strict=True):
        terms = num_terms(example, causal=make_example is causal_example)
        gradient = dense_gradient(model, example, part="own", num_terms=terms)
        assert_same_rows((tokens, rows), gradient, tolerance=tolerance)
        assert torch.equal(tokens, tokens_read(model, example))
        ((alone, alone_rows),) = record(model, example, tied="own")
        assert torch.equal(alone, tokens)
        torch.testing.assert_close(alone_rows, rows, rtol=100 * tolerance, atol=tolerance)
    given = record(model, batch)
    assert torch.equal(recorded.offsets, given.offsets)
    assert torch.equal(recorded.tokens, given.tokens)


def test_labels_that_a_decoder_reads_only_in_front_of_padding_are_no_tokens_of_the_example():
    """Alone, a decoder never reads the last label; in a batch of longer ones it stands before the padding."""
    model, examples = build(t5), examples_of(seq2seq_example)
    batch = collate(examples)
    ready = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    for tied in ("input", "own"):
        for inputs in (batch, ready):
            for (tokens, _), example in zip(record(model, inputs, tied=tied), examples, strict=True):
                assert torch.equal(tokens, tokens_read(model, example))


def test_own_rows_are_scaled_dropped_and_cut_as_others_are():
    model, batch = build(gpt2), collate(examples_of(causal_example), position_ids=True)
    dropped = batch["input_ids"][0, :2].tolist()
    whole = record(model, batch, tied="own", loss_reduction="mean")
    kept = record(model, batch, tied="own", loss_reduction="mean", drop_token_ids=dropped)
    cut = record(model, batch, tied="own", loss_reduction="mean", drop_token_ids=dropped, top_k=2, top_k_unit="token")
    for i, example in enumerate(examples_of(causal_example)):
        gradient = dense_gradient(model, example, part="own")
        assert_same_rows(whole[i], gradient)
        gradient[dropped] = 0
        assert_same_rows(kept[i], gradient)
        assert not set(kept[i][0].tolist()) & set(dropped)
        largest = gradient.norm(dim=1).argsort(descending=True)[:2].sort().values
        assert torch.equal(cut[i][0], largest)
        torch.testing.assert_close(cut[i][1], gradient[largest], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "make_example"), [(lambda: gpt2(tied=False), causal_example), (bert, classification_example)]
)
def test_without_a_tied_output_layer_own_rows_are_those_of_the_input(make, make_example):
    model, batch = build(make), collate(examples_of(make_example), position_ids=make is not bert)
    own, given = record(model, batch, tied="own"), record(model, batch)
    assert torch.equal(own.offsets, given.offsets)
    assert torch.equal(own.tokens, given.tokens)
    assert torch.equal(own.rows, given.rows)


# The model is left as it was


def state_of(model):
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        copy.deepcopy(model.state_dict()),
    )


def assert_state(model, state):
    *expected, weights = state
    *actual, current = state_of(model)
    assert actual == expected
    for name, weight in weights.items():
        assert torch.equal(weight, current[name])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_exactly_even_after_an_error(fails):
    model, batch = build(bert), collate(examples_of(classification_example))
    model.bert.encoder.layer[0].eval()
    model.bert.pooler.dense.bias.requires_grad_(False)
    state = state_of(model)
    if fails:
        batch["input_ids"][0, 0] = V  # out of range: the lookup itself raises
        with pytest.raises(IndexError, match="index out of range"):
            record(model, batch)
    else:
        record(model, batch)
    assert_state(model, state)
    assert torch.overrides._get_current_function_mode() is None


def test_dropout_is_off_and_no_random_number_is_drawn():
    model, batch = build(bert), collate(examples_of(classification_example))
    state = torch.get_rng_state()
    first, second = record(model, batch), record(model, batch)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_after_its_first_batch_a_recorder_runs_one_forward_per_batch():
    model, batch = build(bert), collate(examples_of(classification_example))
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.record(batch)  # before it, its examples are compared with some of them alone
        sizes.clear()
        for _ in range(2):
            recorder.record(batch)
    assert sizes == [4, 4]


def test_rows_are_recorded_under_no_grad_and_hold_no_graph():
    model, batch = build(bert), collate(examples_of(classification_example))
    with torch.no_grad():
        recorded = record(model, batch)
    assert not recorded.rows.requires_grad
    assert self_influence(recorded[0][1]) > 0


# Frozen embeddings


@pytest.mark.parametrize("make", [lora, bert])
def test_frozen_embeddings_are_recorded_as_virtual_with_one_warning(make):
    model = build(make)
    model.get_input_embeddings().weight.requires_grad_(False)
    batch = collate(examples_of(classification_example if make is bert else causal_example))
    recorder = EmbeddingGradientRecorder(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with recorder:
                recorded = recorder.record(batch)
    assert ["frozen" in str(warning.message) for warning in caught] == [True]
    assert recorded.virtual
    assert model.get_input_embeddings().weight.grad is None
    model.get_input_embeddings().weight.requires_grad_(True)
    assert not record(model, batch).virtual


# Models made to be difficult


class Toy(nn.Module):
    """Mean of embeddings through one layer; `mix` sees all examples at once."""

    def __init__(self, *, mix=None, **embedding_options):
        super().__init__()
        self.embedding = nn.Embedding(V, 6, **embedding_options)
        self.layer = nn.Linear(6, 3)
        self.mix = mix

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, labels, attention_mask=None):
        embedded = self.embedding(input_ids)
        embedded *= 2.0  # in place, as some models do
        hidden = embedded.mean(dim=1).tanh()
        if self.mix is not None:
            hidden = self.mix(hidden)
        logits = self.layer(hidden)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def toy_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(V, (4, 5), generator=generator), "labels": torch.tensor([0, 1, 2, 1])}


def across_batch(hidden):
    return hidden + (hidden @ hidden.T).softmax(dim=1) @ hidden


def batch_normalised(hidden):
    return (hidden - hidden.mean(dim=0)) / (hidden.std(dim=0) + 0.1)


def test_a_model_that_writes_into_its_embeddings_is_recorded_exactly():
    model, batch = build(Toy), toy_batch()
    recorded = record(model, batch)
    assert len(recorded) == len(batch["labels"])
    for i, (tokens, rows) in enumerate(recorded):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        (gradient,) = torch.autograd.grad(model(**one).loss, model.embedding.weight)
        assert_same_rows((tokens, rows), gradient)


@pytest.mark.parametrize("mix", [across_batch, batch_normalised])
def test_a_model_whose_examples_see_each_other_is_refused(mix):
    with pytest.raises(ValueError, match="must not depend on its batch"):
        record(build(Toy, mix=mix), toy_batch())


def test_batch_normalisation_by_running_statistics_is_not_refused():
    model = build(Toy, mix=nn.BatchNorm1d(6))
    assert len(record(model, toy_batch())) == 4
    assert model.mix.num_batches_tracked == 0


@pytest.mark.parametrize("certainty", [12.0, 1e4])  # a tiny loss, and one that rounds to 0
def test_a_vanishing_loss_hides_nothing(certainty):
    model, batch = build(Toy, mix=across_batch), toy_batch()
    with torch.no_grad():
        model.layer.bias.copy_(torch.tensor([certainty, 0.0, 0.0]))
    with pytest.raises(ValueError, match="must not depend on its batch"):
        record(model, {**batch, "labels": torch.zeros(4, dtype=torch.long)})


class Regression(Toy):
    """A loss that no other label makes larger, and that is no mean over examples."""

    def forward(self, input_ids, labels, attention_mask=None):
        logits = super().forward(input_ids, torch.zeros_like(labels, dtype=torch.long)).logits
        return SimpleNamespace(loss=(logits[:, 0] - labels).square().sum(), logits=logits)


def test_a_vanishing_loss_without_classes_leaves_the_check_to_the_next_batch():
    model, batch = build(Regression), toy_batch()
    exact = model(batch["input_ids"], batch["labels"]).logits[:, 0].detach()
    with EmbeddingGradientRecorder(model) as recorder:
        recorder.record({**batch, "labels": exact})
        with pytest.raises(ValueError, match="must not depend on its batch"):
            recorder.record({**batch, "labels": exact + 1})


def test_a_loss_that_is_no_mean_over_labels_is_refused():
    """A mixture of experts adds a balancing loss over the whole batch."""
    config = transformers.MixtralConfig(
        **BODY, num_key_value_heads=1, num_local_experts=2, bos_token_id=2, eos_token_id=3, output_router_logits=True,
        router_aux_loss_coef=0.1,
    )  # fmt: skip
    model = build(lambda: transformers.MixtralForCausalLM(config))
    examples = examples_of(causal_example)
    with pytest.raises(ValueError, match="mean cross-entropy"):
        record(model, collate(examples))
    recorded = record(model, collate(examples), loss_fn=token_losses)
    config.output_router_logits = False
    for rows, example in zip(recorded, examples, strict=True):
        assert_same_rows(rows, dense_gradient(model, example, num_terms=num_terms(example, causal=True)))


def test_padding_without_a_mask_is_dropped_by_its_id():
    model, batch = build(bert), collate(examples_of(classification_example))
    del batch["attention_mask"]
    assert PAD not in record(model, batch).tokens  # BERT's own `padding_idx`
    model, batch = build(Toy), toy_batch()
    batch["input_ids"][:, -2:] = PAD
    assert PAD in record(model, batch).tokens
    assert PAD not in record(model, batch, pad_token_id=PAD).tokens


def test_a_training_forward_is_caught_without_changing_its_gradients():
    """What a recording in the training backward itself needs."""
    model, batch = build(gpt2), collate(examples_of(causal_example), position_ids=True)
    model.eval()
    model(**batch).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    caught = []
    with EmbeddingUses(model) as uses:
        loss = model(**batch).loss
        uses.lookups[0].output.register_hook(caught.append)
        loss.backward()
        with torch.no_grad():
            model(**batch)
        assert len(uses.lookups) == 1
    assert caught[0].shape == (4, 8, 16)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


# Bad input


def test_an_example_without_a_label_is_named():
    batch = collate(examples_of(causal_example))
    batch["labels"][2] = -100
    with pytest.raises(ValueError, match=r"those at \[2\] of the batch have none but -100"):
        record(build(llama), batch)
    batch["labels"][2, 0] = 5  # the first token, which a causal model does not predict
    with pytest.raises(ValueError, match=r"those at \[2\]"):
        record(build(llama), batch)
    with pytest.raises(ValueError, match=r"those at \[0, 1, 2, 3\]"):
        record(build(llama), {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_ready_embeddings_are_refused():
    batch = toy_batch()
    embeds = {"inputs_embeds": torch.zeros(4, 5, 6), "labels": batch["labels"]}
    with pytest.raises(ValueError, match="must hold `input_ids` and no ready embeddings"):
        record(build(bert), embeds)
    with pytest.raises(ValueError, match="must hold `input_ids` and no ready embeddings"):
        record(build(bert), {**embeds, **batch})


class Deaf(Toy):
    def forward(self, input_ids, labels):
        logits = self.layer(torch.ones(len(labels), 6))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def test_a_model_that_does_not_read_its_embeddings_is_refused():
    with pytest.raises(ValueError, match="did not read them"):
        record(build(Deaf), toy_batch())


class Sightless(Toy):
    def get_input_embeddings(self):
        return None


def test_a_model_without_input_embeddings_is_refused():
    vision = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4, patch_size=2
        )
    )
    for model in (nn.Linear(2, 2), Sightless(), vision):
        with pytest.raises(ValueError, match=r"(have|hold).*(input embeddings|one matrix)"):
            EmbeddingGradientRecorder(model)


class Transposed(Toy):
    def forward(self, input_ids, labels):
        logits = self.layer(self.embedding(input_ids.T).mean(dim=0).tanh())
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def test_a_model_that_reorders_its_batch_is_recorded_one_example_at_a_time_only():
    model, batch = build(Transposed), toy_batch()
    with pytest.raises(ValueError, match="one line per example"):
        record(model, batch)
    one = {key: value[:1] for key, value in batch.items()}
    (gradient,) = torch.autograd.grad(model(**one).loss, model.embedding.weight)
    assert_same_rows(record(model, one)[0], gradient)


def test_a_batch_without_loss_or_with_a_bad_one_is_refused():
    batch = collate(examples_of(classification_example))
    model = build(bert)
    with pytest.raises(ValueError, match="must return a loss"):
        record(model, {key: value for key, value in batch.items() if key != "labels"})
    with pytest.raises(ValueError, match=r"one loss per example, shape \(4,\), but its shape is \(\)"):
        record(model, batch, loss_fn=lambda outputs, batch: outputs.loss)
    with pytest.raises(ValueError, match="must be finite, but got nan"):
        record(model, batch, loss_fn=lambda outputs, batch: outputs.logits[:, 0] * torch.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: None, r"return a tensor with one loss per example, shape \(4,\), but it returned a NoneType"),
        (lambda losses: list(losses), "but it returned a list"),
        (lambda losses: losses.detach(), r"losses with a gradient, but those it returned have none \(torch.float32\)"),
        (lambda losses: losses.long(), r"losses with a gradient, but those it returned have none \(torch.int64\)"),
    ],
)
def test_what_a_loss_function_returns_is_refused_unless_it_is_losses_with_a_gradient(change, message):
    model, batch = build(llama).float(), collate(examples_of(causal_example))
    with pytest.raises(ValueError, match=f"`loss_fn` must .*{message}"):
        record(model, batch, loss_fn=lambda *args: change(token_losses(*args)))


def test_a_loss_function_may_take_the_labels_out_of_its_batch():
    model, batch = build(llama), collate(examples_of(causal_example))

    def taking(outputs, batch):
        return token_losses(outputs, {"labels": batch.pop("labels")})

    expected, found = (record(model, batch, loss_fn=loss_fn) for loss_fn in (token_losses, taking))
    assert "labels" in batch
    assert torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_reduction": "max"}, "`loss_reduction` must be one of"),
        ({"tied": "both"}, "`tied` must be one of"),
        ({"top_k": 0}, "must be at least 1"),
        ({"top_k": 2, "top_k_unit": "word"}, "`unit` must be one of"),
        ({"top_k": 2, "tied": "full"}, "must be 'token' with"),
        ({"top_k": 2, "tied": "own"}, "must be 'token' with"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingGradientRecorder(build(Toy), **options)


def test_the_output_part_of_an_untied_model_is_refused():
    with pytest.raises(ValueError, match="needs an output layer that multiplies by the embedding matrix"):
        record(build(gpt2, tied=False), collate(examples_of(causal_example), position_ids=True), tied="output")


@pytest.mark.parametrize("tied", ["full", "own"])
def test_a_tied_output_layer_that_is_not_seen_at_work_is_refused(tied):
    model = build(gpt2)
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T
    with pytest.raises(ValueError, match="in a way of its own"):
        record(model, collate(examples_of(causal_example), position_ids=True), tied=tied)


def test_a_refused_batch_leaves_nothing_behind_in_the_next():
    model, batch = build(Toy), toy_batch()
    with EmbeddingGradientRecorder(model) as recorder:
        model.forward = lambda **inputs: [Toy.forward(model, **inputs)]
        with pytest.raises(ValueError, match="must return a loss"):
            recorder.record(batch)
        del model.forward
        rest = {key: value[:3] for key, value in batch.items()}
        recorded = recorder.record(rest)
    assert torch.equal(recorded.rows, record(model, rest).rows)


def test_recording_outside_the_context_is_refused():
    recorder = EmbeddingGradientRecorder(build(Toy))
    with pytest.raises(RuntimeError, match="inside the context"):
        recorder.record(toy_batch())


def test_examples_of_a_recording_are_a_sequence():
    recorded = record(build(Toy), toy_batch())
    for i, (tokens, rows) in enumerate(recorded):
        assert torch.equal(recorded[i - 4][0], tokens)
        assert torch.equal(recorded[i][1], rows)
    with pytest.raises(IndexError, match="out of range"):
        recorded[4]
