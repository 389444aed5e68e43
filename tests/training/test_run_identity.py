"""A resumed run is the run that wrote the checkpoint, also in what no name tells: code, what it captures, frozen weights, rows."""

import json
import re
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from transformers import TrainingArguments, default_data_collator

from hf_doge.training.described_functions import describe_code, describe_function
from hf_doge.training.mixture import DomainWeightedTrainer
from tests.forks import Fork
from tests.launch import launch_environment
from tests.one_layer import tiny_llama
from tests.tiny import three_domains

ARGUMENTS = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3, "report_to": "none"}
WEIGHTS = {"arxiv": 0.5, "books": 0.3, "code": 0.2}


def make(folder, *, data=None, model=None, cls=DomainWeightedTrainer, **options):
    args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **ARGUMENTS)
    data = three_domains(8) if data is None else data
    return cls(model or tiny_llama(), args, train_dataset=data, domain_weights=WEIGHTS, **options)


def mean(logits):
    return logits.float().logsumexp(-1).mean()


def scaled(factor):
    def loss(outputs, labels, num_items_in_batch=None):
        return factor * mean(outputs.logits)

    return loss


def weighted_by(weights):
    return lambda outputs, labels, num_items_in_batch=None: mean(outputs.logits * weights)


def scaled_by(factor, outputs, labels, num_items_in_batch=None):
    return factor * mean(outputs.logits)


def smoothed():
    return [
        lambda outputs, labels, num_items_in_batch=None: mean(outputs.logits),
        lambda outputs, labels, num_items_in_batch=None: mean(outputs.logits) / 2,
    ]


def shifted(by):
    return lambda rows: {**rows, "input_ids": [[(token + by) % 32 for token in row] for row in rows["input_ids"]]}


def transformed(by):
    return {name: rows.with_transform(shifted(by)) for name, rows in three_domains(8).items()}


def masked(column):
    def collate(examples):
        batch = default_data_collator(examples)
        batch["labels"][:, column] = -100
        return batch

    return collate


def longer_row():
    """Of more rows than are sampled, in one that is not."""
    rows = three_domains(4)
    change = rows["books"].map(
        lambda row, number: {name: [*row[name], *[3] * (number == 1)] for name in ("input_ids", "labels")},
        with_indices=True,
    )
    return {**rows, "books": change}


def streams(num_shards):
    def generate(shards, name):
        yield from three_domains(8)[name].to_list()

    return {
        name: IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(num_shards)), "name": name})
        for name in WEIGHTS
    }


CHANGES = {
    "closure": ({"compute_loss_func": scaled(1.0)}, {"compute_loss_func": scaled(0.5)}),
    "class weights": (
        {"compute_loss_func": weighted_by(torch.ones(32))},
        {"compute_loss_func": weighted_by(torch.arange(32.0))},
    ),
    "partial": ({"compute_loss_func": partial(scaled_by, 1.0)}, {"compute_loss_func": partial(scaled_by, 2.0)}),
    "lambda": ({"compute_loss_func": smoothed()[0]}, {"compute_loss_func": smoothed()[1]}),
    "transform": ({"data": transformed(0)}, {"data": transformed(3)}),
    "no transform": ({"data": three_domains(8)}, {"data": transformed(3)}),
    "collator": ({"data_collator": masked(0)}, {"data_collator": masked(1)}),
    "shards": ({"data": streams(1)}, {"data": streams(2)}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_is_refused_by_a_run_that_only_looks_the_same(tmp_path, kind):
    before, after = CHANGES[kind]
    make(tmp_path, **before).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, **before).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="must go on as it began, but the checkpoint"):
        make(tmp_path, **after).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rows_that_no_sample_holds_are_told_by_their_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_doge.training.provenance._NUM_SAMPLED", 2)
    collate = partial(default_data_collator)

    def cut(examples):
        return collate([{name: row[name][:4] for name in ("input_ids", "labels")} for row in examples])

    rows = three_domains(4)
    make(tmp_path, data=rows, data_collator=cut).train()
    with pytest.raises(ValueError, match=re.escape("{'num_tokens': {'books':")):
        make(tmp_path, data=longer_row(), data_collator=cut).train(resume_from_checkpoint=True)


def adapter(seed):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(seed=seed)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_an_adapter_is_not_resumed_over_another_base(tmp_path):
    make(tmp_path, model=adapter(0)).train()
    make(tmp_path, model=adapter(0)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="'frozen_weights': '"):
        make(tmp_path, model=adapter(1)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_an_earlier_version_that_says_none_of_this_still_resumes(tmp_path):
    before, after = {"model": adapter(0), **CHANGES["closure"][0]}, {"model": adapter(1), **CHANGES["closure"][1]}
    make(tmp_path, **before).train()
    file = tmp_path / "checkpoint-2" / "run_identity.json"
    told = json.loads(file.read_text())
    for name in ("num_tokens", "transforms", "code"):
        del told[name]
    del told["model"]["frozen_weights"]
    told["loss"] = {
        name: value for name, value in told["loss"].items() if name in ("compute_loss", "compute_loss_func")
    }
    file.write_text(json.dumps(told))
    make(tmp_path, **after).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def loss_class(factor):
    class Own(DomainWeightedTrainer):
        if factor == 1:

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return model(**inputs).loss

        else:

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return 2 * model(**inputs).loss

    return Own


def test_code_that_has_changed_under_its_name_is_warned_of(tmp_path):
    """It may have been corrected, or told to print something."""
    make(tmp_path, cls=loss_class(1)).train()
    with pytest.warns(UserWarning, match=r"`compute_loss` .*is not what it was when"):
        make(tmp_path, cls=loss_class(2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


SCRIPT = textwrap.dedent(
    '''
    import json, sys
    from functools import partial
    from hf_doge.training.described_functions import describe_function

    def make(factor):
        def loss(outputs, labels):
            """{comment}"""
            # {comment}
            inner = lambda x: x * factor if x in {{"a", "b", "c", "d"}} else None
            return [inner(one) for one in outputs]
        return loss

    print(json.dumps([describe_function(one) for one in (make(2.0), lambda x: x + 1, partial(make, [1, "a"]))]))
    '''
)


def test_the_same_code_is_described_alike_in_another_process_place_and_words(tmp_path):
    found = []
    for number, comment in enumerate(("first", "second")):
        path = tmp_path / f"script{number}.py"
        path.write_text("\n" * number + SCRIPT.format(comment=comment))
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": str(number), "PATH": ""}
        done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]


def test_what_a_function_counts_is_none_of_what_it_is():
    def make():
        count, seen = 0, []

        def collate(examples):
            nonlocal count
            count += 1
            seen.append(examples)
            return examples

        return collate

    collate = make()
    before = describe_function(collate)
    collate([1])
    assert describe_function(collate) == before


def holding(value):
    return lambda rows: (rows, value)[0]


UNREADABLE = {
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(4, device="meta"),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "long number": 10**5000,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_a_function_captures_may_be_anything(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "captured" in describe_function(holding(UNREADABLE[kind]))


def test_large_arrays_texts_and_tuples_are_not_read_whole(tmp_path):
    """A transform may look into a file of tokens that is larger than memory."""
    file = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="w+", shape=(2**33,))  # 16 GB, of holes
    before = describe_function(holding(file))
    file[0] = 7
    assert describe_function(holding(file)) != before
    assert "captured" in describe_function(holding((tuple(range(10**7)), b"a" * 2**24)))


def test_paths_and_devices_in_a_function_may_be_those_of_another_machine():
    def held(*values):
        return describe_function(partial(shifted, *values))

    assert held("/home/me/images", "cuda:1") == held("/data/images", "cpu")
    assert held("/home/me/images") != held("/home/me/others")


def test_a_decorator_of_a_library_is_no_part_of_a_function():
    def loss(outputs, labels, num_items_in_batch=None):
        return mean(outputs.logits)

    for decorated in (torch.no_grad()(loss), torch.compile(loss)):
        assert describe_function(decorated) == describe_function(loss)
        assert describe_code(decorated) == describe_code(loss)


RANKS = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch.distributed as dist
    from hf_doge.training.run_identity import refuse_other_run

    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    refuse_other_run(folder, {"domains": ["a"], "loss": {"name": "loss", "captured": f"rank {rank}"}})
    dist.barrier()
    """
)


def test_a_function_may_capture_the_rank_of_its_process(tmp_path):
    told = {"domains": ["a"], "loss": {"name": "loss", "captured": "rank 0"}}
    (tmp_path / "run_identity.json").write_text(json.dumps(told))
    runs = [Fork(["-c", RANKS, rank, tmp_path], env=launch_environment()) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
