"""
What a reader walks through who follows a call: each function of the package is opened when it is first entered.

    python journeys.py FOLDER

prints for each journey the files that were opened and how often the reader changed from one to another, as one line of
JSON. It needs the Hub of the tests, for the push.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import hf_doge
from hf_doge import DoGEConfig, DoGETrainer, InfluenceIndex, TracInWECallback
from hf_doge.evaluation.influence.experiment import evaluate_small_task
from hf_doge.evaluation.influence.small_models import TrainingRecipe
from hf_doge.evaluation.influence.small_tasks import SmallTask
from tests.artifacts.test_domain_weights import make_weights
from tests.tiny import three_domains, tiny_gpt2
from tests.tracing.influence_tools import classifier, sentences, tokenised, train, wordpiece_tokenizer

PACKAGE = str(Path(hf_doge.__file__).parent)


class Walk:
    """Notes what is opened while it is entered as a context."""

    def __init__(self) -> None:
        self._entered: set[object] = set()
        self.opened: list[str] = []

    def _open_function(self, frame, event, _) -> None:
        code = frame.f_code
        is_named = not code.co_name.startswith("<")  # a lambda or a generator expression is read where it stands
        if event == "call" and is_named and code.co_filename.startswith(PACKAGE) and code not in self._entered:
            self._entered.add(code)
            self.opened.append(code.co_filename.removeprefix(PACKAGE + "/"))

    def __enter__(self) -> "Walk":
        sys.setprofile(self._open_function)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def describe(self) -> dict[str, object]:
        """Files in the order of their first opening, and each change of file."""
        moves = [f"{one} > {other}" for one, other in zip(self.opened, self.opened[1:], strict=False) if one != other]
        return {"files": list(dict.fromkeys(self.opened)), "moves": moves}


def second_call(walk: Walk, call: Callable) -> Callable:
    """`call`, whose second run is noted, so that caches and late imports are none of the way."""
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count != 2:
            return call(*args, **kwargs)
        with walk:
            return call(*args, **kwargs)

    return counted


def training_step(folder: Path) -> Walk:
    walk = Walk()
    args = DoGEConfig(
        folder, recipe="paper", max_steps=3, per_device_train_batch_size=6, alignment="single_pass", report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = DoGETrainer(tiny_gpt2(), args, train_dataset=three_domains(8))
    trainer.training_step = second_call(walk, trainer.training_step)
    trainer.train()
    return walk


def recording_and_search(folder: Path) -> tuple[Walk, Walk]:
    recording, search = Walk(), Walk()
    tokenizer = wordpiece_tokenizer()

    class Noted(TracInWECallback):
        on_save = second_call(recording, TracInWECallback.on_save)

    dataset = tokenised(sentences(24), tokenizer)
    index_folder = train(folder, classifier(tokenizer), tokenizer, dataset, callback=Noted)
    index = InfluenceIndex.from_pretrained(index_folder, cache_dir=folder / "maps")
    text = ["The rocket is winning."]
    index.search(text, top_k=3)
    with search:
        index.search(text, top_k=3)
    return recording, search


def evaluation() -> Walk:
    """What one scorer is worth on a small task, by case deletion."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (24, 6), generator=generator)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    task = SmallTask(data, data, tuple(f"w{number}" for number in range(20)), 2, [""] * 24, [""] * 24)
    options = {"scorers": ["tracin_we"], "ks": [2], "num_points": 2, "num_seeds": 1, "width": 8}
    options["recipe"] = TrainingRecipe(num_epochs=1, checkpoint_epochs=(1,))
    evaluate_small_task(task, "cnn", **options)
    walk = Walk()
    with walk:
        evaluate_small_task(task, "cnn", **options)
    return walk


def push() -> Walk:
    walk = Walk()
    make_weights().push_to_hub("doge/journey")
    with walk:
        make_weights(seed=1).push_to_hub("doge/journey")
    return walk


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    walks = {"training step": training_step(folder / "doge"), "push": push(), "evaluation": evaluation()}
    walks["recording"], walks["search"] = recording_and_search(folder / "index")
    print(json.dumps({name: walk.describe() for name, walk in walks.items()}))
