"""Online mode: the weights draw the examples of an ordinary training."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.one_layer import tiny_gpt2, tiny_llama
from tests.tiny import language_model_rows, three_domains

OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


class Seen:
    """A collator that notes the first tokens of what is trained on, through any number of workers."""

    def __init__(self, trainer_class=DoGETrainer):
        self.batches = []
        seen = self

        class Noting(trainer_class):
            def compute_loss(self, model, inputs, *args, **kwargs):
                if torch.is_grad_enabled() and self._is_training_on(inputs):
                    seen.batches.append(inputs["input_ids"].tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

            def _is_training_on(self, inputs):
                return len(inputs["input_ids"]) == 4 and not getattr(self, "_is_looking", False)

            def _reweight_sampler(self, inputs):
                self._is_looking = True
                super()._reweight_sampler(inputs)
                self._is_looking = False

        self.trainer_class = Noting


def online(
    tmp_path, *, model=None, target=None, initial_weights=None, trainer_class=DoGETrainer, resume=None, **options
):
    options = {"mode": "online", "reweight_steps": 3, "mu": 0.05, **OPTIONS, **options}
    trainer = trainer_class(
        model or tiny_llama(),
        DoGEConfig(str(tmp_path), **options),
        train_dataset=three_domains(8),
        target_dataset=target,
        initial_weights=initial_weights,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_domain_like_the_target_is_drawn_more_and_more(tmp_path):
    target = Dataset.from_dict(language_model_rows(16, low=19, high=31, seed=5))  # the words of "code"
    trainer = online(tmp_path, target=target, max_steps=24)
    weights = trainer.domain_weights.last
    assert weights["code"] == max(weights.values()) > 0.4
    first, last = trainer.domain_sampler.weights_at(0), trainer.domain_sampler.weights_at(24 * 4)
    assert set(first.values()) == {1 / 3}
    assert last["code"] > 0.4
    drawn = trainer.domain_sampler.domain_counts(24 * 4)
    assert drawn["code"] > 24 * 4 / 3 + 3
    counts = dict(zip(trainer._learner.state.names, trainer._learner.state.num_examples.tolist(), strict=True))
    assert counts == drawn


def test_with_weights_that_do_not_move_it_is_an_ordinary_training_to_the_bit(tmp_path):
    """Looking at gradients costs the model nothing: neither a step nor a random number."""
    initial = {"arxiv": 0.5, "books": 0.3, "code": 0.2}
    mine = online(tmp_path, model=tiny_gpt2(), mu=1e30, initial_weights=initial)
    plain = DomainWeightedTrainer(
        tiny_gpt2(),
        TrainingArguments(str(tmp_path), **OPTIONS),
        train_dataset=three_domains(8),
        domain_weights=initial,
    )
    plain.train()
    assert torch.equal(flat(mine.model), flat(plain.model))


@pytest.mark.parametrize(
    "options", [{"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}, {"alignment": "streamed"}]
)
def test_the_stream_of_examples_does_not_depend_on_workers_or_alignment(tmp_path, options):
    runs = []
    for changes in ({}, options):
        seen = Seen()
        trainer = online(
            tmp_path, trainer_class=seen.trainer_class, reweight_steps=4, sampler_lag_steps=4, max_steps=16, **changes
        )
        expected = trainer.domain_sampler.indices(0, 16 * 4)
        rows = trainer.train_dataset[expected.tolist()]["input_ids"]
        assert [row for batch in seen.batches for row in batch] == rows
        runs.append(seen.batches)
    assert runs[0] == runs[1]


def test_new_weights_begin_at_the_draw_that_the_rule_says(tmp_path):
    trainer = online(tmp_path, reweight_steps=3, sampler_lag_steps=5)
    pieces = trainer.domain_sampler.state_dict()["schedule"]
    assert [piece["first_draw"] for piece in pieces] == [0] + [(step + 5) * 4 for step in (0, 3, 6, 9)]
    trajectory = trainer.domain_weights.trajectory
    for piece, weights in zip(pieces[1:], trajectory.weights, strict=True):
        assert list(piece["weights"].values()) == pytest.approx(weights, rel=1e-12)
    logs = [entry for entry in trainer.state.log_history if "sampling_weight/code" in entry]
    drawn_by = [entry["sampling_weight/code"] for entry in logs]
    assert drawn_by[:5] == [1 / 3] * 5
    assert drawn_by[5] == pytest.approx(trajectory.weights[0][2], rel=1e-12)


SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "gradient_accumulation_steps": 2}


def towards_a_target(folder, *, seed=0, **options):
    target = Dataset.from_dict(language_model_rows(16, low=9, high=21, seed=5))
    return online(folder, model=tiny_gpt2(dropout=0.2, seed=seed), target=target, **SAVING, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return towards_a_target(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 3, 5, 6, 11])
def test_a_run_stopped_at_any_step_and_resumed_equals_one_that_was_not(tmp_path, whole, step):
    resumed = towards_a_target(tmp_path, seed=1, resume=f"{whole.args.output_dir}/checkpoint-{step}")
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert whole.domain_weights.last == resumed.domain_weights.last
    assert whole.domain_weights.mean == resumed.domain_weights.mean
    assert whole.domain_sampler.state_dict()["schedule"] == resumed.domain_sampler.state_dict()["schedule"]
    assert torch.equal(whole._learner.state.num_tokens, resumed._learner.state.num_tokens)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"mode": "proxy"}),
        ({"mode": "proxy"}, {}),
        ({"sampler_lag_steps": 7}, {"sampler_lag_steps": 3}),
    ],
    ids=["online_as_proxy", "proxy_as_online", "another_lag"],
)
def test_a_run_goes_on_in_its_mode_and_with_its_lag(tmp_path, before, after):
    online(tmp_path, save_strategy="steps", save_steps=4, **{**before, "max_steps": 4})
    with pytest.raises(ValueError, match="A resumed run must go on as it began, but the checkpoint"):
        online(tmp_path, resume=str(tmp_path / "checkpoint-4"), **after)


class AveragingSGD(torch.optim.SGD):
    """Evaluates other parameters than it trains, as schedule-free optimizers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._shift = 0.0

    def train(self):
        self._move(0.0)

    def eval(self):
        self._move(0.5)

    @torch.no_grad()
    def _move(self, shift):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(shift - self._shift)
        self._shift = shift


def test_an_optimizer_that_evaluates_other_parameters_is_looked_at_where_it_trains(tmp_path):
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = tiny_llama(dtype=torch.float64)
        trainer = DoGETrainer(
            model,
            DoGEConfig(str(tmp_path), mode="online", reweight_steps=3, mu=0.05, **OPTIONS, **options),
            train_dataset=three_domains(8),
            eval_dataset=three_domains(8)["arxiv"],
            optimizers=(AveragingSGD(model.parameters(), lr=OPTIONS["learning_rate"]), None),
        )
        trainer.train()
        runs.append(trainer.domain_weights.last)
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


def test_a_second_training_begins_with_the_first_weights(tmp_path):
    trainer = online(tmp_path)
    trainer.train()
    assert trainer.domain_sampler.weights_at(0)["code"] == 1 / 3
    assert len(trainer.domain_sampler.state_dict()["schedule"]) == 5


def test_a_limit_on_epochs_holds_for_learned_weights(tmp_path):
    target = Dataset.from_dict(language_model_rows(16, low=19, high=31, seed=5))
    args = DoGEConfig(str(tmp_path), mode="online", reweight_steps=2, mu=0.002, **{**OPTIONS, "max_steps": 24})
    trainer = DoGETrainer(
        tiny_llama(), args, train_dataset=three_domains(16), target_dataset=target, max_epochs_per_domain=3.0
    )
    trainer.train()
    assert trainer.domain_weights.last["code"] > 0.9
    assert trainer.domain_sampler.domain_counts(24 * 4)["code"] <= 3 * 16 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "`mode` must be one of"),
        (
            {"sampler_lag_steps": 1},
            "`sampler_lag_steps` must be at least 2, since the DataLoader runs up to 8 examples ahead",
        ),
        ({"dataloader_num_workers": 4}, "`sampler_lag_steps` must be at least 10"),
        ({"sampler_lag_steps": 0}, "`sampler_lag_steps` must be at least 1, but got 0"),
        ({"lagged_update": True}, "`lagged_update` is of the mode 'proxy'"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        online(tmp_path, **options)


def test_the_defaults_start(tmp_path):
    options = {name: value for name, value in OPTIONS.items() if name not in ("reweight_steps", "optim")}
    trainer = DoGETrainer(
        tiny_llama(), DoGEConfig(str(tmp_path), mode="online", **options), train_dataset=three_domains()
    )
    trainer.train()
    assert trainer.args.lag_steps == 2
    assert trainer.domain_weights.recipe["name"] == "doge_plus"
    assert len(trainer.domain_weights.trajectory.steps) == trainer.state.global_step


def test_a_proxy_has_no_limit_on_epochs(tmp_path):
    with pytest.raises(ValueError, match="A proxy sees the same number of examples of every domain"):
        DoGETrainer(
            tiny_llama(),
            DoGEConfig(str(tmp_path), recipe="paper", **OPTIONS),
            train_dataset=three_domains(),
            max_epochs_per_domain=2,
        )


@pytest.mark.parametrize("mode", ["online", "proxy"])
@pytest.mark.parametrize("lora", [False, True])
def test_sft_trainer_learns_weights_through_the_mixin(tmp_path, tokenizer, mode, lora):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class DoGESFTTrainer(DoGEMixin, SFTTrainer):
        pass

    @dataclass
    class DoGESFTConfig(DoGEConfig, SFTConfig):
        pass

    def texts(low):
        ids = language_model_rows(12, low=low, high=low + 9)["input_ids"]
        return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in ids]})

    args = DoGESFTConfig(
        str(tmp_path), mode=mode, reweight_steps=2, mu=0.001, max_length=16, **{**OPTIONS, "max_steps": 6}
    )
    trainer = DoGESFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset={"low": texts(0), "high": texts(18)},
        target_dataset=Dataset.from_dict(
            tokenizer([" ".join(f"w{i}" for i in row) for row in language_model_rows(8, low=18, high=27)["input_ids"]])
        ).select_columns(["input_ids"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    before = flat(trainer.model)
    trainer.train()
    assert not torch.equal(flat(trainer.model), before)
    assert trainer.domain_weights.last["high"] > 0.5
    assert trainer.domain_weights.trajectory.weights.shape == (3, 2)


def test_a_lagged_update_steps_with_the_weights_before_it(tmp_path):
    options = {**OPTIONS, "max_steps": 1, "per_device_train_batch_size": 12, "mu": 0.01, "max_grad_norm": 0.0}
    models, weights = {}, {}
    for name, changes in {"lagged": {"lagged_update": True}, "frozen": {"mu": 1e30}, "new": {}}.items():
        models[name] = tiny_llama()
        args = DoGEConfig(str(tmp_path), **{**options, **changes})
        trainer = DoGETrainer(models[name], args, train_dataset=three_domains())
        trainer.train()
        weights[name] = trainer.domain_weights.last
    torch.testing.assert_close(flat(models["lagged"]), flat(models["frozen"]), rtol=1e-5, atol=1e-7)
    assert (flat(models["lagged"]) - flat(models["new"])).abs().max() > 1e-4
    assert weights["lagged"] == weights["new"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_trl_counts_the_tokens_of_the_steps_and_not_those_of_our_trials(tmp_path, tokenizer, batch_size):
    from trl import SFTConfig, SFTTrainer

    class Counting(DoGEMixin, SFTTrainer):
        num_seen = 0

        def training_step(self, model, inputs, *args, **kwargs):
            self.num_seen += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    @dataclass
    class Config(DoGEConfig, SFTConfig):
        pass

    def texts(low):
        ids = language_model_rows(12, low=low, high=low + 9)["input_ids"]
        return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in ids]})

    options = {**OPTIONS, "max_steps": 3, "reweight_steps": 1, "per_device_train_batch_size": batch_size}
    options["gradient_accumulation_steps"] = 4 // batch_size
    args = Config(str(tmp_path), recipe="paper", max_length=16, **options)
    domains = {"low": texts(0), "high": texts(18)}
    trainer = Counting(model=tiny_llama(), args=args, train_dataset=domains, processing_class=tokenizer)
    trainer.train()
    assert int(trainer._total_train_tokens) == trainer.num_seen
