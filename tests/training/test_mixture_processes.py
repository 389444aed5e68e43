"""DomainWeightedTrainer and bare loops on two processes: together they train on the stream that one would train on."""

import json
from pathlib import Path

import pytest

from hf_doge.sampling.sampler import DomainWeightedSampler
from tests.launch import launch
from tests.training import mixture_processes
from tests.training.mixture_processes import (
    LAG,
    SIZES,
    WEIGHTS,
    expected_rows,
    interleave,
    skip_if_it_could_not_resume,
    train,
    weights_of_step,
)

pytestmark = pytest.mark.timeout(600)  # processes learn in the setup of the first test that reads what they left
STEPS = 15  # of 4 examples, or 8 with accumulation: two epochs and a half of 24 draws, or five
SETTINGS = {
    "default": {},
    "uneven_workers": {"even_batches": False, "dataloader_num_workers": 2},
    "split": {"split_batches": True},
    "dispatch": {"dispatch_batches": True},
    "split_dispatch_uneven": {"split_batches": True, "dispatch_batches": True, "even_batches": False},
    "persistent_workers": {"dataloader_num_workers": 4, "dataloader_persistent_workers": True},
    "accumulation": {"gradient_accumulation_steps": 2, "use_seedable_sampler": False},
    "split_accumulation": {"gradient_accumulation_steps": 2, "split_batches": True, "dataloader_num_workers": 2},
    "dispatch_accumulation": {"gradient_accumulation_steps": 2, "dispatch_batches": True, "dataloader_num_workers": 2},
}
SAVED_AT = [4, 6]  # inside an epoch, and at its border: of 6 steps or, with accumulation, 3
RESUMED = [
    *((name, 4) for name in SETTINGS),
    *((name, 6) for name in ("default", "dispatch", "accumulation")),
]
ONLINE = {  # 30 steps of an epoch of 58 or, with accumulation, 29
    f"online_{name}": {"changes_weights": True, "scale": 10, "max_steps": 30, **options}
    for name, options in {
        "0_workers": {},
        "4_workers": {"dataloader_num_workers": 4},
        "dispatch": {"dispatch_batches": True, "dataloader_num_workers": 2},
        "split_accumulation": {
            "split_batches": True,
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 2,
            "dataloader_prefetch_factor": 3,
        },
    }.items()
}
LOOPS = {
    "default": {},
    "even_batches_off": {"even_batches": False},
    "split": {"split_batches": True},
    "dispatch": {"dispatch_batches": True},
    "seedable": {"use_seedable_sampler": True},
}
CAPPED = {"trainer_options": {"max_epochs_per_domain": 2.65}}


def step_size(options):
    return 4 * options.get("gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def tell(folder):
    """Everything that two processes are asked to do, in one launch; what they told, by name."""
    train(folder / "one", num_processes=1, max_steps=STEPS, save_at=SAVED_AT)
    plan = []
    runs = {
        name: {"max_steps": STEPS, **options, "folder": str(folder / name)}
        for name, options in {**SETTINGS, **ONLINE}.items()
    }
    plan += [{**run, "name": name, "save_at": SAVED_AT} for name, run in runs.items()]
    for name, step in [*RESUMED, ("online_dispatch", 4)]:
        checkpoint = folder / name / f"checkpoint-{step}"
        plan.append({**runs[name], "name": f"{name}_from_{step}", "resume": str(checkpoint)})
    for name, options in LOOPS.items():
        loop = {**options, "run": "loop", "folder": str(folder)}
        plan.append({**loop, "name": f"loop_{name}"})
        plan.append({**loop, "name": f"loop_{name}_seek", "seek": 32})
        if name != "dispatch":
            plan.append({**loop, "name": f"loop_{name}_skip", "skip": {"epoch": 1, "batches": 2}})
    plan.append({"run": "loop", "name": "loop_with_a_remainder", "folder": str(folder), "num_samples": 22})
    for step in SAVED_AT:
        checkpoint = folder / "one" / f"checkpoint-{step}"
        options = {"folder": str(folder / "one"), "max_steps": STEPS, "resume": str(checkpoint)}
        plan.append({**options, "name": f"one_from_{step}"})
    for name in ("default", "split"):
        plan.append({**CAPPED, **SETTINGS[name], "name": f"capped_{name}", "folder": str(folder), "max_steps": STEPS})
    other = {**WEIGHTS, "code": 0.31}
    apart = {"run": "train_apart", "folder": str(folder), "max_steps": 1}
    plan.append({**apart, "name": "other_weights", "by_rank": [{"weights": WEIGHTS}, {"weights": other}]})
    nearly = {**WEIGHTS, "wiki": 0.5000000000000001}
    plan.append({**apart, "name": "nearly_the_weights", "by_rank": [{"weights": WEIGHTS}, {"weights": nearly}]})
    plan.append({**apart, "name": "other_seeds", "by_rank": [{"seed": 3}, {"seed": 4}]})
    odd = {"folder": str(folder), "max_steps": 1, "split_batches": True, "per_device_train_batch_size": 3}
    plan.append({**odd, "name": "odd_batch"})
    plan.append({**apart, "name": "after_the_refusals", "by_rank": [{}, {}]})
    (folder / "plan.json").write_text(json.dumps(plan))
    launch(Path(mixture_processes.__file__), folder / "plan.json", num_processes=2, timeout=500)
    return {
        entry["name"]: [json.loads((folder / f"{entry['name']}-{rank}.json").read_text()) for rank in range(2)]
        for entry in plan
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_on_the_stream_of_one(tell, name):
    stop = STEPS * step_size(SETTINGS[name])
    assert interleave(tell[name]) == expected_rows(0, stop)


def test_one_process_trains_on_that_stream_too(tmp_path):
    assert interleave([train(tmp_path, num_processes=1, max_steps=STEPS)]) == expected_rows(0, STEPS * 4)


@pytest.mark.parametrize(("name", "step"), RESUMED)
def test_a_resumed_run_goes_on_with_the_next_row(tell, name, step):
    skip_if_it_could_not_resume(tell[f"{name}_from_{step}"])
    size = step_size(SETTINGS[name])
    assert interleave(tell[f"{name}_from_{step}"]) == expected_rows(step * size, STEPS * size)


@pytest.mark.parametrize("step", SAVED_AT)
def test_two_processes_go_on_with_what_one_began(tell, step):
    skip_if_it_could_not_resume(tell[f"one_from_{step}"])
    assert interleave(tell[f"one_from_{step}"]) == expected_rows(step * 4, STEPS * 4)


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize(
    ("name", "options"), [("default", {}), ("split_accumulation", {"gradient_accumulation_steps": 2})]
)
def test_one_process_goes_on_with_what_two_began(tell, folder, tmp_path, name, options, step):
    checkpoint = str(folder / name / f"checkpoint-{step}")
    told = train(tmp_path, num_processes=1, resume=checkpoint, max_steps=STEPS, **options)
    size = step_size(options)
    assert interleave([told]) == expected_rows(step * size, STEPS * size)


@pytest.mark.parametrize("name", SETTINGS)
def test_epochs_of_data_and_of_domains_are_those_of_the_global_batch(tell, name):
    size = step_size(SETTINGS[name])
    sampler = DomainWeightedSampler(SIZES, WEIGHTS, seed=3)
    for told in tell[name]:
        assert told["num_samples"] == 24  # 23 rows, and whole steps
        for step, logged in enumerate(told["domain_epochs"][:STEPS], start=1):
            counts = sampler.domain_counts(step * size)
            assert logged == {domain: counts[domain] / SIZES[domain] for domain in SIZES}


@pytest.mark.parametrize("name", ["default", "split"])
def test_a_cap_on_epochs_is_over_the_whole_run_of_all_processes(tell, name):
    sampler = DomainWeightedSampler(
        SIZES, WEIGHTS, seed=3, num_samples=24, num_epochs=STEPS * 4 / 24, max_epochs_per_domain=2.65
    )
    assert sampler.effective_weights != pytest.approx(WEIGHTS)
    for told in tell[f"capped_{name}"]:
        assert told["effective_weights"] == sampler.effective_weights
        assert max(told["domain_epochs"][-1].values()) <= 2.65 + 1 / 5
    assert interleave(tell[f"capped_{name}"]) == sampler.indices(0, STEPS * 4).tolist()


def changed_stream(start, options):
    size = step_size(options)
    changes = [(step * size + LAG, weights_of_step(step)) for step in range(30)]
    return expected_rows(start * size, 30 * size, scale=10, num_samples=232, changes=changes)


@pytest.mark.parametrize("name", ONLINE)
def test_weights_set_on_the_way_take_effect_at_their_draw_whatever_the_loader(tell, name):
    assert interleave(tell[name]) == changed_stream(0, ONLINE[name])


def test_weights_set_on_the_way_are_in_the_checkpoint(tell):
    skip_if_it_could_not_resume(tell["online_dispatch_from_4"])
    assert interleave(tell["online_dispatch_from_4"]) == changed_stream(4, ONLINE["online_dispatch"])


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_weights_set_on_the_way_take_effect_at_that_draw_on_one_process(tmp_path, num_workers):
    options = {**ONLINE["online_0_workers"], "dataloader_num_workers": num_workers}
    told = train(tmp_path, num_processes=1, **options)
    assert interleave([told]) == changed_stream(0, options)
    assert max(told["leads"]) == told["loader_lead"]


@pytest.mark.parametrize("name", ONLINE)
def test_no_loader_is_further_ahead_than_its_lead(tell, name):
    leads = [max(told["leads"]) for told in tell[name]]
    stated = tell[name][0]["loader_lead"]
    assert max(leads) <= stated <= LAG
    if "dispatch_batches" not in ONLINE[name]:  # which has fewer batches in the making
        assert leads == [stated, stated]


@pytest.mark.parametrize("name", LOOPS)
def test_a_bare_loop_draws_the_stream_of_one_process_and_resumes_by_seek(tell, name):
    assert interleave(tell[f"loop_{name}"]) == expected_rows(0, 60)
    assert interleave(tell[f"loop_{name}_seek"]) == expected_rows(32, 32 + 60)


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "dispatch"])
def test_a_bare_loop_resumes_by_skipping_if_the_sampler_is_told_the_epoch(tell, name):
    assert interleave(tell[f"loop_{name}_skip"]) == expected_rows(32, 32 + 60)


def test_a_loop_whose_epoch_is_not_whole_batches_repeats_its_first_rows(tell):
    rows, drawn = interleave(tell["loop_with_a_remainder"]), expected_rows(0, 44, num_samples=22)
    assert rows[:24] == drawn[:22] + drawn[:2]  # what `even_batches` does, and why the Trainer rounds up
    assert rows[24:48] == drawn[22:] + drawn[22:24]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_weights", "the weight of 'code' is 0.3 on rank 0, 0.30693"),
        ("nearly_the_weights", "the weight of 'wiki' is 0.5 on rank 0, 0.50000000000000"),
        ("other_seeds", "seed is 3 on rank 0, 4 on rank 1"),
    ],
)
def test_processes_that_draw_differently_are_refused_on_all_of_them(tell, name, message):
    for told in tell[name]:
        assert "All processes must draw by the same weights" in told["error"]
        assert message in told["error"]
        assert told["micro_batches"] == []
    assert [told["error"] for told in tell["after_the_refusals"]] == [None, None]


def test_a_batch_that_cannot_be_split_is_refused(tell):
    for told in tell["odd_batch"]:
        assert "must be a multiple of the 2 processes, but it is 3" in told["error"]
