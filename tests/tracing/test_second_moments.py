"""Adam's second moments, read from saved checkpoints: those that training had, or none."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hf_doge.artifacts.influence import IndexReader
from hf_doge.tracing.after_training import record_dataset
from hf_doge.tracing.pretrained import load_model
from hf_doge.tracing.saved_moments import saved_second_moments
from hf_doge.tracing.settings import RecordingSettings
from tests.tiny import VOCAB, tiny_classifier, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.tracing.recorded_training import (
    BATCH_SIZE,
    causal_collator,
    classification_data,
    language_data,
    make_trainer,
    train,
)
from tests.tracing.test_tracing_callback_resume import pad


def lone_classifier():
    """A classifier with one parameter of the shape of its embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=24, num_labels=3, pad_token_id=0, resid_pdrop=0.0
    )
    return GPT2ForSequenceClassification(config)


def record(folder, checkpoints, *, tokenizer, dataset=None, collator=None, **options):
    record_dataset(
        folder,
        checkpoints,
        dataset or classification_data(),
        collator=collator,
        tokenizer=tokenizer,
        settings=RecordingSettings(
            metric="optimizer", dtype=options.pop("dtype", "float32"), max_segment_bytes=10 * 16 * 4
        ),
        progress=False,
        **{"batch_size": BATCH_SIZE, **options},
    )
    return IndexReader.open(folder, cache_dir=folder.with_name(f"{folder.name}-cache"))


def rows(reader, *, first=0, last=None):
    """Tokens and rows of every example at every checkpoint."""
    count = last or reader.config["num_examples"]
    return [
        [torch.as_tensor(part) for part in example]
        for checkpoint in range(len(reader.checkpoints))
        for example in reader.example_rows(checkpoint, list(range(first, count)))
    ]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for (tokens, values), (again, found) in zip(one, other, strict=True):
        assert torch.equal(tokens, again)
        assert torch.equal(values, found)


def saved(folder):
    return sorted((folder / "run").glob("checkpoint-*"))


RECORDING = {"metric": "optimizer", "dtype": "float32"}
MODELS = {
    "classifier": (tiny_classifier, {}),
    "tied": (tiny_gpt2, {"causal": True}),
    "untied": (lambda: tiny_llama(tied=False), {"causal": True}),
    "float16": (tiny_classifier, {"dtype": "float16"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_index_made_afterwards_has_the_rows_that_the_callback_recorded(tmp_path, tokenizer, kind):
    make, options = MODELS[kind]
    data = {}
    if options.get("causal"):
        data = {"dataset": language_data(), "collator": causal_collator(tokenizer)}
    recording = {"metric": "optimizer", "dtype": options.get("dtype", "float32"), "max_segment_bytes": 10 * 16 * 4}
    live = train(
        tmp_path, tokenizer=tokenizer, model=make(), recording=recording, adam_beta2=0.9, weight_decay=0.1, **data
    )
    afterwards = record(tmp_path / "again", saved(tmp_path), tokenizer=tokenizer, dtype=recording["dtype"], **data)
    assert afterwards.config["second_moment"] is True
    assert_same(rows(live), rows(afterwards))
    live, afterwards = (
        [entry["second_moments"] for entry in reader.config["checkpoints"]] for reader in (live, afterwards)
    )
    assert live == afterwards
    assert live[0] != live[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a training that was recorded while it lasted, of 8 examples of 11."""
    folder = tmp_path_factory.mktemp("trained")
    recording = {"metric": "optimizer", "dataset": classification_data().select(range(8))}
    train(folder, tokenizer=tiny_tokenizer(), recording=recording)
    return folder


def alter(checkpoint, change):
    path = checkpoint / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


def quadruple(content):
    for state in content["state"].values():
        state["exp_avg_sq"] *= 4
    return content


def test_a_recorded_training_grows_with_its_own_moments_only(tmp_path, trained, tokenizer):
    shutil.copytree(trained / "index", tmp_path / "index")
    whole = record(tmp_path / "whole", saved(trained), tokenizer=tokenizer)
    other = [shutil.copytree(path, tmp_path / path.name) for path in saved(trained)]
    alter(other[1], quadruple)
    with pytest.raises(ValueError, match=r"other second moments of Adam.* Bring the optimizer\.pt"):
        record(tmp_path / "index", other, tokenizer=tokenizer, add_examples=True)
    assert_same(rows(IndexReader.open(trained / "index")), rows(IndexReader.open(tmp_path / "index")))
    grown = record(tmp_path / "index", saved(trained), tokenizer=tokenizer, add_examples=True)
    assert_same(rows(whole), rows(grown))


def test_an_interrupted_recording_continues_with_its_own_moments_only(tmp_path, trained):
    checkpoint = shutil.copytree(saved(trained)[0], tmp_path / "checkpoint-2")
    batches = []

    def collator(examples):
        batches.append(len(examples))
        return pad(examples)

    def interrupted(examples):
        if len(batches) == 5:
            raise KeyboardInterrupt("stopped by the test")
        return collator(examples)

    def recorded(name, collator=collator):
        batches.clear()
        return rows(record(tmp_path / name, [checkpoint], tokenizer=None, collator=collator, batch_size=2))

    whole, every = recorded("whole"), len(batches)
    with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
        recorded("begun", interrupted)
    shutil.copytree(tmp_path / "begun", tmp_path / "anew")
    assert_same(whole, recorded("begun"))
    assert 0 < len(batches) < every
    alter(checkpoint, quadruple)
    anew = recorded("anew")
    assert len(batches) == every
    assert_same(anew, recorded("altered"))
    assert not torch.equal(anew[0][1], whole[0][1])


def test_a_whole_checkpoint_needs_no_optimizer_any_more(tmp_path, trained, tokenizer):
    checkpoints = [shutil.copytree(path, tmp_path / path.name) for path in saved(trained)]
    record(tmp_path / "index", checkpoints[:1], tokenizer=tokenizer)
    (checkpoints[0] / "optimizer.pt").unlink()
    both = record(tmp_path / "index", checkpoints, tokenizer=tokenizer)
    assert_same(rows(both), rows(record(tmp_path / "whole", saved(trained), tokenizer=tokenizer)))


def test_the_entry_of_the_matrix_is_known_by_its_shape_where_groups_are_made_otherwise(tmp_path, tokenizer):
    model = lone_classifier()
    optimizer = torch.optim.Adam(list(model.parameters())[::-1], lr=0.01, betas=(0.9, 0.95))
    live = train(tmp_path, tokenizer=tokenizer, model=model, recording=RECORDING, optimizers=(optimizer, None))
    assert_same(rows(live), rows(record(tmp_path / "again", saved(tmp_path), tokenizer=tokenizer)))


def test_with_amsgrad_the_moments_are_those_that_it_steps_with(tmp_path, tokenizer):
    model = lone_classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5), amsgrad=True)
    live = train(tmp_path, tokenizer=tokenizer, model=model, recording=RECORDING, optimizers=(optimizer, None))
    assert_same(rows(live), rows(record(tmp_path / "again", saved(tmp_path), tokenizer=tokenizer)))
    state = optimizer.state[model.get_input_embeddings().weight]
    moments = saved_second_moments(saved(tmp_path)[-1], model)
    assert not torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    assert torch.equal(moments.average, state["max_exp_avg_sq"])
    assert moments.correction == 1 - 0.5**4


def lora(folder, **options):
    lone_classifier().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    return get_peft_model(base, config)


def test_an_adapter_that_trains_the_embeddings_has_their_moments(tmp_path, tokenizer):
    model = lora(tmp_path, modules_to_save=["wte", "score"])
    live = train(tmp_path, tokenizer=tokenizer, model=model, recording=RECORDING)
    afterwards = record(tmp_path / "again", saved(tmp_path), tokenizer=tokenizer)
    assert_same(rows(live), rows(afterwards))
    assert live.config["virtual"] is afterwards.config["virtual"] is False


def test_an_adapter_that_leaves_the_embeddings_is_refused(tmp_path, tokenizer):
    make_trainer(tmp_path / "run", None, tokenizer=tokenizer, model=lora(tmp_path)).train()
    refused(
        tmp_path,
        saved(tmp_path),
        tokenizer,
        "input embeddings that are trained, but they were frozen in .*checkpoint-2",
    )


def refused(tmp_path, checkpoints, tokenizer, match, *, error=ValueError):
    with pytest.raises(error, match=match):
        record(tmp_path / "index", checkpoints, tokenizer=tokenizer)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_optimizers_other_than_adam_are_refused(tmp_path, tokenizer, optim):
    make_trainer(tmp_path / "run", None, tokenizer=tokenizer, optim=optim).train()
    match = r"keeps `exp_avg_sq` of .*, \(32, 16\) here, .* as Adam and AdamW do, but that in .* has no `betas`"
    refused(tmp_path, saved(tmp_path), tokenizer, match)


def frozen_classifier():
    model = tiny_classifier()
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def frozen_untied():
    model = tiny_llama(tied=False)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [frozen_classifier, frozen_untied])
def test_frozen_embeddings_never_get_the_moments_of_another_matrix(tmp_path, tokenizer, make):
    data = {}
    if make is frozen_untied:
        data = {"dataset": language_data(), "collator": causal_collator(tokenizer)}
    make_trainer(tmp_path / "run", None, tokenizer=tokenizer, model=make(), **data).train()
    checkpoint = saved(tmp_path)[0]
    with pytest.raises(ValueError, match=r"its groups have \[.*of that shape are 1 entries and 2 parameters"):
        saved_second_moments(checkpoint, load_model(checkpoint))


def test_groups_made_otherwise_are_refused_where_two_parameters_have_the_shape(tmp_path, tokenizer):
    model = tiny_llama(tied=False)
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1])
    data = {"dataset": language_data(), "collator": causal_collator(tokenizer)}
    make_trainer(
        tmp_path / "run", None, tokenizer=tokenizer, model=model, optimizers=(optimizer, None), **data
    ).train()
    checkpoint = saved(tmp_path)[0]
    match = r"of that shape are 2 entries and 2 parameters, \['model\.embed_tokens\.weight', 'lm_head\.weight'\].* Record in"
    with pytest.raises(ValueError, match=match):
        saved_second_moments(checkpoint, load_model(checkpoint))


class Quantised:
    """What `weights_only` does not load, as the states of 8-bit optimizers."""


def quantised(content):
    content["state"][0]["exp_avg_sq"] = Quantised()
    return content


def without_steps(content):
    for state in content["state"].values():
        del state["step"]
    return content


def by_names(content):
    return {**content, "state": {f"parameter{number}": state for number, state in content["state"].items()}}


def eight_bit(content):
    for state in content["state"].values():
        state["state2"] = state.pop("exp_avg_sq").to(torch.uint8)
    return content


def whole_numbers(content):
    for state in content["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.uint8)
    return content


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (quantised, r"is damaged or holds something else \(an 8-bit optimizer\?\)"),
        (without_steps, "its `step` and `betas`, as Adam and AdamW do, but that in"),
        (by_names, "know parameters by number"),
        (eight_bit, r"state2 \(Tensor, torch\.uint8, \(32, 16\)\)\. Train with"),
        (whole_numbers, r"exp_avg_sq \(Tensor, torch\.uint8"),
        (lambda content: content["state"], r"of another kind \(sharded\?\)"),
    ],
)
def test_files_that_are_not_of_a_plain_adam_are_refused(tmp_path, trained, tokenizer, change, match):
    checkpoint = shutil.copytree(saved(trained)[0], tmp_path / "checkpoint-2")
    alter(checkpoint, change)
    refused(tmp_path, [checkpoint], tokenizer, match)


def test_a_damaged_file_is_refused(tmp_path, trained, tokenizer):
    checkpoint = shutil.copytree(saved(trained)[0], tmp_path / "checkpoint-2")
    path = checkpoint / "optimizer.pt"
    for content in (b"", path.read_bytes()[:2000]):
        path.write_bytes(content)
        refused(tmp_path, [checkpoint], tokenizer, r"optimizer\.pt' is damaged")


def test_embeddings_resized_since_are_refused(tmp_path, trained, tokenizer):
    checkpoint = shutil.copytree(saved(trained)[0], tmp_path / "checkpoint-2")
    model = tiny_classifier()
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(checkpoint)
    match = r"entry 0 has a tensor of shape \(32, 16\), but '.*word_embeddings\.weight' has \(40, 16\)"
    refused(tmp_path, [checkpoint], tokenizer, match)


def test_missing_and_sharded_optimizers_are_refused_before_anything_is_recorded(tmp_path, trained, tokenizer):
    checkpoints = [shutil.copytree(path, tmp_path / path.name) for path in saved(trained)]
    last = checkpoints[1]
    (last / "optimizer.pt").unlink()
    match = r"needs optimizer\.pt in every checkpoint.*checkpoint-4' has none\. Record in training by .* or index with `metric"
    refused(tmp_path, checkpoints, tokenizer, match, error=FileNotFoundError)
    (last / "optimizer_0").mkdir()
    (last / "global_step4").mkdir()
    match = r"has \['global_step4', 'optimizer_0'\] instead: optimizers of FSDP or DeepSpeed cannot be read"
    refused(tmp_path, checkpoints, tokenizer, match, error=FileNotFoundError)
