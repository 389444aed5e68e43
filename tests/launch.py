"""Starting a script under `accelerate launch`: real processes, gloo, loopback."""

import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from tests.forks import Fork, forks_at, free_port, imported_for

REPOSITORY = Path(__file__).parent.parent


def end_process_group() -> None:
    """
    The last thing that a launched script does.

    A thread of gloo that still lets go of its last work while Python ends is aborted, and the process with it. Its
    threads end with the group, which sharded models hold on to.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def launch_command(script: Path, *arguments: object, num_processes: int) -> list[str]:
    """
    The command line of `accelerate launch` for processes on the CPU.

    `--cpu` would ask for MPI, and starts one process without it; `--multi_gpu` is the way to torch's own launcher, and
    picks gloo where there is no GPU. What it starts asks for forks; `test_multi_node.py` launches interpreters.
    """
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if num_processes > 1:
        launcher += ["--multi_gpu", "--main_process_port", str(free_port())]
    launcher += ["--num_machines", "1", "--no_python", sys.executable, "-IS"]
    return [*launcher, str(REPOSITORY / "tests" / "fork_client.py"), str(script), *map(str, arguments)]


def launch_environment(**changes: str) -> dict[str, str]:
    """One thread a process, no network, this repository's package."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **changes}


def launch(
    script: Path, *arguments: object, num_processes: int = 2, timeout: float = 500, check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """
    Run a script under `accelerate launch` and wait for it.

    Args:
        script (`Path`): What every process runs; its folder of work is the repository.
        arguments: Of the script.
        num_processes (`int`): 1 starts it without a process group.
        timeout (`float`): Seconds after which all processes are killed.
        check (`bool`): Whether to fail, showing the end of the output, if the script does.
        env: Environment variables beside the usual.
    """
    command = launch_command(script, *arguments, num_processes=num_processes)
    with tempfile.TemporaryDirectory() as folder, forks_at(f"{folder}/forks", imported=imported_for(env)):
        process = Fork(command, env=launch_environment(FORKS=f"{folder}/forks", **env))
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.terminate()  # the launcher then ends those that it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
    result = subprocess.CompletedProcess(command, process.returncode, output)
    if check:
        assert result.returncode == 0, result.stdout[-6000:]
    return result


def start_without_launcher(script: Path, *arguments: object, num_processes: int = 2, **env: str) -> list[Fork]:
    """
    The same processes without a launcher, which would end all of them when one dies; by rank, and forked, which is quicker.

    The caller waits for them, and kills those that are left.
    """
    if num_processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
        env["LOCAL_WORLD_SIZE"] = env["WORLD_SIZE"]
    by_rank = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {} for rank in range(num_processes)
    ]
    return [
        Fork([script, *arguments], env=launch_environment(**env, **rank), imported=imported_for(env))
        for rank in by_rank
    ]


def run_processes(script: Path, *arguments: object, num_processes: int = 2, timeout: float = 500, **env: str) -> str:
    """
    What [`launch`] does where nothing depends on the launcher. Their output.

    Each kind of work has one test that goes by `accelerate launch`.
    """
    processes = start_without_launcher(script, *arguments, num_processes=num_processes, **env)
    end = time.monotonic() + timeout
    try:
        while not all(process.poll() == 0 for process in processes):
            failed = any(process.returncode for process in processes)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-6000:] for output in outputs)
    return "".join(outputs)
