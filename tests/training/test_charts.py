"""One chart for all domains in TensorBoard: read from the event file that a training writes."""

import pickle
import re
import struct

import pytest
from transformers import Trainer, TrainerCallback

from hf_doge.training.charts import GroupedChartsCallback
from hf_doge.training.config import DoGEConfig
from hf_doge.training.metrics_callback import DomainMetricsCallback
from hf_doge.training.mixture import DomainWeightedTrainer
from hf_doge.training.trainer import DoGETrainer
from tests.one_layer import tiny_llama
from tests.tiny import three_domains
from tests.training.metrics_processes import WEIGHTS, arguments, labelled

tensorboardX = pytest.importorskip("tensorboardX")


def make(kind, folder, **options):
    settings = {"report_to": "tensorboard", "max_steps": 2, "logging_steps": 1, **options}
    if kind == "callback":
        trainer = Trainer(tiny_llama(), arguments(folder, **settings), train_dataset=labelled())
        trainer.add_callback(DomainMetricsCallback(trainer))
        return trainer
    if kind == "learning":
        return DoGETrainer(
            tiny_llama(), arguments(folder, DoGEConfig, **settings, recipe="paper"), train_dataset=three_domains(8)
        )
    return DomainWeightedTrainer(
        tiny_llama(), arguments(folder, **settings), train_dataset=three_domains(8), domain_weights=WEIGHTS
    )


def read_events(folder):
    """What the only event file holds: records of a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.rglob("events.out.tfevents*")
    data, place, events = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 12 + length + 4
    return events


def layouts_and_tags(folder):
    """The layouts of charts, and the tags of numbers."""
    from tensorboardX.proto.layout_pb2 import Layout

    values = [value for event in read_events(folder) for value in event.summary.value]
    layouts = [Layout.FromString(v.tensor.string_val[0]) for v in values if v.tag == "custom_scalars__config__"]
    return layouts, {value.tag for value in values if value.HasField("simple_value")}


@pytest.mark.parametrize(
    ("kind", "titles"),
    [
        ("weighted", {"Losses": "loss", "Shares of the examples": "share", "Epochs": "epochs"}),
        ("callback", {"Losses": "loss", "Shares of the examples": "share", "Epochs": "epochs"}),
        ("learning", {"Weights": "weight", "Losses": "loss", "Scores": "score", "Epochs": "epochs"}),
    ],
)
def test_tensorboard_shows_all_domains_in_one_chart(tmp_path, kind, titles):
    make(kind, tmp_path).train()
    (layout,), tags = layouts_and_tags(tmp_path)  # TensorBoard looks at the first of a run
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert category.title == "Domains"
    assert charts.keys() == titles.keys()
    for title, kind_of_metric in titles.items():
        (pattern,) = charts[title]
        shown = {tag for tag in tags if re.match(pattern, tag)}  # as TensorBoard looks for them
        assert shown == {f"train/domain_{kind_of_metric}/{name}" for name in WEIGHTS}


def test_nothing_is_laid_out_where_nothing_is_reported(tmp_path):
    make("weighted", tmp_path, report_to="none").train()
    assert not list(tmp_path.rglob("events.out*"))


def test_a_trainer_that_trains_again_lays_out_the_charts_of_its_next_run(tmp_path):
    trainer = make("weighted", tmp_path / "first")
    trainer.train()
    trainer.args.output_dir = str(tmp_path / "second")
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "logging_dir"):
            callback.logging_dir = None
    trainer.train()
    assert [len(layouts_and_tags(tmp_path / name)[0]) for name in ("first", "second")] == [1, 1]


def test_the_callback_is_pickled_with_its_trainer_as_a_search_over_processes_does():
    trainer = TrainerCallback()  # anything that can be pickled
    callback, found = pickle.loads(pickle.dumps((GroupedChartsCallback(trainer, ("domain_loss",)), trainer)))
    assert callback._trainer() is found
