"""
The failures of the two other recorders for the Trainer (../shared/papers/attribution_peers.md, section 5), as laws that
`TracInWECallback` keeps. Those of `record="online"` are in test_tracing_online*.py.
"""

import warnings

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_doge.artifacts.influence import IndexReader
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.callback import TracInWECallback
from tests.tiny import tiny_classifier, tiny_gpt2
from tests.tracing.recorded_training import (
    assert_rows_are_autograd,
    causal_collator,
    classification_data,
    language_data,
    make_trainer,
    segments,
    single_examples,
    train,
)


def all_rows(reader, checkpoint=0):
    return reader.example_rows(checkpoint, list(range(reader.num_examples)))


def assert_same_rows(rows, others, *, tolerance=1e-5):
    assert len(rows) == len(others)
    for (tokens, values), (other_tokens, other_values) in zip(rows, others, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        assert np.linalg.norm(values - other_values) <= tolerance * np.linalg.norm(other_values)


def test_a_classifier_is_recorded(tmp_path, tokenizer):
    reader = train(tmp_path, tokenizer=tokenizer)
    for position, step in enumerate((2, 4)):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        assert_rows_are_autograd(reader, position, model, classification_data())


def test_rows_do_not_depend_on_the_batch_not_even_on_a_short_last_one(tmp_path, tokenizer):
    """Eleven examples in batches of 1, of 8 (the last one has 3), and each by a recorder of its own."""
    recorded = {}
    for batch_size in (1, 8):
        options = {"batch_size": batch_size, "dtype": "float32"}
        recorded[batch_size] = all_rows(train(tmp_path / str(batch_size), tokenizer=tokenizer, recording=options))
    assert_same_rows(recorded[8], recorded[1])
    model = BertForSequenceClassification.from_pretrained(tmp_path / "8" / "run" / "checkpoint-2")
    with EmbeddingGradientRecorder(model) as recorder:
        alone = [recorder.record(example)[0] for example in single_examples(classification_data())]
    assert_same_rows(recorded[8], [(tokens.numpy(), rows.numpy()) for tokens, rows in alone])


def test_rows_do_not_depend_on_the_training_batch_or_its_accumulation(tmp_path, tokenizer):
    recorded = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        reader = train(tmp_path / str(batch_size), tokenizer=tokenizer, learning_rate=0.0, max_steps=2, **options)
        recorded.append(all_rows(reader))
    assert_same_rows(*recorded)


def test_two_epochs_are_two_checkpoints_also_when_nothing_moves(tmp_path, tokenizer):
    reader = train(
        tmp_path, tokenizer=tokenizer, learning_rate=0.0, max_steps=-1, num_train_epochs=2, save_strategy="epoch"
    )
    assert [checkpoint["name"] for checkpoint in reader.checkpoints] == ["checkpoint-3", "checkpoint-6"]
    assert [checkpoint["epoch"] for checkpoint in reader.checkpoints] == [1.0, 2.0]
    assert_same_rows(all_rows(reader, 0), all_rows(reader, 1), tolerance=0)
    assert all(np.abs(rows).sum() > 0 for _, rows in all_rows(reader, 0))


@pytest.mark.parametrize("accumulation", [2, 3])
def test_every_example_of_every_micro_batch_is_recorded(tmp_path, tokenizer, accumulation):
    reader = train(
        tmp_path,
        tokenizer=tokenizer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_rows_are_autograd(reader, 0, model, classification_data())


def test_a_resumed_training_has_each_example_once_with_its_rows(tmp_path, tokenizer):
    whole = train(tmp_path / "whole", tokenizer=tokenizer, max_steps=8)
    callback = TracInWECallback(tmp_path / "index", dtype="float32", layers="embedding")
    make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, max_steps=8).train()
    for step in (6, 8):  # as if training had stopped after its fourth step
        for leftover in sorted((tmp_path / "run" / f"checkpoint-{step}").iterdir()):
            leftover.unlink()
        (tmp_path / "run" / f"checkpoint-{step}").rmdir()
    resumed = train(tmp_path, tokenizer=tokenizer, max_steps=8, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert [checkpoint["step"] for checkpoint in resumed.checkpoints] == [2, 4, 6, 8]
    assert segments(resumed) == segments(whole)


def test_a_training_that_stopped_early_and_resumes_records_what_an_unbroken_one_does(tmp_path, tokenizer):
    whole = train(tmp_path / "whole", tokenizer=tokenizer, max_steps=8)
    callback = TracInWECallback(tmp_path / "index", dtype="float32", layers="embedding")
    trainer = make_trainer(tmp_path / "run", callback, tokenizer=tokenizer, max_steps=8)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer.add_callback(Stop())
    trainer.train()
    assert [checkpoint["step"] for checkpoint in IndexReader.open(tmp_path / "index").checkpoints] == [2, 4]
    resumed = train(tmp_path, tokenizer=tokenizer, max_steps=8, resume=True)
    assert [checkpoint["step"] for checkpoint in resumed.checkpoints] == [2, 4, 6, 8]
    assert segments(resumed) == segments(whole)
    rates = [[entry["learning_rate"] for entry in reader.checkpoints] for reader in (whole, resumed)]
    assert rates[0] == rates[1]


def test_equal_examples_stay_two_examples(tmp_path, tokenizer):
    data = classification_data()
    data = data.select([0, 1, 0, 2, 3, 1])
    reader = train(tmp_path, tokenizer=tokenizer, dataset=data)
    hashes = reader.examples["content_hash"]
    assert hashes[0] == hashes[2]
    assert hashes[1] == hashes[5]
    assert len(set(hashes)) == 4
    assert reader.examples["example_id"] == list(range(6))
    rows = all_rows(reader)
    assert_same_rows([rows[0], rows[1]], [rows[2], rows[5]])
    self_influence = reader.self_influence(0)
    assert self_influence.shape == (6,)
    assert self_influence[0] == pytest.approx(self_influence[2])


@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_frozen_embeddings_are_recorded_as_virtual_and_warned_of_once(tmp_path, tokenizer, how):
    if how == "frozen":
        model, data, collator, causal = tiny_classifier(), classification_data(), None, False
        model.get_input_embeddings().weight.requires_grad_(False)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        data, collator, causal = language_data(), causal_collator(tokenizer), True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = train(tmp_path, tokenizer=tokenizer, model=model, dataset=data, collator=collator)
    assert sum("virtual" in str(warning.message) for warning in caught) == 1
    assert reader.config["virtual"] is True
    assert [checkpoint["step"] for checkpoint in reader.checkpoints] == [2, 4]
    assert_rows_are_autograd(reader, 1, model, data, causal=causal)
    assert not model.get_input_embeddings().weight.requires_grad


def test_each_checkpoint_has_the_learning_rate_of_the_step_that_led_there(tmp_path, tokenizer):
    reader = train(tmp_path, tokenizer=tokenizer, learning_rate=0.01, lr_scheduler_type="linear")
    rates = [checkpoint["learning_rate"] for checkpoint in reader.checkpoints]
    assert rates == pytest.approx(
        [0.01 * 3 / 4, 0.01 * 1 / 4]
    )  # steps 2 and 4 of 4; the next one's would be 1/2 and 0


def test_the_learning_rate_is_that_of_the_parameter_group_of_the_embeddings(tmp_path, tokenizer):
    model = tiny_classifier()
    matrix = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not matrix]
    optimizer = torch.optim.SGD([{"params": others, "lr": 0.5}, {"params": [matrix], "lr": 0.125}])
    reader = train(
        tmp_path, tokenizer=tokenizer, model=model, optimizers=(optimizer, None), lr_scheduler_type="constant"
    )
    assert [checkpoint["learning_rate"] for checkpoint in reader.checkpoints] == [0.125, 0.125]
