"""Rows of layers in the metric of Adam, against autograd and the saved optimizer."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.gradients.layers import recorded_layers, recorded_weights
from tests.gradients.test_layer_gradients import weight_gradients
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.tracing.recorded_training import (
    causal_collator,
    language_data,
    make_trainer,
    record_again,
    segments,
    single_examples,
)
from tests.tracing.test_layers import close, summed_loss

MODELS = {
    "llama lora": (lambda: tiny_llama(tied=False), {"target_modules": ["q_proj", "down_proj"]}, "adapters"),
    "gpt2 and its words": (tiny_gpt2, None, ["embedding", "c_fc", "c_proj"]),
}


def train(folder, kind, **options):
    make, lora, layers = MODELS[kind]
    tokenizer = tiny_tokenizer()
    make().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if lora is not None:
        model = get_peft_model(model, LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **lora))
    settings = {"layers": layers, "projection_dim": 100, "metric": "optimizer", "dtype": "float32", "tied": "input"}
    callback = TracInWECallback(folder / "index", dataset=language_data(), **{**settings, **options})
    trainer = make_trainer(
        folder / "run",
        callback,
        tokenizer=tokenizer,
        collator=causal_collator(tokenizer),
        dataset=language_data(),
        model=model,
        max_grad_norm=0.0,
    )
    trainer.train()
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps")


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, request.param, train(folder, request.param)


def load(folder, path, kind):
    if MODELS[kind][1] is None:
        return AutoModelForCausalLM.from_pretrained(path)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), path, is_trainable=True)


def divisors(model, path):
    """Name of a parameter -> `sqrt(v) + eps`, by the order in which the Trainer numbers parameters."""
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    from transformers import Trainer

    decaying = Trainer.get_decay_parameter_names(None, model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [name for name in trained if name in decaying] + [name for name in trained if name not in decaying]
    found = {}
    for number, name in enumerate(names):
        state = saved["state"][number]
        group = next(group for group in saved["param_groups"] if number in group["params"])
        found[name] = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    return found


def layer_scores(folder, kind, index, queries):
    """`sum_c lr_c sum <g, g' / (sqrt(v) + eps)>` over the chosen layers."""
    chosen, total = recorded_layers(index.config), 0
    for checkpoint in index.reader.checkpoints:
        path = folder / "run" / checkpoint["name"]
        model = load(folder, path, kind)
        by = divisors(model, path)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        weights = recorded_weights(model, chosen)
        scale = [
            by[names[id(weights[layer.name])]].T
            if weights[layer.name].shape != layer.shape or kind.startswith("gpt2")
            else by[names[id(weights[layer.name])]]
            for layer in chosen.layers
        ]
        sides = []
        for part, power in ((queries, 1.0), (language_data(), 0.0)):
            rows = [weight_gradients(model, one, chosen, summed_loss) for one in single_examples(part)]
            sides.append(
                torch.stack(
                    [torch.cat([(g / s**power).flatten() for g, s in zip(one, scale, strict=True)]) for one in rows]
                )
            )
        total = total + checkpoint["learning_rate"] * sides[0] @ sides[1].T
    return total.numpy()


def test_scores_are_those_of_the_metric_in_which_adam_steps(run, tmp_path):
    folder, kind, index = run
    queries = language_data(3)
    options = {"special_tokens": "count", "sentence_ends": "count", "cosine": False}
    expected = layer_scores(folder, kind, index, queries)
    found = index.scores(queries, **options)
    if recorded_layers(index.config).embedding:
        words = train(tmp_path, kind, layers=None, projection_dim=None)
        found = found - words.scores(queries, **options)
    assert index.config["metric"] == "optimizer"
    assert np.abs(expected).max() > 0
    assert close(found, expected, 1e-3)


def test_cosine_and_self_influence_are_in_the_same_metric(run):
    _, _, index = run
    queries = language_data(3)
    options = {"special_tokens": "count", "sentence_ends": "count"}
    table = index.self_influence()
    own = np.array(table["score"][:])[np.argsort(table["example_id"][:])]
    assert close(own, np.diag(index.scores(language_data(), cosine=False, **options)), 1e-3)
    cosines = index.scores(queries, cosine=True, **options)
    assert np.allclose(
        np.diag(cosines[:, :3]), sum(one["learning_rate"] for one in index.reader.checkpoints), rtol=1e-3
    )


def test_the_moments_that_the_trainer_saved_give_the_same_rows(run, tmp_path):
    folder, kind, index = run
    settings = {"layers": MODELS[kind][2], "projection_dim": 100, "metric": "optimizer"}
    again = record_again(folder, tmp_path / "index", **settings, dtype="float32", tied="input")
    assert segments(again.reader) == segments(index.reader)


@pytest.mark.parametrize(
    ("layers", "dim", "metric"),
    [(["c_fc"], None, "gradient"), (["c_fc"], 100, "optimizer"), (["c_fc"], 3, "gradient")],
)
def test_the_metric_is_left_to_the_optimizer_where_layers_are_whole(tmp_path, layers, dim, metric):
    options = {"layers": layers, "projection_dim": dim, "metric": "auto"}
    if metric == "optimizer":
        index = train(tmp_path, "gpt2 and its words", **options)
    else:
        with pytest.warns(UserWarning, match=r"plain gradients, as the layers \['c_fc'\] are projected"):
            index = train(tmp_path, "gpt2 and its words", **options)
    assert index.config["metric"] == metric
    assert index.config["format_version"] == "3.0"


def test_projected_layers_have_no_metric_of_the_optimizer(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs layers that are whole, but \['c_fc'\] are projected \(`projection_dim=3`\)"
    ):
        train(tmp_path, "gpt2 and its words", layers=["c_fc"], projection_dim=3)


def test_layers_that_no_optimizer_trains_have_no_moments(tmp_path):
    with pytest.raises(
        ValueError, match=r"`metric='optimizer'` needs .*q_proj.base_layer that are trained, but they are frozen"
    ):
        train(tmp_path, "llama lora", layers=["q_proj"])


@pytest.mark.filterwarnings("ignore:The (parts|chosen layers) .*are frozen")
@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (["embedding", "adapters"], "the input embeddings are frozen, so no optimizer knows anything of them"),
        (["layers.0.self_attn.q_proj"], "layer '.*q_proj.base_layer' is frozen, so no optimizer knows anything of it"),
    ],
)
def test_the_reason_for_plain_gradients_names_what_is_frozen(tmp_path, layers, why):
    with pytest.warns(UserWarning, match=f"plain gradients, as {why}") as told:
        index = train(tmp_path, "llama lora", layers=layers, projection_dim=100, metric="auto")
    assert re.fullmatch(why, index.config["metadata"]["metric"])
    (message,) = [str(one.message) for one in told if "plain gradients" in str(one.message)]
    would_do = "Leave 'embedding' out of `layers` to have the metric of Adam for the 8 weights that are trained"
    assert (would_do in message) == ("adapters" in layers)
    if "adapters" in layers:
        with pytest.warns(UserWarning, match=re.escape(would_do)):
            record_again(tmp_path, tmp_path / "again", layers=layers, metric="auto", tied="input")
        index = train(tmp_path / "adapters", "llama lora", layers="adapters", metric="auto")
        assert index.config["metric"] == "optimizer"


@pytest.mark.parametrize("words", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_words_and_adapters_together_are_in_the_metric_of_adam_or_it_is_said(tmp_path, words, monkeypatch, recwarn):
    make, lora, _ = MODELS["llama lora"]
    monkeypatch.setitem(MODELS, "words and adapters", (make, {**lora, **words}, ["embedding", "adapters"]))
    index = train(tmp_path, "words and adapters", metric="auto", projection_dim=None)
    told = [one for one in recwarn if "`metric='auto'` records plain gradients" in str(one.message)]
    assert (index.config["metric"] == "optimizer") == bool(words)
    assert len(told) == (not words)
    recwarn.clear()
    settings = {"layers": ["embedding", "adapters"], "metric": "auto", "dtype": "float32"}
    again = record_again(tmp_path, tmp_path / "again", **settings, tied="input")
    told = [one for one in recwarn if "`metric='auto'` records plain gradients" in str(one.message)]
    assert again.config["metric"] == index.config["metric"]
    assert len(told) == (not words)
    assert segments(again.reader) == segments(index.reader)
