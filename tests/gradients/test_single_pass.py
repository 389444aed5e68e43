"""One backward of the mixed batch gives what one backward per domain gives."""

import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.tiny import (
    ONE_STEP,
    VOCAB,
    classifier_domains,
    float64_causal_loss,
    language_model_rows,
    three_domains,
    tiny_bert,
    tiny_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)


def float64_masked_loss(outputs, labels, num_items_in_batch=None):
    """Same for a masked language model."""
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def tiny_gemma(*, dtype=torch.float32):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_cache=False,
    )
    return Gemma2ForCausalLM(config).to(dtype)


def tiny_lora():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of A
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def take_step(tmp_path, model, domains, targets=None, loss_func=None, callbacks=None, **options):
    args = DoGEConfig(str(tmp_path), **{**ONE_STEP, **options})
    trainer = DoGETrainer(
        model,
        args,
        train_dataset=domains,
        target_dataset=targets,
        compute_loss_func=loss_func,
        callbacks=callbacks,
    )
    before = flat(model)
    trainer.train()
    point = trainer.domain_weights.trajectory
    step = (flat(model) - before) / -0.05
    return trainer, {
        "scores": torch.from_numpy(point.scores),
        "losses": torch.from_numpy(point.losses),
        "weights": torch.from_numpy(point.weights),
        "step": step,
    }


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_close(found, expected, *, tolerance):
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, f"{name} differs by {error:.2g}"


def uneven_domains(**kwargs):
    """A domain with more examples in the batch than the others, and examples of other lengths inside it."""
    domains = three_domains(5, **kwargs)
    return {**domains, "books": Dataset.from_dict(language_model_rows(9, low=9, high=21, seed=4, masked=0.3))}


MODELS = {
    "gpt2": (tiny_gpt2, three_domains, float64_causal_loss),
    "bert": (tiny_bert, lambda: three_domains(masked=0.5), float64_masked_loss),
    "classifier": (tiny_classifier, classifier_domains, None),
}


@pytest.mark.parametrize("kept", ["dense", "factors"])
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_one_backward_equals_one_per_domain_in_float64(tmp_path, kind, with_target, kept):
    make_model, make_domains, loss_func = MODELS[kind]
    domains = make_domains()
    options = {"loss_func": loss_func, "per_device_target_batch_size": 2}
    if with_target:
        options["targets"] = {"target": domains["code"].select([1, 2])}
    budget = {"gradient_memory_budget": 0.0} if kept == "factors" else {}

    _, expected = take_step(tmp_path, make_model(dtype=torch.float64), domains, alignment="per_domain", **options)
    trainer, found = take_step(
        tmp_path, make_model(dtype=torch.float64), domains, alignment="single_pass", **options, **budget
    )
    assert_close(found, expected, tolerance=1e-10)
    assert not trainer._learner.alignment._step_is_plain


@pytest.mark.parametrize("kept", ["dense", "factors"])
@pytest.mark.parametrize(
    "make_model", [tiny_llama, lambda: tiny_llama(tied=False), tiny_gpt2, tiny_bert, tiny_gemma, tiny_lora]
)
def test_one_backward_equals_one_per_domain_in_float32(tmp_path, make_model, kept):
    domains = uneven_domains(masked=0.4)
    budget = {"gradient_memory_budget": 0.0} if kept == "factors" else {}
    _, expected = take_step(tmp_path, make_model(), domains, alignment="per_domain")
    trainer, found = take_step(tmp_path, make_model(), domains, alignment="single_pass", **budget)
    assert_close(found, expected, tolerance=1e-5)
    assert not trainer._learner.alignment._step_is_plain


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "cosine"},
        {"normalization": "mean_norm", "domain_max_grad_norm": 0.3},
        {"self_term": False},
        {"alignment_parameters": "mlp"},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "normalization": "cosine"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 6, "gradient_memory_budget": 0.0},
        {"reweight_steps": 2, "max_steps": 4},
        {"bf16": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2])
def test_every_option_gives_the_same_numbers(tmp_path, make_model, options):
    domains = uneven_domains()
    _, expected = take_step(tmp_path, make_model(), domains, alignment="per_domain", **options)
    trainer, found = take_step(tmp_path, make_model(), domains, alignment="single_pass", **options)
    assert_close(found, expected, tolerance=1e-2 if "bf16" in options else 1e-5)
    assert not trainer._learner.alignment._step_is_plain


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_gemma])
def test_checkpointed_layers_give_the_same_numbers(tmp_path, make_model):
    _, expected = take_step(tmp_path, make_model(), three_domains(), alignment="per_domain")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer, found = take_step(tmp_path, make_model(), three_domains(), alignment="single_pass", **options)
    assert_close(found, expected, tolerance=1e-5)
    assert not trainer._learner.alignment._step_is_plain


def test_an_absent_domain_keeps_its_share_and_a_nan_is_left_out(tmp_path):
    domains = three_domains()
    silent = domains["books"].to_dict()
    silent["labels"] = [[-100] * len(labels) for labels in silent["labels"]]
    domains["books"] = Dataset.from_dict(silent)
    _, expected = take_step(tmp_path, tiny_llama(), domains, alignment="per_domain")
    _, found = take_step(tmp_path, tiny_llama(), domains, alignment="single_pass")
    assert found["weights"][0, 1] == pytest.approx(1 / 3, abs=1e-15)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=0)
    assert (found["step"] - expected["step"]).norm() / expected["step"].norm() < 1e-5


def test_a_step_with_a_loss_that_is_not_a_number_goes_the_plain_way_once(tmp_path):
    num_calls = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1]
        num_calls.append(len(labels))
        if num_calls.count(12) == 2:  # the second step's mixed batch, and what is made of it
            logits = torch.where((labels[:, 1:2] >= 19).unsqueeze(-1), torch.nan, logits)  # the domain "code"
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    domains = three_domains()
    options = {"max_steps": 3, "loss_func": loss_func}
    trainer, found = take_step(tmp_path, tiny_llama(), domains, alignment="single_pass", **options)
    assert trainer._learner.state.nonfinite_steps == 1
    assert found["step"].isfinite().all()
    assert not trainer._learner.alignment._is_plain
    assert not trainer._learner.alignment._step_is_plain
    assert num_calls.count(4) >= 3  # the second step, domain by domain


def test_a_loss_that_is_not_a_number_beside_its_tokens_is_not_overlooked(tmp_path):
    num_calls = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        num_calls.append(len(labels))
        is_spoilt = num_calls.count(12) >= 2 and bool(
            (labels >= 29).any()
        )  # the domain "code", from the second step on
        loss = float64_causal_loss(outputs, labels, num_items_in_batch)
        return loss * torch.nan if is_spoilt else loss

    options = {"max_steps": 2, "loss_func": loss_func}
    trainer, found = take_step(tmp_path, tiny_llama(), three_domains(), alignment="single_pass", **options)
    assert trainer._learner.state.nonfinite_steps == 1
    assert found["step"].isfinite().all()


class MeanOfBatch(nn.Module):
    """Mixes the examples of a batch, which nobody notices who looks at layers one by one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, hidden):
        return hidden + self.scale * hidden.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("alignment", ["single_pass", "auto", "per_domain"])
def test_a_module_that_mixes_examples_is_found_out_before_the_first_step(tmp_path, alignment):
    with pytest.raises(ValueError, match=r"labels .* together and of .* in two parts"):
        take_step(tmp_path, with_last(MeanOfBatch()), three_domains(), alignment=alignment)


class MeanOfBatchInTraining(MeanOfBatch):
    """As above, where a look in evaluation mode does not see it."""

    def forward(self, hidden):
        return super().forward(hidden) if self.training else hidden * self.scale


class ChangedInPlace(nn.Module):
    """Goes on in the very memory that a module beneath it returned."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(0.1 * torch.eye(16))

        def forward(self, hidden):
            return torch.matmul(hidden, self.matrix)

    def __init__(self):
        super().__init__()
        self.product = self.Product()

    def forward(self, hidden):
        output = self.product(hidden)
        output += hidden
        return output


class ReadsWeightOfChild(nn.Module):
    """Has a parameter of its own, and uses that of a module beneath it past that module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16, bias=False)
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, hidden):
        return hidden + torch.matmul(hidden, self.linear.weight) * self.gain.sum()


class DrawsNumbers(nn.Module):
    """Noise that no list of dropout functions knows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(16))

    def forward(self, hidden):
        noise = torch.empty_like(hidden).uniform_(0.5, 1.5) if self.training else 1.0
        return torch.matmul(hidden, self.matrix) * noise


def with_last(module):
    """A model whose last layer is `module`."""
    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, module)
    return model


def one_domain():
    return {"arxiv": three_domains(8)["arxiv"]}


def tiny_mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    )


def tiny_prompt_tuning():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def tiny_weight_norm():
    model = tiny_llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


ONE_EXAMPLE_EACH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}


# Two models of each kind, whose data are all four together.
@pytest.mark.parametrize(
    ("make_model", "reason", "make_domains", "options"),
    [
        (tiny_mamba, "uses a parameter of another module", one_domain, {}),
        (tiny_mamba, "uses a parameter of another module", three_domains, ONE_EXAMPLE_EACH),
        (lambda: with_last(ReadsWeightOfChild()), "uses a parameter of another module", three_domains, {}),
        (lambda: with_last(ReadsWeightOfChild()), "uses a parameter of another module", one_domain, ONE_EXAMPLE_EACH),
        (tiny_prompt_tuning, None, one_domain, {}),
        (tiny_prompt_tuning, None, three_domains, ONE_EXAMPLE_EACH),
        (tiny_weight_norm, None, three_domains, {}),
        (tiny_weight_norm, None, one_domain, ONE_EXAMPLE_EACH),
    ],
)
def test_what_cannot_be_taken_apart_is_exact_also_with_one_domain_or_one_example(
    tmp_path, caplog, make_model, reason, make_domains, options
):
    options = {"max_steps": 2, **options}
    _, expected = take_step(tmp_path, make_model(), make_domains(), alignment="per_domain", **options)
    with caplog.at_level(logging.WARNING, logger="hf_doge"):
        _, found = take_step(tmp_path, make_model(), make_domains(), alignment="auto", **options)
    assert_close(found, expected, tolerance=1e-5)
    assert reason is None or reason in caplog.text


def hidden_term(outputs, labels, num_items_in_batch=None):
    """A term in the gradient that leaves the value of the loss alone."""
    term = outputs.logits.sum()
    return float64_causal_loss(outputs, labels, num_items_in_batch) + 0.01 * (term - term.detach())


@pytest.mark.parametrize("options", [{}, ONE_EXAMPLE_EACH], ids=["batch", "one_example_each"])
@pytest.mark.parametrize("make_domains", [one_domain, three_domains])
def test_a_term_that_the_value_of_the_loss_does_not_show_is_found_out(tmp_path, make_domains, options):
    with pytest.raises(ValueError, match="All domains cannot be had from one backward: the gradient of"):
        take_step(tmp_path, tiny_llama(), make_domains(), loss_func=hidden_term, alignment="single_pass", **options)


def test_what_mixes_examples_in_training_only_is_found_out_before_the_first_step(tmp_path):
    """The check fails in the very mode that is used, not in a later step."""
    model = with_last(MeanOfBatchInTraining())
    before = flat(model)
    with pytest.raises(ValueError, match=r"labels .* together and of .* in two parts"):
        take_step(tmp_path, model, three_domains(), alignment="single_pass")
    assert torch.equal(flat(model), before)


def test_a_module_that_draws_random_numbers_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'model.norm.1' \(DrawsNumbers\) draws random numbers"):
        take_step(tmp_path, with_last(DrawsNumbers()), three_domains(), alignment="single_pass")


def test_the_output_of_a_module_may_be_changed_in_place(tmp_path):
    _, expected = take_step(tmp_path, with_last(ChangedInPlace()), three_domains(), alignment="per_domain")
    _, found = take_step(tmp_path, with_last(ChangedInPlace()), three_domains(), alignment="single_pass")
    assert_close(found, expected, tolerance=1e-5)


def test_an_error_of_the_model_itself_comes_up_as_it_is(tmp_path):
    class Broken(nn.Module):
        def forward(self, hidden):
            return hidden.view(-1, 7) if hidden.requires_grad else hidden

    with pytest.raises(RuntimeError, match="shape '\\[-1, 7\\]' is invalid"):
        take_step(tmp_path, with_last(Broken()), three_domains(), alignment="single_pass")


def test_nothing_of_a_step_outlives_it(tmp_path):
    """Not even until the garbage collector comes by: activations are large."""
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(sum(isinstance(thing, torch.autograd.graph.Node) for thing in gc.get_objects()))

    gc.collect()
    gc.disable()
    try:
        args = {"max_steps": 4, "callbacks": [Count()], "alignment": "single_pass"}
        take_step(tmp_path, with_last(ChangedInPlace()), three_domains(), **args)
    finally:
        gc.enable()
    assert graphs[1:] == graphs[:1] * 3


def test_a_parameter_used_outside_of_its_module_is_named(tmp_path):
    model = tiny_llama()
    norm = model.model.norm

    class Outside(nn.Module):
        def forward(self, hidden):
            return hidden * norm.weight

    model.model.layers[1].post_attention_layernorm = Outside()
    with pytest.raises(ValueError, match=r"the parameter 'model.norm.weight' is used outside of the module"):
        take_step(tmp_path, model, three_domains(), alignment="single_pass")


def test_a_loss_with_another_term_in_it_is_named(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return float64_causal_loss(outputs, labels, num_items_in_batch) * 1.5

    with pytest.raises(ValueError, match="another term is in it"):
        take_step(tmp_path, tiny_llama(), three_domains(), loss_func=loss_func, alignment="single_pass")


def test_shared_relative_positions_send_t5_the_plain_way(tmp_path, caplog):
    domains = three_domains(masked=0.4)
    _, expected = take_step(tmp_path, tiny_t5(), domains, alignment="per_domain")
    with caplog.at_level(logging.WARNING, logger="hf_doge"):
        _, found = take_step(tmp_path, tiny_t5(), domains)
    assert_close(found, expected, tolerance=0)
    assert "relative_attention_bias" in caplog.text


def test_routed_experts_are_exact_or_named(tmp_path):
    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        )  # fmt: skip
        return MixtralForCausalLM(config)

    _, expected = take_step(tmp_path, mixtral(), three_domains(), alignment="per_domain")
    _, found = take_step(tmp_path, mixtral(), three_domains(), alignment="auto")
    assert_close(found, expected, tolerance=1e-5)


def test_a_thousand_domains_run(tmp_path):
    rows = language_model_rows(1000, length=6)
    domains = Dataset.from_dict({**rows, "domain": [f"d{i}" for i in range(1000)]})
    options = {"per_device_train_batch_size": 250, "gradient_accumulation_steps": 4}
    trainer, found = take_step(tmp_path, tiny_llama(), domains, alignment="single_pass", **options)
    weights = found["weights"][0]
    assert weights.sum() == pytest.approx(1)
    assert len(weights.unique()) > 900
    assert not trainer._learner.alignment._step_is_plain
