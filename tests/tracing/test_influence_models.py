"""What is recorded can be searched: models in any dtype, adapters, weights in several files; and nothing foreign runs."""

import io
import json
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CLIPConfig, Trainer

from hf_doge import InfluenceIndex, TracInWECallback
from hf_doge.cli import main
from hf_doge.tracing.pretrained import plain_config
from tests.tiny import tiny_classifier, tiny_llama, tiny_tokenizer
from tests.tracing.recorded_training import arguments

ROWS = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 6, 7]], "labels": [[5, 6, 7, 8], [9, 6, 7]]})
CLASSES = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 6, 7]], "labels": [0, 2]})
LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model in float32 on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tied=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def record(folder, model, rows=ROWS, **options):
    trainer = Trainer(
        model,
        arguments(folder / "run", max_steps=1, save_steps=1, per_device_train_batch_size=1),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        data_collator=lambda items: {key: torch.tensor([item[key] for item in items]) for key in items[0]},
        callbacks=[TracInWECallback(folder / "index", dtype="float32", batch_size=1, **options)],
    )
    trainer.train()
    return trainer.model


def open_index(folder, **options):
    return InfluenceIndex.from_pretrained(folder / "index", cache_dir=folder / "maps", **options)


def in_bfloat16(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def resized(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(36)
    return model


ADAPTERS = {
    "base in bfloat16": lambda base: get_peft_model(in_bfloat16(base), LoraConfig(**LORA)),
    "all in bfloat16": lambda base: get_peft_model(
        in_bfloat16(base), LoraConfig(**LORA), autocast_adapter_dtype=False
    ),
    "k-bit preparation": lambda base: get_peft_model(
        prepare_model_for_kbit_training(in_bfloat16(base)), LoraConfig(**LORA)
    ),
    "cast later": lambda base: get_peft_model(
        AutoModelForCausalLM.from_pretrained(base).to(torch.float16), LoraConfig(target_modules=["q_proj"])
    ),
    "resized": lambda base: get_peft_model(resized(base), LoraConfig(**LORA)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
def test_an_adapter_is_searched_in_the_dtypes_of_its_training(kind, base, tmp_path):
    model = ADAPTERS[kind](base)
    record(tmp_path, model)
    found = open_index(tmp_path).scores(ROWS)
    assert found == pytest.approx(open_index(tmp_path, model=model).scores(ROWS), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
def test_the_trained_head_of_an_adapter_is_found_again(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    record(tmp_path, get_peft_model(model, LoraConfig(**{**LORA, "task_type": "SEQ_CLS"})), CLASSES)
    assert open_index(tmp_path).scores(CLASSES).any()


@pytest.mark.filterwarnings("ignore:The input embeddings of the model are frozen")
def test_an_adapter_of_a_model_that_was_saved_nowhere_needs_it(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="adapts a model that was saved nowhere.*`model=` or `load_model=`"):
        record(tmp_path, model)
    with pytest.raises(ValueError, match="must name the model that it adapts"):
        open_index(tmp_path).scores(ROWS)
    found = open_index(tmp_path, model=model).scores(ROWS)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).add_(1)
    assert open_index(tmp_path, model=model).scores(ROWS) == pytest.approx(found)


def test_an_adapter_whose_base_has_changed_says_so(base, tmp_path):
    changed = shutil.copytree(base, tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(changed), LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="frozen"):
        record(tmp_path, model)
    tiny_llama(tied=False, seed=1).save_pretrained(changed)
    with pytest.raises(ValueError, match=r"It is an adapter: its base, .* must be the one of the training too"):
        open_index(tmp_path).scores(ROWS)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A classifier with its weights in the index, which holds no path of the run."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder, tiny_classifier(), CLASSES, save_weights=True)
    return folder


@pytest.fixture
def foreign(recorded, tmp_path):
    """The folder of the index, to be changed, and that of its model."""
    shutil.copytree(recorded / "index", tmp_path / "index")
    return tmp_path, tmp_path / "index" / "models" / "step-1"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_with_old_names_of_bert_fills_the_given_one(foreign):
    folder, weights = foreign
    expected = open_index(folder).scores(CLASSES)
    saved = load_file(weights / "model.safetensors")
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): saved[name] for name in saved}
    assert set(old) != set(saved)
    save_file(old, weights / "model.safetensors", {"format": "pt"})
    assert open_index(folder, model=tiny_classifier(seed=5)).scores(CLASSES) == pytest.approx(expected)
    assert open_index(folder).scores(CLASSES) == pytest.approx(expected)


def test_a_model_of_several_files_fills_the_given_one(foreign):
    folder, weights = foreign
    expected = open_index(folder).scores(CLASSES)
    AutoModelForSequenceClassification.from_pretrained(weights).save_pretrained(weights, max_shard_size="4KB")
    (weights / "model.safetensors").unlink()
    assert len(list(weights.glob("model-*.safetensors"))) > 2
    assert open_index(folder, model=tiny_classifier(seed=5)).scores(CLASSES) == pytest.approx(expected)
    assert open_index(folder).scores(CLASSES) == pytest.approx(expected)
    change(weights / "model.safetensors.index.json", weight_map={"a": "../../config.json"})
    with pytest.raises(ValueError, match="must name files of the folder"):
        open_index(folder, model=tiny_classifier(seed=5)).scores(CLASSES)


ODD = {
    "label of no kind": ({"text": "w1", "label": {"a": 1}}, "a number, numbers or a name, but got {'a': 1}"),
    "label beyond numbers": ({"text": "w1", "label": 10**30}, "a number, numbers or a name, but got 10000"),
    "text as label of tokens": ({"input_ids": [5], "label": "w1"}, "one of the model's labels"),
    "label with a gap": ({"input_ids": [5], "labels": [None]}, r"a number, numbers or a name, but got \[None\]"),
    "nested tokens": ({"input_ids": [[5, 6]]}, "must have one list of `input_ids`"),
    "kinds beyond the model": (
        {"input_ids": [5], "token_type_ids": [9]},
        r"`token_type_ids` .* from 0 to 1, .* \[9\]",
    ),
    "too few kinds": ({"input_ids": [5, 6], "token_type_ids": [0]}, r"`token_type_ids` .* its 2 tokens"),
    "positions beyond the model": ({"input_ids": [5], "position_ids": [99]}, r"`position_ids` .* from 0 to 31"),
    "half a character": ({"text": "\ud800"}, "query 0 has half of a character"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_query_is_refused_by_name(kind, recorded, tmp_path):
    query, message = ODD[kind]
    with pytest.raises(ValueError, match=message):
        InfluenceIndex.from_pretrained(recorded / "index", cache_dir=tmp_path).scores([query])


CODE = "import pathlib; pathlib.Path({path!r}).touch()\nclass Mine: pass\n"


@pytest.mark.parametrize("part", ["model", "tokenizer", "both, of an unknown kind", "adapter"])
def test_code_that_comes_with_an_index_never_runs(part, foreign, capsys, monkeypatch):
    folder, weights = foreign
    ran = folder / "ran"
    for place in (weights, folder):
        (place / "mine.py").write_text(CODE.format(path=str(ran)))
    autos = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    mapped = {name: ["mine.Mine", "mine.Mine"] if "Tokenizer" in name else "mine.Mine" for name in autos}
    if part != "tokenizer":
        change(weights / "config.json", auto_map=mapped)
    if part != "model":
        change(weights / "tokenizer_config.json", auto_map=mapped, tokenizer_class="Mine")
    if part.startswith("both"):
        change(weights / "config.json", model_type="mine", architectures=["Mine"])
        config = json.loads((folder / "index" / "config.json").read_text())
        config["checkpoints"][0]["model_class"] = "AutoModelForSequenceClassification"
        change(folder / "index" / "config.json", **config)
    if part == "adapter":
        lora = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(weights), "r": 2}
        lora |= {"megatron_config": {"a": 1}, "megatron_core": "mine", "target_modules": ["query"]}
        (weights / "adapter_config.json").write_text(json.dumps(lora))
        shutil.copy(weights / "model.safetensors", weights / "adapter_model.safetensors")
    commands = [
        ["search", "--index", str(folder / "index"), "--query", "w1 w2", "--json"],
        ["index", "--checkpoints", str(weights), "--data", str(folder / "data.jsonl"), "--learning_rates", "1"],
    ]
    (folder / "data.jsonl").write_text('{"text": "w1 w2", "label": 1}\n')
    monkeypatch.chdir(folder)
    for command in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        ended = main(command)
        told = capsys.readouterr()
        assert not ran.exists()
        assert "[y/N]" not in told.out + told.err
        assert ended == 0 or "never run" in told.err or "must be one of transformers" in told.err
        assert sys.stdin.read(2) == "y\n"


OTHER_MODELS = {
    "adapters": {"peft_type": "XLORA", "hidden_size": 16, "adapters": {"0": "evil/adapter"}},
    "prompt_tuning_init_state_dict_path": {
        **{"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 1},
        "prompt_tuning_init_state_dict_path": "evil/prompt",
    },
}


@pytest.mark.parametrize("field", OTHER_MODELS)
def test_nothing_that_an_adapter_names_beside_its_base_model_is_fetched(field, foreign):
    folder, weights = foreign
    named = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(weights), **OTHER_MODELS[field]}
    (weights / "adapter_config.json").write_text(json.dumps(named))
    shutil.copy(weights / "model.safetensors", weights / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"it names others under `{field}`, and beside its base model nothing"):
        open_index(folder).scores(CLASSES)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("kernel", ["evil/kernel", "kernels-community/flash-attn2", "flash_attention_2"])
def test_a_kernel_that_a_model_names_is_neither_fetched_nor_run(name, kernel, foreign):
    folder, weights = foreign
    expected = open_index(folder).scores(CLASSES)
    change(weights / "config.json", **{name: kernel})
    assert open_index(folder).scores(CLASSES) == pytest.approx(expected)


def test_what_computes_attention_is_chosen_in_all_parts_of_a_model():
    config = CLIPConfig()
    config.text_config._attn_implementation = "evil/kernel"
    assert plain_config(config).text_config._attn_implementation is None
    assert plain_config(CLIPConfig(attn_implementation="eager"))._attn_implementation == "eager"


def damage_tokenizer(weights):
    (weights / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')


def pickled_weights(weights):
    torch.save(tiny_classifier().state_dict(), weights / "pytorch_model.bin")
    (weights / "model.safetensors").unlink()


DAMAGES = {
    "config of another architecture": (
        lambda weights: change(weights / "config.json", model_type="llama"),
        "BertForSequenceClassification, whose `model_type` is 'bert', but its config.json is of 'llama'",
    ),
    "config that is no JSON": (lambda weights: (weights / "config.json").write_text("{"), "step-1' cannot be loaded"),
    "config of other sizes": (
        lambda weights: change(weights / "config.json", hidden_size=32),
        "step-1' (cannot be loaded|differ)",
    ),
    "config that needs what is not installed": (
        lambda weights: change(weights / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "step-1' cannot be loaded: ImportError: .* optimum",
    ),
    "config of wrong kinds": (
        lambda weights: change(weights / "config.json", hidden_size="large"),
        "step-1' cannot be loaded",
    ),
    **{
        f"config that claims {name}": (
            lambda weights, name=name: change(weights / "config.json", **{name: 10**9}),
            f"step-1' cannot be loaded: .* at most .* under `{name}`, but claims 1,000,000,000",
        )
        for name in ("num_hidden_layers", "num_labels", "num_experts")
    },
    "tokenizer": (damage_tokenizer, "The tokenizer in .*step-1' cannot be loaded"),
    "tokenizer that is no JSON": (
        lambda weights: (weights / "tokenizer.json").write_bytes(b"\0" * 9),
        "The tokenizer in .*step-1' cannot be loaded",
    ),
    "weights": (lambda weights: (weights / "model.safetensors").write_bytes(b"x" * 99), "step-1' cannot be loaded"),
    "pickled weights": (pickled_weights, "step-1' cannot be loaded"),
    "moved": (lambda weights: shutil.rmtree(weights), "step-1' was moved or deleted since it was recorded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_or_tokenizer_is_named(damage, foreign):
    folder, weights = foreign
    edit, message = DAMAGES[damage]
    edit(weights)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_index(folder).scores("w1 w2")


def test_a_run_that_was_moved_with_its_index_is_found(recorded, tmp_path):
    record(tmp_path / "old", tiny_classifier(), CLASSES)
    expected = open_index(tmp_path / "old").scores("w1 w2")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert open_index(tmp_path / "new").scores("w1 w2") == pytest.approx(expected)
    shutil.move(tmp_path / "new" / "run", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"need the tokenizer .*run/checkpoint-1' was moved or deleted"):
        open_index(tmp_path / "new").scores("w1 w2")
    with pytest.raises(FileNotFoundError, match=r"run/checkpoint-1' was moved or deleted .* pass `load_model`"):
        open_index(tmp_path / "new").scores(CLASSES)
    found = open_index(
        tmp_path / "new",
        load_model=lambda path: AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "elsewhere/checkpoint-1"
        ),
        processing_class=tiny_tokenizer(),
    )
    assert found.scores("w1 w2") == pytest.approx(expected)


def test_an_adapter_is_indexed_and_searched_from_the_shell(base, tmp_path, capsys):
    model = get_peft_model(in_bfloat16(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "data.jsonl").write_text('{"text": "w1 w2 w3", "source": "a"}\n{"text": "w2 w1 w5", "source": "b"}\n')
    argv = ["index", "--checkpoints", str(tmp_path / "adapter"), "--data", str(tmp_path / "data.jsonl")]
    with pytest.warns(UserWarning, match="frozen"):
        assert main([*argv, "--learning_rates", "1", "--output_dir", str(tmp_path / "index")]) == 0
    assert main(["search", "--index", str(tmp_path / "index"), "--query", "w1 w2"]) == 0
    influence = open_index(tmp_path).domain_influence("w1 w2 w3", "source")
    assert set(influence["domain"]) == {"a", "b"}


def test_columns_that_the_trainer_drops_are_kept_of_the_dataset_that_is_given(tmp_path):
    rows = CLASSES.add_column("text", ["w1 w2 w3 w4", "w5 w2 w3"]).add_column("source", ["wiki", "books"])
    with pytest.warns(
        UserWarning, match=r"keeps no text, source .* Pass `dataset=`, the train dataset with its columns"
    ):
        record(tmp_path / "without", tiny_classifier(), rows)
    without = open_index(tmp_path / "without")
    with pytest.raises(ValueError, match=r"`column` must be one of .* `TracInWECallback\(dataset=...\)`"):
        without.domain_influence("w1 w2", "source")
    assert set(without.search("w1 w2")["text"]) == {"w1 w2 w3 w4", "w5 w2 w3"}  # what their tokens decode to
    record(tmp_path / "with", tiny_classifier(), rows, dataset=rows)
    index = open_index(tmp_path / "with")
    assert set(index.domain_influence("w1 w2", "source")["domain"]) == {"wiki", "books"}
    assert set(index.search("w1 w2")["source"]) == {"wiki", "books"}
