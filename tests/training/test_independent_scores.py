"""Scores across halves of a step's examples, and in the metric of the optimizer: against autograd, in every alignment."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_doge.artifacts.cards.weights import undecided_groups
from hf_doge.artifacts.score_noise import estimate_score_noise
from hf_doge.functional import independent_scores
from hf_doge.training.config import DoGEConfig
from hf_doge.training.trainer import DoGETrainer
from tests.launch import REPOSITORY
from tests.one_layer import tiny_llama
from tests.tiny import float64_causal_loss, language_model_rows, three_domains

OPTIONS = {
    "per_device_train_batch_size": 12, "max_steps": 1, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "optim": "sgd", "max_grad_norm": 0.0, "mu": 0.1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True, "logging_strategy": "no",
}  # fmt: skip
ALIGNMENTS = ("single_pass", "per_domain", "streamed")


def learn(tmp_path, domains, *, model=None, targets=None, resume=None, **options):
    seen = []

    class Noting(DoGETrainer):
        def _proxy_step(self, model, inputs, num_items):
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super()._proxy_step(model, inputs, num_items)

    model = tiny_llama(dtype=torch.float64) if model is None else model
    args = DoGEConfig(str(tmp_path), **{**OPTIONS, **options})
    trainer = Noting(model, args, train_dataset=domains, target_dataset=targets, compute_loss_func=float64_causal_loss)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def gradient(model, ids):
    """Of the mean loss of some examples."""
    loss = float64_causal_loss(model(input_ids=ids), ids, ids[:, 1:].numel())
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def halves_of(batch, num_domains=3):
    """Gradient of each half of each domain, at `[domain, half]`."""
    model = tiny_llama(dtype=torch.float64)
    rows = [batch["input_ids"][batch["domain_ids"] == domain] for domain in range(num_domains)]
    return torch.stack([torch.stack([gradient(model, ids[half::2]) for half in range(2)]) for ids in rows])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("budget", [4.0, 0.0])
def test_a_domain_is_compared_across_halves_only(tmp_path, alignment, budget):
    options = {"self_term": "independent", "alignment": alignment, "gradient_memory_budget": budget}
    trainer, seen = learn(tmp_path, three_domains(4), **options)
    halves = halves_of(seen[0])
    sums = halves.sum(dim=0)
    expected = ((halves[:, 0] @ sums[1]) + (halves[:, 1] @ sums[0])) / 2
    point = trainer.domain_weights.trajectory
    np.testing.assert_allclose(point.scores[0], expected, rtol=1e-9)
    step = (flat(tiny_llama(dtype=torch.float64)) - flat(trainer.model)) / 0.05
    weights = torch.from_numpy(point.weights[0])
    whole = weights @ halves.mean(dim=1)  # steps it
    assert (step - whole).norm() / whole.norm() < 1e-6  # a norm inside the model is of float32


def test_given_targets_share_no_example_so_nothing_changes(tmp_path):
    targets = {"a": three_domains(8)["code"].select([4, 5, 6, 7]), "b": three_domains(8)["arxiv"].select([6, 7])}
    plain, _ = learn(tmp_path, three_domains(4), targets=targets)
    trainer, _ = learn(tmp_path, three_domains(4), targets=targets, self_term="independent")
    assert trainer.domain_weights.trajectory == plain.domain_weights.trajectory


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_in_halves_or_not_the_step_between_two_updates_is_the_same(tmp_path, alignment):
    runs = [
        learn(tmp_path, three_domains(4), alignment=alignment, max_steps=2, reweight_steps=2, mu=1e30, **options)[0]
        for options in ({}, {"self_term": "independent"})
    ]
    torch.testing.assert_close(flat(runs[0].model), flat(runs[1].model), rtol=1e-9, atol=1e-12)


def test_across_halves_a_score_is_unbiased_and_the_papers_is_not():
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    noises = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    halves = means.unsqueeze(1) + noises * torch.randn(20_000, 3, 2, 40, generator=generator).double()
    products = torch.einsum("sdhp,sip->sdhi", halves, halves.sum(dim=1))
    scores = torch.stack([independent_scores(one) for one in products])
    goal, spread = means @ means.sum(dim=0), scores.std(dim=0) / 20_000**0.5
    assert ((scores.mean(dim=0) - goal).abs() < 4 * spread).all()
    papers = products.mean(dim=(2, 3)).mean(dim=0) - goal
    torch.testing.assert_close(papers, 40 * noises.flatten().double() ** 2 / 2, rtol=0.05, atol=0)
    assert estimate_score_noise(scores.numpy()) == pytest.approx(scores.std(dim=0).numpy(), rel=0.02)


def text(num_examples, seed):
    return Dataset.from_dict(language_model_rows(num_examples, low=1, high=31, seed=seed))


def test_the_noise_of_a_model_is_the_spread_over_independent_batches(tmp_path):
    """Within 20 %: told by a run whose model learns, observed on the model that it leaves, standing still."""
    domains = {name: text(256, seed) for seed, name in enumerate(("a", "b", "c"))}
    options = {
        "max_steps": 120,
        "self_term": "independent",
        "alignment": "single_pass",
        "learning_rate": 3e-4,
        "mu": 1e6,
    }
    model = tiny_llama()
    moving, _ = learn(tmp_path, domains, model=model, **options)
    predicted = estimate_score_noise(moving.domain_weights.trajectory.scores)
    still, _ = learn(tmp_path, domains, model=model, **{**options, "learning_rate": 0.0, "seed": 1})
    observed = still.domain_weights.trajectory.scores.std(axis=0)
    assert predicted == pytest.approx(observed, rel=0.2)


def license_text(length=24):
    """Blocks of English, by the letter."""
    text = " ".join((REPOSITORY / "LICENSE").read_text().lower().split())
    letters = "".join(sorted(set(text), key=lambda letter: (-text.count(letter), letter)))[:30]
    ids = [1 + max(letters.find(letter), 0) for letter in text]
    return [ids[start : start + length] for start in range(0, len(ids) - length, length)]


@pytest.mark.parametrize("recipe", ["paper", "doge_plus"])
def test_of_the_same_text_a_domain_with_half_the_labels_in_a_batch_gains_by_the_papers_recipe_alone(tmp_path, recipe):
    """Half of its labels are left out by chance, as where only answers count: its gradients are as noisy as of half a batch."""
    rows = license_text()
    kept = np.random.default_rng(0).random((len(rows), len(rows[0]))) < 0.5
    half = np.where(kept, rows, -100).tolist()
    domains = {
        name: Dataset.from_dict({"input_ids": rows, "labels": labels})
        for name, labels in (("whole", rows), ("half", half))
    }
    num_steps = 60 if recipe == "doge_plus" else 120
    args = DoGEConfig(
        str(tmp_path), recipe=recipe, per_device_train_batch_size=16, max_steps=num_steps, learning_rate=5e-3, seed=2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = DoGETrainer(tiny_llama(), args, train_dataset=domains)
    trainer.train()
    weights, trajectory = trainer.domain_weights, trainer.domain_weights.trajectory
    rates = np.ones(num_steps) if recipe == "doge_plus" else trajectory.learning_rates
    gap = np.log(weights.last["half"] / weights.last["whole"])
    column = [trajectory.domains.index(name) for name in ("half", "whole")]
    differences = trajectory.scores[:, column] @ [[1.0], [-1.0]]
    noise = estimate_score_noise(differences).item() * np.linalg.norm(rates) / weights.recipe["mu"]
    if recipe == "doge_plus":
        assert abs(gap) < 3 * noise < 0.2
        assert undecided_groups(weights) == [sorted(weights.mean, key=weights.mean.get, reverse=True)]
    else:
        assert gap > 3 * noise
        assert weights.mean["half"] > 0.65
        assert undecided_groups(weights) == []


def test_a_resumed_run_learns_the_same_weights(tmp_path):
    options = {
        "max_steps": 6,
        "self_term": "independent",
        "save_strategy": "steps",
        "save_steps": 3,
        "save_only_model": False,
    }
    whole, _ = learn(tmp_path, three_domains(8), **options)
    resumed, _ = learn(tmp_path, three_domains(8), resume=str(tmp_path / "checkpoint-3"), **options)
    assert whole.domain_weights.trajectory == resumed.domain_weights.trajectory


def test_logs_and_summary_tell_the_noise_and_what_it_leaves_undecided(tmp_path):
    domains = {"twin": text(64, 0), "other twin": text(64, 1), "code": three_domains(64)["code"]}
    options = {"self_term": "independent", "max_steps": 12, "logging_strategy": "steps", "logging_steps": 3}
    trainer, _ = learn(tmp_path, domains, model=tiny_llama(dtype=torch.float64, num_layers=2), **options)
    logs = trainer.state.log_history[0]
    noise, score = logs["domain_score_noise/code"], logs["domain_score/code"]
    assert logs["domain_score_snr/code"] == pytest.approx(score / noise)
    weights = trainer.domain_weights
    assert noise == pytest.approx(estimate_score_noise(weights.trajectory.scores[:3])[2])
    assert {"twin", "other twin"} <= {name for group in undecided_groups(weights) for name in group}
    assert "cannot tell apart, for the noise of its scores:" in " ".join(weights.summary().split())
    assert "score/noise" in weights.summary()


def adam_update(trainer, parameter, gradient, target, clip):
    """What AdamW makes of a clipped gradient, its second moment after a step by the mean of the targets' gradients."""
    group, state = trainer.optimizer.param_groups[0], trainer.optimizer.state[parameter]
    decay, step = group["betas"][1], int(state["step"]) + 1
    moment = decay * state["exp_avg_sq"] + (1 - decay) * (clip * target).square()
    return group["lr"] * clip * gradient / ((moment / (1 - decay**step)).sqrt() + group["eps"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_in_the_optimizers_metric_a_score_is_the_product_with_its_update(tmp_path, alignment, max_grad_norm):
    model, found = tiny_llama(dtype=torch.float64), []

    class Expecting(DoGETrainer):
        def _proxy_step(self, model, inputs, num_items):
            if self.state.global_step == 2:
                rows = [inputs["input_ids"][inputs["domain_ids"] == domain] for domain in range(3)]
                parameters = list(model.parameters())
                gradients = [
                    torch.autograd.grad(float64_causal_loss(model(input_ids=ids), ids, ids[:, 1:].numel()), parameters)
                    for ids in rows
                ]
                total = [sum(parts) for parts in zip(*gradients, strict=True)]
                norm = torch.cat([part.flatten() for part in total]).norm() / 3
                clip = min(1.0, max_grad_norm / (float(norm) + 1e-6)) if max_grad_norm else 1.0
                assert (clip < 0.5) == bool(max_grad_norm)
                for parts in gradients:
                    updates = [
                        adam_update(self, p, g, t / 3, clip) for p, g, t in zip(parameters, parts, total, strict=True)
                    ]
                    found.append(sum(float((u * t / 3).sum()) for u, t in zip(updates, total, strict=True)))
            return super()._proxy_step(model, inputs, num_items)

    options = {
        **OPTIONS,
        "optim": "adamw_torch",
        "max_steps": 3,
        "score_metric": "optimizer",
        "alignment": alignment,
        "max_grad_norm": max_grad_norm,
        "mu": 5.0,
    }
    trainer = Expecting(
        model,
        DoGEConfig(str(tmp_path), **options),
        train_dataset=three_domains(8),
        compute_loss_func=float64_causal_loss,
    )
    trainer.train()
    point = trainer.domain_weights.trajectory
    np.testing.assert_allclose(point.scores[2], found, rtol=1e-8)
    change = np.log(point.weights[2] / point.weights[1])
    np.testing.assert_allclose(change - change[0], (point.scores[2] - point.scores[2][0]) / 5.0, rtol=1e-6, atol=1e-9)


def test_a_score_in_nats_is_what_a_step_on_the_domain_lowers_the_targets_loss_by(tmp_path):
    """To first order: the target's loss after AdamW's update from one domain's gradient alone."""
    model = tiny_llama(dtype=torch.float64)
    target = Dataset.from_dict(language_model_rows(4, low=19, high=31, seed=5))
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "score_metric": "optimizer",
        "adam_epsilon": 1e-1,
        "targets": target,
        "per_device_target_batch_size": 4,
    }
    trainer, seen = learn(tmp_path, three_domains(4), model=model, **options)
    start, ids = tiny_llama(dtype=torch.float64), torch.tensor(target["input_ids"])
    goal = gradient(start, ids)
    scores = trainer.domain_weights.trajectory.scores[0]
    for domain in range(3):
        moved = tiny_llama(dtype=torch.float64)
        direction = gradient(start, seen[0]["input_ids"][seen[0]["domain_ids"] == domain])
        torch.nn.utils.vector_to_parameters(flat(start) - 1e-4 * direction / (goal.abs() + 1e-1), moved.parameters())
        before, after = (float(float64_causal_loss(m(input_ids=ids), ids, ids[:, 1:].numel())) for m in (start, moved))
        assert before - after == pytest.approx(scores[domain], rel=2e-2)


def test_doge_plus_runs_and_names_its_ingredients(tmp_path):
    options = {"recipe": "doge_plus", "optim": "adamw_torch", "mu": None, "max_steps": 3}
    trainer, _ = learn(tmp_path, three_domains(8), **options)
    recipe = trainer.domain_weights.recipe
    assert (recipe["self_term"], recipe["score_metric"], recipe["mu"]) == ("independent", "optimizer", 3.0)
    assert "score_metric" not in DoGEConfig(str(tmp_path), recipe="paper").get_recipe().to_dict()
    assert DoGEConfig(str(tmp_path), recipe="doge_plus", self_term="same").get_recipe().self_term is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_term": "independent", "normalization": "cosine"}, "`normalization` must be 'none', but got 'cosine'"),
        ({"self_term": "independent", "recipe": "official"}, "`domain_max_grad_norm` must be 0, but got 1.0"),
        (
            {"score_metric": "optimizer", "self_term": "none"},
            "`self_term` must be 'independent' or 'same', but got 'none'",
        ),
        ({"self_term": "half"}, "`self_term` must be True, False or one of"),
        ({"score_metric": "adam"}, r"`score_metric` must be one of \['gradient', 'optimizer'\], but got 'adam'"),
    ],
)
def test_ingredients_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DoGEConfig(str(tmp_path), **options)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_an_optimizer_without_second_moments_is_refused(tmp_path, optim):
    for recipe in ({"score_metric": "optimizer"}, {"recipe": "doge_plus"}):
        with pytest.raises(ValueError, match=f"keep, but `optim` is '{optim}'.*or `recipe='paper'`"):
            learn(tmp_path, three_domains(4), optim=optim, **recipe)


def test_an_optimizer_of_ones_own_without_second_moments_is_refused(tmp_path):
    model = tiny_llama()
    args = DoGEConfig(str(tmp_path), **{**OPTIONS, "optim": "adamw_torch"}, score_metric="optimizer")
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = DoGETrainer(model, args, train_dataset=three_domains(4), optimizers=(own, None))
    with pytest.raises(ValueError, match="the optimizer SGD keeps none of that kind"):
        trainer.train()


class OwnStep(torch.optim.Adam):
    """Adam by name, and another optimizer."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(("make", "num_told"), [(OwnStep, 1), (torch.optim.RAdam, 0), (torch.optim.NAdam, 0)])
def test_an_optimizer_that_may_step_otherwise_than_adam_is_told_once(tmp_path, make, num_told, recwarn):
    model = tiny_llama()
    args = DoGEConfig(str(tmp_path), **{**OPTIONS, "max_steps": 3}, score_metric="optimizer")
    own = make(model.parameters(), lr=0.1)
    trainer = DoGETrainer(model, args, train_dataset=three_domains(4), optimizers=(own, None))
    trainer.train()
    told = [one for one in recwarn if "`exp_avg_sq` for the second moments of Adam" in str(one.message)]
    assert len(told) == num_told


def test_too_few_examples_for_two_halves_are_refused(tmp_path):
    options = {"self_term": "independent", "per_device_train_batch_size": 5}
    with pytest.raises(ValueError, match="Every step must hold two examples of every domain"):
        learn(tmp_path, three_domains(4), **options)
