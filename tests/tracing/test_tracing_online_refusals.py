"""`record="online"`: trainings whose examples or scale cannot be told are refused, and nothing is left behind."""

import pytest
import torch
from transformers import Trainer

from hf_doge.tracing.online_identity import EXAMPLE_IDS, IdentifiedBatches
from tests.tiny import tiny_classifier, tiny_gpt2
from tests.tracing.online_training import (
    Online,
    Still,
    all_hooks,
    assert_rows,
    classifier_dataset,
    index_rows,
    language_dataset,
    pad,
    record,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def refuse(tmp_path, match, *, model=None, **kwargs):
    with pytest.raises(ValueError, match=match):
        record(model or tiny_gpt2(), language_dataset(), tmp_path, **kwargs)


def test_streams_are_refused(tmp_path):
    stream = language_dataset().to_iterable_dataset()
    online = Online(tmp_path / "index", language_dataset())
    with pytest.raises(ValueError, match="examples by position"):
        train(tiny_gpt2(), stream, tmp_path / "out", callbacks=[online], max_steps=2)


@pytest.mark.parametrize("other", [language_dataset(num_examples=5), language_dataset(seed=5)], ids=["size", "tokens"])
def test_another_dataset_is_refused(tmp_path, other):
    online = Online(tmp_path / "index", other)
    with pytest.raises(ValueError, match="Leave `dataset` out"):
        train(tiny_gpt2(), language_dataset(), tmp_path / "out", callbacks=[online])


def test_collators_that_pack_are_refused(tmp_path):
    def flatten(features):
        return {
            name: torch.tensor([[token for feature in features for token in feature[name]]])
            for name in ("input_ids", "labels")
        }

    refuse(tmp_path, "one line per example", collator=flatten)


def test_collators_that_sort_are_refused(tmp_path):
    def longest_first(features):
        return pad(sorted(features, key=lambda feature: -len(feature["input_ids"])))

    refuse(tmp_path, "keep the order of examples", collator=longest_first)


def test_packing_is_refused(tmp_path):
    class PackingTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.packing = True

    refuse(tmp_path, "packed sequences", trainer_class=PackingTrainer)


def test_label_smoothing_is_refused(tmp_path):
    refuse(tmp_path, "label smoothing", label_smoothing_factor=0.1)


def with_loss(function):
    class LossTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = function(outputs, inputs)
            return (loss, outputs) if return_outputs else loss

    return LossTrainer


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda outputs, inputs: outputs.loss + outputs.logits.pow(2).mean(), "multiple of the loss"),
        (lambda outputs, inputs: outputs.logits.pow(2).mean(), "backward did not come through it"),
    ],
    ids=["more", "another"],
)
def test_losses_beside_the_models_own_are_refused(tmp_path, function, match):
    refuse(tmp_path, match, trainer_class=with_loss(function))


def test_a_multiple_of_the_models_loss_leaves_the_rows_as_they_are(tmp_path):
    found = []
    for name, factor in (("one", 1.0), ("other", 0.125)):
        model = tiny_classifier()

        class Scaled(with_loss(lambda outputs, inputs, factor=factor: outputs.loss * factor)):
            def __init__(self, model, *args, **kwargs):
                super().__init__(model, *args, optimizers=(Still(model.parameters(), lr=0.5), None), **kwargs)

        record(model, classifier_dataset(), tmp_path / name, trainer_class=Scaled, lr_scheduler_type="constant")
        found.append(index_rows(tmp_path / name))
    assert_rows(found[1], found[0], rtol=1e-6)


def test_a_loss_function_of_the_trainer_is_refused(tmp_path):
    class LossFunctionTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=lambda outputs, labels, **kw: outputs.logits.mean(), **kwargs)

    refuse(tmp_path, "cannot be recorded online.*must return a loss", trainer_class=LossFunctionTrainer)


def test_batches_that_lose_their_identity_are_refused(tmp_path):
    class PickingTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    refuse(tmp_path, "with all its keys", trainer_class=PickingTrainer)


def test_a_refused_training_leaves_the_model_as_it_was(tmp_path):
    for number, function in enumerate((lambda outputs, inputs: outputs.logits.mean(), lambda outputs, inputs: None)):
        model = tiny_gpt2()
        smoothing = {"label_smoothing_factor": 0.1} if number else {}
        refuse(tmp_path / str(number), "online", model=model, trainer_class=with_loss(function), **smoothing)
        assert all_hooks(model) == []
        assert model.training


def test_losses_that_mix_examples_are_refused(tmp_path):
    class Mixing(type(tiny_gpt2())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = outputs.loss**2
            return outputs

    refuse(tmp_path, "mean cross-entropy", model=Mixing(tiny_gpt2().config), remove_unused_columns=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tied": "full"}, "input part only"),
        ({"tied": "own"}, "input part only, but `tied` is 'own'"),
        ({"loss_fn": lambda outputs, batch: None}, "got another as `loss_fn`"),
    ],
)
def test_options_without_a_meaning_online_are_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        Online(tmp_path, language_dataset(), **options)


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    refuse(
        tmp_path,
        "Gradients must be finite",
        trainer_class=with_loss(lambda outputs, inputs: outputs.loss * torch.inf),
        gradient_checkpointing=True,  # where the first backward is not compared
    )


def test_identified_batches_need_examples_by_position():
    loader = torch.utils.data.DataLoader([1, 2, 3], batch_size=None)
    with pytest.raises(ValueError, match="no batch sampler"):
        IdentifiedBatches(loader)


def test_plain_datasets_and_negative_positions_are_identified():
    rows = [{"input_ids": [number], "labels": 0} for number in range(5)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=[[0, -1], [3, 2]], collate_fn=pad)
    with IdentifiedBatches(loader):
        found = [(batch[EXAMPLE_IDS].tolist(), batch["input_ids"].flatten().tolist()) for batch in loader]
    assert found == [([0, 4], [0, 4]), ([3, 2], [3, 2])]
    assert loader.dataset is rows
    assert loader.collate_fn is pad
