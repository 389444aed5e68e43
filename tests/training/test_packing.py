"""Packed texts: trained on and learned on as if each text had a row of its own."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from hf_doge.training.config import DoGEConfig
from hf_doge.training.metrics_callback import DomainMetricsCallback
from hf_doge.training.packing import EXAMPLE_LENGTHS, LengthsCollator, PackingMixin, pick_from_line
from hf_doge.training.step_gradients import MicroBatch
from hf_doge.training.trainer import DoGETrainer
from hf_doge.training.units import read_lengths
from tests.gradients.test_fused_head import assert_close, is_plain, take_step
from tests.gradients.test_fused_head import make_trainer as make_doge_trainer
from tests.gradients.test_single_pass import tiny_gemma
from tests.one_layer import tiny_gpt2, tiny_llama
from tests.tiny import tiny_tokenizer
from tests.training.packing_processes import LENGTHS, LOW, packable, targets
from tests.training.test_domain_metrics import ONE, Noting, logs_of
from tests.training.test_mixture import arguments, make_sft_trainer


def owner_of(ids):
    (name,) = {name for token in ids for name, low in LOW.items() if low <= token < low + 8}
    return name


def texts_of(call):
    """Tokens and labels of each text of a batch, by itself."""
    ids, labels = call["input_ids"], call["labels"]
    if "position_ids" not in call:
        mask = call["attention_mask"].bool()
        return [(ids[row][mask[row]], labels[row][mask[row]]) for row in range(len(ids))]
    starts = call["position_ids"][0].eq(0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    return [(ids[0, start:end], labels[0, start:end]) for start, end in zip(starts, ends, strict=True)]


def separate_losses(model, calls):
    """Mean loss of each domain, one text at a time, and its number of labels."""
    sums, counts = dict.fromkeys(LOW, 0.0), dict.fromkeys(LOW, 0)
    for ids, labels in (text for call in calls for text in texts_of(call)):
        if not labels[1:].ne(-100).any():
            continue
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        owner = owner_of(ids.tolist())
        sums[owner] += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        counts[owner] += int((labels[1:] != -100).sum())
    return {name: sums[name] / counts[name] for name in LOW if counts[name]}, {n: c for n, c in counts.items() if c}


PACKED = {
    "bfd": {"packing": True},
    "bfd of several lines": {"packing": True, "pad_to_multiple_of": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "wrapped and padding-free": {"packing": True, "packing_strategy": "wrapped", "padding_free": True},
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_trainer_tells_the_losses_of_packed_domains(tmp_path, tokenizer, kind, implementation):
    options = {
        "max_length": 16,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        **ONE,
        **PACKED[kind],
    }
    trainer = make_sft_trainer(tmp_path, tokenizer, packable(masked=0.3), **options)
    trainer.model.set_attn_implementation(implementation)
    noted = Noting(trainer.model)
    trainer.train()
    calls = [call for call in noted.calls if call is not None]
    assert len(calls) == 2
    assert not any(EXAMPLE_LENGTHS in call for call in calls)
    losses, counts = separate_losses(trainer.model.eval(), calls)
    (logs,) = logs_of(trainer).values()
    assert {name: logs[f"domain_loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-5)
    assert {name: logs[f"domain_tokens/{name}"] for name in counts} == counts
    assert (logs["domain_share/arxiv"], logs["domain_share/books"]) == (0.5, 0.0)  # of the packed rows
    rows = len(trainer.train_dataset) / 3
    assert logs["domain_epochs/code"] == pytest.approx(3 / rows)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_a_packed_row_is_of_one_domain_and_no_token_is_lost(tmp_path, tokenizer, strategy):
    trainer = make_sft_trainer(
        tmp_path, tokenizer, packable(), **{"max_length": 16, "packing": True, "packing_strategy": strategy}
    )
    data = trainer.train_dataset
    names = data.features["domain"].names
    found = dict.fromkeys(LOW, ())
    for ids, label in zip(data["input_ids"], data["domain"], strict=True):
        assert owner_of(ids) == names[label]
        found[names[label]] += tuple(ids)
    expected = {name: sorted(token for ids in one["input_ids"] for token in ids) for name, one in packable().items()}
    assert {name: sorted(tokens) for name, tokens in found.items()} == expected
    assert len(data) < 3 * len(LENGTHS)


def test_tokens_without_a_loss_stay_so_where_texts_are_packed(tmp_path, tokenizer):
    trainer = make_sft_trainer(tmp_path, tokenizer, packable(masked=0.3), max_length=16, packing=True)
    found = set()
    for position in range(len(trainer.train_dataset)):
        batch = trainer.data_collator.collator.collator([trainer.train_dataset[position]])
        found |= {(tuple(ids.tolist()), tuple(labels[1:].tolist())) for ids, labels in texts_of(batch)}
    rows = [row for data in packable(masked=0.3).values() for row in data]
    assert found == {(tuple(row["input_ids"]), tuple(row["labels"][1:])) for row in rows}
    assert any(-100 in labels for _, labels in found)


class Forgetful:
    """Packs as trl 0.26 does: labels are lost."""

    def _prepare_dataset(self, dataset, packing):
        return dataset.remove_columns("labels")


class Packing(PackingMixin, Forgetful):
    _domain_column = "domain"


def test_a_trainer_that_loses_labels_where_it_packs_is_refused():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[-100, 2], [3, 4]], "domain": ["a", "b"]})
    with pytest.raises(ValueError, match=r"drops the `labels` of what it packs.*Update trl"):
        Packing()._prepare_dataset(rows, packing=True)
    assert len(Packing()._prepare_dataset(rows.select([1]), packing=True)) == 1  # every token has a loss anyway
    assert "labels" not in Packing()._prepare_dataset(rows, packing=False).column_names


def test_token_shares_count_what_a_packed_row_is_trained_on(tmp_path, tokenizer):
    trainer = make_sft_trainer(tmp_path, tokenizer, packable(masked=0.3), unit="tokens", max_length=16, packing=True)
    rows = [trainer.train_dataset[position] for position in range(len(trainer.train_dataset))]
    trained = [int((trainer.data_collator.collator.collator([row])["labels"][:, 1:] != -100).sum()) for row in rows]
    assert read_lengths(trainer, "tokens").tolist() == trained


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma": tiny_gemma}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What a step on all texts, one in a row, learns."""
    folder = tmp_path_factory.mktemp("unpacked")
    options = {"alignment": "per_domain", "max_length": 16, "per_device_train_batch_size": 27}
    return {
        kind: take_step(
            folder, tiny_tokenizer(), make_model(), data=packable(masked=0.3, unlabelled_starts=True), **options
        )[1]
        for kind, make_model in MODELS.items()
    }


@pytest.mark.parametrize(  # every two of the three meet
    ("kind", "alignment", "accumulate"),
    [
        (kind, alignment, (1, 3)[(row + column) % 2])
        for row, kind in enumerate(MODELS)
        for column, alignment in enumerate(("per_domain", "streamed", "single_pass"))
    ],
)
def test_what_is_learned_of_packed_texts_is_what_is_learned_of_each_by_itself(
    tmp_path, tokenizer, unpacked, kind, alignment, accumulate
):
    trainer, found = take_step(
        tmp_path,
        tokenizer,
        MODELS[kind](),
        data=packable(masked=0.3, unlabelled_starts=True),
        alignment=alignment,
        packing=True,
        max_length=16,
        per_device_train_batch_size=9 // accumulate,
        gradient_accumulation_steps=accumulate,
    )
    assert len(trainer.train_dataset) == 9
    assert is_plain(trainer) == (alignment != "single_pass")
    assert not getattr(trainer._learner.alignment, "_step_is_plain", False)
    assert_close(found, unpacked[kind], tolerance=1e-5)


@pytest.mark.parametrize("alignment", ["per_domain", "single_pass"])
def test_so_it_is_towards_a_target(tmp_path, tokenizer, alignment):
    options = {"data": packable(), "target": targets(), "max_length": 16, "per_device_target_batch_size": 3}
    _, expected = take_step(tmp_path, tokenizer, alignment="per_domain", per_device_train_batch_size=27, **options)
    _, found = take_step(
        tmp_path, tokenizer, alignment=alignment, packing=True, per_device_train_batch_size=9, **options
    )
    assert_close(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("alignment", ["per_domain", "single_pass"])
def test_a_collator_that_lays_texts_end_to_end_changes_nothing(tmp_path, alignment):
    """Without trl: its rows are texts of unequal length."""
    data = packable(masked=0.3)
    options = {
        "per_device_train_batch_size": 27,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    found = {}
    for name, collator in {
        "padded": DataCollatorForSeq2Seq(tiny_tokenizer()),
        "flat": DataCollatorWithFlattening(),
    }.items():
        way = alignment if name == "flat" else "per_domain"
        args = DoGEConfig(str(tmp_path), mu=0.1, alignment=way, save_strategy="no", **options)
        trainer = DoGETrainer(tiny_llama(), args, train_dataset=data, data_collator=collator)
        trainer.train()
        point = trainer.domain_weights.trajectory
        found[name] = {what: torch.from_numpy(getattr(point, what)) for what in ("scores", "losses", "weights")}
    assert_close(found["flat"], found["padded"], tolerance=1e-5)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("alignment", ["per_domain", "single_pass"])
def test_wrapped_rows_are_examples_like_others(tmp_path, tokenizer, alignment, padding_free):
    options = {"max_length": 16, "per_device_train_batch_size": 9}
    wrapped = {"packing": True, "packing_strategy": "wrapped", "padding_free": padding_free}
    trainer, found = take_step(tmp_path, tokenizer, data=packable(), alignment=alignment, **wrapped, **options)
    rows = trainer.train_dataset.to_pandas().groupby("domain")
    names = trainer.train_dataset.features["domain"].names
    blocks = {
        names[label]: Dataset.from_dict({key: list(map(list, some[key])) for key in ("input_ids", "labels")})
        for label, some in rows
    }
    assert [len(one) for one in blocks.values()] == [3, 3, 3]
    _, expected = take_step(tmp_path, tokenizer, data=blocks, alignment="per_domain", **options)
    assert_close(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("packing", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_a_training_learns_its_weights_on_packed_texts(tmp_path, tokenizer, packing):
    options = {"mode": "online", "reweight_steps": 2, "max_steps": 4, "mu": 0.001, "logging_steps": 1}
    trainer = make_doge_trainer(
        tmp_path,
        tokenizer,
        tiny_gpt2(dropout=0.1),
        data=packable(),
        target=targets(),
        **{**options, "per_device_train_batch_size": 3, **packing},
    )
    trainer.train()
    weights = trainer.domain_weights
    assert weights.last["code"] > 0.5  # whose words the target has
    assert weights.trajectory.weights.shape == (2, 3)
    assert trainer._learner.state.num_examples.sum() == 12
    log = next(log for log in trainer.state.log_history if "domain_epochs/code" in log)
    assert sum(log[f"domain_epochs/{name}"] for name in LOW) > 0
    assert trainer.evaluate(targets())["eval_loss"] > 0


def test_learning_is_refused_where_attention_goes_across_texts(tmp_path, tokenizer):
    def ignore_texts(model, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}

    options = {"data": packable(), "packing": True, "max_length": 16, "per_device_train_batch_size": 9}
    trainer = make_doge_trainer(tmp_path, tokenizer, **options)
    trainer.model.register_forward_pre_hook(ignore_texts, with_kwargs=True)
    with pytest.raises(ValueError, match="The loss must be a sum over the labels"):
        trainer.train()


def test_the_callback_tells_packed_texts_apart(tmp_path, tokenizer):
    from trl import SFTConfig, SFTTrainer, pack_dataset

    packed = {name: pack_dataset(one, seq_length=16) for name, one in packable(masked=0.3).items()}
    data = concatenate_datasets([one.add_column("domain", [name] * len(one)) for name, one in packed.items()])
    options = {**ONE, "max_length": None, "padding_free": True, "bf16": False, "per_device_train_batch_size": 9}
    trainer = SFTTrainer(
        tiny_llama(), arguments(tmp_path, SFTConfig, **options), train_dataset=data, processing_class=tokenizer
    )
    trainer.add_callback(DomainMetricsCallback(trainer))
    noted = Noting(trainer.model)
    trainer.train()
    (call,) = noted.calls
    losses, counts = separate_losses(trainer.model.eval(), [call])
    (logs,) = logs_of(trainer).values()
    assert {name: logs[f"domain_loss/{name}"] for name in LOW} == pytest.approx(losses, rel=1e-5)
    assert {name: logs[f"domain_tokens/{name}"] for name in LOW} == counts
    assert [logs[f"domain_share/{name}"] for name in LOW] == pytest.approx([1 / 3] * 3)


def collate(rows, **options):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return LengthsCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, **options))(rows)


ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]},
    {"input_ids": [6, 7, 8], "labels": [6, -100, 8], "seq_lengths": [3]},
    {"input_ids": [9, 1, 2, 3], "labels": [9, 1, 2, 3], "seq_lengths": [1, 1, 2]},
]


@pytest.mark.parametrize("order", [[0], [2, 0], [0, 1, 2], [1, 1]])
def test_examples_of_a_line_are_picked_as_if_they_had_been_collated_alone(order):
    expected = collate([ROWS[position] for position in order])
    found = pick_from_line(collate(ROWS, pad_to_multiple_of=8), torch.tensor(order))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
        assert torch.as_tensor(found[name]).dtype == torch.as_tensor(value).dtype, name


def test_a_text_that_would_be_predicted_from_another_is_refused():
    batch = collate(ROWS)
    batch["labels"] = batch["input_ids"]
    with pytest.raises(ValueError, match="first token of each text of a line must have the label -100"):
        MicroBatch(batch, torch.tensor([0, 1, 0]), labels_are_shifted=True)


def test_labels_of_a_line_are_counted_by_example():
    batch = MicroBatch(collate(ROWS, pad_to_multiple_of=8), torch.tensor([0, 1, 0]), labels_are_shifted=True)
    assert batch.items.tolist() == [3, 1, 1]
