"""Rows of chosen layers on live models, against ordinary autograd on their weights, one example at a time."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_doge.gradients.embedding import EmbeddingGradientRecorder
from hf_doge.gradients.layers import ChosenLayers, choose_layers
from tests.gradients.test_embedding_gradients import (
    bart,
    bert,
    build,
    causal_example,
    classification_example,
    collate,
    examples_of,
    gpt2,
    llama,
    record,
    rounding,
    seq2seq_example,
    t5,
)


def adapted(make, **options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)  # B begins at 0, where A has no gradient
    return model


def llama_lora():
    return adapted(lambda: llama(tied=False), target_modules=["q_proj", "down_proj"], lora_dropout=0.5)


def gpt2_lora():
    return adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True)


def bert_lora():
    return adapted(bert, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")


def causal_loss(outputs, batch):
    """The sum of each example's token losses, in the dtype of the logits, which transformers' own loss rounds."""
    logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(end_dim=1), labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view(labels.shape).sum(dim=1)


CASES = {
    "llama head and attention": (lambda: llama(tied=False), ["lm_head", "o_proj"], causal_example),
    "llama, a middle one": (llama, ["layers.1.mlp.down_proj"], causal_example),
    "gpt2": (gpt2, ["h.0.mlp.c_fc", "*.c_proj"], causal_example),
    "bert": (bert, ["classifier", "attention.output.dense", "pooler.dense"], classification_example),
    "t5": (t5, ["wo", "EncDecAttention.v"], seq2seq_example),
    "bart": (bart, ["fc2"], seq2seq_example),
    "llama lora": (llama_lora, ["adapters"], causal_example),
    "gpt2 lora": (gpt2_lora, ["adapters"], causal_example),
    "bert lora": (bert_lora, ["adapters", "classifier"], classification_example),
    "a frozen base": (llama_lora, ["q_proj"], causal_example),
}


def weight_gradients(model, example, chosen, loss):
    """`(d_out, d_in)` of each layer, by autograd in evaluation mode."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    modules = dict(model.named_modules())
    weights = [modules[layer.name].weight.requires_grad_(True) for layer in chosen.layers]
    grads = torch.autograd.grad(loss(model(**example), example).sum(), weights)
    return [
        grad.T if type(modules[layer.name]).__name__ == "Conv1D" else grad
        for layer, grad in zip(chosen.layers, grads, strict=True)
    ]


def expected_rows(gradients, chosen):
    """Projected, flattened, and cut into rows."""
    rows = []
    for layer, gradient in zip(chosen.layers, gradients, strict=True):
        p_out, p_in = chosen.projections(layer)
        gradient = gradient if p_out is None else p_out.T.to(gradient) @ gradient
        gradient = gradient if p_in is None else gradient @ p_in.to(gradient)
        flat = gradient.flatten()
        rows += F.pad(flat, (0, -len(flat) % chosen.width)).split(chosen.width)
    return torch.stack(rows)


def own_loss(outputs, batch):
    """The sum of token losses in float64, whichever way a model predicts."""
    if batch["labels"].ndim == 1:
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")
    losses = F.cross_entropy(outputs.logits.flatten(end_dim=1), batch["labels"].flatten(), reduction="none")
    return losses.view(batch["labels"].shape).sum(dim=1)


@pytest.mark.parametrize("dim", [None, 3, 1000], ids=["default", "projected", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_projected_gradient_of_the_weight_in_float64(case, dim):
    make, names, make_example = CASES[case]
    model, loss = build(make).double(), causal_loss if make_example is causal_example else own_loss
    chosen = choose_layers(model, names, projection_dim=dim, seed=5)
    assert chosen.is_exact == (dim == 1000 or (dim is None and names == ["adapters"]))
    examples = examples_of(make_example)
    recorded = record(model, collate(examples), layers=chosen, loss_fn=loss, pad_token_id=1)
    numbers, tolerance = chosen.num_words + torch.arange(chosen.num_rows), rounding(model, examples[0])
    for (tokens, rows), example in zip(recorded, examples, strict=True):
        expected = expected_rows(weight_gradients(model, example, chosen, loss), chosen)
        assert torch.equal(tokens, numbers)
        assert expected.norm(dim=1).min() > 0
        assert (rows - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_has_the_rows_of_its_examples_alone_next_to_those_of_words(case, reduction):
    make, names, make_example = CASES[case]
    model = build(make)
    chosen = choose_layers(model, ["embedding", *names])
    examples = examples_of(make_example)
    options = {"loss_reduction": reduction, "pad_token_id": 1}
    words = record(model, collate(examples), **options)
    for (tokens, rows), (own, alone), example in zip(
        record(model, collate(examples), layers=chosen, **options), words, examples, strict=True
    ):
        single_tokens, single = record(model, example, layers=chosen, **options)[0]
        assert torch.equal(tokens, single_tokens)
        assert (rows - single).norm() <= 1e-5 * single.norm()
        assert torch.equal(tokens[: len(own)], own)
        assert torch.equal(rows[: len(own)], alone)
        # The scale is that of the loss: the model's own is a mean over the tokens of one example.
        num_terms = 1 if reduction == "mean" or example["labels"].ndim == 1 else None
        causal = make_example is causal_example
        num_terms = num_terms or int((example["labels"][:, 1:] if causal else example["labels"]).ne(-100).sum())
        gradients = weight_gradients(model, example, chosen, lambda out, _, terms=num_terms: terms * out.loss)
        expected = expected_rows(gradients, chosen)
        assert (rows[len(own) :] - expected).norm() <= 1e-5 * expected.norm()


def test_padding_on_the_left_changes_no_row():
    model = build(llama, tied=False)
    chosen = choose_layers(model, ["lm_head", "up_proj"])
    examples = examples_of(causal_example)
    rows = record(model, collate(examples, side="left", position_ids=True), layers=chosen)
    for (_, found), example in zip(rows, examples, strict=True):
        expected = record(model, example, layers=chosen)[0][1]
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_what_is_kept_of_words_leaves_the_rows_of_layers_alone():
    model = build(llama)
    chosen = choose_layers(model, ["embedding", "down_proj"])
    batch = collate(examples_of(causal_example))
    every, few = (record(model, batch, layers=chosen, tied="own", top_k=k, top_k_unit="token") for k in (None, 2))
    for (tokens, rows), (kept, kept_rows) in zip(every, few, strict=True):
        assert len(kept) == 2 + chosen.num_rows
        assert torch.equal(tokens[-chosen.num_rows :], kept[2:])
        assert torch.equal(rows[-chosen.num_rows :], kept_rows[2:])


def test_inner_products_of_projected_gradients_are_right_in_the_mean():
    model = build(llama, tied=False)
    batch = collate(examples_of(causal_example))

    def products(dim, seed):
        chosen = choose_layers(model, ["lm_head", "o_proj"], projection_dim=dim, seed=seed)
        rows = torch.stack([rows.flatten() for _, rows in record(model, batch, layers=chosen)]).double()
        return rows @ rows.T

    exact = products(1000, 0)
    estimates = torch.stack([products(6, seed) for seed in range(40)])
    error = (estimates.mean(dim=0) - exact).abs()
    assert (error <= 4 * estimates.std(dim=0) / 40**0.5).all()
    assert estimates.std(dim=0).min() > 0


def test_without_words_the_backward_ends_at_the_first_layer():
    model, seen = build(llama, tied=False), []
    chosen = choose_layers(model, ["lm_head"])
    block = model.model.layers[0]
    handle = block.register_full_backward_hook(lambda *_: seen.append("block"))
    record(model, collate(examples_of(causal_example)), layers=chosen, verify=False)
    assert seen == []
    handle.remove()


def test_training_state_is_put_back():
    model = build(llama_lora)
    before = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    record(model, collate(examples_of(causal_example)), layers=choose_layers(model, ["adapters"]))
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == before
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_row_of_what_is_trained_is_not_virtual():
    model = build(llama_lora)
    batch = collate(examples_of(causal_example))
    assert not record(model, batch, layers=choose_layers(model, ["adapters"])).virtual
    recorder = EmbeddingGradientRecorder(model, layers=choose_layers(model, ["q_proj"]))
    with pytest.warns(UserWarning, match=r"The chosen layers of the model are frozen, .* virtual"):
        recorder.__enter__()
    assert recorder.record(batch).virtual
    recorder.__exit__(None, None, None)


def test_chosen_layers_come_back_from_their_description():
    chosen = choose_layers(build(llama_lora), ["embedding", "adapters", "lm_head"], projection_dim=5, seed=3)
    again = ChosenLayers.from_dict(chosen.to_dict(), width=chosen.width)
    assert again == chosen
    assert again.to_dict() == chosen.to_dict()
    other = choose_layers(build(llama_lora), ["embedding", "adapters", "lm_head"], projection_dim=5, seed=4)
    assert other.to_dict()["sha256"] != chosen.to_dict()["sha256"]


def test_adapters_stay_whole_whatever_pattern_stands_next_to_them():
    model = llama_lora()
    orders = [choose_layers(model, names) for names in (["adapters", "*"], ["*", "adapters"])]
    assert orders[0] == orders[1]
    adapters = [one for one in orders[0].layers if "lora_" in one.name]
    assert adapters
    assert all(one.kept == one.shape for one in adapters)


def test_rows_without_words_are_as_wide_as_leaves_least_room_unused():
    model = build(llama, tied=False)
    assert choose_layers(model, ["embedding", "lm_head"], projection_dim=3).width == 16
    assert choose_layers(model, ["o_proj"], projection_dim=3).width == 9
    for chosen in (
        choose_layers(build(llama_lora), ["adapters"]),  # 2 x 16, 2 x 24 and their mirrors
        choose_layers(model, ["up_proj", "o_proj"], projection_dim=100),  # 24 x 16, 16 x 16
    ):
        sizes = [one.kept[0] * one.kept[1] for one in chosen.layers]
        assert sum(sizes) <= chosen.num_rows * chosen.width <= 1.15 * sum(sizes)
        assert chosen.num_rows <= 3 * len(sizes)


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (llama, ["o_prj"], r"none that is called 'o_prj', .*\['o_proj'"),
        (
            llama,
            ["self_attn"],
            r"'self_attn' of `LlamaForCausalLM` is a `LlamaAttention`.* within it are \['model.layers.0",
        ),
        (llama, ["lm_head"], r"'lm_head': its weight is the matrix of the input embeddings \(tied\).*tied='own'"),
        (llama, ["adapters"], "needs a model with LoRA adapters, but `LlamaForCausalLM` has none"),
        (llama_lora, ["lora_C"], r"none that is called 'lora_C', .*lora_"),
    ],
)
def test_a_layer_that_cannot_be_recorded_is_refused(make, names, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(build(make), names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            r"magnitude_vector at .*\['lora_A.default', 'lora_B.default'\]",
        ),
        ({"target_modules": ["embed_tokens"]}, r"has lora_embedding_A at .* no matrix of a linear layer"),
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            r"has lora_embedding_A at .*\['lora_A.default', 'lora_B.default'\]",
        ),
    ],
)
def test_adapters_with_more_than_two_matrices_are_refused_with_advice_that_works(options, message):
    model = adapted(lambda: llama(tied=False), **options)
    with pytest.raises(ValueError, match=message):
        choose_layers(model, ["adapters"])
    if "q_proj" not in options["target_modules"]:
        return
    chosen = choose_layers(model.double(), ["lora_A.default", "lora_B.default"], projection_dim=100)
    examples = examples_of(causal_example)
    rows = record(model, collate(examples), layers=chosen, loss_fn=causal_loss)
    for (_, found), example in zip(rows, examples, strict=True):
        expected = expected_rows(weight_gradients(model, example, chosen, causal_loss), chosen)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_no_layer_is_refused_and_one_name_is_a_list_of_it():
    model = build(llama, tied=False)
    with pytest.raises(ValueError, match="must name at least one layer, but it is empty"):
        choose_layers(model, [])
    assert choose_layers(model, "o_proj") == choose_layers(model, ["o_proj"])


def test_an_offloaded_layer_is_refused():
    model = build(llama, tied=False)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"that of 'lm_head' is offloaded"):
        choose_layers(model, ["lm_head"])


def test_adapters_next_to_some_trained_tokens_of_an_embedding_have_their_gradients():
    options = {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [5, 6]}
    model = adapted(lambda: llama(tied=False), **options).double()
    chosen, examples = choose_layers(model, ["adapters"]), examples_of(causal_example)
    rows = record(model, collate(examples), layers=chosen, loss_fn=causal_loss)
    for (_, found), example in zip(rows, examples, strict=True):
        expected = expected_rows(weight_gradients(model, example, chosen, causal_loss), chosen)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"whole or not at all.*without words: `layers='adapters'`"):
        record(model, collate(examples), layers=choose_layers(model, ["embedding", "adapters"]))


def test_what_is_frozen_next_to_what_is_trained_is_named_once():
    model = build(llama_lora)
    recorder = EmbeddingGradientRecorder(model, layers=choose_layers(model, ["embedding", "adapters", "o_proj"]))
    names = r"'embedding', 'base_model.model.model.layers.0.self_attn.o_proj'"
    with pytest.warns(UserWarning, match=f"The parts {names}, .* of the model are frozen.*`virtual='count'`"):
        recorder.__enter__()
    assert not recorder.record(collate(examples_of(causal_example))).virtual
    recorder.__exit__(None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recorder:
            pass


class QuantisedLinear(nn.Linear):
    """Eight bits a weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max() / 127)
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, inputs):
        return inputs @ (self.weight.to(inputs.dtype) * self.scale).T


def test_adapters_of_a_quantised_base_have_the_rows_of_the_same_base_dequantised():
    def base(whole):
        model = build(llama, tied=False)
        for block in model.model.layers:
            block.self_attn.o_proj = QuantisedLinear(block.self_attn.o_proj)
            if whole:
                weight = block.self_attn.o_proj.weight.float() * block.self_attn.o_proj.scale
                block.self_attn.o_proj = nn.Linear(16, 16, bias=False)
                block.self_attn.o_proj.weight.data = weight
        torch.manual_seed(1)
        return adapted(lambda: model, target_modules=["o_proj"])

    batch = collate(examples_of(causal_example))
    found, expected = (
        record(model, batch, layers=choose_layers(model, ["adapters"])).rows for model in (base(False), base(True))
    )
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected)


def test_a_quantised_layer_is_refused():
    model = build(llama)
    model.model.layers[0].mlp.gate_proj = QuantisedLinear(model.model.layers[0].mlp.gate_proj)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.gate_proj' is quantised \(`QuantisedLinear`\).*'adapters'"
    ):
        choose_layers(model, ["gate_proj"])


def test_a_layer_that_takes_no_part_is_refused():
    model = build(llama_lora)
    chosen = choose_layers(model, ["adapters"])
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=re.escape("must take part when the model runs, but ['base_model")):
            record(model, collate(examples_of(causal_example)), layers=chosen)
