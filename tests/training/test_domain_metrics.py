"""What trainers log of their domains: the loss that a separate evaluation finds, for no second forward."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer

from hf_doge.training.domain_metrics import DomainMeter
from hf_doge.training.loss_watch import LossWatch, SeenLosses
from hf_doge.training.metrics_callback import DomainMetricsCallback
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGETrainer
from tests.launch import run_processes
from tests.one_layer import tiny_bert, tiny_classifier, tiny_llama
from tests.tiny import classifier_domains, language_model_rows, three_domains
from tests.training import metrics_processes
from tests.training.metrics_processes import WEIGHTS, arguments, labelled, logs_of, make_trainer, read_told, train
from tests.training.test_mixture import make_sft_trainer, text_domains

KINDS = ["mixin", "streams", "callback"]
ONE = {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}


class Noting:
    """Keeps what reaches the forwards of a model."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(dict(kwargs) if torch.is_grad_enabled() else None),
            with_kwargs=True,
        )


def separate_losses(model, calls, owners):
    """Mean loss of each domain, one example at a time, and its number of labels: `owners` has a domain for each example."""
    sums, counts = {}, {}
    rows = [(ids, labels) for call in calls for ids, labels in zip(call["input_ids"], call["labels"], strict=True)]
    for (ids, labels), owner in zip(rows, owners, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        sums[owner] = sums.get(owner, 0) + float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        counts[owner] = counts.get(owner, 0) + int((labels[1:] != -100).sum())
    return {name: total / counts[name] for name, total in sums.items()}, counts


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_a_separate_evaluation_of_each_domain(tmp_path, kind):
    trainer = make_trainer(kind, arguments(tmp_path, **ONE))
    noted = Noting(trainer.model)
    trainer.train()
    calls = list(noted.calls)
    assert len(calls) == 2  # one forward for each micro-batch
    assert not any("domain_ids" in call for call in calls)
    rows = {tuple(ids): name for name, ids in zip(labelled()["domain"], labelled()["input_ids"], strict=True)}
    owners = [rows[tuple(ids)] for call in calls for ids in call["input_ids"].tolist()]
    losses, counts = separate_losses(trainer.model.eval(), calls, owners)
    (logs,) = logs_of(trainer).values()
    assert {name: logs[f"domain_loss/{name}"] for name in losses} == pytest.approx(losses, abs=1e-6)
    assert {name: logs[f"domain_tokens/{name}"] for name in counts} == counts
    assert {name: logs[f"domain_share/{name}"] for name in WEIGHTS} == {n: owners.count(n) / 8 for n in WEIGHTS}
    if kind != "streams":
        assert {name: logs[f"domain_epochs/{name}"] for name in WEIGHTS} == {n: owners.count(n) / 8 for n in WEIGHTS}


def test_an_evaluation_is_a_mean_over_the_labels_that_are_predicted(tmp_path):
    """Older transformers count the first label of each row too."""
    data, seen = three_domains(8, masked=0.6), []
    trainer = DomainWeightedTrainer(
        tiny_llama(),
        arguments(tmp_path),
        train_dataset=three_domains(),
        domain_weights=WEIGHTS,
        eval_dataset=data,
        compute_metrics=lambda prediction: seen.append(prediction.label_ids.tolist()) or {},
    )
    found = trainer.evaluate()
    for name, rows in data.items():
        with torch.no_grad():
            loss = trainer.model(**rows.with_format("torch")[:]).loss
        assert found[f"eval_{name}_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert seen == [rows["labels"][:] for rows in data.values()]


class Unmeasured(DomainWeightedTrainer):
    """As it was before there was anything to log."""

    _measures_domains = False


@pytest.mark.parametrize("makes", ["sum", "mean"])
def test_looking_on_changes_no_bit_of_the_training(tmp_path, makes):
    """Whether the model adds the losses of tokens up, or takes their mean as BERT does."""
    trained = []
    for cls in (DomainWeightedTrainer, Unmeasured):
        model = tiny_llama() if makes == "sum" else tiny_bert()
        data = three_domains(8, masked=0.3)
        trainer = cls(model, arguments(tmp_path), train_dataset=data, domain_weights=WEIGHTS)
        trainer.train()
        trained.append(model.state_dict())
        assert any("domain_loss/arxiv" in entry for entry in logs_of(trainer).values()) == (
            cls is DomainWeightedTrainer
        )
    assert all(torch.equal(one, trained[1][name]) for name, one in trained[0].items())


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    plan = [{"name": kind, "kind": kind, "folder": str(folder / kind)} for kind in KINDS]
    plan += [
        {"name": f"{kind}_saved", "kind": kind, "folder": str(folder / f"{kind}-saved"), "save_at": [3]}
        for kind in KINDS
    ]
    plan += [
        {
            "name": f"{kind}_resumed",
            "kind": kind,
            "folder": str(folder / f"{kind}-saved"),
            "resume": str(folder / f"{kind}-saved" / "checkpoint-3"),
        }
        for kind in KINDS
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    run_processes(Path(metrics_processes.__file__), folder / "plan.json")
    return folder


def assert_same_logs(found, expected):
    assert found.keys() == expected.keys()
    for step in found:
        assert found[step] == pytest.approx(expected[step], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_log_what_one_logs(on_two_processes, tmp_path, kind):
    expected = train(tmp_path, kind=kind)
    assert list(expected) == [2, 4, 6]
    assert_same_logs(read_told(on_two_processes, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_logs_what_an_uninterrupted_one_logs(on_two_processes, tmp_path, kind):
    """It was interrupted between two logs: one process as two, and one from the checkpoint of two."""
    whole = train(tmp_path / "whole", kind=kind, save_at=[3])
    resumed = train(tmp_path / "whole", kind=kind, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_logs(resumed, whole)
    assert_same_logs(read_told(on_two_processes, f"{kind}_resumed"), whole)
    checkpoint = on_two_processes / f"{kind}-saved" / "checkpoint-3"
    assert_same_logs(train(tmp_path / "one", kind=kind, resume=str(checkpoint)), whole)


def test_a_checkpoint_at_a_log_holds_nothing_that_was_logged(tmp_path):
    whole = train(tmp_path, kind="callback", save_at=[4])
    resumed = train(tmp_path, kind="callback", resume=str(tmp_path / "checkpoint-4"))
    assert_same_logs(resumed, whole)


def test_training_again_begins_from_nothing(tmp_path):
    trainer = make_trainer("mixin", arguments(tmp_path, **ONE))
    trainer.train()
    first = logs_of(trainer)
    trainer.train()
    assert logs_of(trainer) == first


# SFTTrainer


MORE = ["w2 w3", "w4 w5 w6", "w7", "w8"] * 2


def owners_of_text(calls, tokenizer):
    firsts = {tokenizer.convert_tokens_to_ids(f"w{i}"): n for n, i in {"arxiv": 1, "books": 9, "code": 17}.items()}
    return [firsts[ids[2]] for call in calls for ids in call["input_ids"].tolist()]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_sft_trainer_tells_the_losses_that_its_fused_head_makes(tmp_path, tokenizer, is_streamed):
    data = text_domains()
    if is_streamed:
        data = {name: one.to_iterable_dataset() for name, one in data.items()}
    trainer = make_sft_trainer(tmp_path, tokenizer, data, **ONE)
    noted = Noting(trainer.model)
    trainer.train()
    calls = list(noted.calls)
    assert len(calls) == 1
    losses, counts = separate_losses(trainer.model.eval(), calls, owners_of_text(calls, tokenizer))
    (logs,) = logs_of(trainer).values()
    assert {name: logs[f"domain_loss/{name}"] for name in losses} == pytest.approx(losses, abs=1e-6)
    assert {name: logs[f"domain_tokens/{name}"] for name in counts} == counts


def sft_logs(tmp_path, tokenizer, *, args=None, data=None, **options):
    """What the callback logs of one step of a plain SFTTrainer over texts of two lengths."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        (name, f"{text} {more}")
        for name, one in text_domains().items()
        for text, more in zip(one["text"], MORE, strict=True)
    ]
    data = Dataset.from_dict({"domain": [name for name, _ in rows], "text": [text for _, text in rows]})
    options = {"bf16": False, "max_length": None, "gradient_accumulation_steps": 3, **ONE, **options}
    trainer = SFTTrainer(
        tiny_llama(), arguments(tmp_path, SFTConfig, **options), train_dataset=data, processing_class=tokenizer
    )
    trainer.add_callback(DomainMetricsCallback(trainer))
    trainer.train()
    (told,) = logs_of(trainer).values()
    return told


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 32}])
def test_examples_that_lie_end_to_end_are_told_apart(tmp_path, tokenizer, options):
    padded = sft_logs(tmp_path, tokenizer)
    assert sum(name.startswith("domain_loss/") for name in padded) == 3
    assert sft_logs(tmp_path, tokenizer, padding_free=True, **options) == pytest.approx(padded, abs=1e-6)


# What cannot be seen


def words_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_doge")]


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def plain_trainer(tmp_path, model=None, data=None, **options):
    own = {name: options.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in options}
    trainer = Trainer(
        model or tiny_llama(), arguments(tmp_path, **{**ONE, **options}), train_dataset=data or labelled(), **own
    )
    trainer.add_callback(DomainMetricsCallback(trainer))
    return trainer


@pytest.mark.parametrize(
    ("options", "word", "told"),
    [
        ({"compute_loss_func": mean_loss}, "computed outside of the model", ["share", "epochs"]),
        ({"label_smoothing_factor": 0.1}, "computed outside of the model", ["share", "epochs"]),
    ],
)
def test_a_loss_that_the_callback_cannot_see_is_said_once_and_the_rest_is_logged(
    tmp_path, caplog, options, word, told
):
    expected = logs_of_one(plain_trainer(tmp_path))
    caplog.clear()
    found = logs_of_one(plain_trainer(tmp_path, **options))
    (words,) = words_of(caplog)
    assert word in words
    assert f"The logs tell {', '.join(told).replace(', epochs', ' and epochs')} of the domains" in words
    kinds = {f"domain_{kind}" for kind in told}
    assert found == {name: value for name, value in expected.items() if name.partition("/")[0] in kinds}


def test_a_compiled_model_is_not_looked_into():
    """What wraps it may be wrapped itself; tokens are those of the labels."""
    model = tiny_llama()
    watch = LossWatch(model)
    with watch.during(torch.nn.parallel.DataParallel(torch.compile(model, backend="eager"))):
        pass
    seen = watch.seen({"labels": torch.tensor([[1, 2, -100, 4]])}, labels_are_shifted=True)
    assert seen.problem == "the model is compiled, and what happens inside is not seen"
    assert seen.losses is None
    assert seen.counted.tolist() == [True, False, True]


def logs_of_one(trainer):
    trainer.train()
    (logs,) = logs_of(trainer).values()
    return logs


def test_the_mixin_sees_a_loss_that_is_computed_outside_of_the_model(tmp_path):
    logs = []
    for options in ({}, {"compute_loss_func": mean_loss}):
        trainer = DomainWeightedTrainer(
            tiny_llama(), arguments(tmp_path, **ONE), train_dataset=three_domains(8), domain_weights=WEIGHTS, **options
        )
        logs.append(logs_of_one(trainer))
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


class TwoLosses(torch.nn.Module):
    """Whose loss is a sum of two cross-entropies."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def forward(self, input_ids, labels):
        logits = self.model(input_ids=input_ids).logits.flatten(0, 1)
        return {"loss": F.cross_entropy(logits, labels.flatten()) + F.cross_entropy(logits, labels.flip(1).flatten())}


def test_a_loss_of_several_parts_is_said_and_not_logged(tmp_path, caplog):
    logs = logs_of_one(plain_trainer(tmp_path, TwoLosses()))
    assert not any("domain_loss" in name for name in logs)
    (told,) = words_of(caplog)
    assert "the loss is not one plain cross-entropy over tokens" in told


def test_examples_of_a_classifier_count_as_one_token_each(tmp_path):
    data = classifier_domains(8)
    args = arguments(tmp_path, **ONE, gradient_accumulation_steps=1, per_device_train_batch_size=8)
    trainer = DomainWeightedTrainer(tiny_classifier(), args, train_dataset=data, domain_weights=WEIGHTS)
    logs = logs_of_one(trainer)
    assert [logs[f"domain_tokens/{name}"] for name in WEIGHTS] == [4, 2, 2]
    assert sum(logs[f"domain_loss/{name}"] * logs[f"domain_tokens/{name}"] for name in WEIGHTS) == pytest.approx(
        8 * trainer.state.log_history[0]["loss"], rel=1e-5
    )


def test_several_texts_in_an_example_are_said(tmp_path, caplog):
    """Where examples lie end to end, only the beginnings of texts tell where one ends."""
    meter = DomainMeter(["a", "b"], torch.device("cpu"))
    losses = torch.arange(6.0)
    inputs = {"input_ids": torch.ones(1, 6), "position_ids": torch.tensor([[0, 1, 0, 1, 0, 1]])}
    seen = SeenLosses(losses, torch.ones(6, dtype=torch.bool))
    meter.add(torch.tensor([0, 1]), seen, inputs)
    logs = meter.collect()
    assert logs == {"domain_share/a": 0.5, "domain_share/b": 0.5}
    (told,) = words_of(caplog)
    assert "an example holds several texts" in told


def test_examples_of_other_domains_are_not_counted(tmp_path):
    meter = DomainMeter(["a", "b"], torch.device("cpu"))
    seen = SeenLosses(torch.arange(6.0), torch.ones(6, dtype=torch.bool))
    meter.add(torch.tensor([1, -1, 0]), seen, {"input_ids": torch.ones(3, 2)})
    assert meter.collect() == {
        "domain_loss/a": 4.5,
        "domain_loss/b": 0.5,
        "domain_tokens/a": 2,
        "domain_tokens/b": 2,
        "domain_share/a": 0.5,
        "domain_share/b": 0.5,
    }


def test_a_domain_that_diverges_is_the_one_that_is_told():
    meter = DomainMeter(["a", "b"], torch.device("cpu"))
    seen = SeenLosses(torch.tensor([1.0, torch.nan]), torch.ones(2, dtype=torch.bool))
    meter.add(torch.tensor([0, 1]), seen, {"input_ids": torch.ones(2, 1)})
    logs = meter.collect()
    assert logs["domain_loss/a"] == 1
    assert logs["domain_loss/b"] != logs["domain_loss/b"]


# The callback leaves things as it found them


def test_the_callback_changes_nothing_but_the_logs(tmp_path):
    trained = []
    for has_callback in (True, False):
        trainer = plain_trainer(
            tmp_path, max_steps=5, learning_rate=0.01, eval_dataset=labelled(4), eval_strategy="steps", eval_steps=2
        )
        if not has_callback:
            trainer.data_collator = trainer.pop_callback(DomainMetricsCallback)._collator.collator
        trainer.train()
        losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
        losses.append(trainer.evaluate()["eval_loss"])
        trained.append((trainer.model.state_dict(), losses))
        assert not trainer.model._forward_hooks
        assert not trainer.model._forward_pre_hooks
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-6)  # their terms are added up in another order
    assert all(torch.equal(one, trained[1][0][name]) for name, one in trained[0][0].items())


def test_the_callback_serves_streams_whose_domains_are_named(tmp_path):
    data = labelled().to_iterable_dataset()
    trainer = Trainer(tiny_llama(), arguments(tmp_path, **ONE), train_dataset=data)
    with pytest.raises(ValueError, match="`domains` must name the domains of a stream"):
        DomainMetricsCallback(trainer)
    trainer.add_callback(DomainMetricsCallback(trainer, domains=["arxiv", "books", "code"]))
    logs = logs_of_one(trainer)
    assert logs["domain_tokens/arxiv"] == 8 * 7
    assert logs["domain_share/books"] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_callback_serves_loaders_with_workers_and_all_columns(tmp_path, num_workers):
    logs = []
    for options in ({}, {"remove_unused_columns": False, "dataloader_num_workers": num_workers}):
        logs.append(logs_of_one(plain_trainer(tmp_path, **options)))
    assert logs[1] == logs[0]


def test_what_the_callback_cannot_serve_is_refused(tmp_path):
    args = arguments(tmp_path, **ONE)
    with pytest.raises(ValueError, match="must have a column 'domain' that tells the domain"):
        DomainMetricsCallback(Trainer(tiny_llama(), args, train_dataset=Dataset.from_dict(language_model_rows(8))))
    with pytest.raises(ValueError, match="DomainWeightedTrainer logs loss, tokens, share and epochs"):
        DomainMetricsCallback(make_trainer("mixin", args))
    with pytest.raises(ValueError, match=r"`train_dataset` must be a `datasets.Dataset`"):
        DomainMetricsCallback(Trainer(tiny_llama(), args, train_dataset=[{"input_ids": [1, 2]}]))
    trainer = plain_trainer(tmp_path)
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ValueError, match="The data collator must stay the one that `DomainMetricsCallback` put"):
        trainer.train()


class Blind(Trainer):
    """Passes on what it knows, as trainers of preferences do."""

    def compute_loss(self, model, inputs, **kwargs):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def test_a_trainer_that_does_not_pass_the_batch_on_is_refused(tmp_path):
    trainer = Blind(tiny_llama(), arguments(tmp_path, **ONE), train_dataset=labelled())
    trainer.add_callback(DomainMetricsCallback(trainer))
    with pytest.raises(ValueError, match="Batches must reach the model as they are collated, but Blind"):
        trainer.train()


def test_streams_that_lose_their_domains_are_trained_on_and_that_is_said(tmp_path, caplog):
    class Preparing(Trainer):
        """Keeps the columns that it knows."""

        def __init__(self, *args, train_dataset, **kwargs):
            columns = ["input_ids", "labels"]
            super().__init__(*args, train_dataset=train_dataset.select_columns(columns), **kwargs)

    from hf_doge.training.mixture import DomainWeightedMixin

    class OnDomains(DomainWeightedMixin, Preparing):
        """What a user would write."""

    data = {name: one.to_iterable_dataset() for name, one in three_domains(8).items()}
    trainer = OnDomains(tiny_llama(), arguments(tmp_path, **ONE), train_dataset=data, domain_weights=WEIGHTS)
    trainer.train()
    assert logs_of(trainer) == {}
    (told,) = words_of(caplog)
    assert "prepared the streams down to ['input_ids', 'labels']" in told


def test_a_proxy_tells_of_its_domains_by_its_learner(tmp_path):
    from hf_doge.training.config import DoGEConfig

    args = DoGEConfig(
        str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=6, use_cpu=True, report_to=[]
    )
    trainer = DoGETrainer(tiny_llama(), args, train_dataset=three_domains(8))
    assert trainer._domain_meter is None
    assert "domain_loss/arxiv" in logs_of_one(trainer)
