"""Small trainings that are recorded online, and the slow reference they are compared with."""

import copy
import os
from functools import partial

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_doge.artifacts.influence import IndexReader
from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.tracing.online import OnlineRecording
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import VOCAB, tiny_classifier, tiny_gpt2, tiny_llama, tiny_t5

NUM_EXAMPLES = 12


class Online(TrainerCallback):
    def __init__(self, folder, dataset, tokenizer=None, **options):
        self.recording = OnlineRecording(
            folder,
            dataset=dataset,
            options=RecordingSettings(record="online", dtype="float32", **options),
            tokenizer=tokenizer,
        )
        self.learning_rates = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.recording.start(
            model=kwargs["model"], train_dataloader=kwargs["train_dataloader"], args=args, state=state
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.learning_rates.append(learning_rate)
        self.recording.before_optimizer_step(learning_rate=learning_rate, state=state)

    def on_save(self, args, state, control, **kwargs):
        name = f"checkpoint-{state.global_step}"
        facts = {
            "name": name,
            "step": state.global_step,
            "epoch": state.epoch,
            "learning_rate": self.learning_rates[-1],
        }
        self.recording.save({**facts, "path": os.path.join(args.output_dir, name)}, model=kwargs["model"])

    def on_train_end(self, args, state, control, **kwargs):
        self.recording.stop()


def texts(*, seed=0, lengths=(3, 9), num_examples=NUM_EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (num_examples,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def classifier_dataset(**kwargs):
    ids = texts(**kwargs)
    return Dataset.from_dict({"input_ids": ids, "labels": [sum(line) % 3 for line in ids]})


def language_dataset(*, masked=2, **kwargs):
    ids = texts(**kwargs)
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (i % masked) + line[i % masked :] for i, line in enumerate(ids)]}
    )


def pad(features):
    """Padded on the right, labels -100 there."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        ids, rest = feature["input_ids"], longest - len(feature["input_ids"])
        batch["input_ids"].append(ids + [0] * rest)
        batch["attention_mask"].append([1] * len(ids) + [0] * rest)
        labels = feature["labels"]
        batch["labels"].append(labels + [-100] * (longest - len(labels)) if isinstance(labels, list) else labels)
    return {name: torch.tensor(value) for name, value in batch.items()}


def arguments(folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "save_strategy": "epoch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**defaults, **kwargs})


def train(model, dataset, folder, *, callbacks=(), resume=None, collator=pad, trainer_class=Trainer, **kwargs):
    trainer = trainer_class(
        model, arguments(folder, **kwargs), train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def record(model, dataset, folder, *, resume=None, options=None, callbacks=(), **kwargs):
    online = Online(folder / "index", dataset, **(options or {}))
    trainer = train(model, dataset, folder / "out", callbacks=[online, *callbacks], resume=resume, **kwargs)
    return online, trainer


def index_rows(folder, *, checkpoint=0):
    reader = IndexReader.open(folder / "index", cache_dir=folder / "cache")
    rows = reader.example_rows(checkpoint, range(reader.num_examples))
    return [dense(torch.as_tensor(tokens), torch.as_tensor(values), reader.width) for tokens, values in rows]


def dense(tokens, rows, width):
    matrix = torch.zeros(VOCAB, width, dtype=torch.float64)
    matrix.index_add_(0, tokens.long(), rows.double())
    return matrix


class Watch(TrainerCallback):
    """Learns from outside which examples each step used: a collator that notes them, and the weights before each step."""

    def __init__(self, collator=pad):
        self.collator, self.collated, self.weights, self.rates = collator, [], [], []

    def __call__(self, features):
        self.collated.append([feature["input_ids"] for feature in features])
        return self.collator(features)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.weights.append(copy.deepcopy(kwargs["model"].state_dict()))
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def replayed(model, dataset, watch, *, accumulation=1, collator=pad, **options):
    """Each example's rows at the step that used it, one at a time through the recorder in evaluation mode."""
    width = model.get_input_embeddings().weight.shape[1]
    sums = [torch.zeros(VOCAB, width, dtype=torch.float64) for _ in range(len(dataset))]
    lines = dataset["input_ids"]
    for step, (weights, rate) in enumerate(zip(watch.weights, watch.rates, strict=True)):
        model.load_state_dict(weights)
        for batch in watch.collated[step * accumulation : (step + 1) * accumulation]:
            for line in batch:
                example = lines.index(line)
                with EmbeddingGradientRecorder(model, **options) as recorder:
                    ((tokens, rows),) = recorder.record(collator([dataset[example]]))
                sums[example] += rate * dense(tokens, rows, width)
    return sums


def assert_rows(found, expected, *, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6 * float(torch.stack(expected).abs().max()))


MODELS = {
    "classifier": (tiny_classifier, classifier_dataset),
    "gpt2": (tiny_gpt2, language_dataset),
    "llama": (tiny_llama, language_dataset),
    "t5": (tiny_t5, partial(language_dataset, masked=1)),
}


class Still(torch.optim.SGD):
    """An optimizer that moves nothing: every step sees the same weights."""

    def step(self, closure=None):
        return None


def still(model, lr=0.5):
    schedule = {"optimizers": (Still(model.parameters(), lr=lr), None)}

    class StillTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **schedule)

    return {"trainer_class": StillTrainer, "lr_scheduler_type": "constant"}


def all_hooks(model):
    return [
        dict(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        if hooks
    ]


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt("stopped by the test")
