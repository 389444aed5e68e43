"""Training on a mixture: DomainWeightedTrainer, and the mixin before other trainers."""

import gc
import json
import multiprocessing
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.sampling.streaming import interleave_domains
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import SAMPLER_FILE, DomainWeightedMixin, DomainWeightedTrainer
from hf_doge.training.run_identity import RUN_FILE
from hf_doge.training.trainer import DoGEMixin, DoGETrainer
from tests.one_layer import tiny_bert, tiny_llama
from tests.tiny import three_domains, tiny_t5, tiny_tokenizer

WEIGHTS = {"arxiv": 0.5, "books": 0.0, "code": 0.5}


def arguments(tmp_path, cls=TrainingArguments, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",  # such a run may be made longer
    }
    return cls(str(tmp_path), **{**defaults, **kwargs})


def train_and_count(trainer, owner_of):
    """
    Train, and count the examples of each domain, watched in the collator, which is called thrice for the first batch; the
    loader reads one batch ahead.
    """
    drawn = []
    collate = trainer.data_collator

    def watch(features):
        drawn.append([owner_of(tuple(feature["input_ids"])) for feature in features])
        return collate(features)

    trainer.data_collator = watch
    trainer.train()
    assert drawn[0] == drawn[1] == drawn[2]
    owners = [owner for batch in drawn[2:] for owner in batch]
    return Counter(owners[: trainer.state.global_step * trainer.args.train_batch_size])


def owner_in(domains):
    return {tuple(row): name for name, data in domains.items() for row in data["input_ids"]}.get


def test_the_examples_follow_the_weights(tmp_path):
    domains = three_domains(8)
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=domains, domain_weights=WEIGHTS)
    counts = train_and_count(trainer, owner_in(domains))
    assert counts["books"] == 0
    assert abs(counts["arxiv"] - counts["code"]) <= 1
    assert trainer.state.log_history[4]["domain_epochs/arxiv"] == 10 / 8


def first_token(token):
    return lambda batch: {**batch, "input_ids": [[token, *row[1:]] for row in batch["input_ids"]]}


@pytest.mark.parametrize("transformed", [("arxiv", "books", "code"), ("code",)])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("removes", [False, True])
def test_each_domain_is_trained_on_as_its_own_transform_gives_it(tmp_path, transformed, learns, removes):
    rows = three_domains(8)
    tokens = {name: 27 + k for k, name in enumerate(rows) if name in transformed}
    domains = {
        name: data.with_transform(first_token(tokens[name])) if name in tokens else data for name, data in rows.items()
    }
    seen = set()

    def collator(features):
        assert all("domain" not in feature for feature in features)
        seen.update(tuple(feature["input_ids"]) for feature in features)
        return default_data_collator(features)

    options = {"max_steps": 8, "per_device_train_batch_size": 6, "remove_unused_columns": removes}
    if learns:
        args = arguments(tmp_path, DoGEConfig, **options)
        trainer = DoGETrainer(tiny_llama(), args, train_dataset=domains, data_collator=collator)
    else:
        uniform = dict.fromkeys(domains, 1.0)
        trainer = DomainWeightedTrainer(
            tiny_llama(),
            arguments(tmp_path, **options),
            train_dataset=domains,
            domain_weights=uniform,
            data_collator=collator,
        )
    trainer.train()
    assert seen == {tuple(data[row]["input_ids"]) for data in domains.values() for row in range(8)}


def test_a_transform_per_domain_is_kept_by_a_mixed_dataset_or_refused():
    domains = {
        name: data.with_transform(first_token(27 + k)) for k, (name, data) in enumerate(three_domains(8).items())
    }
    mixed = interleave_domains(domains, WEIGHTS, domain_column="domain")
    names = mixed.features["domain"].names
    assert {(names[row["domain"]], row["input_ids"][0]) for row in mixed} == {("arxiv", 27), ("code", 29)}
    with pytest.raises(ValueError, match=r"no domain column, and the format of \['code'\] is not"):
        interleave_domains(domains, WEIGHTS)
    with pytest.raises(ValueError, match="count the tokens of rows as they are stored"):
        interleave_domains(domains, WEIGHTS, domain_column="domain", unit="tokens")


def test_a_learned_artifact_can_be_trained_with(tmp_path):
    domains = three_domains(8)
    weights = DomainWeights({"arxiv": 0.25, "books": 0.25, "code": 0.5})
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=domains, domain_weights=weights)
    counts = train_and_count(trainer, owner_in(domains))
    assert counts["code"] == counts["arxiv"] + counts["books"] == 10


def test_workers_end_with_a_trainer_that_nobody_holds_without_the_garbage_collector(tmp_path):
    """Which would wait 5 s for each of them."""
    gc.collect()
    before = multiprocessing.active_children()
    options = {"max_steps": 2, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = DomainWeightedTrainer(
        tiny_llama(), arguments(tmp_path, **options), train_dataset=three_domains(), domain_weights=WEIGHTS
    )
    gc.disable()
    try:
        trainer.train()
        assert len(multiprocessing.active_children()) == len(before) + 1
        del trainer
        assert multiprocessing.active_children() == before
    finally:
        gc.enable()


def test_a_cap_on_epochs_moves_the_excess_to_the_other_domains(tmp_path):
    domains = three_domains(8)
    weights = {"arxiv": 0.8, "books": 0.1, "code": 0.1}
    trainer = DomainWeightedTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=4),
        train_dataset=domains,
        domain_weights=weights,
        max_epochs_per_domain=1.0,
    )
    counts = train_and_count(trainer, owner_in(domains))
    assert counts["arxiv"] <= 8 + 1  # never more than one example above its quota
    assert abs(counts["books"] - counts["code"]) <= 1


def test_evaluation_by_domain_uses_the_trainers_own_evaluate(tmp_path):
    domains = three_domains(8)
    trainer = DomainWeightedTrainer(
        tiny_llama(), arguments(tmp_path), train_dataset=domains, domain_weights=WEIGHTS, eval_dataset=domains
    )
    assert {f"eval_{name}_loss" for name in domains} <= set(trainer.evaluate())


def test_weights_of_other_domains_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wiki"):
        DomainWeightedTrainer(
            tiny_llama(), arguments(tmp_path), train_dataset=three_domains(), domain_weights={**WEIGHTS, "wiki": 1.0}
        )


def test_a_stream_that_is_not_split_by_domain_is_sent_to_interleave_domains(tmp_path):
    with pytest.raises(ValueError, match="Pass a dict with one stream per domain, or pass `interleave_domains"):
        DomainWeightedTrainer(
            tiny_llama(),
            arguments(tmp_path),
            train_dataset=three_domains()["code"].to_iterable_dataset(),
            domain_weights=WEIGHTS,
        )


def streams(num_examples=8):
    return {name: data.to_iterable_dataset() for name, data in three_domains(num_examples).items()}


def test_a_dict_of_streams_is_mixed_by_the_weights(tmp_path):
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=streams(), domain_weights=WEIGHTS)
    counts = train_and_count(trainer, owner_in(three_domains(8)))
    assert counts == {"arxiv": 10, "code": 10}  # more than there are: they are restarted
    assert not any("domain_epochs" in name for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize(
    ("options", "args", "error", "message"),
    [
        ({}, {"max_steps": -1}, ValueError, "`max_steps` must be positive"),
        (
            {"max_epochs_per_domain": 2.0},
            {},
            ValueError,
            "`max_epochs_per_domain` must be unset for streams, but got 2",
        ),
        ({"domain_weights": {**WEIGHTS, "wiki": 1.0}}, {}, ValueError, "wiki"),
        (
            {"train_dataset": {**streams(), "code": three_domains()["code"]}},
            {},
            TypeError,
            "must be all `datasets.Dataset` or all `datasets.IterableDataset`",
        ),
    ],
)
def test_what_streams_cannot_do_is_refused(tmp_path, options, args, error, message):
    options = {"train_dataset": streams(), "domain_weights": WEIGHTS, **options}
    with pytest.raises(error, match=message):
        DomainWeightedTrainer(tiny_llama(), arguments(tmp_path, **args), **options)


def save_a_run(tmp_path, **options):
    """Two of five steps, and the arguments of its trainer."""
    options = {"train_dataset": three_domains(8), "domain_weights": WEIGHTS, **options}
    DomainWeightedTrainer(
        tiny_llama(), arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), **options
    ).train()
    return options


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, {}, "{'examples_per_step': 4} and this run {'examples_per_step': 8}"),
        (
            {},
            {"domain_weights": {**WEIGHTS, "books": 0.1}},
            "{'weights': {'arxiv': 0.5, 'books': 0.0, 'code': 0.5}} and",
        ),
        ({"data_seed": 7}, {}, "{'seed': 42} and this run {'seed': 7}"),
        ({}, {"draw": "iid"}, "{'draw': 'quota'} and this run {'draw': 'iid'}"),
        ({}, {"train_dataset": three_domains(9)}, "{'num_rows': {'arxiv': 8, 'books': 8, 'code': 8}, 'num_tokens':"),
    ],
)
def test_resuming_another_stream_is_refused(tmp_path, args, changes, message):
    options = {**save_a_run(tmp_path), **changes}
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path, **args), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            {},
            "has 4 and these arguments make it 8. Set batch size, accumulation and number of processes",
        ),
        ({}, {"domain_weights": {**WEIGHTS, "books": 0.1}}, "must go on under the weights it began with"),
        ({"data_seed": 7}, {}, "saved with `seed` 42, but this sampler has 7"),
        ({}, {"draw": "iid"}, "saved with `draw` 'quota', but this sampler has 'iid'"),
        ({}, {"train_dataset": three_domains(9)}, "must have as many rows as when the state was saved"),
    ],
)
def test_resuming_another_stream_is_refused_of_a_checkpoint_that_does_not_say_of_which_run(
    tmp_path, args, changes, message
):
    options = {**save_a_run(tmp_path), **changes}
    (tmp_path / "checkpoint-2" / RUN_FILE).unlink()
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path, **args), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, {}, "`examples_per_step` was 4 and is 8"),
        ({"data_seed": 7}, {}, "`seed` was 42 and is 7"),
        ({}, {"draw": "iid"}, "`draw` was 'quota' and is 'iid'"),
        ({}, {"domain_weights": {**WEIGHTS, "books": 0.1}}, "`weights` was"),
    ],
)
def test_resuming_streams_that_are_read_in_another_way_is_refused(tmp_path, args, changes, message):
    options = {**save_a_run(tmp_path, train_dataset=streams()), **changes}
    (tmp_path / "checkpoint-2" / RUN_FILE).unlink()
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path, **args), **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_streams_that_are_read_in_the_same_way_are_resumed(tmp_path):
    options = save_a_run(tmp_path, train_dataset=streams())
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path, max_steps=4), **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_the_place_in_a_checkpoint_is_behind_what_was_trained_on(tmp_path):
    save_a_run(tmp_path)
    state = json.loads((tmp_path / "checkpoint-2" / SAMPLER_FILE).read_text())
    assert (state["epoch"], state["position"], state["examples_per_step"]) == (0, 8, 4)


def test_a_model_saved_to_be_pushed_has_no_place_in_the_stream(tmp_path):
    trainer = DomainWeightedTrainer(
        tiny_llama(), arguments(tmp_path), train_dataset=three_domains(), domain_weights=WEIGHTS
    )
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / SAMPLER_FILE).exists()


class OwnBatches(DomainWeightedTrainer):
    """Drops the batches at the end of an epoch that a loader of its own does not fill."""

    def get_train_dataloader(self):
        return DataLoader(
            self._remove_unused_columns(self.train_dataset),
            sampler=self.domain_sampler,
            batch_size=5,
            drop_last=True,
            collate_fn=self.data_collator,
        )


def test_an_epoch_that_does_not_come_out_even_is_refused(tmp_path):
    trainer = OwnBatches(tiny_llama(), arguments(tmp_path), train_dataset=three_domains(8), domain_weights=WEIGHTS)
    with pytest.raises(RuntimeError, match="An epoch of 24 draws must come as 6 batches of 4 examples"):
        trainer.train()


class Seq2SeqOnDomains(DomainWeightedMixin, Seq2SeqTrainer):
    """What a user would write."""


def test_the_mixin_serves_seq2seq_trainer(tmp_path, tokenizer):
    domains = three_domains(8)
    model = tiny_t5()
    trainer = Seq2SeqOnDomains(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True),
        train_dataset=domains,
        domain_weights=WEIGHTS,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    counts = train_and_count(trainer, owner_in(domains))
    assert counts["books"] == 0
    assert counts["arxiv"] == counts["code"] == 10


FIRST_WORDS = {"arxiv": 1, "books": 9, "code": 17}


def text_domains():
    return {
        name: Dataset.from_dict({"text": [f"w{(first + i) % 28} w{i % 28} w{first}" for i in range(8)]})
        for name, first in FIRST_WORDS.items()
    }


def make_sft_trainer(tmp_path, tokenizer, train_dataset=None, **options):
    from trl import SFTConfig, SFTTrainer

    class SFTOnDomains(DomainWeightedMixin, SFTTrainer):
        """What a user would write."""

    own = {name: options.pop(name) for name in ("unit",) if name in options}
    defaults = {"max_length": 8, "bf16": False, "gradient_checkpointing": False}
    args = arguments(tmp_path, SFTConfig, **{**defaults, **options})
    train_dataset = text_domains() if train_dataset is None else train_dataset
    return SFTOnDomains(
        tiny_llama(), args, train_dataset=train_dataset, domain_weights=WEIGHTS, processing_class=tokenizer, **own
    )


def test_the_mixin_serves_sft_trainer(tmp_path, tokenizer):
    trainer = make_sft_trainer(tmp_path, tokenizer)
    names = {tokenizer.convert_tokens_to_ids(f"w{i}"): name for name, i in FIRST_WORDS.items()}
    counts = train_and_count(trainer, lambda input_ids: names[input_ids[2]])
    assert counts["books"] == 0
    assert counts["arxiv"] == counts["code"] == 10


def test_the_mixin_serves_sft_trainer_on_streams(tmp_path, tokenizer):
    streams = {name: data.to_iterable_dataset() for name, data in text_domains().items()}
    trainer = make_sft_trainer(tmp_path, tokenizer, streams)
    names = {tokenizer.convert_tokens_to_ids(f"w{i}"): name for name, i in FIRST_WORDS.items()}
    counts = train_and_count(trainer, lambda input_ids: names[input_ids[2]])
    assert counts == {"arxiv": 10, "code": 10}


def test_preparing_that_loses_the_domains_is_refused(tmp_path):
    class Packing(Trainer):
        def __init__(self, *args, train_dataset, **kwargs):
            super().__init__(*args, train_dataset=train_dataset.select_columns(["input_ids", "labels"]), **kwargs)

    class PackingOnDomains(DomainWeightedMixin, Packing):
        pass

    with pytest.raises(ValueError, match=r"must keep its column 'domain'.*pack the data of each domain before"):
        PackingOnDomains(tiny_llama(), arguments(tmp_path), train_dataset=three_domains(), domain_weights=WEIGHTS)


def test_the_domain_column_does_not_reach_the_model(tmp_path):
    merged = concatenate_datasets([data.add_column("domain", [n] * 4) for n, data in three_domains().items()])
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=merged, domain_weights=WEIGHTS)
    assert "domain" not in next(iter(trainer.get_train_dataloader()))


def test_training_moves_the_model(tmp_path):
    model = tiny_llama()
    before = model.model.embed_tokens.weight.detach().clone()
    DomainWeightedTrainer(model, arguments(tmp_path), train_dataset=three_domains(), domain_weights=WEIGHTS).train()
    assert not torch.equal(before, model.model.embed_tokens.weight)


class Ordered(Trainer):
    """A trainer with a sampler of its own."""

    sampler = SequentialSampler

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler(self.train_dataset)


@pytest.mark.parametrize(
    ("sampler", "is_lost"),
    [
        (SequentialSampler, True),
        (lambda data: None, True),
        (lambda data: RandomSampler(data, replacement=True), True),
        (lambda data: RandomSampler(data, num_samples=3), True),
        (lambda data: WeightedRandomSampler([1.0] * len(data), len(data)), True),
        (lambda data: RandomSampler(data, generator=torch.Generator()), False),
    ],
)
def test_a_sampler_that_would_be_lost_is_refused_unless_it_is_a_plain_random_one(tmp_path, sampler, is_lost):
    class Mixed(DomainWeightedMixin, type("Own", (Ordered,), {"sampler": staticmethod(sampler)})):
        pass

    options = {"train_dataset": three_domains(), "domain_weights": WEIGHTS}
    if is_lost:
        with pytest.raises(ValueError, match=r"`_get_train_sampler` of Ordered returns (a|none)"):
            Mixed(tiny_llama(), arguments(tmp_path), **options)
    else:
        Mixed(tiny_llama(), arguments(tmp_path), **options).train()


def test_the_mixin_comes_before_the_trainer():
    with pytest.raises(TypeError, match=r"must come before .* Write `class Turned\(DomainWeightedMixin, Ordered\)`"):

        class Turned(Ordered, DomainWeightedMixin):
            pass


def test_a_sampler_is_asked_for_as_the_trainer_asks(tmp_path):
    class Needy(Trainer):
        def _get_train_sampler(self, train_dataset):
            return RandomSampler(train_dataset)

    class Mixed(DomainWeightedMixin, Needy):
        pass

    Mixed(tiny_llama(), arguments(tmp_path), train_dataset=three_domains(), domain_weights=WEIGHTS).train()


@pytest.mark.parametrize("is_list", [False, True])
def test_batches_that_no_sampler_of_ours_draws_are_refused(tmp_path, is_list):
    class Own(DomainWeightedTrainer):
        def get_train_dataloader(self):
            data, batches = self.train_dataset.remove_columns("domain"), [[0, 1, 2, 3]] * 3
            loader = DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator)
            return list(loader) if is_list else loader

    trainer = Own(tiny_llama(), arguments(tmp_path), train_dataset=three_domains(), domain_weights=WEIGHTS)
    with pytest.raises(RuntimeError, match=r"must draw through .* but its innermost sampler is list"):
        trainer.train()


def test_learning_refuses_a_sampler_of_ones_own_and_the_pairs_of_preference_trainers(tmp_path, tokenizer):
    class Learning(DoGEMixin, Ordered):
        pass

    args = arguments(tmp_path, DoGEConfig, recipe="paper")
    with pytest.raises(ValueError, match="`_get_train_sampler` of Ordered returns a SequentialSampler"):
        Learning(tiny_llama(), args, train_dataset=three_domains())

    def pairs(features):
        rows = torch.tensor([feature["input_ids"] for feature in features for _ in range(2)])
        return {"input_ids": rows, "labels": rows}

    paired = DoGETrainer(tiny_llama(), args, train_dataset=three_domains(), data_collator=pairs)
    with pytest.raises(ValueError, match=r"several rows of one example.*`DomainWeightedMixin` can train"):
        paired.train()


@pytest.mark.parametrize("names", [("train",), ("train", "test"), ("train_sft", "test_sft"), ("validation", "books")])
def test_the_splits_of_a_dataset_are_no_domains(tmp_path, names):
    splits = DatasetDict(dict(zip(names, three_domains().values(), strict=False)))
    weights = dict.fromkeys(names, 1.0)
    message = "look like the splits of one dataset. Pass one split, such as `dataset\\['"
    with pytest.raises(ValueError, match=message):
        DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=splits, domain_weights=weights)
    with pytest.raises(ValueError, match=message):
        DoGETrainer(tiny_llama(), arguments(tmp_path, DoGEConfig), train_dataset=splits)
    with pytest.raises(ValueError, match=message):
        interleave_domains(IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}), weights)
    if names == ("train", "test"):
        with pytest.raises(ValueError, match=message):
            interleave_domains(dict(splits), weights)


def test_domains_may_come_in_a_dataset_dict_or_be_called_like_a_split(tmp_path):
    domains = DatasetDict(three_domains())
    trainer = DomainWeightedTrainer(tiny_llama(), arguments(tmp_path), train_dataset=domains, domain_weights=WEIGHTS)
    assert list(trainer.domain_sampler.domains.names) == list(domains)
    assert len(interleave_domains({"dev": domains["code"], "ops": domains["books"]}, {"dev": 1.0, "ops": 1.0})) == 8


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("cls", [DomainWeightedTrainer, DoGETrainer])
def test_the_domain_column_reaches_neither_collator_nor_model_where_all_columns_are_kept(tmp_path, cls, is_merged):
    train = three_domains()
    if is_merged:
        train = concatenate_datasets([data.add_column("domain", [0] * 4) for data in train.values()])
    weights = {} if cls is DoGETrainer else {"domain_weights": {"0": 1.0} if is_merged else WEIGHTS}
    args = arguments(tmp_path, DoGEConfig, recipe="paper", remove_unused_columns=False, max_steps=1)
    trainer = cls(tiny_bert(), args, train_dataset=train, **weights)
    assert "domain" not in next(iter(trainer.get_train_dataloader()))
    trainer.train()


def test_a_collator_of_ones_own_gets_the_column_that_its_dataset_came_with(tmp_path):
    seen, merged = [], concatenate_datasets([data.add_column("domain", [0] * 4) for data in three_domains().values()])

    def collate(features):
        seen.extend(feature.pop("domain") for feature in features)
        return default_data_collator(features)

    args = arguments(tmp_path, remove_unused_columns=False, max_steps=1)
    options = {"train_dataset": merged, "domain_weights": {"0": 1.0}, "data_collator": collate}
    DomainWeightedTrainer(tiny_bert(), args, **options).train()
    assert seen[:4] == [0] * 4


QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1, "disable_tqdm": True}
QUIET["per_device_train_batch_size"] = 6
TEXTS = {name: Dataset.from_dict({"text": ["a b"] * 8, "labels": [[1]] * 8}) for name in ("arxiv", "books", "code")}


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda folder, **more: DomainWeightedTrainer(
            tiny_llama(), TrainingArguments(folder, **QUIET), train_dataset=TEXTS, domain_weights=dict.fromkeys(TEXTS, 1), **more
        ),
        lambda folder, **more: DoGETrainer(tiny_llama(), DoGEConfig(folder, **QUIET), train_dataset=TEXTS, **more),
        lambda folder, **more: DoGETrainer(
            tiny_llama(), DoGEConfig(folder, **QUIET), train_dataset=three_domains(8), target_dataset=TEXTS["code"], **more
        ),
        lambda folder, **more: DoGETrainer(
            tiny_llama(), DoGEConfig(folder, **QUIET), train_dataset={k: v.to_iterable_dataset() for k, v in TEXTS.items()}, **more
        ),
    ],
    ids=["mixture", "proxy", "target", "streams"],
)  # fmt: skip
def test_rows_of_which_the_model_takes_nothing_are_refused_in_words(tmp_path, make, with_tokenizer):
    trainer = make(str(tmp_path), processing_class=tiny_tokenizer() if with_tokenizer else None)
    with pytest.raises(
        ValueError,
        match=r"must hold what the model takes, such as `input_ids`, but their columns are .*'labels', 'text'\]",
    ):
        trainer.train()


def test_what_a_model_takes_may_be_its_labels_too(tmp_path):
    """A masked autoencoder has pixels for both (`label_names`)."""
    args = TrainingArguments(str(tmp_path), label_names=["input_ids"], **QUIET)
    rows = {name: data.select_columns("input_ids") for name, data in three_domains(8).items()}

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().logsumexp(-1).mean()

    weights = dict.fromkeys(rows, 1.0)
    DomainWeightedTrainer(
        tiny_llama(), args, train_dataset=rows, domain_weights=weights, compute_loss_func=loss
    ).train()
