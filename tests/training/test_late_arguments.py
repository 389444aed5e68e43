"""What is set in the arguments after a trainer was made counts from train begin, as a hyperparameter search sets it."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains, tiny_tokenizer

QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 3}


class SearchedTrainer(DoGETrainer):
    """Sets the arguments of a trial where a hyperparameter search sets them, inside of `train`."""

    trial: ClassVar = {}

    def _hp_search_setup(self, trial):
        for name, value in self.trial.items():
            setattr(self.args, name, value)
        super()._hp_search_setup(trial)


def make_trainer(folder, cls=SearchedTrainer, **changes):
    data = {
        "train_dataset": changes.pop("train_dataset", three_domains(8)),
        "target_dataset": three_domains(6)["code"],
    }
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.05, "optim": "sgd", "mu": 0.1, **QUIET, **changes}
    return cls(None, DoGEConfig(str(folder), **options), model_init=lambda: tiny_llama(), **data)


def learned(trainer):
    weights = trainer.domain_weights
    recipe = {name: value for name, value in weights.recipe.items() if name != "arguments"}
    arguments = {name: value for name, value in weights.recipe["arguments"].items() if name != "hub_weights_id"}
    training = {k: v for k, v in weights.metadata["training"].items() if k != "seconds"}
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return (
        weights.mean,
        weights.last,
        weights.trajectory.scores.tolist(),
        recipe,
        arguments,
        training,
        parameters.tolist(),
    )


CHANGES = [
    {"mu": 5.0, "smoothing": 0.1},
    {"recipe": "official"},
    {"normalization": "cosine", "self_term": False},
    {"seed": 7},
    {"per_device_train_batch_size": 9, "alignment": "streamed", "alignment_parameters": "mlp"},
    {"per_device_target_batch_size": 1, "reweight_steps": 2, "trajectory_steps": 2},
    {"mode": "online", "sampler_lag_steps": 3, "seed": 7, "mu": 0.01},
    {"recipe": "paper", "shrinkage": True, "min_spread": 2.0},
    {"mean_weighting": "inverse_variance"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes))
def test_a_trial_of_a_search_is_the_run_of_a_trainer_made_for_it(tmp_path, changes):
    first = {"mode": changes.get("mode", "proxy")}
    trainer = make_trainer(tmp_path, **first)
    trainer.train()

    trainer.trial = changes
    trainer.train()
    made = make_trainer(tmp_path, **changes)
    made.train()
    assert learned(trainer) == learned(made)


class Searching(Trainer):
    """Sets up a trial as the Trainer's own search does."""

    trial = None

    def _hp_search_setup(self, trial):
        for name, value in self.trial.items():
            setattr(self.args, name, value)


class LearningSearching(DoGEMixin, Searching):
    pass


@pytest.mark.parametrize("changes", [{}, {"mu": 5.0, "seed": 7, "per_device_train_batch_size": 9, "max_steps": 4}])
def test_a_trial_without_a_model_yet_is_the_run_of_a_trainer_made_for_it(tmp_path, changes):
    trainer = make_trainer(tmp_path, cls=LearningSearching, save_strategy="steps", save_steps=2)
    for trainer.trial in ({"mu": 0.3}, {"mu": 0.1, **changes}):
        trainer.model = None  # as a search leaves it behind; `model_init` makes that of a trial
        trainer.train()
    made = make_trainer(tmp_path / "made", **changes)
    made.train()
    assert learned(trainer)[:3] + learned(trainer)[5:] == learned(made)[:3] + learned(made)[5:]
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="must go on as it began"):
        make_trainer(tmp_path, **{**changes, "mu": 0.3}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_arguments_set_between_two_trainings_count_from_the_second(tmp_path):
    trainer = make_trainer(tmp_path)
    found = []
    for mu in (0.1, 5.0, 0.1):
        trainer.args.mu = mu
        trainer.train()
        found.append(learned(trainer))
        assert trainer.domain_weights.recipe["mu"] == trainer.domain_weights.recipe["arguments"]["mu"] == mu
    assert found[0] == found[2] != found[1]


def test_arguments_set_after_the_training_are_not_recorded_of_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = learned(trainer)
    trainer.args.mu, trainer.args.learning_rate, trainer.args.seed, trainer.args.reweight_steps = 5.0, 1.0, 3, 4
    assert learned(trainer) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", "online", "`mode` must stay what the trainer was made with, 'proxy', but is 'online' now"),
        ("domain_column", "kind", "`domain_column` must stay"),
        ("mu", -1.0, "`mu` must be"),
        ("fp16", True, "fp16 loss scaling"),
        ("per_device_train_batch_size", 2, "2 examples a step cannot hold 3 domains"),
        ("auto_find_batch_size", True, "`auto_find_batch_size`"),
        ("label_smoothing_factor", 0.1, "`label_smoothing_factor` must stay what the trainer was made with, 0.0"),
        ("neftune_noise_alpha", 5.0, "`neftune_noise_alpha` must stay"),
        ("bf16", True, "`bf16` must stay"),
    ],
)
def test_what_may_not_change_is_refused_at_train_begin(tmp_path, name, value, message):
    trainer = make_trainer(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_schedule_set_by_its_name_is_recorded(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    assert trainer.domain_weights.metadata["training"]["lr_scheduler_type"] == "constant"


def test_what_else_may_not_be_set_late_is_refused_in_words(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.data_collator = default_data_collator
    with pytest.raises(ValueError, match="Pass `data_collator` when the trainer is made"):
        trainer.train()
    trainer = make_trainer(tmp_path)
    trainer.args = TrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="`args` must be a `DoGEConfig`, but is a TrainingArguments now"):
        trainer.train()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.select(range(5)),
        lambda data: data.select(range(len(data))[::-1]),
        lambda data: {"a": data},
        lambda data: data.remove_columns("domain"),
        lambda data: None,
    ],
)
def test_another_train_set_is_refused(tmp_path, change):
    trainer = mix(tmp_path)
    trainer.train_dataset = change(trainer.train_dataset)
    with pytest.raises(ValueError, match="`train_dataset` must stay what the trainer was made with"):
        trainer.train()


def test_the_same_train_set_with_another_column_is_taken(tmp_path):
    first, second = mix(tmp_path), mix(tmp_path)
    second.train_dataset = second.train_dataset.add_column("extra", range(24))
    assert drawn(first) == drawn(second)


def drawn(trainer):
    seen, collate = [], trainer.data_collator

    def watch(features):
        seen.append([feature["input_ids"] for feature in features])
        return collate(features)

    trainer.data_collator = watch
    trainer.train()
    trainer.data_collator = collate
    return seen[2:][: trainer.state.global_step]  # the first batch is collated thrice


def mix(folder, **changes):
    ours = {name: changes.pop(name) for name in ("train_dataset", "unit") if name in changes}
    args = TrainingArguments(str(folder), **{"per_device_train_batch_size": 4, **QUIET, **changes})
    options = {"train_dataset": three_domains(8), "domain_weights": {"arxiv": 0.6, "books": 0.3, "code": 0.1}} | ours
    return DomainWeightedTrainer(tiny_llama(), args, max_epochs_per_domain=1.0, **options)


@pytest.mark.parametrize(
    "changes", [{"seed": 3}, {"per_device_train_batch_size": 5}, {"max_steps": 4}, {"data_seed": 9}]
)
def test_a_mixture_is_drawn_by_the_arguments_at_train_begin(tmp_path, changes):
    trainer = mix(tmp_path)
    sampler = trainer.domain_sampler
    drawn(trainer)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    assert drawn(trainer) == drawn(mix(tmp_path, **changes))
    assert trainer.domain_sampler is sampler
    assert np.isclose(sum(sampler.effective_weights.values()), 1)


def test_the_seed_of_streams_may_not_change(tmp_path):
    streams = {name: data.to_iterable_dataset() for name, data in three_domains().items()}
    args = TrainingArguments(str(tmp_path), **QUIET)
    weights = dict.fromkeys(streams, 1.0)
    trainer = DomainWeightedTrainer(tiny_llama(), args, train_dataset=streams, domain_weights=weights)
    args.seed = 3
    with pytest.raises(ValueError, match=r"seed of a mixture of streams must stay .* 42, but is 3 now"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_dataset", three_domains(6)["arxiv"]),
        ("target_weights", {"target": 2.0}),
        ("initial_weights", {"arxiv": 0.8, "books": 0.1, "code": 0.1}),
        ("max_epochs_per_domain", 2.0),
        ("unit", "tokens"),
        ("draw", "iid"),
        ("domain_sampler", None),
    ],
)
def test_an_argument_that_a_trainer_reads_when_it_is_made_may_not_be_set_later(tmp_path, name, value):
    for trainer in (make_trainer(tmp_path), mix(tmp_path)):
        setattr(trainer, name, value)
        with pytest.raises(ValueError, match=f"`{name}` is read when the trainer is made, but was set later"):
            trainer.train()


@pytest.mark.parametrize(("name", "value"), [("domain_weights", {"arxiv": 1.0}), ("domain_column", "source")])
def test_weights_and_their_column_may_not_be_set_later(tmp_path, name, value):
    trainer = mix(tmp_path)
    setattr(trainer, name, value)
    with pytest.raises(ValueError, match=f"`{name}` is read when the trainer is made, but was set later"):
        trainer.train()


def test_another_model_is_refused_which_a_trainer_would_leave_untrained(tmp_path):
    trainer = mix(tmp_path)
    trainer.model = tiny_llama(seed=5)
    with pytest.raises(ValueError, match="`model` must stay what the trainer was made with"):
        trainer.train()
    trainer.model_wrapped = trainer.model  # where the Trainer looks for what it trains
    trainer.train()
    trainer.train()


def test_another_tokenizer_than_the_collator_pads_with_is_refused(tmp_path):
    first, second = tiny_tokenizer(), tiny_tokenizer()
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **QUIET)
    options = {"train_dataset": three_domains(8), "domain_weights": dict.fromkeys(three_domains(8), 1.0)}
    trainer = DomainWeightedTrainer(tiny_llama(), args, processing_class=first, **options)
    trainer.processing_class = second
    with pytest.raises(ValueError, match="`processing_class` must be the tokenizer of the data collator"):
        trainer.train()
    trainer.data_collator = DataCollatorWithPadding(second)
    trainer.train()
    trainer = DomainWeightedTrainer(tiny_llama(), args, **options)
    trainer.processing_class = second  # to be saved
    trainer.train()


def change_tokens(data):
    return data.map(lambda row: {name: [(token + 3) % 32 for token in row[name]] for name in ("input_ids", "labels")})


@pytest.mark.parametrize("mode", ["proxy", "online"])
def test_a_train_set_of_the_same_rows_counts_wholly_from_train_begin(tmp_path, mode):
    """Also where the old one was described before."""
    late = make_trainer(tmp_path, mode=mode)
    assert late.domain_weights.domains
    late.train_dataset = change_tokens(late.train_dataset)
    late.train()
    made = make_trainer(tmp_path, mode=mode, train_dataset=late.train_dataset)
    made.train()
    assert learned(late) == learned(made)
    assert late.domain_weights.domains == made.domain_weights.domains


def test_tokens_are_counted_in_the_train_set_at_train_begin(tmp_path):
    def mask(row):
        return {"labels": [-100] * (0 if row["domain"] == 0 else 3) + row["labels"][3 * (row["domain"] > 0) :]}

    late = mix(tmp_path, unit="tokens")
    late.train_dataset = late.train_dataset.map(mask)
    made = mix(tmp_path, unit="tokens", train_dataset=late.train_dataset)
    assert drawn(late) == drawn(made) != drawn(mix(tmp_path, unit="tokens"))


class KeepingTrainer(DomainWeightedTrainer):
    """Keeps what it is made with, as many a subclass does."""

    def __init__(self, *args, domain_weights, unit, **kwargs):
        super().__init__(*args, domain_weights=domain_weights, unit=unit, **kwargs)
        self.domain_weights, self.unit = domain_weights, unit


class KeepingLearner(DoGETrainer):
    def __init__(self, *args, target_dataset, unit="examples", **kwargs):
        super().__init__(*args, target_dataset=target_dataset, unit=unit, **kwargs)
        self.target_dataset, self.unit = target_dataset, unit


def test_a_subclass_may_keep_its_arguments_under_their_names(tmp_path):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **QUIET)
    weights = dict.fromkeys(three_domains(8), 1.0)
    trainer = KeepingTrainer(
        tiny_llama(), args, train_dataset=three_domains(8), domain_weights=weights, unit="examples"
    )
    trainer.train()
    trainer.domain_weights = {**weights, "code": 2.0}
    with pytest.raises(ValueError, match="`domain_weights` is read when the trainer is made"):
        trainer.train()
    make_trainer(tmp_path, KeepingLearner).train()
