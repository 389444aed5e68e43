"""Under trl's SFTTrainer, whose fused head returns log-probabilities, one backward gives what one per domain gives."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import SFTConfig, SFTTrainer

from hf_doge.gradients.fused_head import WholeLogitsError, _log_probs, ask_for_logits
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGEMixin
from tests.gradients.test_single_pass import assert_close, flat, tiny_gemma, uneven_domains
from tests.tiny import ONE_STEP, language_model_rows, tiny_gpt2, tiny_llama

pytest.importorskip("trl", minversion="1.16")  # before, its loss comes from logits

KEYWORD = "All domains cannot be had from one backward"


class DoGESFTTrainer(DoGEMixin, SFTTrainer):
    pass


@dataclass
class DoGESFTConfig(DoGEConfig, SFTConfig):
    pass


def make_trainer(folder, tokenizer, model=None, *, data=None, target=None, peft_config=None, loss=None, **options):
    defaults = {**ONE_STEP, "max_length": 16, "bf16": False, "gradient_checkpointing": False}
    return DoGESFTTrainer(
        model=tiny_llama() if model is None else model,
        args=DoGESFTConfig(str(folder), **{**defaults, **options}),
        train_dataset=uneven_domains(masked=0.4) if data is None else data,
        target_dataset=target,
        processing_class=tokenizer,
        peft_config=peft_config,
        compute_loss_func=loss,
    )


def take_step(*args, **options):
    trainer = make_trainer(*args, **options)
    before = flat(trainer.model)
    trainer.train()
    point = trainer.domain_weights.trajectory
    found = {name: torch.from_numpy(getattr(point, name)) for name in ("scores", "losses", "weights")}
    return trainer, {**found, "step": (flat(trainer.model) - before) / -0.05}


def is_plain(trainer):
    return getattr(trainer._learner.alignment, "_is_plain", True)


MODELS = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
    "gemma": tiny_gemma,  # whose logits are capped, which the fused head does by itself
}


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_one_backward_equals_one_per_domain(tmp_path, tokenizer, kind, with_target):
    target = Dataset.from_dict(language_model_rows(4, low=19, high=31, seed=5)) if with_target else None
    _, expected = take_step(tmp_path, tokenizer, MODELS[kind](), target=target, alignment="per_domain")
    trainer, found = take_step(tmp_path, tokenizer, MODELS[kind](), target=target, alignment="single_pass")
    assert not is_plain(trainer)
    assert not trainer._learner.alignment._step_is_plain
    assert_close(found, expected, tolerance=1e-5)


def test_one_backward_equals_one_per_domain_under_gradient_checkpointing(tmp_path, tokenizer):
    options = {"gradient_checkpointing": True}  # as trl has it by default
    _, expected = take_step(tmp_path, tokenizer, alignment="per_domain")
    trainer, found = take_step(tmp_path, tokenizer, alignment="single_pass", **options)
    assert not is_plain(trainer)
    assert_close(found, expected, tolerance=1e-5)


def test_single_pass_is_what_is_chosen(tmp_path, tokenizer):
    trainer, _ = take_step(tmp_path, tokenizer)
    assert not is_plain(trainer)


def test_a_step_between_two_updates_is_the_plain_way_s(tmp_path, tokenizer):
    options = {"max_steps": 3, "reweight_steps": 3}
    found = [take_step(tmp_path, tokenizer, alignment=way, **options)[1] for way in ("per_domain", "single_pass")]
    assert_close(found[1], found[0], tolerance=1e-5)


class FusedForwards:
    """Counts the forwards that train and make log-probabilities without logits."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_hook(self._note)

    def _note(self, model, args, outputs):
        self.count += torch.is_grad_enabled() and type(outputs).__name__ == "FusedCausalLMOutput"


def test_a_head_that_is_not_trained_stays_fused(tmp_path, tokenizer):
    found = {}
    for way in ("per_domain", "single_pass"):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = make_trainer(tmp_path, tokenizer, peft_config=lora, alignment=way)
        forwards, before = FusedForwards(trainer.model), flat(trainer.model)
        trainer.train()
        assert forwards.count > 0
        point = trainer.domain_weights.trajectory
        found[way] = {
            "scores": torch.from_numpy(point.scores),
            "losses": torch.from_numpy(point.losses),
            "step": flat(trainer.model) - before,
        }
    assert not is_plain(trainer)
    assert_close(found["single_pass"], found["per_domain"], tolerance=1e-5)


def test_it_tells_what_the_fused_head_tells(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(tied=False))
    rows = language_model_rows(5, masked=0.4)
    batch = {name: torch.tensor(value) for name, value in rows.items()}
    model = trainer.model
    expected = model(**batch, fused_lm_head=True)
    ask = partial(ask_for_logits, memory_budget=2**20)
    with model.register_forward_pre_hook(ask, with_kwargs=True):
        found = model(**batch, fused_lm_head=True)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    for name in ("is_top1", "label_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert type(model(**batch, fused_lm_head=True)).__name__ == type(expected).__name__  # the model is left as it was


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "dft"}, "its tokens add up to"),
        ({"label_smoothing_factor": 0.2}, "the loss comes from no cross-entropy"),
        ({"gradient_memory_budget": 1e-6}, "the logits of a micro-batch, whole, take"),
    ],
)
def test_where_the_loss_cannot_be_told_apart_the_plain_way_stays(tmp_path, tokenizer, caplog, options, words):
    _, expected = take_step(tmp_path, tokenizer, alignment="per_domain", **options)
    caplog.clear()
    trainer, found = take_step(tmp_path, tokenizer, **options)
    assert is_plain(trainer)
    (said,) = [record.getMessage() for record in caplog.records if KEYWORD in record.getMessage()]
    assert words in said
    assert_close(found, expected, tolerance=1e-5)


def test_several_labels_at_a_position_are_left_to_the_plain_way():
    outputs = SimpleNamespace(logits=torch.zeros(2, 4, 3, 7))
    with pytest.raises(WholeLogitsError, match=r"for labels of shape \(2, 4, 3\)"):
        _log_probs(outputs, torch.ones(2, 4, 3).long())


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_a_loss_of_logits_is_taken_apart_beside_the_fused_metrics(tmp_path, tokenizer):
    """Its trainer makes log-probabilities too, without gradients, for its logs alone."""
    _, expected = take_step(tmp_path, tokenizer, alignment="per_domain", loss=mean_loss)
    trainer, found = take_step(tmp_path, tokenizer, alignment="single_pass", loss=mean_loss)
    assert not is_plain(trainer)
    assert_close(found, expected, tolerance=1e-5)
