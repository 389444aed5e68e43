"""DoGETrainer against an independent reference, and the laws of learning."""

import json
import logging
import pickle
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_bert, tiny_classifier, tiny_gpt2, tiny_llama
from tests.reference import domain_loss, flat_gradient, reference_step
from tests.tiny import ONE_STEP, classifier_domains, float64_causal_loss, language_model_rows, three_domains, tiny_t5


def config(output_dir, **kwargs):
    return DoGEConfig(str(output_dir), **{**ONE_STEP, "logging_steps": 1, "seed": 0, **kwargs})


def train(model, args, domains, targets=None, **kwargs):
    trainer = DoGETrainer(model, args, train_dataset=domains, target_dataset=targets, **kwargs)
    trainer.train()
    return trainer


def mean_causal_loss(outputs, labels, num_items_in_batch=None):
    """A mean over the batch at hand; transformers 5.0 counts one label too many for its own."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def rows(domains):
    return {name: dataset.to_dict() for name, dataset in domains.items()}


def flat_parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weights_of(trainer):
    return torch.tensor(list(trainer.domain_weights.last.values()), dtype=torch.float64)


MODELS = {
    "causal": (tiny_llama, three_domains),
    "causal_untied": (lambda **kw: tiny_llama(tied=False, **kw), lambda: three_domains(masked=0.4)),
    "masked": (tiny_bert, lambda: three_domains(masked=0.5)),
    "seq2seq": (tiny_t5, lambda: three_domains(masked=0.4)),
    "classifier": (tiny_classifier, classifier_domains),
}


@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_weights_and_step_equal_autograd_in_float64(tmp_path, kind, with_target, alignment):
    make_model, make_domains = MODELS[kind]
    model, domains = make_model(dtype=torch.float64, num_layers=2), make_domains()
    targets = {"target": domains["code"].select([1, 2])} if with_target else None
    kind = kind.split("_")[0]
    scores, weights, losses, gradient = reference_step(
        model, rows(domains), rows(targets) if with_target else None, learning_rate=0.05, mu=0.1, kind=kind
    )
    before = flat_parameters(model)

    args = config(tmp_path, alignment=alignment, per_device_target_batch_size=2)
    loss_func = float64_causal_loss if kind == "causal" else None
    trainer = train(model, args, domains, targets, compute_loss_func=loss_func)

    point = trainer.domain_weights.trajectory
    torch.testing.assert_close(torch.from_numpy(point.scores[0]), scores, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.from_numpy(point.losses[0]), losses, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weights_of(trainer), weights, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        flat_parameters(model), before - 0.05 * gradient, rtol=0, atol=step_tolerance(alignment)
    )


def step_tolerance(alignment):
    """RMSNorm works in float32 whatever the model's dtype, so a scaled loss rounds otherwise than a scaled gradient."""
    return 1e-13 if alignment == "per_domain" else 1e-8


@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
def test_the_official_recipe_equals_its_reference(tmp_path, alignment):
    model, domains = tiny_llama(dtype=torch.float64), three_domains()
    targets = {"mix": concatenate_datasets([dataset.select([0]) for dataset in domains.values()])}
    options = {"learning_rate": 0.05, "mu": 0.1}
    expected = reference_step(model, rows(domains), rows(targets), official=True, max_norm=0.3, **options)
    before = flat_parameters(model)

    args = config(
        tmp_path,
        recipe="official",
        domain_max_grad_norm=0.3,
        alignment=alignment,
        per_device_target_batch_size=3,
    )
    trainer = train(model, args, domains, targets["mix"], compute_loss_func=float64_causal_loss)

    scores, weights, _, _ = expected
    torch.testing.assert_close(
        torch.from_numpy(trainer.domain_weights.trajectory.scores[0]), scores, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(weights_of(trainer), weights, rtol=1e-12, atol=0)
    clipped = sum(
        w * g * min(1.0, 0.3 / (float(g.norm()) + 1e-6))
        for w, g in zip(weights, _domain_gradients(domains), strict=True)
    )
    torch.testing.assert_close(flat_parameters(model), before - 0.05 * clipped, rtol=0, atol=step_tolerance(alignment))


def _domain_gradients(domains):
    model = tiny_llama(dtype=torch.float64)
    return [flat_gradient(model, domain_loss(model, data, "causal")) for data in rows(domains).values()]


def test_several_targets_count_by_their_weights(tmp_path):
    model, domains = tiny_llama(dtype=torch.float64), three_domains()
    targets = {"a": domains["arxiv"].select([0, 1]), "b": domains["code"].select([2, 3])}
    single = [
        reference_step(model, rows(domains), {name: rows(targets)[name]}, learning_rate=0.05, mu=0.1)[0]
        for name in targets
    ]
    args = config(tmp_path, per_device_target_batch_size=2, alignment="per_domain")
    trainer = train(
        model, args, domains, targets, target_weights={"a": 2.0, "b": 0.5}, compute_loss_func=float64_causal_loss
    )
    scores = torch.from_numpy(trainer.domain_weights.trajectory.scores[0])
    torch.testing.assert_close(scores, 2 * single[0] + 0.5 * single[1], rtol=1e-10, atol=0)


def test_without_self_term_a_domain_is_not_compared_with_itself(tmp_path):
    domains = three_domains()
    scores = {}
    for self_term in (True, False):
        args = config(tmp_path, self_term=self_term, alignment="per_domain")
        trainer = train(tiny_llama(dtype=torch.float64), args, domains, compute_loss_func=float64_causal_loss)
        scores[self_term] = torch.from_numpy(trainer.domain_weights.trajectory.scores[0])
    norms = torch.stack([g.square().sum() for g in _domain_gradients(domains)])
    torch.testing.assert_close(scores[True] - scores[False], norms, rtol=1e-9, atol=0)


def test_a_parameter_filter_scores_some_parameters_and_trains_all(tmp_path):
    model, domains = tiny_llama(dtype=torch.float64), three_domains()
    named = [(n, p) for n, p in model.named_parameters()]
    chosen = [p for n, p in named if "mlp" in n]
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(domain_loss(model, data, "causal"), chosen)])
        for data in rows(domains).values()
    ]
    expected = torch.stack([g @ sum(grads) for g in grads])
    before = flat_parameters(model)
    args = config(tmp_path, alignment_parameters="mlp", alignment="per_domain")
    trainer = train(model, args, domains, compute_loss_func=float64_causal_loss)
    scores = torch.from_numpy(trainer.domain_weights.trajectory.scores[0])
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=0)
    assert (model.model.embed_tokens.weight.flatten() != before[: 32 * 16]).any()


# Batch law: how a step is cut into micro-batches, and in which order its examples come, changes nothing.


@pytest.mark.parametrize("kind", ["causal_untied", "masked", "classifier", "seq2seq"])
@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
def test_micro_batches_give_the_weights_and_parameters_of_one_batch(tmp_path, kind, alignment):
    make_model, make_domains = MODELS[kind]
    results = []
    for batch_size, accumulation in ((12, 1), (4, 3), (1, 12)):
        model = make_model()
        args = config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            per_device_target_batch_size=4,
            alignment=alignment,
            max_steps=2,
        )
        trainer = train(model, args, make_domains(), make_domains()["code"])
        results.append((weights_of(trainer), flat_parameters(model)))
    for weights, parameters in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parameters, results[0][1], rtol=1e-5, atol=1e-6)


def test_streamed_equals_per_domain_with_dropout_on(tmp_path):
    results = []
    for alignment in ("per_domain", "streamed"):
        model = tiny_gpt2(dropout=0.3)
        trainer = train(model, config(tmp_path, alignment=alignment, max_steps=5), three_domains())
        results.append((weights_of(trainer), flat_parameters(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_dropout_is_on_while_learning(tmp_path):
    with_dropout = train(tiny_gpt2(dropout=0.5), config(tmp_path), three_domains()).domain_weights
    without = train(tiny_gpt2(dropout=0.0), config(tmp_path), three_domains()).domain_weights
    assert not np.allclose(with_dropout.trajectory.losses, without.trajectory.losses, rtol=1e-3)


# Frozen law.


class WeightedLossTrainer(Trainer):
    """A plain Trainer on the weighted loss: the mean of the mean losses of three domains of four rows each."""

    weights = (0.2, 0.5, 0.3)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = []
        for data in self.rows_by_domain.values():
            first = torch.tensor(data["input_ids"])
            mine = torch.stack([(first == row).all(dim=1).any() for row in inputs["input_ids"]])
            part = {k: v[mine].tolist() for k, v in inputs.items() if k in ("input_ids", "labels")}
            losses.append(domain_loss(model, part, "causal"))
        return sum(w * loss for w, loss in zip(self.weights, losses, strict=True))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_with_frozen_weights_a_step_is_a_trainer_step_on_the_weighted_loss(tmp_path, optim):
    domains = three_domains()
    options = {"optim": optim, "max_steps": 5, "max_grad_norm": 0.5, "learning_rate": 0.01}
    model = tiny_llama()
    train(
        model,
        config(tmp_path, mu=1e30, **options),
        domains,
        initial_weights=dict(zip(domains, (0.2, 0.5, 0.3), strict=True)),
    )

    plain = tiny_llama()
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=12,
        report_to="none",
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = WeightedLossTrainer(plain, args, train_dataset=concatenate_datasets(list(domains.values())))
    trainer.rows_by_domain = rows(domains)
    trainer.train()
    torch.testing.assert_close(flat_parameters(model), flat_parameters(plain), rtol=1e-5, atol=1e-6)


def test_one_domain_is_a_plain_trainer_run(tmp_path):
    dataset = three_domains(8)["books"]
    args = config(tmp_path, per_device_train_batch_size=8, max_steps=4)
    model, plain = tiny_llama(), tiny_llama()
    train(model, args, {"books": dataset}, compute_loss_func=mean_causal_loss)
    Trainer(plain, args, train_dataset=dataset, compute_loss_func=mean_causal_loss).train()
    torch.testing.assert_close(flat_parameters(model), flat_parameters(plain), rtol=1e-5, atol=1e-6)


def test_between_updates_the_weights_are_kept_and_still_step_the_model(tmp_path):
    trainer = train(tiny_llama(), config(tmp_path, reweight_steps=3, max_steps=8), three_domains())
    assert trainer.domain_weights.trajectory.steps.tolist() == [1, 4, 7]
    every = train(tiny_llama(), config(tmp_path, reweight_steps=1, max_steps=8, mu=1e30), three_domains())
    never = train(tiny_llama(), config(tmp_path, reweight_steps=8, max_steps=8, mu=1e30), three_domains())
    torch.testing.assert_close(flat_parameters(every.model), flat_parameters(never.model), rtol=1e-5, atol=1e-6)


# Absent-domain law, and the target that never moves the model.


def domains_with_a_silent_one():
    domains = three_domains()
    labels = [[-100] * 8] * 4
    domains["books"] = domains["books"].remove_columns("labels").add_column("labels", labels)
    return domains


@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
def test_a_domain_without_a_label_keeps_its_share_and_the_others_step_the_model(tmp_path, alignment):
    domains = domains_with_a_silent_one()
    model = tiny_llama(dtype=torch.float64)
    initial = {"arxiv": 0.2, "books": 0.5, "code": 0.3}
    others = {name: data for name, data in rows(domains).items() if name != "books"}
    old = torch.tensor([0.4, 0.6], dtype=torch.float64)
    scores, weights, _, gradient = reference_step(model, others, learning_rate=0.05, mu=0.1, weights=old)
    before = flat_parameters(model)

    options = {"initial_weights": initial, "compute_loss_func": float64_causal_loss}
    trainer = train(model, config(tmp_path, alignment=alignment), domains, **options)

    learned = trainer.domain_weights
    assert learned.last["books"] == 0.5
    learned_scores = torch.from_numpy(learned.trajectory.scores[0])
    assert learned_scores[1].isnan()
    torch.testing.assert_close(learned_scores[[0, 2]], scores, rtol=1e-11, atol=0)
    torch.testing.assert_close(weights_of(trainer)[[0, 2]], 0.5 * weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        flat_parameters(model), before - 0.05 * gradient, rtol=0, atol=step_tolerance(alignment)
    )


def test_the_target_never_moves_the_model(tmp_path):
    results = []
    for target in ("arxiv", "code"):
        model = tiny_llama()
        train(model, config(tmp_path, mu=1e30, max_steps=3), three_domains(), three_domains()[target])
        results.append(flat_parameters(model))
    assert torch.equal(*results)


def test_a_target_without_a_label_updates_nothing(tmp_path):
    silent = domains_with_a_silent_one()["books"]
    trainer = train(tiny_llama(), config(tmp_path, max_steps=2), three_domains(), silent)
    assert trainer.domain_weights.trajectory is None
    assert list(trainer.domain_weights.last.values()) == pytest.approx([1 / 3] * 3)


def test_every_step_sees_every_domain_and_carries_the_remainder(tmp_path):
    trainer = train(tiny_llama(), config(tmp_path, per_device_train_batch_size=5, max_steps=6), three_domains(8))
    assert not np.isnan(trainer.domain_weights.trajectory.losses).any()
    consumed = [trainer.state.log_history[5][f"domain_epochs/{name}"] * 8 for name in ("arxiv", "books", "code")]
    assert consumed == [10, 10, 10]


@pytest.mark.parametrize("mode", ["proxy", "online"])
def test_no_example_of_a_target_is_compared_with_again_before_all_were(tmp_path, mode):
    first_tokens = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        first_tokens.extend(labels[:, 0].tolist() if outputs.logits.requires_grad else [])
        return float64_causal_loss(outputs, labels, num_items_in_batch)

    target = language_model_rows(8, low=1, high=20)
    for row, (ids, labels) in enumerate(zip(target["input_ids"], target["labels"], strict=True)):
        ids[0] = labels[0] = 24 + row  # begins no example of the two train domains
    domains = {name: dataset for name, dataset in three_domains(8).items() if name != "code"}
    args = config(
        tmp_path, mode=mode, reweight_steps=3, max_steps=12, per_device_target_batch_size=2, alignment="per_domain"
    )
    train(tiny_llama(), args, domains, Dataset.from_dict(target), compute_loss_func=loss_func)
    assert sorted(token for token in first_tokens if token >= 24) == list(range(24, 32))


# Losses that are not numbers.


def spoilt_loss(outputs, labels, num_items_in_batch=None):
    """Not a number where a row starts with the token 31."""
    loss = float64_causal_loss(outputs, labels, num_items_in_batch)
    return loss * float("nan") if (labels[:, 0] == 31).any() else loss


def domains_with_a_spoilt_one():
    domains = three_domains()
    spoilt = domains["books"].to_dict()
    for row in (*spoilt["input_ids"], *spoilt["labels"]):
        row[0] = 31
    domains["books"] = Dataset.from_dict(spoilt)
    return domains


@pytest.mark.parametrize("options", [{}, {"alignment": "streamed"}, {"reweight_steps": 100}])
def test_a_loss_that_is_not_a_number_keeps_the_weights_and_spares_the_model(tmp_path, options):
    model = tiny_llama()
    args = config(tmp_path, max_steps=3, **options)
    trainer = train(model, args, domains_with_a_spoilt_one(), compute_loss_func=spoilt_loss)
    assert list(trainer.domain_weights.last.values()) == pytest.approx([1 / 3] * 3)
    assert torch.isfinite(flat_parameters(model)).all()
    assert not torch.equal(flat_parameters(model), flat_parameters(tiny_llama()))
    assert trainer.state.log_history[2]["nonfinite_domain_steps"] == 3


@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
def test_a_target_whose_loss_is_not_a_number_keeps_the_weights_and_spares_the_model(tmp_path, alignment):
    args = config(tmp_path, max_steps=2, alignment=alignment)
    target = domains_with_a_spoilt_one()["books"]
    trainer = train(tiny_llama(), args, three_domains(), target, compute_loss_func=spoilt_loss)
    assert list(trainer.domain_weights.last.values()) == pytest.approx([1 / 3] * 3)
    assert torch.isfinite(flat_parameters(trainer.model)).all()
    assert not torch.equal(flat_parameters(trainer.model), flat_parameters(tiny_llama()))


@pytest.mark.parametrize("alignment", ["single_pass", "per_domain", "streamed"])
@pytest.mark.parametrize("reweight_steps", [1, 100])
def test_a_gradient_that_is_not_a_number_of_a_loss_that_is_spares_the_model(tmp_path, alignment, reweight_steps):
    def spoilt_gradient(outputs, labels, num_items_in_batch=None):
        """Of the rows that start with the token 31, from the second step on."""
        logits = outputs.logits[:, :-1].clone()
        spoilt = labels[:, 0].eq(31) & (trainer.state.global_step > 0)
        logits[spoilt] = logits[spoilt] + (0 * logits[spoilt]).sqrt()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    args = config(tmp_path, max_steps=3, alignment=alignment, reweight_steps=reweight_steps)
    trainer = DoGETrainer(
        tiny_llama(), args, train_dataset=domains_with_a_spoilt_one(), compute_loss_func=spoilt_gradient
    )
    trainer.train()
    assert torch.isfinite(flat_parameters(trainer.model)).all()
    assert trainer.state.log_history[2]["nonfinite_domain_steps"] == 2
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[2] < losses[1]  # the other domains trained it


def test_too_many_losses_that_are_not_numbers_in_a_row_end_the_run(tmp_path):
    args = config(tmp_path, max_steps=9, max_nonfinite_steps=4)
    with pytest.raises(FloatingPointError, match="in the last 4 steps some domain's was not"):
        train(tiny_llama(), args, domains_with_a_spoilt_one(), compute_loss_func=spoilt_loss)


def test_a_loss_func_gets_every_domain_alone(tmp_path):
    seen = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        seen.append(int(num_items_in_batch))
        return float64_causal_loss(outputs, labels, num_items_in_batch)

    args = config(tmp_path, alignment="per_domain")
    trainer = train(tiny_llama(dtype=torch.float64), args, three_domains(), compute_loss_func=loss_func)
    scores = reference_step(tiny_llama(dtype=torch.float64), rows(three_domains()), learning_rate=0.05, mu=0.1)[0]
    torch.testing.assert_close(
        torch.from_numpy(trainer.domain_weights.trajectory.scores[0]), scores, rtol=1e-10, atol=0
    )
    assert seen[-3:] == [28, 28, 28]  # behind those that the loss was tried out with


def test_a_loss_that_cannot_be_averaged_is_refused(tmp_path):
    def with_penalty(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().sum() / num_items_in_batch + 1.0

    with pytest.raises(ValueError, match="doubling `num_items_in_batch` changed it from"):
        train(tiny_llama(), config(tmp_path), three_domains(), compute_loss_func=with_penalty)


# What the Trainer offers keeps working.


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = tiny_llama()
        train(model, config(tmp_path, max_steps=3, gradient_checkpointing=checkpointing), three_domains())
        results.append(flat_parameters(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_bf16_autocast_learns_close_to_float32(tmp_path):
    results = [
        weights_of(train(tiny_llama(), config(tmp_path, max_steps=5, bf16=bf16), three_domains()))
        for bf16 in (False, True)
    ]
    torch.testing.assert_close(*results, rtol=0.02, atol=0)
    assert not torch.equal(*results)


def test_lora_scores_and_trains_only_the_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    before = flat_parameters(base)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    scores = reference_step(model, rows(three_domains()), learning_rate=0.05, mu=0.1)[0]
    trainer = train(model, config(tmp_path, alignment="streamed"), three_domains())
    learned = torch.from_numpy(trainer.domain_weights.trajectory.scores[0])
    torch.testing.assert_close(learned, scores.double(), rtol=1e-4, atol=0)
    frozen = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora" not in n])
    assert torch.equal(frozen, before)


def test_a_collator_that_masks_at_random_works(tmp_path, tokenizer):
    domains = {name: data.remove_columns("labels") for name, data in three_domains(8).items()}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = train(tiny_bert(), config(tmp_path, max_steps=2), domains, data_collator=collator)
    assert len(trainer.domain_weights.trajectory.steps) == 2


def test_evaluation_takes_sets_with_and_without_the_domain_column(tmp_path):
    merged = concatenate_datasets([data.add_column("domain", [name] * 4) for name, data in three_domains().items()])
    trainer = train(tiny_llama(), config(tmp_path), merged, eval_dataset={"all": merged, **three_domains()})
    metrics = trainer.evaluate()
    assert {"eval_all_loss", "eval_books_loss"} <= set(metrics)


def test_a_column_of_strings_or_class_labels_equals_a_dict_of_datasets(tmp_path):
    merged = concatenate_datasets([data.add_column("kind", [name] * 4) for name, data in three_domains().items()])
    expected = weights_of(train(tiny_llama(), config(tmp_path, max_steps=2), three_domains()))
    for dataset in (merged, merged.class_encode_column("kind"), merged.shuffle(seed=3)):
        trainer = train(tiny_llama(), config(tmp_path, max_steps=2, domain_column="kind"), dataset)
        assert list(trainer.domain_weights.last) == ["arxiv", "books", "code"]
        torch.testing.assert_close(weights_of(trainer), expected, rtol=1e-5, atol=0)


def test_the_logs_tell_of_every_domain(tmp_path):
    trainer = train(tiny_llama(), config(tmp_path, max_steps=2), three_domains())
    logs = trainer.state.log_history[1]
    for name in ("arxiv", "books", "code"):
        for kind in ("weight", "score", "loss", "tokens", "epochs"):
            assert np.isfinite(logs[f"domain_{kind}/{name}"])
    assert logs["domain_tokens/code"] == 2 * 4 * 7
    assert logs["domain_epochs/code"] == 2
    weights = np.array([logs[f"domain_weight/{name}"] for name in ("arxiv", "books", "code")])
    assert logs["domain_weight_entropy"] == pytest.approx(-(weights * np.log(weights)).sum())
    assert 0 <= logs["alignment_time_share"] < 1
    expected = sum(logs[f"domain_weight/{n}"] * logs[f"domain_loss/{n}"] for n in ("arxiv", "books", "code"))
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_choice_of_alignment_follows_the_budget_and_is_logged(tmp_path, caplog):
    plain = []
    with caplog.at_level(logging.INFO, logger="hf_doge"):
        for options in ({}, {"gradient_memory_budget": 1e-6}):
            trainer = DoGETrainer(tiny_llama(), config(tmp_path, **options), train_dataset=three_domains())
            plain.append(type(trainer._learner.alignment.plain).__name__)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Alignment")]
    assert [line.partition(" (")[0] for line in lines] == ["Alignment: single_pass"] * 2
    assert "3 domains takes" in lines[1]
    assert "budget of 1e-06 GiB" in lines[1]
    assert plain == ["PerDomainAlignment", "StreamedAlignment"]


def test_the_artifact_tells_where_the_weights_come_from(tmp_path):
    trainer = train(tiny_llama(), config(tmp_path, max_steps=2), three_domains())
    trainer.save_model(str(tmp_path / "proxy"))
    learned = DomainWeights.from_pretrained(tmp_path / "proxy" / "domain_weights")
    assert learned.mean == trainer.domain_weights.mean
    assert learned.domains["books"]["num_rows"] == 4
    assert learned.domains["books"]["num_tokens"] == 32
    assert learned.recipe["name"] == "paper"
    assert learned.recipe["arguments"]["mu"] == 0.1
    assert learned.metadata["versions"]["torch"] == version("torch")
    assert learned.metadata["model"]["class"] == "LlamaForCausalLM"
    assert learned.mean["arxiv"] == pytest.approx(np.mean(trainer.domain_weights.trajectory.weights[:, 0]))
    json.dumps(learned.recipe)


def test_an_infinite_bound_can_be_saved(tmp_path):
    args = config(tmp_path, score_min=float("-inf"), gradient_memory_budget=float("inf"))
    trainer = train(tiny_llama(), args, three_domains())
    trainer.domain_weights.save_pretrained(tmp_path / "weights")
    recipe = DomainWeights.from_pretrained(tmp_path / "weights").recipe
    assert recipe["score_min"] is None
    assert recipe["arguments"]["score_min"] == "-inf"


def test_an_odd_model_configuration_does_not_cost_the_weights(tmp_path):
    model = tiny_llama()
    model.config.time_step_limit = (0.0, float("inf"))
    trainer = train(model, config(tmp_path), three_domains())
    assert trainer.domain_weights.metadata["model"]["config"]["time_step_limit"] == [0.0, "inf"]


@pytest.mark.parametrize("alignment", ["per_domain", "streamed"])
def test_parameters_unfrozen_after_construction_are_scored_and_trained(tmp_path, alignment):
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    trainer = DoGETrainer(model, config(tmp_path, alignment=alignment), train_dataset=three_domains())
    model.model.layers[0].requires_grad_(True)
    trainer.train()
    expected = train(tiny_llama(), config(tmp_path, alignment=alignment), three_domains())
    torch.testing.assert_close(flat_parameters(model), flat_parameters(expected.model), rtol=1e-6, atol=1e-8)


class ScheduleFreeLike(torch.optim.SGD):
    """Schedule-free optimizers keep two sets of parameters and refuse a step unless switched to training."""

    is_training = False

    def train(self):
        self.is_training = True

    def eval(self):
        self.is_training = False

    def step(self, closure=None):
        assert self.is_training
        return super().step(closure)


def test_an_optimizer_with_a_training_mode_is_switched_to_it(tmp_path):
    model = tiny_llama()
    optimizer = ScheduleFreeLike(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = train(model, config(tmp_path), three_domains(), optimizers=(optimizer, scheduler))
    assert trainer.state.global_step == trainer.args.max_steps


def test_a_first_loss_of_zero_does_not_decide_how_losses_are_averaged(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        return float64_causal_loss(outputs, labels, num_items_in_batch) * (len(calls) > 2)

    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 2}
    calls = []
    late = train(tiny_llama(), config(tmp_path, **options), three_domains(), compute_loss_func=loss_func)
    calls = [1, 1]
    early = train(tiny_llama(), config(tmp_path, **options), three_domains(), compute_loss_func=loss_func)
    torch.testing.assert_close(flat_parameters(late.model), flat_parameters(early.model), rtol=1e-6, atol=1e-8)


def test_a_target_column_called_target_reaches_the_collator(tmp_path):
    def collate(features):
        ids = torch.tensor([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "labels": torch.tensor([feature["target"] for feature in features])}

    domains = {name: data.rename_column("labels", "target") for name, data in three_domains().items()}
    args = config(tmp_path, remove_unused_columns=False)
    trainer = train(tiny_llama(), args, domains, domains["code"], data_collator=collate)
    assert np.isfinite(trainer.domain_weights.trajectory.scores).all()


def test_burn_in_leaves_the_first_updates_out_of_the_mean(tmp_path):
    trainer = train(tiny_llama(), config(tmp_path, max_steps=5, burn_in_steps=3), three_domains())
    learned = trainer.domain_weights
    expected = learned.trajectory.weights[3:].mean(axis=0)
    np.testing.assert_allclose(list(learned.mean.values()), expected, rtol=1e-12)


def test_a_model_made_by_model_init_is_trained_and_scored(tmp_path):
    made = train(None, config(tmp_path, max_steps=3), three_domains(), model_init=lambda: tiny_llama())
    given = train(tiny_llama(), config(tmp_path, max_steps=3), three_domains())
    assert not torch.equal(flat_parameters(made.model), flat_parameters(tiny_llama()))
    torch.testing.assert_close(weights_of(made), weights_of(given), rtol=1e-6, atol=0)


def test_spawned_workers_can_carry_the_domains(tmp_path):
    trainer = DoGETrainer(tiny_llama(), config(tmp_path), train_dataset=three_domains())
    collator = pickle.loads(pickle.dumps(trainer.data_collator))
    rows = [{"input_ids": [1], "domain": trainer.train_dataset[i]["domain"]} for i in (0, 4, 8)]
    assert collator(rows)["domain_ids"].tolist() == [0, 1, 2]


def test_training_twice_starts_anew(tmp_path):
    trainer = DoGETrainer(tiny_llama(), config(tmp_path, max_steps=2), train_dataset=three_domains())
    trainer.train()
    trainer.train()
    assert trainer.domain_weights.trajectory.steps.tolist() == [1, 2]


def test_language_model_rows_differ_between_seeds():
    assert language_model_rows(4, seed=0) != language_model_rows(4, seed=1)
