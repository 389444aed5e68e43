"""`record="online"`: interrupted, resumed, and what lies on disk between saves."""

import json

import pytest
import torch

from hf_doge.functional.tracin_we import batch_token_gradient_rows
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.tracing.online import PARTIAL
from hf_doge.tracing.online_spill import RowSpill, merged_rows, read_segments
from tests.tiny import tiny_classifier, tiny_gpt2
from tests.tracing.online_training import (
    Interrupt,
    assert_rows,
    classifier_dataset,
    index_rows,
    language_dataset,
    record,
    still,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


LONG = {
    "num_train_epochs": 3,  # 9 steps
    "save_strategy": "steps",
    "save_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}


def gradient_files(folder):
    config = json.loads((folder / "index" / "config.json").read_text())
    facts = [{**checkpoint, "path": None} for checkpoint in config["checkpoints"]]
    return facts, {
        path.name: path.read_bytes() for path in sorted((folder / "index" / "gradients").rglob("*.parquet"))
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    record(tiny_gpt2(dropout=0.1), language_dataset(), folder, **LONG)
    return gradient_files(folder)


@pytest.mark.parametrize("step", [5, 7, 8])
def test_an_interrupted_and_resumed_training_leaves_the_same_index(tmp_path, uninterrupted, step):
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, callbacks=[Interrupt(step)], **LONG)
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=True, **LONG)
    assert gradient_files(tmp_path) == uninterrupted
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_a_save_that_failed_is_made_good_when_the_training_is_resumed(tmp_path, uninterrupted, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_doge.artifacts.influence.checkpoint_writer.write_atomically", full_disk)
        with pytest.raises(OSError, match="No space left"):
            record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, **LONG)
    assert (tmp_path / "out" / "checkpoint-4").exists()
    assert json.loads((tmp_path / "index" / "config.json").read_text())["checkpoints"] == []
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=True, **LONG)
    assert gradient_files(tmp_path) == uninterrupted


def test_going_back_to_an_older_checkpoint_records_nothing_twice(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        record(tiny_gpt2(dropout=0.1), language_dataset(), tmp_path, callbacks=[Interrupt(9)], **LONG)
    resume = str(tmp_path / "out" / "checkpoint-4")
    record(tiny_gpt2(dropout=0.1, seed=1), language_dataset(), tmp_path, resume=resume, **LONG)
    assert gradient_files(tmp_path) == uninterrupted


def test_steps_without_rows_are_told(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        train(tiny_gpt2(), language_dataset(), tmp_path / "out", callbacks=[Interrupt(5)], **LONG)
    with pytest.warns(UserWarning, match="steps from 1 to 4 were trained without their rows"):
        record(tiny_gpt2(), language_dataset(), tmp_path, resume=True, **LONG)
    facts, _ = gradient_files(tmp_path)
    assert [checkpoint["step"] for checkpoint in facts] == [8, 9]


def test_steps_after_the_last_save_are_told(tmp_path):
    with pytest.warns(UserWarning, match="steps from 1 on were trained after the last save"):
        record(tiny_classifier(), classifier_dataset(), tmp_path, save_strategy="no")
    assert not (tmp_path / "index" / PARTIAL).exists()


def test_another_training_is_refused_in_the_same_folder(tmp_path):
    record(tiny_classifier(), classifier_dataset(), tmp_path)
    with pytest.raises(ValueError, match="has recorded a training up to step 3"):
        record(tiny_classifier(), classifier_dataset(), tmp_path)


def random_rows(generator, num_examples, *, width=3, vocabulary_size=7):
    ids = torch.randint(vocabulary_size, (num_examples, 5), generator=generator)
    grads = torch.randn(num_examples, 5, width, generator=generator)
    return TokenRows(*batch_token_gradient_rows(ids, grads), virtual=False)


@pytest.mark.parametrize("max_bytes", [1, 100, 400, 10**6])
def test_spilled_rows_are_summed_by_example_and_token(tmp_path, max_bytes):
    generator = torch.Generator().manual_seed(0)
    size = {"width": 3, "vocabulary_size": 7, "max_bytes": max_bytes}
    expected = torch.zeros(9, 7, 3, dtype=torch.float64)
    folders, spills = [tmp_path / "a", tmp_path / "b"], []
    for folder in folders:
        spill = RowSpill(folder, **size)
        for step in range(6):
            example_ids = torch.randint(1, 8, (3,), generator=generator)  # examples 0 and 8 are never used
            rows = random_rows(generator, 3)
            lengths = rows.offsets.diff()
            factors = torch.full((len(rows.tokens),), 0.5 + step)
            spill.add(example_ids.repeat_interleave(lengths), rows.tokens, rows.rows, factors=factors)
            for example, (tokens, values) in zip(example_ids.tolist(), rows, strict=True):
                expected[example].index_add_(0, tokens, (0.5 + step) * values.double())
        spill.close({})
        spills.append(spill)
    for first in (0, 4):
        blocks = list(
            merged_rows(spills[0].read() + read_segments(folders[1]), num_examples=9, first_example=first, **size)
        )
        if max_bytes < 10**6:
            assert len(blocks) > 1
        found = [dense_rows for block in blocks for dense_rows in block]
        assert len(found) == 9 - first
        for (tokens, values), rows in zip(found, expected[first:], strict=True):
            assert (tokens.diff() > 0).all()
            torch.testing.assert_close(
                torch.zeros(7, 3, dtype=torch.float64).index_add_(0, tokens, values.double()),
                rows,
                rtol=1e-5,
                atol=1e-5,
            )


def test_small_segments_change_nothing(tmp_path):
    found = []
    for name, max_segment_bytes in (("small", 512), ("large", 2**26)):
        model = tiny_gpt2()
        options = {"max_segment_bytes": max_segment_bytes}
        record(model, language_dataset(), tmp_path / name, options=options, num_train_epochs=2, **still(model))
        found.append([index_rows(tmp_path / name, checkpoint=number) for number in (0, 1)])
    for one, other in zip(*found, strict=True):
        assert_rows(one, other, rtol=1e-6)
