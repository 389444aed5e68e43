"""What every test shares: no network, one thread, a tiny tokenizer."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest

LONGEST = (
    "training/test_learning_processes.py",
    "cli/test_cli.py",
    "training/test_resume.py",
    "training/test_doge_trainer.py",
    "gradients/test_single_pass.py",
    "hub/test_push_faults.py",
    "tracing/test_tracing_callback_resume.py",
    "artifacts/test_domain_weights.py",
    "training/test_mixture_processes.py",
    "evaluation/test_reproduce.py",
    "tracing/test_influence_index.py",
    "training/test_learning_streams.py",
    "training/test_multi_node.py",
    "tracing/test_tracing_callback.py",
    "tracing/test_tracing_callback_processes.py",
    "training/test_independent_scores.py",
    "training/test_mixture_units.py",
    "hub/test_remote_index.py",
    "evaluation/test_reproduce_tracing.py",
    "training/test_online.py",
    "mixing/test_sweep.py",
    "test_walk.py",
    "training/test_shrinkage.py",
    "tracing/test_tracing_online.py",
    "gradients/test_layer_gradients.py",
    "tracing/test_layers.py",
    "tracing/test_what_is_recorded.py",
    "test_architecture.py",
    "training/test_late_arguments.py",
    "training/test_learning_faults.py",
    "tracing/test_principal_components.py",
    "training/test_packing_processes.py",
    "tracing/test_second_moments.py",
    "hub/test_hub_refusals.py",
    "training/test_domain_metrics.py",
    "gradients/test_embedding_gradients.py",
    "tracing/test_recorder_failures.py",
    "training/test_packing.py",
    "sampling/test_sampler.py",
    "tracing/test_optimizer_metric.py",
    "test_fuzz.py",
    "tracing/test_influence_models.py",
    "gradients/test_fused_head.py",
    "tracing/test_influence_processes.py",
    "hub/test_hub_server.py",
    "artifacts/test_influence_reader.py",
    "training/test_loss_law.py",
    "artifacts/test_influence_growth.py",
    "training/test_undecided.py",
    "cli/test_cli_index_kinds.py",
    "artifacts/test_cards.py",
    "artifacts/test_saving_together.py",
    "tracing/test_tracing_online_processes.py",
    "tracing/test_layer_moments.py",
    "training/test_streaming_processes.py",
    "training/test_mixture.py",
    "artifacts/test_influence_writer.py",
    "hub/test_push_killed.py",
    "tracing/test_auto_metric.py",
    "tracing/test_saved_rates.py",
)


def pytest_configure(config):
    """
    One thread, in the processes that run tests: the one that hands them out to two others needs no torch, and would have
    those wait for the seconds that its import takes.
    """
    hands_out = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish():
    """
    Keep the garbage collector away from what the imports made.

    A Trainer collects garbage at the end of each training; going through the half a million objects of the libraries took
    a third of the time of a short training.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no worker is alone with one of them at the end."""
    rank = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(rank)))


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """
    No test waits for the disk: a process that is killed loses nothing that it has written.

    What must last through a power cut is told by the order of the calls, in `test_power_cut.py`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses a closed file too
        yield


@pytest.fixture
def tokenizer():
    """Thirty-two one-letter words, with padding, mask and end."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()
