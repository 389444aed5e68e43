"""The example of several nodes, as it stands: two launchers, each in a network of its own where the machine allows it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_doge.artifacts import DomainWeights
from hf_doge.cli import main
from tests.cli.test_cli import write_data
from tests.launch import REPOSITORY, free_port, launch_environment

pytestmark = pytest.mark.timeout(600)  # processes learn in the setup of the first test that reads what they left
EXAMPLE = REPOSITORY / "examples" / "multi_node"
FLAGS = (
    "--train_tokenizer_vocab 300 --block_size 16 --model_size nano --max_steps 4 --save_steps 2 --disable_tqdm true"
)
ON_CPU = "--use_cpu --ddp_backend gloo --per_device_train_batch_size 6"

# What Slurm's commands do for the script: name the nodes, and start its command once on each of them.
SCONTROL = """#!/bin/bash
printf '%s\\n' {hosts}
"""
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
SLURM_NODEID=0 {node_0} "$@" > {folder}/node-0.log 2>&1 & first=$!
SLURM_NODEID=1 {node_1} "$@" > {folder}/node-1.log 2>&1 & second=$!
status=0
wait $first || status=$?
wait $second || status=$?
exit $status
"""


@contextlib.contextmanager
def two_networks():
    """
    Two network namespaces joined by a cable: for each node what to start a command with, its address and its interface.
    Where the machine allows none, both nodes are on loopback.
    """
    names = [f"hfdoge{os.getpid()}n{node}" for node in (0, 1)]
    addresses = ["10.213.7.1", "10.213.7.2"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        if shutil.which("ip") is None or os.geteuid() != 0:
            yield [("env", "127.0.0.1", "lo")] * 2
            return
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", names[0], "true")
        except subprocess.CalledProcessError:
            yield [("env", "127.0.0.1", "lo")] * 2
            return
        yield [(f"ip netns exec {name}", address, "cable") for name, address in zip(names, addresses, strict=True)]
    finally:
        if shutil.which("ip") is not None:
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def write_executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """
    Folder of a job on two nodes (`job`) and of the same on one process (`alone`), what the nodes printed, and the bytes
    that the first of them sent over the cable, `None` where there was none.
    """
    folder = tmp_path_factory.mktemp("nodes")
    data_dir = write_data(folder / "data")
    commands = folder / "bin"
    commands.mkdir()
    with two_networks() as ((node_0, address, interface), (node_1, other_address, _)):
        write_executable(commands / "scontrol", SCONTROL.format(hosts=f"{address} {other_address}"))
        write_executable(commands / "srun", SRUN.format(node_0=node_0, node_1=node_1, folder=folder))
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
        }
        edited = {
            "DATA_DIR": str(data_dir),
            "OUTPUT_DIR": str(folder / "job"),
            "CONFIG": "two_nodes_cpu.yaml",
            "PROCESSES_PER_NODE": "1",
            "PYTHON": sys.executable,
            "FLAGS": f"{FLAGS} {ON_CPU}",
            "MAIN_PROCESS_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": interface,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        }
        job = subprocess.Popen(
            ["bash", "learn.slurm"],
            cwd=EXAMPLE,
            env=launch_environment(**slurm, **edited),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, _ = job.communicate(timeout=500)
        finally:
            if job.poll() is None:  # SIGTERM, which the launchers pass on to their processes
                os.killpg(job.pid, signal.SIGTERM)
                job.wait(timeout=60)
        sent = None
        if interface != "lo":
            sent = int(
                subprocess.check_output([*node_0.split(), "cat", f"/sys/class/net/{interface}/statistics/tx_bytes"])
            )
    logs = [(folder / f"node-{node}.log").read_text() for node in (0, 1)]
    assert job.returncode == 0, "\n".join([printed, *logs])
    flags = [*FLAGS.split(), "--use_cpu", "--per_device_train_batch_size=6", "--gradient_accumulation_steps=2"]
    assert main(["learn", f"--data_dir={data_dir}", f"--output_dir={folder / 'alone'}", *flags]) == 0
    return folder, logs, sent


def test_two_nodes_learn_what_one_process_learns(learned):
    folder, _, _ = learned
    found, expected = (DomainWeights.from_pretrained(folder / run / "domain_weights") for run in ("job", "alone"))
    assert found.trajectory.steps.tolist() == expected.trajectory.steps.tolist() == [1, 2, 3, 4]
    assert np.abs(expected.trajectory.weights - 1 / 3).max() > 1e-4  # there was something to learn
    for name in ("weights", "losses"):
        np.testing.assert_allclose(getattr(found.trajectory, name), getattr(expected.trajectory, name), rtol=1e-5)


def test_the_nodes_met_over_the_cable_where_the_machine_allows_it(learned):
    """At every step the first node sends the gradients of at least the loss that it differentiated."""
    folder, _, sent = learned
    if sent is None:
        pytest.skip("this machine allows no network namespaces: both nodes were on loopback")
    assert sent > (folder / "job" / "checkpoint-4" / "model.safetensors").stat().st_size


def test_only_the_first_process_prints_and_logs(learned):
    folder, (first, second), _ = learned
    assert first.count(f"Weights: {folder / 'job' / 'domain_weights'}") == 1
    assert first.count("code.train: ") == 1  # it cut the blocks
    for said in ("Weights:", "code.train", "{'loss'"):
        assert said not in second


def test_every_file_is_written_once_and_none_is_left_over(learned):
    folder, _, _ = learned
    files = {path.relative_to(folder / "job") for path in (folder / "job").rglob("*") if path.is_file()}
    alone = {path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*") if path.is_file()}
    of_each_rank = {Path(f"checkpoint-{step}/rng_state{which}.pth") for step in (2, 4) for which in ("", "_0", "_1")}
    assert files - of_each_rank == alone - of_each_rank
    assert len(files & of_each_rank) == 4


@pytest.mark.parametrize(("name", "num_processes"), [("two_nodes_gpu", 16), ("two_nodes_cpu", 2)])
def test_accelerate_reads_the_configurations(name, num_processes):
    config = load_config_from_file(str(EXAMPLE / f"{name}.yaml"))
    assert config.distributed_type == "MULTI_GPU"  # torch's launcher; see the comment in the file
    assert (config.num_machines, config.num_processes, config.rdzv_backend) == (2, num_processes, "static")


def test_the_slurm_script_goes_on_from_a_checkpoint_once_there_is_one(learned, tmp_path):
    folder, _, _ = learned
    write_executable(tmp_path / "scontrol", SCONTROL.format(hosts="node0 node1"))
    write_executable(tmp_path / "srun", '#!/bin/bash\necho "RESUME=$RESUME MAIN=$MAIN_PROCESS_IP N=$NUM_PROCESSES"\n')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    for output_dir, expected in ((tmp_path / "new", ""), (folder / "job", "--resume_from_checkpoint last")):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = launch_environment(PATH=path, OUTPUT_DIR=str(output_dir), **slurm)
        result = subprocess.run(
            ["bash", "learn.slurm"], cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout == f"RESUME={expected} MAIN=node0 N=16\n"
