"""A push of an index of 200 MB is killed; the next one sends what is missing, and no more."""

import re
import signal
import time

import numpy as np
import pytest
import torch

from hf_doge.gradients.token_rows import TokenRows
from tests.artifacts.influence_rows import examples_table
from tests.hub.handle import HubServer, run_client, start_client
from tests.hub.test_push_processes import titles

NUM_SEGMENTS, ROWS, WIDTH = 8, 98_304, 64  # of 25 MB each
MEGABYTE = 10**6
PUSH = "import sys\nfrom hf_doge.cli import main\nsys.exit(main(['push', *sys.argv[1:]]))"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of 8 examples with 98,304 tokens each, as float32."""
    from hf_doge.artifacts.influence import IndexWriter

    folder = tmp_path_factory.mktemp("large") / "index"
    writer = IndexWriter(
        folder,
        width=WIDTH,
        vocabulary_size=ROWS,
        num_examples=NUM_SEGMENTS,
        dtype="float32",
        max_segment_bytes=ROWS * WIDTH * 4,
    )
    writer.write_examples(examples_table(NUM_SEGMENTS))
    facts = {"step": 1, "epoch": 1.0, "learning_rate": 0.1, "path": "", "model_class": "None", "fingerprint": "0"}
    tokens = torch.arange(ROWS)
    with writer.checkpoint("checkpoint-1", **facts) as checkpoint:
        for example in range(NUM_SEGMENTS):
            rows = torch.from_numpy(np.random.default_rng(example).standard_normal((ROWS, WIDTH), dtype=np.float32))
            checkpoint.add(TokenRows(torch.tensor([0, ROWS]), tokens, rows, False))
        writer.publish(checkpoint)
    writer.close()
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    assert size > 200 * MEGABYTE
    return folder


@pytest.mark.parametrize("xet", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lfs", "xet"])
def test_after_sigkill_the_second_push_uploads_only_the_rest(index, tmp_path, xet):
    upload = ("POST", "/v1/xorbs/") if xet else ("PUT", "/lfs/")
    with HubServer(tmp_path / "hub") as hub:
        total = sum(path.stat().st_size for path in index.rglob("segment-*.parquet"))
        client = start_client(hub, PUSH, index, "doge/large", xet=xet, home=tmp_path / "home")
        hub.wait_for(lambda: hub.bytes_received(upload[1], method=upload[0]) > total * 0.6, timeout=120)
        client.send_signal(signal.SIGKILL)
        client.communicate()
        time.sleep(0.2)
        assert titles(hub, "doge/large")[:-1] == [], "nothing is to be seen of a push that was killed"
        before = hub.bytes_received(upload[1], method=upload[0])
        run_client(hub, PUSH, index, "doge/large", xet=xet, home=tmp_path / "home", timeout=240)
        after = hub.bytes_received(upload[1], method=upload[0])
        print(
            f"killed after {before / MEGABYTE:.0f} MB of {total / MEGABYTE:.0f}, then {(after - before) / MEGABYTE:.0f}"
        )
        # What was on its way when it was killed comes again: of files at a time, or a batch of 64 MiB by xet.
        assert after - total < (100 if xet else 160) * MEGABYTE
        assert after - before < total * 0.7
        assert len(titles(hub, "doge/large")) == 2
        files = {path: content for path, content in hub.files("doge/large").items() if path.startswith("gradients/")}
        assert files == {
            path.relative_to(index).as_posix(): path.read_bytes() for path in (index / "gradients").rglob("*.parquet")
        }
        sent = hub.bytes_received()
        result = run_client(hub, PUSH, index, "doge/large", xet=xet, home=tmp_path / "home")
        assert re.search(r"/datasets/doge/large/commit/[0-9a-f]{40}", result.stdout)
        assert hub.bytes_received() - sent < 0.01 * MEGABYTE, "a repeated push sends nothing"
