"""DoGEConfig: what the recipes mean, and what is refused."""

from dataclasses import fields, replace

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import HfArgumentParser, TrainingArguments

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains

# The name of the argument changed within transformers 5.
IS_STRATEGY = "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
GROUPED = {"train_sampling_strategy": "group_by_length"} if IS_STRATEGY else {"group_by_length": True}


def config(tmp_path, **kwargs):
    defaults = {"use_cpu": True, "report_to": "none", "max_steps": 1, "per_device_train_batch_size": 12}
    return DoGEConfig(str(tmp_path), **{**defaults, **kwargs})


def make_trainer(tmp_path, model=None, domains=None, options=None, **kwargs):
    args = config(tmp_path, **(options or {}))
    domains = three_domains() if domains is None else domains
    return DoGETrainer(tiny_llama() if model is None else model, args, train_dataset=domains, **kwargs)


def test_the_paper_recipe_has_no_normalisation_no_bounds_and_no_clipping(tmp_path):
    recipe = config(tmp_path, recipe="paper").get_recipe()
    assert recipe.normalization == "none"
    assert recipe.score_min is recipe.score_max is recipe.domain_max_grad_norm is None
    assert recipe.self_term
    assert recipe.smoothing == recipe.burn_in_steps == 0
    assert recipe.reweight_steps == 1


def test_the_official_recipe_is_the_authors_code(tmp_path):
    recipe = config(tmp_path, recipe="official", max_grad_norm=5.0).get_recipe()
    assert recipe.normalization == "mean_norm"
    assert (recipe.score_min, recipe.score_max, recipe.domain_max_grad_norm) == (0.0, 5.0, 5.0)


def test_without_a_recipe_scores_are_in_nats_across_halves_and_weights_are_shrunk(tmp_path):
    recipe = config(tmp_path).get_recipe()
    assert recipe == config(tmp_path, recipe="doge_plus").get_recipe()
    assert (recipe.name, recipe.mu, recipe.score_metric) == ("doge_plus", 3.0, "optimizer")
    assert recipe.is_independent
    assert recipe.shrinkage


def test_without_mu_weights_go_faster_towards_a_target_than_where_all_domains_count_alike(tmp_path):
    ways = {"universal": {}, "target": {"target_dataset": three_domains(5)["books"]}}
    found = {}
    for way, given in ways.items():
        for options in ({}, {"mu": 2.0, "recipe": "doge_plus"}, {"recipe": "paper"}):
            trainer = make_trainer(tmp_path / f"{way}-{len(found)}", options={"max_steps": 1, **options}, **given)
            trainer.train()
            found[way, *options.values()] = trainer.domain_weights.recipe["mu"]
    assert (found["universal",], found["target",]) == (3.0, 1.0)
    assert found["universal", 2.0, "doge_plus"] == found["target", 2.0, "doge_plus"] == 2.0
    assert found["universal", "paper"] == found["target", "paper"] == 0.01


@pytest.mark.parametrize(
    "ingredient",
    [
        {"mu": 0.05},
        {"normalization": "cosine"},
        {"score_max": 5.0},
        {"domain_max_grad_norm": 1.0},
        {"self_term": False},
        {"self_term": "same"},
        {"score_metric": "gradient"},
    ],
)
def test_without_a_recipe_an_ingredient_is_meant_as_the_paper_has_it(tmp_path, ingredient):
    recipe = config(tmp_path, **ingredient).get_recipe()
    assert recipe == config(tmp_path, recipe="paper", **ingredient).get_recipe()
    assert recipe.name == "paper"
    assert config(tmp_path, recipe="doge_plus", mu=5.0).get_recipe().score_metric == "optimizer"


@pytest.mark.parametrize(
    "ingredient",
    [{"shrinkage": False}, {"self_term": "independent"}, {"score_metric": "optimizer"}, {"smoothing": 0.1}],
)
def test_what_is_not_the_papers_leaves_the_default(tmp_path, ingredient):
    recipe = config(tmp_path, **ingredient).get_recipe()
    assert recipe == config(tmp_path, recipe="doge_plus", **ingredient).get_recipe()


def test_mu_is_in_the_unit_of_the_scores(tmp_path):
    assert config(tmp_path, recipe="paper", score_metric="optimizer").get_recipe().mu == 3.0
    assert config(tmp_path, recipe="doge_plus", score_metric="gradient").get_recipe().mu == 0.01


def test_an_ingredient_given_beside_the_recipe_overrides_it(tmp_path):
    options = {"normalization": "cosine", "score_min": float("-inf"), "score_max": 2.0, "domain_max_grad_norm": 0.0}
    recipe = config(tmp_path, recipe="official", **options).get_recipe()
    assert recipe.normalization == "cosine"
    assert (recipe.score_min, recipe.score_max, recipe.domain_max_grad_norm) == (None, 2.0, None)


def test_help_renders_and_flags_parse(capsys, tmp_path):
    parser = HfArgumentParser(DoGEConfig)
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(["--help"])
    assert "--gradient_memory_budget" in capsys.readouterr().out
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--mu", "0.02", "--self_term", "false", "--normalization", "cosine"]
    )
    assert (parsed.mu, parsed.self_term, parsed.normalization) == (0.02, False, "cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0}, r"`mu` must be in \[1e-30, 1e\+30\], but got 0"),
        ({"mu": -1.0}, r"`mu` must be in \[1e-30, 1e\+30\], but got -1.0"),
        ({"mu": float("nan")}, r"`mu` must be in \[1e-30, 1e\+30\], but got nan"),
        ({"mu": float("inf")}, r"`mu` must be in \[1e-30, 1e\+30\], but got inf"),
        ({"mu": 10**200}, r"`mu` must be in \[1e-30, 1e\+30\], but got 1000"),
        ({"learning_rate": 1e308}, r"`learning_rate` must be in \[0, 1e\+30\], but got 1e\+308"),
        ({"learning_rate": 1e10, "mu": 1e-25}, "`learning_rate` / `mu`, the speed of the weights, must be at most"),
        ({"mu": "0.1"}, "`mu` must be a number, but got '0.1'"),
        ({"score_max": "5"}, "`score_max` must be a number, but got '5'"),
        ({"score_min": float("nan")}, "`score_min` must be below inf, but got nan"),
        ({"score_max": float("-inf")}, "`score_max` must be above -inf, but got -inf"),
        ({"reweight_steps": 2.5}, "`reweight_steps` must be a whole number, but got 2.5"),
        ({"recipe": "doremi"}, r"`recipe` must be one of \['paper', 'official', 'doge_plus'\], but got 'doremi'"),
        ({"alignment": "fast"}, "`alignment` must be one of .* but got 'fast'"),
        ({"normalization": "l2"}, "`normalization` must be one of .* but got 'l2'"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\), but got 1.0"),
        ({"reweight_steps": 0}, "`reweight_steps` must be at least 1, but got 0"),
        ({"trajectory_steps": 0}, "`trajectory_steps` must be at least 1, but got 0"),
        ({"max_nonfinite_steps": 0}, "`max_nonfinite_steps` must be at least 1, but got 0"),
        ({"burn_in_steps": -1}, "`burn_in_steps` must be at least 0, but got -1"),
        ({"reweight_steps": True}, "`reweight_steps` must be a whole number, but got True"),
        ({"sampler_lag_steps": "3"}, "`sampler_lag_steps` must be a whole number, but got '3'"),
        ({"per_device_target_batch_size": 1.5}, "`per_device_target_batch_size` must be a whole number, but got 1.5"),
        ({"lagged_update": "false"}, "`lagged_update` must be True or False, but got 'false'"),
        (
            {"self_term": "no"},
            r"`self_term` must be True, False or one of \['same', 'none', 'independent'\], but got 'no'",
        ),
        ({"domain_column": None}, "`domain_column` must be the name of a column, but got None"),
        ({"alignment_parameters": 3}, "`alignment_parameters` must be a regular expression, but got 3"),
        ({"per_device_target_batch_size": 0}, "`per_device_target_batch_size` must be at least 1, but got 0"),
        ({"gradient_memory_budget": -1}, "`gradient_memory_budget` must be at least 0 GiB, but got -1"),
        ({"domain_max_grad_norm": -1}, "`domain_max_grad_norm` must be at least 0, but got -1"),
        ({"score_min": 2.0, "score_max": 1.0}, "`score_min` must not exceed `score_max`, but got 2.0 > 1.0"),
        ({"alignment_parameters": "("}, r"`alignment_parameters` must be a regular expression, but got '\('"),
    ],
)
def test_bad_arguments_are_refused_at_construction(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16 loss scaling yet. Use `bf16=True`"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` yet. Set `per_device_train_batch_size`"),
        (GROUPED, "sampling strategies yet. Leave the order"),
        ({"per_device_train_batch_size": 2}, "2 examples a step cannot hold 3 domains, which take"),
        ({"recipe": "official"}, "`recipe='official'` compares with a held-out set, but `target_dataset` is None"),
        ({"alignment_parameters": "nowhere"}, "must match a trainable parameter, but 'nowhere' matches none"),
        ({"domain_column": "kind"}, None),
    ],
)
def test_combinations_that_would_learn_wrong_weights_are_refused(tmp_path, options, message):
    if message is None:
        make_trainer(tmp_path, options=options)  # a dict of datasets names its domains itself
        return
    if options.get("fp16"):
        options = {**options, "use_cpu": False}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, options=options)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("deepspeed", "zero2.json", "DeepSpeed yet. Leave `deepspeed` unset"),
        ("optim", "lomo", "optimizers that step inside the backward pass yet"),
        ("optim", "galore_adamw_layerwise", "optimizers that step inside the backward pass yet"),
        ("_n_gpu", 2, "DataParallel over several GPUs yet. Set CUDA_VISIBLE_DEVICES"),
    ],
)
def test_devices_and_engines_that_are_not_right_yet_are_refused(tmp_path, attribute, value, message):
    args = config(tmp_path)
    setattr(args, attribute, value)
    with pytest.raises(ValueError, match=message):
        DoGETrainer(tiny_llama(), args, train_dataset=three_domains())


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` must be a `DoGEConfig`, but got TrainingArguments"):
        DoGETrainer(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=three_domains())


def test_a_streaming_train_set_is_refused(tmp_path):
    streaming = IterableDataset.from_generator(lambda: iter([{"input_ids": [1], "domain": "a"}]))
    with pytest.raises(ValueError, match=r"but got IterableDataset\. Load it without `streaming=True`"):
        make_trainer(tmp_path, domains=streaming)


def test_a_missing_domain_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="'domain'"):
        make_trainer(tmp_path, domains=three_domains()["code"])


def test_an_empty_domain_is_named(tmp_path):
    domains = {**three_domains(), "wiki": three_domains()["code"].select([])}
    with pytest.raises(ValueError, match="wiki"):
        make_trainer(tmp_path, domains=domains)


def test_a_blank_domain_name_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="Domain names must be non-empty strings"):
        make_trainer(tmp_path, domains={" ": three_domains()["code"]})


def test_a_format_that_hides_the_domains_is_named(tmp_path):
    merged = concatenate_datasets([data.add_column("domain", [n] * 4) for n, data in three_domains().items()])
    trainer = make_trainer(tmp_path, domains=merged.with_format("torch", columns=["input_ids", "labels"]))
    with pytest.raises(ValueError, match="Every train example must come with its 'domain'"):
        trainer.train()


def test_an_empty_target_is_refused(tmp_path):
    with pytest.raises(ValueError, match="target"):
        make_trainer(tmp_path, target_dataset=three_domains()["code"].select([]))


def test_weights_of_other_domains_are_refused_by_name(tmp_path):
    weights = DomainWeights({"arxiv": 0.5, "books": 0.25, "wiki": 0.25})
    with pytest.raises(ValueError, match=r"they have \['wiki'\] beside these and lack \['code'\]"):
        make_trainer(tmp_path, initial_weights=weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"b": 1.0}, "must name the targets"), ({"a": -1.0}, "finite, >= 0 and not all 0"), ({"a": 0.0}, "not all 0")],
)
def test_bad_target_weights_are_refused(tmp_path, weights, message):
    targets = {"a": three_domains()["code"]}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, target_dataset=targets, target_weights=weights)


def test_a_model_that_mixes_examples_is_refused(tmp_path):
    model = tiny_llama()
    model.norm = torch.nn.BatchNorm1d(16)
    with pytest.raises(ValueError, match=r"the module 'norm' \(BatchNorm1d\) mixes the examples of a batch"):
        make_trainer(tmp_path, model=model)


def test_sparse_embeddings_are_refused_by_name(tmp_path):
    model = tiny_llama()
    model.get_input_embeddings().sparse = True
    with pytest.raises(
        ValueError, match=r"Gradients must be dense, but the module 'model.embed_tokens' \(Embedding\)"
    ):
        DoGETrainer(model, DoGEConfig(str(tmp_path), max_steps=1), train_dataset=three_domains()).train()


def test_the_default_lag_follows_the_interval_also_in_a_changed_copy(tmp_path):
    args = DoGEConfig(str(tmp_path), mode="online", reweight_steps=4)
    assert (args.lag_steps, replace(args, reweight_steps=9).lag_steps) == (4, 9)
    assert replace(args, sampler_lag_steps=6, reweight_steps=9).lag_steps == 6


def test_a_frozen_model_is_refused(tmp_path):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters"):
        make_trainer(tmp_path, model=model)


def test_a_packing_collator_is_refused(tmp_path):
    def pack(features):
        ids = torch.tensor([[token for feature in features for token in feature["input_ids"]]])
        return {"input_ids": ids, "labels": ids}

    trainer = make_trainer(tmp_path, data_collator=pack)
    with pytest.raises(ValueError, match="Use a collator that pads instead of packing"):
        trainer.train()


def test_a_replaced_sampler_is_noticed_at_train_begin(tmp_path):
    class Meddler(DoGETrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Meddler(tiny_llama(), config(tmp_path), train_dataset=three_domains())
    with pytest.raises(RuntimeError, match="its innermost sampler is SequentialSampler"):
        trainer.train()


def test_a_single_dataset_names_its_domains_in_its_column(tmp_path):
    dataset = Dataset.from_dict(
        {"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4, "domain": ["b", "a", "b", "a"]}
    )
    assert list(make_trainer(tmp_path, domains=dataset).domain_weights.mean) == ["a", "b"]


def test_a_name_that_the_weights_could_not_have_on_the_hub_is_refused_before_training(tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "doge/" + "n" * 90, "use_cpu": True}
    with pytest.raises(ValueError, match=r"-domain-weights', which is no name of a repository.*Pass `hub_weights_id`"):
        DoGEConfig(str(tmp_path), **options)
    DoGEConfig(str(tmp_path), **options, hub_weights_id="doge/short")
