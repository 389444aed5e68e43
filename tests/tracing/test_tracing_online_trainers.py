"""`record="online"` in the trainers of transformers, trl and ours, through the callback."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_doge import DoGEConfig, DoGETrainer, DomainWeightedTrainer
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.callback import TracInWECallback
from hf_doge.tracing.online_capture import TrainingCapture
from hf_doge.tracing.online_identity import EXAMPLE_IDS
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import tiny_bert, tiny_classifier, tiny_gpt2, tiny_llama, tiny_t5
from tests.tracing.online_training import (
    MODELS,
    Online,
    Still,
    arguments,
    assert_rows,
    classifier_dataset,
    dense,
    index_rows,
    language_dataset,
    pad,
    record,
    still,
    texts,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def online(tmp_path, **options):
    return TracInWECallback(tmp_path / "index", record="online", dtype="float32", **options)


def optimizers(model, lr=1.0):
    return Still(model.parameters(), lr=lr), None


def alone(model, dataset, collator=pad):
    with EmbeddingGradientRecorder(model) as recorder:
        return [dense(*recorder.record(collator([example]))[0], 16) for example in dataset]


def test_the_callback_records_online(tmp_path):
    model, dataset = tiny_classifier(), classifier_dataset()
    train(model, dataset, tmp_path / "out", callbacks=[online(tmp_path)], **still(model, lr=1.0))
    assert_rows(index_rows(tmp_path), alone(tiny_classifier(), dataset))


def test_seq2seq_trainer(tmp_path):
    model, dataset = tiny_t5(), language_dataset(masked=1)
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "out"), num_train_epochs=1, lr_scheduler_type="constant", report_to=[], use_cpu=True
    )
    Seq2SeqTrainer(
        model,
        args,
        train_dataset=dataset,
        data_collator=pad,
        callbacks=[online(tmp_path)],
        optimizers=optimizers(model),
    ).train()
    assert_rows(index_rows(tmp_path), alone(tiny_t5(), dataset))


def sft_trainer(tmp_path, tokenizer, **options):
    from trl import SFTConfig, SFTTrainer

    words = [" ".join(f"w{token % 28}" for token in line) for line in texts()]
    model = tiny_gpt2()
    args = SFTConfig(
        str(tmp_path / "out"),
        num_train_epochs=1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        **options,
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": words}),
        processing_class=tokenizer,
        callbacks=[online(tmp_path)],
        optimizers=optimizers(model),
    )


def test_sft_trainer(tmp_path, tokenizer):
    trainer = sft_trainer(tmp_path, tokenizer)
    trainer.train()
    collator = trainer.data_collator
    assert_rows(index_rows(tmp_path), alone(tiny_gpt2(), list(trainer.train_dataset), collator))


def test_a_loss_that_weighs_tokens_is_refused_in_sft_trainer(tmp_path, tokenizer):
    # Transformers 5.0 takes the labels away from the model, which then has no loss; later the weights are what is noticed.
    with pytest.raises(ValueError, match=r"use `record='checkpoint'`"):
        sft_trainer(tmp_path, tokenizer, loss_type="dft").train()


def test_domain_weighted_trainer(tmp_path):
    model = tiny_gpt2()
    dataset = language_dataset().add_column("domain", ["a", "b", "b"] * 4)
    trainer = DomainWeightedTrainer(
        model,
        arguments(tmp_path / "out", lr_scheduler_type="constant"),
        train_dataset=dataset,
        domain_weights={"a": 0.5, "b": 0.5},
        data_collator=pad,
        callbacks=[online(tmp_path)],
        optimizers=optimizers(model),
    )
    trainer.train()
    rows = alone(tiny_gpt2(), dataset.remove_columns("domain"))
    uses = [
        round(float((one * other).sum() / (other * other).sum()))
        for one, other in zip(index_rows(tmp_path), rows, strict=True)
    ]
    assert_rows(index_rows(tmp_path), [count * row for count, row in zip(uses, rows, strict=True)])
    assert sum(uses) == 12
    assert sum(uses[0::3]) == 6  # four examples of domain a, drawn as often as the eight of b


def test_trainings_that_reweight_examples_are_refused(tmp_path):
    class Weighing(still(tiny_gpt2(), lr=1.0)["trainer_class"]):
        def compute_loss(self, model, inputs, **kwargs):
            weight = 1.0 + (inputs["input_ids"] == 7).any()
            return weight * super().compute_loss(model, inputs, **kwargs)

    with pytest.raises(ValueError, match="must weigh the same"):
        record(
            tiny_gpt2(),
            language_dataset(),
            tmp_path,
            trainer_class=Weighing,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=6,
        )


def test_learning_domain_weights_is_refused(tmp_path):
    args = DoGEConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=3,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    dataset = language_dataset().add_column("domain", ["a", "b", "b"] * 4)
    trainer = DoGETrainer(tiny_gpt2(), args, train_dataset=dataset, data_collator=pad, callbacks=[online(tmp_path)])
    with pytest.raises(ValueError, match="domain weights that change"):
        trainer.train()


def test_lora_is_recorded_as_virtual(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_gpt2(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]))
    with pytest.warns(UserWarning, match="frozen"):
        record(model, language_dataset(), tmp_path, **still(model, lr=1.0))
    # LoRA begins as the identity
    assert_rows(index_rows(tmp_path), alone(tiny_gpt2(), language_dataset()))


def test_padding_on_the_left_changes_no_row(tmp_path):
    def pad_left(features):
        batch = pad(features)
        shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        return {
            name: torch.stack([line.roll(shift) for line, shift in zip(value, shifts, strict=True)])
            for name, value in batch.items()
        }

    model = tiny_llama()
    record(model, language_dataset(), tmp_path, collator=pad_left, **still(model, lr=1.0))
    assert_rows(index_rows(tmp_path), alone(tiny_llama(), language_dataset()))


def test_masked_language_models_are_recorded_with_the_masks_of_each_step(tmp_path, tokenizer):
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    batches = []

    def collate(features):
        lines = [feature["input_ids"] for feature in features]
        batches.append((lines, masking(features)))
        return batches[-1][1]

    model, dataset = tiny_bert(), Dataset.from_dict({"input_ids": texts()})
    record(model, dataset, tmp_path, collator=collate, **still(model, lr=1.0))
    expected = [torch.zeros(32, 16, dtype=torch.float64) for _ in dataset]
    unlabelled = 0
    with EmbeddingGradientRecorder(tiny_bert()) as recorder:
        for lines, batch in batches:
            for position, line in enumerate(lines):
                few = {key: value[position : position + 1] for key, value in batch.items() if key != EXAMPLE_IDS}
                if (few["labels"] == -100).all():
                    unlabelled += 1  # nothing masked in this step: the example has no loss, and no row
                else:
                    expected[dataset["input_ids"].index(line)] += dense(*recorder.record(few)[0], 16)
    assert unlabelled > 0
    assert_rows(index_rows(tmp_path), expected)


def test_text_is_padded_by_the_tokenizers_collator(tmp_path, tokenizer):
    model, dataset = tiny_classifier(), classifier_dataset()
    collator = DataCollatorWithPadding(tokenizer)
    record(model, dataset, tmp_path, collator=collator, **still(model, lr=1.0))
    assert_rows(index_rows(tmp_path), alone(tiny_classifier(), dataset, collator))


@pytest.mark.parametrize("factor", [2.0**16, 1e-3])
@pytest.mark.parametrize("name", MODELS)
def test_the_scale_of_the_loss_drops_out(name, factor):
    make_model, make_dataset = MODELS[name]
    model, batch = make_model(), pad(make_dataset()[:4] and [make_dataset()[i] for i in range(4)])
    model.train()
    with TrainingCapture(model, settings=RecordingSettings(record="online")) as capture:
        (model(**batch, **{EXAMPLE_IDS: torch.arange(4)}).loss * factor).backward()
        found = [torch.zeros(32, 16, dtype=torch.float64) for _ in range(4)]
        for caught in capture.take():
            rows = caught.rows * caught.factors[:, None]
            for example in range(4):
                own = caught.examples == example
                found[example] += dense(caught.tokens[own], rows[own], 16)
    assert_rows(found, alone(make_model(), [make_dataset()[i] for i in range(4)]))


def test_a_step_that_the_loss_scaler_skips_has_no_rows(tmp_path):
    class Overflow(TrainerCallback):
        """Does to the first step what float16 does when it overflows."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            recording._args = SimpleNamespace(**{**vars(args), "fp16": True, "process_index": 0, "world_size": 1})
            if state.global_step == 0:
                next(kwargs["model"].parameters()).grad[0] = torch.inf

    model, dataset = tiny_classifier(), classifier_dataset()
    callback = Online(tmp_path / "index", dataset)
    recording = callback.recording
    train(model, dataset, tmp_path / "out", callbacks=[Overflow(), callback], **still(model))
    used = [bool(rows.abs().max() > 0) for rows in index_rows(tmp_path)]
    assert sum(used) == 8  # two of three steps, of four examples each
