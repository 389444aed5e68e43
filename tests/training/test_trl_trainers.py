"""trl's other trainers: which of them train by weights behind the mixin, and which on data that are mixed before."""

from collections import Counter
from dataclasses import dataclass

import pytest
from datasets import Dataset

from hf_doge.sampling.streaming import interleave_domains
from hf_doge.training.config import DoGEConfig
from hf_doge.training.mixture import DomainWeightedMixin
from hf_doge.training.trainer import DoGEMixin
from tests.one_layer import tiny_classifier, tiny_llama
from tests.training.mixture_processes import SaveAt
from tests.training.test_mixture import arguments

trl = pytest.importorskip("trl")

WEIGHTS = {"arxiv": 0.5, "books": 0.0, "code": 0.5}
FIRST_WORDS = {"arxiv": 1, "books": 9, "code": 17}
COLUMNS = {
    "DPO": ["prompt", "chosen", "rejected"],
    "Reward": ["prompt", "chosen", "rejected"],
    "KTO": ["prompt", "completion", "label"],
    "GRPO": ["prompt"],
    "RLOO": ["prompt"],
    "Distillation": ["prompt"],
}
OPTIONS = {
    "KTO": {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
    "GRPO": {"num_generations": 2, "max_completion_length": 2},
    "RLOO": {"num_generations": 2, "max_completion_length": 2, "beta": 0.0},
    "Distillation": {"max_completion_length": 2},
}
GROUPED = ("GRPO", "RLOO", "Distillation")


def prompt_domains():
    """Eight examples a domain, whose prompts begin with a word of the domain's own."""
    return {
        name: Dataset.from_dict(
            {
                "prompt": [f"w{first} w{i + 18} " for i in range(8)],
                "chosen": [f"w{i} w3" for i in range(8)],
                "rejected": [f"w{i} w4" for i in range(8)],
                "completion": [f"w{i} w5" for i in range(8)],
                "label": [i % 2 == 0 for i in range(8)],
            }
        )
        for name, first in FIRST_WORDS.items()
    }


def make(tmp_path, tokenizer, kind, *, mixin=DomainWeightedMixin, config=None, train_dataset=None, **options):
    """A trainer of trl, which notes the domains of each micro-batch; behind a mixin, or without."""
    if not hasattr(trl, f"{kind}Trainer"):
        pytest.skip(f"trl {trl.__version__} has no {kind}Trainer")
    owners = {tokenizer.convert_tokens_to_ids(f"w{i}"): name for name, i in FIRST_WORDS.items()}

    class Noting(getattr(trl, f"{kind}Trainer")):
        def training_step(self, model, inputs, *args, **kwargs):
            if isinstance(inputs, list):  # prompts as they are
                self.seen.append([(row["prompt"], row.get("domain")) for row in inputs])
            else:
                begin = "" if "input_ids" in inputs else "prompt_"  # as trl 0.26 has them, once for both of a pair
                rows = zip(inputs[f"{begin}input_ids"], inputs[f"{begin}attention_mask"], strict=True)
                found = [owners[int(ids[mask.bool()][0])] for ids, mask in rows]
                self.seen.append(found * 2 if begin else found)
            return super().training_step(model, inputs, *args, **kwargs)

    cls = Noting if mixin is None else type("OnDomains", (mixin, Noting), {})
    settings = {"bf16": False, "gradient_checkpointing": False, **OPTIONS.get(kind, {}), **options}
    args = arguments(tmp_path, config or getattr(trl, f"{kind}Config"), **settings)
    more = {"domain_weights": WEIGHTS} if mixin is DomainWeightedMixin else {}
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [float(len(set(one))) for one in completions]
    elif kind == "Distillation":
        more["teacher_model"] = tiny_llama()
    elif kind in ("DPO", "KTO"):
        more["ref_model"] = tiny_llama()
    model = tiny_classifier(num_labels=1) if kind == "Reward" else tiny_llama()
    if train_dataset is None:
        train_dataset = {name: data.select_columns(COLUMNS[kind]) for name, data in prompt_domains().items()}
    trainer = cls(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **more)
    trainer.seen = []
    return trainer


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_weights_choose_pairs_which_stay_whole(tmp_path, tokenizer, kind):
    trainer = make(tmp_path, tokenizer, kind)
    trainer.train()
    for rows in trainer.seen:
        chosen, rejected = rows[:4], rows[4:]
        assert chosen == rejected
        assert Counter(chosen) == {"arxiv": 2, "code": 2}
    log = trainer.state.log_history[4]
    assert (log["domain_share/arxiv"], log["domain_share/books"], log["domain_epochs/code"]) == (0.5, 0.0, 10 / 8)
    assert "domain_loss/code" not in log  # of pairs, not of tokens


def test_weights_choose_the_examples_of_kto_where_its_loss_has_no_kl_term(tmp_path, tokenizer):
    pytest.importorskip("trl", minversion="1.0")
    trainer = make(tmp_path, tokenizer, "KTO")
    trainer.train()
    assert [Counter(rows) for rows in trainer.seen] == [{"arxiv": 2, "code": 2}] * 5


def test_kto_with_a_kl_term_is_refused_and_trains_on_what_is_mixed_before(tmp_path, tokenizer):
    pytest.importorskip("trl", minversion="1.0")
    options = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=r"must be 'random', but got 'sequential'.*all but `loss_type='apo_zero_un"):
        make(tmp_path, tokenizer, "KTO", **options)
    trainer = make(tmp_path, tokenizer, "KTO", mixin=None, train_dataset=mixed("KTO"), **options)
    trainer.train()
    assert [Counter(rows) for rows in trainer.seen] == [{"arxiv": 2, "code": 2}] * 5


def mixed(kind):
    """The domains in one data set, by the weights."""
    domains = {name: data.select_columns(COLUMNS[kind]) for name, data in prompt_domains().items()}
    column = "domain" if kind in GROUPED else None
    return interleave_domains(domains, WEIGHTS, num_samples=20, domain_column=column)


@pytest.mark.parametrize("kind", GROUPED)
def test_a_trainer_whose_sampler_groups_prompts_is_refused(tmp_path, tokenizer, kind):
    message = f"of {kind}Trainer returns a RepeatSampler.* `interleave_domains.* as `train_dataset` to {kind}Trainer"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, kind)


@pytest.mark.parametrize("kind", GROUPED)
def test_weights_choose_prompts_that_are_mixed_before_and_groups_stay_whole(tmp_path, tokenizer, kind):
    trainer = make(tmp_path, tokenizer, kind, mixin=None, train_dataset=mixed(kind), shuffle_dataset=False)
    trainer.train()
    size = OPTIONS[kind].get("num_generations", 1)
    for rows in trainer.seen:
        groups = [rows[start : start + size] for start in range(0, 4, size)]
        assert all(group == [group[0]] * size for group in groups)
        owners = Counter(group[0][1] for group in groups)
        assert owners == {0: len(groups) / 2, 1: len(groups) / 2}  # "arxiv" and "code"


def test_pairs_are_drawn_on_where_a_run_was_interrupted(tmp_path, tokenizer):
    undisturbed = make(tmp_path, tokenizer, "DPO", max_steps=5)
    undisturbed.add_callback(SaveAt([2]))
    undisturbed.train()
    resumed = make(tmp_path, tokenizer, "DPO", max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.seen == undisturbed.seen[2:]
    assert resumed.state.log_history[-2]["loss"] == undisturbed.state.log_history[-2]["loss"]


def test_pairs_whose_reference_is_computed_before_are_drawn_by_weights_too(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "DPO", precompute_ref_log_probs=True)
    trainer.train()
    assert [Counter(rows) for rows in trainer.seen] == [{"arxiv": 4, "code": 4}] * 5


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_learning_on_pairs_is_refused(tmp_path, tokenizer, kind):
    if kind == "DPO" and trl.__version__.startswith("0.26."):
        pytest.skip("trl 0.26 keeps a row for each pair, so its loss is a mean over examples")

    class Config(DoGEConfig, getattr(trl, f"{kind}Config")):
        pass

    trainer = make(tmp_path, tokenizer, kind, mixin=DoGEMixin, config=dataclass(Config), recipe="paper")
    with pytest.raises(ValueError, match=r"several rows of one example.*`DomainWeightedMixin` can train"):
        trainer.train()
