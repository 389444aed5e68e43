"""What `compare` measures of targets, and that its arms differ by their weights alone."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed

from hf_doge.artifacts import DomainWeights
from hf_doge.training.adaptation import Adaptation, calibrated_loss, fit_inverse_temperature
from hf_doge.training.compare import compare_mixtures
from tests.one_layer import tiny_llama
from tests.tiny import language_model_rows, three_domains


def rows(**kwargs):
    return Dataset.from_dict(language_model_rows(8, **kwargs)).with_format("torch")


def collate(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def arguments(folder, **kwargs):
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 6, "save_strategy": "no"}
    return TrainingArguments(
        str(folder), **{**defaults, "use_cpu": True, "report_to": [], "disable_tqdm": True, **kwargs}
    )


def test_the_temperature_is_the_best_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(400, 9, generator=generator)
    labels = torch.distributions.Categorical(logits=logits / 3).sample()
    scale = fit_inverse_temperature(logits, labels)
    losses = {b / 100: F.cross_entropy(logits * b / 100, labels).item() for b in range(5, 200)}
    assert scale == pytest.approx(min(losses, key=losses.get), abs=0.01)
    assert scale == pytest.approx(1 / 3, abs=0.06)


def test_the_temperature_of_a_model_that_is_always_right_stays_finite():
    logits = torch.eye(5) * 3
    assert math.isfinite(fit_inverse_temperature(logits, torch.arange(5)))


def test_a_calibrated_loss_is_that_of_the_scaled_logits_and_at_most_the_plain_one(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # over-confident
    trainer = Trainer(model, arguments(tmp_path), data_collator=collate)
    train, validation = rows(seed=1, masked=0.3), rows(seed=2, masked=0.3)
    batch = collate(list(validation))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    found = calibrated_loss(trainer, train, validation)
    fitted = collate(list(train))
    with torch.no_grad():
        own = model(input_ids=fitted["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = fitted["labels"][:, 1:].flatten()
    scale = fit_inverse_temperature(own[targets != -100], targets[targets != -100])
    assert found == pytest.approx(F.cross_entropy(logits * scale, labels).item(), rel=1e-5)
    assert found < F.cross_entropy(logits, labels).item()


def test_adapting_is_a_training_on_the_target_and_leaves_the_model_as_it_was(tmp_path):
    train, validation = rows(seed=1), rows(seed=2)
    trainer = Trainer(tiny_llama(), arguments(tmp_path), data_collator=collate)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    measured = Adaptation({"ca": train}, steps=(3,), learning_rate=3e-3).measure(trainer, {"ca": validation})
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    set_seed(trainer.args.seed)
    plain = Trainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=3, learning_rate=3e-3),
        train_dataset=train,
        data_collator=collate,
    )
    plain.train()
    batch = collate(list(validation))
    with torch.no_grad():
        loss = plain.model.eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert measured["adapted_3"]["ca"] == pytest.approx(loss, rel=1e-6)


def test_the_arms_of_a_seed_differ_by_their_weights_alone(tmp_path):
    names = ("arxiv", "books", "code")
    mixtures = {
        "uniform": DomainWeights.uniform(names),
        "again": DomainWeights.from_mapping({"code": 1, "books": 1, "arxiv": 1}),
        "tilted": DomainWeights.from_mapping({"arxiv": 2, "books": 1, "code": 1}),
    }
    domains = {name: dataset.with_format("torch") for name, dataset in three_domains(12).items()}
    seen = {}

    def make_watched():
        model = tiny_llama()

        def note(_, inputs, kwargs):
            if model.training:
                seen.setdefault(len(comparisons), []).extend(map(tuple, kwargs["input_ids"].tolist()))

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    comparisons = []
    for mixture in mixtures:
        comparison = compare_mixtures(
            make_watched,
            arguments(tmp_path / mixture),
            mixtures={mixture: mixtures[mixture]},
            seeds=[1],
            train_dataset=domains,
            eval_dataset={**domains, "ca": rows(seed=5)},
            data_collator=collate,
            tokens_per_example=8,
            identity={},
            adaptation=Adaptation({"ca": rows(seed=6)}, steps=(2,)),
        )
        comparisons.append(comparison.runs[0])
    uniform, again, tilted = comparisons
    assert again.losses == uniform.losses
    assert again.target_losses == uniform.target_losses
    assert set(uniform.target_losses) == {"calibrated", "adapted_2"}
    assert tilted.losses != uniform.losses

    def order_inside(run):
        kinds = {tuple(row): name for name, dataset in domains.items() for row in dataset["input_ids"][:].tolist()}
        found = {name: [] for name in domains}
        for row in seen[run]:
            if row in kinds:
                found[kinds[row]].append(row)
        return found

    first, other = order_inside(0), order_inside(2)
    for name in domains:
        shared = min(len(first[name]), len(other[name]))
        assert shared > 2
        assert first[name][:shared] == other[name][:shared]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": (0,)}, "`steps` must be at least 1"),
        ({"steps": (3, 3)}, "must be different"),
        ({"learning_rate": math.inf}, "positive and finite"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adaptation({"ca": rows()}, **arguments)


def test_a_target_without_text_is_refused_by_name():
    with pytest.raises(ValueError, match="'ca'"):
        Adaptation({"ca": rows().select([])})
