"""
Processes that start with the libraries imported: forks of a server that has done nothing else.

A new interpreter spends 5 seconds of CPU on importing torch and transformers before it does anything; a fork of a process
that has imported them spends a tenth of a second. Each fork is a process of its own in all that the tests look at: it has
its own environment, folder of work and output, can be killed, and ends as an interpreter ends.

Two things a fork cannot show, and such tests start an interpreter: what is imported when, and environment variables that a
library reads when it is imported. `BARE` is without any library of Hugging Face for that reason: `HF_ENDPOINT`, `HF_HOME`
and the like are the fork's own. `HUB` has imported them with the endpoint of this process's Hub, and with a home that each
fork finds at a descriptor of its own.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

REPOSITORY = Path(__file__).parent.parent
BARE = (
    *(
        "torch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "torch.export",
        "torch.utils.data",
    ),
    *(
        "numpy",
        "pandas",
        "scipy.optimize",
        "sympy",
        "PIL.ImageOps",
        "pyarrow.parquet",
        "pyarrow.dataset",
        "jinja2",
        "yaml",
    ),
    *("multiprocess", "dill", "psutil", "fsspec", "regex", "safetensors.torch"),
)
FULL = (
    *BARE,
    *("datasets", "accelerate", "peft", "transformers.trainer"),
    *(f"transformers.models.{name}" for name in ("bert.modeling_bert", "gpt2.modeling_gpt2", "llama.modeling_llama")),
    *("tests.tiny", "hf_doge.training.trainer", "hf_doge.training.mixture", "hf_doge.tracing.callback"),
    *("pytest", "trl.trainer.sft_trainer"),
)
HUB = (*FULL, "huggingface_hub.hf_api")
HOME = 250  # the descriptor of the folder `HF_HOME` in forks of `HUB`
_SERVERS: dict[tuple[str, ...], socket.socket] = {}
_PORT_LOCKS = []  # held until this process ends


def free_port() -> int:
    """
    A port that nothing listens on, and that nobody takes before those who are started with it.

    It lies below the ports that Linux and macOS give away by themselves, and its lock keeps the other test processes of
    this machine from it for as long as this one lives.
    """
    folder = Path(tempfile.gettempdir()) / f"hf_doge-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        lock = FileLock(folder / str(port))
        with contextlib.suppress(Timeout, OSError), socket.socket() as probe:
            lock.acquire(timeout=0)
            probe.bind(("", port))
            _PORT_LOCKS.append(lock)
            return port
    raise RuntimeError("None of 100 ports between 20000 and 32000 is free.")


@functools.cache
def hub_port() -> int:
    """Where this process has its Hubs, one after another."""
    return free_port()


def hub_settings() -> dict[str, str]:
    """The variables with which `HUB` has imported the libraries of Hugging Face."""
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub_port()}",
        "HF_HOME": f"/proc/self/fd/{HOME}",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def imported_for(env: dict[str, str]) -> tuple[str, ...]:
    """What processes with these variables beside the usual can share: all that reads them while it is imported reads the same."""
    if not {"HF_ENDPOINT", "HF_HOME"} & env.keys():
        return FULL
    if not ({"HF_ENDPOINT", "HF_HOME"} <= env.keys() and Path("/proc/self/fd").exists()):
        return BARE
    own = {"HF_HOME": "", "HF_TOKEN": ""}  # the token is read when it is used
    read = {name: value for name, value in env.items() if name.startswith("HF_")}
    return HUB if {**read, **own} == {**hub_settings(), **own} else BARE


class Fork:
    """
    A script in a process of its own; what `subprocess.Popen` has of this name behaves alike.

    Args:
        arguments (`list[str]`): A script, `-c` and code, or `-m` and a module; then its arguments.
        env (`dict[str, str]`): The whole environment.
        imported (`tuple[str, ...]`): The modules that it has from the beginning.
        separate_errors (`bool`): Whether standard error is kept apart, as `stderr`; it goes with standard output
            otherwise.
    """

    def __init__(self, arguments, *, env, imported=FULL, separate_errors=False):
        self.args, self.returncode, self._texts = [str(argument) for argument in arguments], None, [b"", b""]
        self._status, status = os.pipe()
        outputs = [os.pipe() for _ in range(1 + separate_errors)]
        self._readers = [
            threading.Thread(target=self._read, args=(number, output[0]), daemon=True)
            for number, output in enumerate(outputs)
        ]
        written = [output[1] for output in outputs]
        request = json.dumps({"arguments": self.args, "env": env}).encode()
        try:
            socket.send_fds(_server(imported), [request], [status, written[0], written[-1]])
        finally:
            for descriptor in (status, *written):
                os.close(descriptor)
        for reader in self._readers:
            reader.start()
        self.pid = struct.unpack("i", os.read(self._status, 4))[0]

    def _read(self, number, descriptor):
        with open(descriptor, "rb") as output:
            while part := output.read1(1 << 16):
                self._texts[number] += part

    @property
    def output(self):
        """What it has written to standard output so far."""
        return self._texts[0].decode()

    def wait(self, timeout=None):
        """The exit status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = struct.unpack("i", os.read(self._status, 4))[0]
            os.close(self._status)
        return self.returncode

    def poll(self):
        """The exit status if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        """What it has written, at its end."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
        texts = [text.decode() for text in self._texts]
        return texts[0], texts[1] if len(self._readers) == 2 else None

    def send_signal(self, number):
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Kill it and what it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def forks_at(address, imported=FULL):
    """Fork for everyone who asks at this address, as `fork_client.py` does."""
    server = _server(imported)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen()
        thread = threading.Thread(target=_pass_on, args=(listener, server), daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _pass_on(listener, server):
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # it was shut down
            return
        with client:
            request, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if request:
            socket.send_fds(server, [request], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _server(imported):
    """The way to a process that has these modules, started if there is none; others are forks of that of `BARE`."""
    if imported not in _SERVERS:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _SERVERS[imported] = ours
        atexit.register(ours.close)
        if imported != BARE:
            with its:
                settings = hub_settings() if imported == HUB else {}
                request = json.dumps({"modules": imported, "settings": settings}).encode()
                socket.send_fds(_server(BARE), [request], [its.fileno()])
            return ours
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(its.fileno()), *imported],
            cwd=REPOSITORY,
            env={**os.environ, **fixed},
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
        )
        its.close()
        atexit.register(lambda: (ours.close(), process.wait()))
    return _SERVERS[imported]


def serve(control):
    """Fork for every request. Returns in each fork, with what it is to run; a server ends with the one who asks."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            control.close()
            sys.exit()
        request = json.loads(message)
        if "modules" in request:
            if os.fork() == 0:
                control.close()
                control = socket.socket(fileno=descriptors[0])
                os.environ.update(request["settings"])
                import_all(request["modules"])
            else:
                os.close(descriptors[0])
            continue
        if os.fork() == 0:  # one that waits for the fork and tells how it ended
            control.close()
            status, output, errors = descriptors
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.write(status, struct.pack("i", os.getpid()))
                os.dup2(output, 1)
                os.dup2(errors, 2)
                for descriptor in {status, output, errors}:
                    os.close(descriptor)
                return request
            os.close(output)
            if errors != output:
                os.close(errors)
            os.write(status, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def run(arguments, env):
    """What an interpreter does with its arguments."""
    if os.environ.get("HF_HOME") == f"/proc/self/fd/{HOME}":
        Path(env["HF_HOME"]).mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(env["HF_HOME"], os.O_RDONLY), HOME)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = ""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def import_all(modules):
    """Import what is installed, and let forks share the pages."""
    with warnings.catch_warnings(action="ignore"):
        for module in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        if "transformers.trainer" in modules:  # what every process works out that saves a model, for .3 seconds
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.freeze()


if __name__ == "__main__":
    import_all(sys.argv[2:])
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    run(**request)
