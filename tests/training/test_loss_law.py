"""A loss that cannot be cut by domain and micro-batch is refused before the first step, whatever its first labels are."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from hf_doge.training.config import DoGEConfig
from hf_doge.training.domain_loss import DomainLoss
from hf_doge.training.loss_law import LossLaw
from hf_doge.training.step_gradients import MicroBatch
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_bert, tiny_classifier, tiny_gpt2, tiny_llama
from tests.tiny import VOCAB, classifier_domains, float64_causal_loss, three_domains, tiny_t5


def learn(folder, model, domains, *, cls=DoGETrainer, loss_func=None, **options):
    defaults = {
        "per_device_train_batch_size": 12,
        "max_steps": 1,
        "mu": 0.1,
        "optim": "sgd",
        "alignment": "per_domain",
    }
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = DoGEConfig(str(folder), **{**defaults, **quiet, **options})
    trainer = cls(model, args, train_dataset=domains, compute_loss_func=loss_func)
    trainer.train()
    return trainer


def labelled(labels):
    """Classifier domains with given labels."""
    return {name: data.remove_columns("labels").add_column("labels", labels) for name, data in three_domains().items()}


def of_logits(function):
    """A trainer whose `compute_loss` is a function of logits and labels, as transformers' documentation has it."""

    class Custom(DoGETrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels", None)
            outputs = model(**inputs)
            loss = function(outputs.logits, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    return Custom


RARE = torch.tensor([1.0, 1.0, 20.0])


def hand_weighted(logits, labels, _):
    weights = RARE[labels]
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum() / weights.sum()


NOT_CUT = {
    "class weights": lambda logits, labels, _: F.cross_entropy(logits, labels, weight=RARE),
    "class weights by hand": hand_weighted,
    "a sum": lambda logits, labels, _: F.cross_entropy(logits, labels, reduction="sum"),
    "a root": lambda logits, labels, _: F.cross_entropy(logits, labels).sqrt(),
    "a small term of the batch": lambda logits, labels, _: (
        F.cross_entropy(logits, labels) + 3e-3 * (logits.mean(dim=0) - 1).square().sum()
    ),
    "weights by how often a label occurs": lambda logits, labels, _: F.cross_entropy(
        logits, labels, weight=1 / (1 + torch.bincount(labels, minlength=3).float())
    ),
    "a floor": lambda logits, labels, _: (F.cross_entropy(logits, labels) - 0.5).abs() + 0.5,
    "a comparison": lambda logits, labels, _: F.cross_entropy(logits @ logits.T, torch.arange(len(labels))),
}


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}])
@pytest.mark.parametrize("kind", NOT_CUT)
def test_a_loss_that_is_no_mean_over_labels_is_refused_whatever_the_first_labels_are(tmp_path, kind, options):
    if options and kind == "weights by how often a label occurs":
        return  # in a micro-batch of one example it occurs once
    with pytest.raises(ValueError, match=r"labels .* together and of .* in two parts\. Class weights"):
        learn(tmp_path, tiny_classifier(), labelled([0, 0, 1, 1]), cls=of_logits(NOT_CUT[kind]), **options)


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}])
def test_half_precision_hides_nothing(tmp_path, options):
    model = tiny_classifier(dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match="in two parts"):
        learn(tmp_path, model, labelled([0, 0, 1, 1]), cls=of_logits(NOT_CUT["a small term of the batch"]), **options)


def per_sequence(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    counted = labels[:, 1:].ne(-100)
    return ((losses * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)).mean()


def rare_token(outputs, labels, num_items_in_batch=None):
    weights = torch.ones(VOCAB)
    weights[31] = 3.0
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weights)


@pytest.mark.parametrize("loss_func", [per_sequence, rare_token])
def test_a_loss_of_tokens_that_is_no_mean_over_them_is_refused(tmp_path, loss_func):
    domains = {name: data for name, data in three_domains().items() if name != "code"}  # without the rare token
    with pytest.raises(ValueError, match="in two parts"):
        learn(tmp_path, tiny_llama(), domains, loss_func=loss_func)


def hand_weighted_token(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    weights = torch.where(labels == 31, 5.0, 1.0)
    return -(weights * logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)).sum() / weights.sum()


def rare_ignored(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=31)


def rare_ignored_and_divided(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=31, reduction="sum") / num_items_in_batch


class WeightedByColumn(DoGETrainer):
    """A mean by the weights of a column."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, weights = inputs["labels"][:, 1:], inputs.pop("token_weights")[:, 1:]
        logits = model(input_ids=inputs["input_ids"]).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        weights = weights * labels.ne(-100)
        return (losses * weights).sum() / weights.sum()


class Mixup(DoGETrainer):
    """Mixes the examples of a batch, in training mode alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        if model.training:
            share = float(np.random.beta(1, 1))
            logits = share * logits + (1 - share) * logits[torch.randperm(len(logits))]
        return F.cross_entropy(logits, labels)


def test_a_loss_that_does_otherwise_with_a_token_or_a_weight_that_does_not_occur_is_refused(tmp_path):
    domains = {name: data for name, data in three_domains().items() if name != "code"}  # without the rare token
    weighted = {name: data.add_column("token_weights", [[1.0] * 8] * 4) for name, data in domains.items()}
    for loss_func in (hand_weighted_token, rare_ignored):
        with pytest.raises(ValueError, match="in two parts"):
            learn(tmp_path, tiny_llama(), domains, loss_func=loss_func)
    with pytest.raises(ValueError, match="in two parts"):
        learn(tmp_path, tiny_llama(), weighted, cls=WeightedByColumn, remove_unused_columns=False)
    learn(tmp_path, tiny_llama(), domains, loss_func=rare_ignored_and_divided)


def test_a_loss_that_compares_examples_in_training_mode_alone_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"labels \(of examples in training mode, against either half of them twice\)"
    ):
        learn(tmp_path, tiny_classifier(), classifier_domains(), cls=Mixup)


class NoisyByNumPy(DoGETrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits + torch.from_numpy(np.random.randn(*logits.shape)).float(), labels)


def small_term(outputs, labels, num_items_in_batch=None):
    return float64_causal_loss(outputs, labels, num_items_in_batch) + 3e-4 * outputs.logits.exp().mean()


def constant(outputs, labels, num_items_in_batch=None):
    return float64_causal_loss(outputs, labels, num_items_in_batch) + 1e-3


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"per_device_train_batch_size": 1}])
@pytest.mark.parametrize("loss_func", [small_term, constant])
def test_a_small_term_that_is_not_divided_is_refused(tmp_path, loss_func, options):
    options = {"gradient_accumulation_steps": 12, **options} if "per_device_train_batch_size" in options else options
    with pytest.raises(ValueError, match="doubling `num_items_in_batch` changed it from"):
        learn(tmp_path, tiny_gpt2(dropout=0.3), three_domains(), loss_func=loss_func, **options)


def tiny_mixtral(**options):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False, **options,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_the_auxiliary_loss_of_routed_experts_is_refused_at_its_default_coefficient(tmp_path):
    with pytest.raises(ValueError, match="Switch off auxiliary losses"):
        learn(tmp_path, tiny_mixtral(output_router_logits=True), three_domains())
    with pytest.raises(ValueError, match="Switch off auxiliary losses"):
        learn(tmp_path, tiny_mixtral(output_router_logits=True, router_aux_loss_coef=1e-5), three_domains())
    learn(tmp_path, tiny_mixtral(), three_domains())


def divided_class_weights(logits, labels, num_items_in_batch):
    return F.cross_entropy(logits, labels, weight=RARE, reduction="sum") / num_items_in_batch


def multi_labels(domains):
    columns = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    return {
        name: data.remove_columns("labels").add_column("labels", columns[: len(data)])
        for name, data in domains.items()
    }


def half_dropped():
    """Of one domain no label counts, and of another every other example has none."""
    domains = three_domains()
    labels = [[-100] * 8] * 4
    silent = domains["books"].remove_columns("labels").add_column("labels", labels)
    some = [row if i % 2 else [-100] * 8 for i, row in enumerate(domains["code"]["labels"])]
    return {**domains, "books": silent, "code": domains["code"].remove_columns("labels").add_column("labels", some)}


CUT = {
    "divided class weights": (tiny_classifier, classifier_domains, {"cls": of_logits(divided_class_weights)}),
    "label smoothing": (tiny_llama, three_domains, {"label_smoothing_factor": 0.1}),
    "label smoothing of classes": (tiny_classifier, classifier_domains, {"label_smoothing_factor": 0.1}),
    "masked": (tiny_bert, lambda: three_domains(masked=0.5), {}),
    "seq2seq": (tiny_t5, lambda: three_domains(masked=0.4), {}),
    "classifier": (tiny_classifier, classifier_domains, {"bf16": True}),
    "bfloat16": (lambda: tiny_llama(dtype=torch.bfloat16), lambda: three_domains(masked=0.4), {}),
    "multi-label": (tiny_classifier, lambda: multi_labels(three_domains()), {}),
    "one example": (tiny_llama, lambda: {"a": three_domains()["code"].select([0])}, {}),
    "labels that do not count": (tiny_gpt2, half_dropped, {"per_device_train_batch_size": 4}),
    "noise of NumPy's": (tiny_classifier, classifier_domains, {"cls": NoisyByNumPy}),
    "noise in embeddings": (tiny_llama, lambda: three_domains(masked=0.4), {"neftune_noise_alpha": 5.0}),
    "a constant in a mean": (
        tiny_classifier,
        classifier_domains,
        {"cls": of_logits(lambda logits, labels, _: F.cross_entropy(logits, labels) + 1)},
    ),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_loss_that_can_be_cut_is_taken(tmp_path, kind):
    make_model, make_domains, options = CUT[kind]
    weights = learn(tmp_path, make_model(), make_domains(), **options).domain_weights
    assert np.isfinite(list(weights.last.values())).all()


def test_a_loss_that_never_has_a_label_learns_nothing_and_says_nothing(tmp_path):
    silent = {name: half_dropped()["books"] for name in "ab"}
    assert learn(tmp_path, tiny_llama(), silent, max_steps=2).domain_weights.last == {"a": 0.5, "b": 0.5}


def test_trying_a_loss_out_leaves_model_and_random_numbers_as_they_were():
    model = tiny_gpt2(dropout=0.3, dtype=torch.bfloat16).train()
    model.lm_head.eval()
    model.register_buffer("count", torch.zeros(3, dtype=torch.bfloat16))
    places = {name: (t, t.data_ptr(), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}

    def compute_loss(piece, num_items):
        assert model.dtype == torch.float32
        model.count += torch.rand(3) + random.random() + np.random.rand()
        return model(**piece.inputs, num_items_in_batch=num_items).loss

    ids = torch.tensor(three_domains()["code"]["input_ids"])
    batch = MicroBatch({"input_ids": ids, "labels": ids}, torch.zeros(4).long(), labels_are_shifted=True)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    law = LossLaw(model, compute_loss, [batch], labels_are_shifted=True, device=torch.device("cpu"), is_half=False)
    law.check(makes_same_calls=False)
    assert law.is_divided
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert model.training
    assert not model.lm_head.training
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        same, place, value = places[name]
        assert tensor is same
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, value)


def test_all_processes_make_as_many_calls_whatever_their_examples_are():
    model, counts = tiny_llama(), []

    def compute_loss(piece, num_items):
        counts[-1] += 1
        return model(piece.inputs["input_ids"], labels=piece.inputs["labels"], num_items_in_batch=num_items).loss

    ids = torch.tensor(three_domains()["code"]["input_ids"])
    unpaired = {"input_ids": ids[:1], "labels": ids[:1], "patches": torch.zeros(3, 2)}
    for inputs in ({"input_ids": ids, "labels": ids}, unpaired, {"input_ids": ids[:2], "labels": ids[:2]}):
        counts.append(0)
        batch = MicroBatch(inputs, torch.zeros(len(inputs["labels"])).long(), labels_are_shifted=True)
        options = {"labels_are_shifted": True, "device": torch.device("cpu"), "is_half": False}
        LossLaw(model, compute_loss, [batch], **options).check(makes_same_calls=True)
    assert len(set(counts)) == 1


def test_regression_and_a_loss_with_no_label_at_all(tmp_path):
    columns = {"input_ids": [[1, 2, 3]] * 4, "labels": [0.5, -1.0, 3.0, 0.1]}
    model = tiny_classifier()
    model.config.problem_type, model.num_labels, model.classifier = "regression", 1, torch.nn.Linear(16, 1)
    learn(tmp_path, model, {"a": Dataset.from_dict(columns), "b": Dataset.from_dict(columns)})


@pytest.mark.parametrize("scales", [True, False])
def test_a_loss_counts_the_same_on_two_processes_whether_or_not_it_is_scaled_for_their_mean(scales):
    """As the Trainer's own loss is and one that overrides it is not."""
    model = tiny_llama()
    args = SimpleNamespace(device=torch.device("cpu"), average_tokens_across_devices=True, bf16=False)

    def compute_loss(model, inputs, num_items_in_batch):
        loss = model(**inputs, num_items_in_batch=num_items_in_batch).loss
        return 2 * loss if scales and args.average_tokens_across_devices else loss

    trainer = SimpleNamespace(
        args=args, model=model, accelerator=SimpleNamespace(num_processes=2), model_accepts_loss_kwargs=True,
        compute_loss_func=None, compute_loss=compute_loss, compute_loss_context_manager=nullcontext,
    )  # fmt: skip
    ids = torch.tensor(three_domains()["code"]["input_ids"])
    batch, loss = (
        MicroBatch({"input_ids": ids, "labels": ids}, torch.zeros(4), labels_are_shifted=True),
        DomainLoss(trainer),
    )
    loss.learn([batch])
    found = loss(batch.pick(torch.arange(4)), 2 * 28)
    assert found.item() == pytest.approx(model(ids, labels=ids).loss.item() / 2, rel=1e-5)
    assert args.average_tokens_across_devices
