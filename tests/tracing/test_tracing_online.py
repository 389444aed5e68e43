"""`record="online"`: rows caught in the training backward are those of each example alone at the step that used it."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, TrainerCallback

from hf_doge import InfluenceIndex
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.online import PARTIAL
from hf_doge.tracing.online_identity import EXAMPLE_IDS
from tests.tiny import tiny_classifier, tiny_gpt2
from tests.tracing.online_training import (
    MODELS,
    Online,
    Watch,
    all_hooks,
    assert_rows,
    classifier_dataset,
    dense,
    index_rows,
    language_dataset,
    pad,
    record,
    replayed,
    still,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_each_example_alone_at_the_step_that_used_it(tmp_path, name, reduction):
    make_model, make_dataset = MODELS[name]
    model, dataset, watch = make_model(), make_dataset(), Watch()
    accumulation, batch_size = 2, 5  # 12 examples: batches of 5, 5 and 2, steps of two and one of them
    record(
        model,
        dataset,
        tmp_path,
        callbacks=[watch],
        collator=watch,
        options={"loss_reduction": reduction},
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    expected = replayed(make_model(), dataset, watch, accumulation=accumulation, loss_reduction=reduction)
    assert all(rows.abs().max() > 0 for rows in expected)
    assert_rows(index_rows(tmp_path), expected)


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_batch_size_or_accumulation(tmp_path, name):
    make_model, make_dataset = MODELS[name]
    found = []
    for number, (batch_size, accumulation) in enumerate([(1, 1), (8, 1), (2, 3), (5, 2)]):
        model = make_model()
        folder = tmp_path / str(number)
        record(
            model,
            make_dataset(),
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **still(model),
        )
        found.append(index_rows(folder))
    for other in found[1:]:
        assert_rows(other, found[0], rtol=1e-5)


def test_uses_in_several_epochs_add_up(tmp_path):
    found = []
    for epochs in (1, 3):
        model = tiny_classifier()
        folder = tmp_path / str(epochs)
        options = {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 1000}
        record(model, classifier_dataset(), folder, **options, **still(model))
        found.append(index_rows(folder))
    assert_rows(found[1], [3 * rows for rows in found[0]], rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_dropout", *MODELS])
def test_training_is_the_same_bit_for_bit(tmp_path, name):
    make_model, make_dataset = {**MODELS, "gpt2_dropout": (partial(tiny_gpt2, dropout=0.2), language_dataset)}[name]
    runs = []
    for folder, watched in (("with", True), ("without", False)):
        model, dataset = make_model(), make_dataset()
        run = record if watched else train
        result = run(
            model,
            dataset,
            tmp_path / folder,
            optim="adamw_torch",
            logging_strategy="steps",
            logging_steps=1,
            eval_strategy="no",
            gradient_accumulation_steps=2,
            num_train_epochs=2,
        )
        trainer = result[1] if watched else result
        runs.append((model.state_dict(), [entry.get("loss") for entry in trainer.state.log_history], torch.rand(1)))
    (weights, losses, draw), (other_weights, other_losses, other_draw) = runs
    assert losses == other_losses
    assert draw == other_draw
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key


def test_everything_is_put_back(tmp_path):
    model, dataset = tiny_gpt2(), language_dataset()
    features, fingerprint = dict(dataset.features), dataset._fingerprint
    loaders = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            loaders.append(kwargs["train_dataloader"])

    _, trainer = record(model, dataset, tmp_path, callbacks=[Look()])
    assert trainer.train_dataset is dataset
    assert trainer.data_collator is pad
    assert (dict(dataset.features), dataset._fingerprint) == (features, fingerprint)
    assert loaders[0].dataset.column_names == dataset.column_names
    assert loaders[0].collate_fn is pad
    assert all_hooks(model) == []
    assert EXAMPLE_IDS not in next(iter(loaders[0]))
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_equal_examples_stay_apart(tmp_path):
    lines = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7]]
    dataset = Dataset.from_dict({"input_ids": lines, "labels": [0, 0, 1, 0]})
    model = tiny_classifier()
    record(model, dataset, tmp_path, per_device_train_batch_size=2, **still(model))
    rows = index_rows(tmp_path)
    assert_rows([rows[1], rows[3]], [rows[0], rows[0]], rtol=1e-5)
    assert rows[0][5].abs().max() > 0


def test_learning_rates_are_in_the_rows_and_the_checkpoint_weighs_one(tmp_path):
    model, watch = tiny_classifier(), Watch()
    dataset = classifier_dataset()
    online, _ = record(model, dataset, tmp_path, callbacks=[watch], collator=watch, warmup_steps=2)
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    assert [checkpoint["learning_rate"] for checkpoint in config["checkpoints"]] == [1.0]
    assert online.learning_rates[0] == 0.0
    assert len(set(online.learning_rates)) == 3
    rows = index_rows(tmp_path)
    for line in watch.collated[0]:
        assert rows[dataset["input_ids"].index(line)].abs().max() == 0
    assert_rows(rows, replayed(tiny_classifier(), dataset, watch))


def test_an_online_index_is_searched_like_any_other(tmp_path):
    dataset, queries = classifier_dataset(), classifier_dataset(seed=5, num_examples=3)
    record(tiny_classifier(), dataset, tmp_path, num_train_epochs=2)
    index = InfluenceIndex.from_pretrained(tmp_path / "index", cache_dir=tmp_path / "cache")
    expected = 0
    for position, checkpoint in enumerate(index.reader.checkpoints):
        model = BertForSequenceClassification.from_pretrained(checkpoint["path"])
        rows = torch.stack(index_rows(tmp_path, checkpoint=position)).flatten(1)
        with EmbeddingGradientRecorder(model) as recorder:
            asked = [dense(*recorder.record(pad([query]))[0], 16) for query in queries]
        expected = expected + torch.stack(asked).flatten(1) @ rows.T
    assert len(index.reader.checkpoints) == 2
    torch.testing.assert_close(torch.from_numpy(index.scores(queries)).double(), expected, rtol=1e-4, atol=1e-7)
    hits = index.search(queries, top_k=len(dataset))
    assert len(hits) > 0
    for hit in hits:
        assert hit["score"] == pytest.approx(float(expected[hit["query"], hit["example_id"]]), rel=1e-3, abs=1e-7)
        assert sum(hit["word_scores"]) == pytest.approx(hit["score"], rel=1e-6, abs=1e-12)
        assert (hit["kind"] == "proponent") == (hit["score"] > 0)
    assert "<article" in index.to_html(hits)
    assert index.scores(queries, kernel="synonym", synonym_threshold=0.3).shape == (3, len(dataset))
    with pytest.raises(ValueError, match="Self-influence needs an index with `record='checkpoint'`"):
        index.self_influence()


def test_frozen_embeddings_are_recorded_as_virtual(tmp_path):
    model, watch = tiny_classifier(), Watch()
    model.get_input_embeddings().weight.requires_grad_(False)
    dataset = classifier_dataset()
    with pytest.warns(UserWarning, match="frozen"):
        record(model, dataset, tmp_path, callbacks=[watch], collator=watch)
    rows = index_rows(tmp_path)
    assert all(row.abs().max() > 0 for row in rows)
    assert_rows(rows, replayed(tiny_classifier(), dataset, watch))


@pytest.mark.parametrize("unit", ["position", "token"])
def test_top_k_truncates_each_step(tmp_path, unit):
    model = tiny_classifier()
    options = {"top_k_tokens": 2, "top_k_unit": unit}
    record(model, classifier_dataset(), tmp_path / "top", options=options, **still(model, lr=1.0))
    with EmbeddingGradientRecorder(tiny_classifier(), top_k=2, top_k_unit=unit) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in classifier_dataset()]
    assert_rows(index_rows(tmp_path / "top"), expected)
    assert all(0 < int((row != 0).any(dim=1).sum()) <= 2 for row in index_rows(tmp_path / "top"))


def test_special_tokens_are_dropped_on_request(tmp_path, tokenizer):
    found = {}
    for special_tokens in ("count", "drop"):
        model, dataset = tiny_classifier(), classifier_dataset()
        online = Online(tmp_path / special_tokens / "index", dataset, tokenizer, special_tokens=special_tokens)
        train(model, dataset, tmp_path / special_tokens / "out", callbacks=[online], **still(model))
        found[special_tokens] = index_rows(tmp_path / special_tokens)
    special = list(tokenizer.all_special_ids)
    assert sum(rows[special].abs().sum() for rows in found["count"]) > 0
    for rows in found["count"]:
        rows[special] = 0
    assert_rows(found["drop"], found["count"], rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": None, "max_grad_norm": 0.01},
    ],
    ids=["workers", "persistent", "drop_last", "checkpointing", "clipping"],
)
def test_rows_of_unusual_trainings(tmp_path, settings):
    model, dataset = tiny_gpt2(), language_dataset()
    record(model, dataset, tmp_path, **{**settings, **still(model, lr=1.0)})
    with EmbeddingGradientRecorder(tiny_gpt2()) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in dataset]
    rows = index_rows(tmp_path)
    used = [i for i, row in enumerate(rows) if row.abs().max() > 0]
    assert len(used) == (10 if "dataloader_drop_last" in settings else 12)
    assert_rows([rows[i] for i in used], [expected[i] for i in used])


def test_evaluations_during_training_leave_no_rows(tmp_path):
    found = []
    for strategy in ("no", "steps"):
        model, dataset = tiny_gpt2(), language_dataset()

        class Evaluating(still(model)["trainer_class"]):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, eval_dataset=language_dataset(seed=1), **kwargs)

        options = {"trainer_class": Evaluating, "lr_scheduler_type": "constant", "eval_steps": 1}
        record(model, dataset, tmp_path / strategy, eval_strategy=strategy, **options)
        found.append(index_rows(tmp_path / strategy))
    assert_rows(*found)


def test_half_precision_agrees_up_to_its_rounding(tmp_path):
    model, dataset = tiny_gpt2(), language_dataset()
    record(model, dataset, tmp_path, bf16=True, **still(model, lr=1.0))
    with EmbeddingGradientRecorder(tiny_gpt2()) as recorder:
        expected = [dense(*recorder.record(pad([example]))[0], 16) for example in dataset]
    for found, row in zip(index_rows(tmp_path), expected, strict=True):
        assert (found - row).norm() < 0.05 * row.norm()
