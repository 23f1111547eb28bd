"""Configs that train in a blink, CIFAR-10 files made byte by byte, and processes that can be killed."""

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiments import run
from experiments.launch.progress import Progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write_config(tmp_path, monkeypatch):
    """Write a small, valid config (dotted changes applied) below an own working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name="tiny", folder="configs", **sections) -> Path:
        config = {
            "name": name,
            "model": {"name": "mlp", "hidden_features": [8]},
            "data": {"name": "digits", "train_samples": 100},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "proxprop": {"optimization_mode": "gradient"},
            "epochs": 2,
            "batch_size": 40,
            "device": "cpu",
            **sections,
        }
        path = tmp_path / folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config))
        return path.relative_to(tmp_path)

    return write


@pytest.fixture
def batch_bytes():
    """The function that lays out a batch as the official files do."""
    return official_batch


def official_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A protocol-2 pickle as Python 2 and its numpy wrote it, opcode by opcode.

    Plain pickling under Python 3 would give other opcodes and other globals.
    """

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()  # SHORT_BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)  # BININT

    code = pixels.dtype.str[1:]
    dtype = b"cnumpy\ndtype\n(" + text(code) + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"(" + b"".join(map(number, pixels.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    array += b"(" + number(0) + b"t" + text("b") + b"tR"
    array += b"(" + number(1) + shape + dtype + b"\x89"
    array += b"T" + struct.pack("<I", pixels.nbytes) + pixels.tobytes() + b"tb"
    entries = text("batch_label") + text("training batch 1 of 5")
    entries += text("labels") + b"](" + b"".join(map(number, labels)) + b"e"
    entries += text("data") + array
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture
def one_thread():
    """On small tensors, more threads only wait for each other, above all where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_until(monkeypatch):
    """Run a command line in this process, with signals (by default SIGTERM) after so many minibatches."""

    def main_until(minibatches: int, arguments: list[str], numbers=(signal.SIGTERM,), main=run.main) -> int:
        done, advance = itertools.count(1), Progress.advance

        def signalling(self: Progress, examples: int) -> None:
            advance(self, examples)
            if next(done) == minibatches:
                for number in numbers:
                    signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "advance", signalling)
            return main(arguments)

    return main_until


@pytest.fixture
def wait_until():
    """Wait until a function returns something true, and return that."""

    def wait(condition: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                pytest.fail(f"waited for {seconds} s in vain")
            time.sleep(0.005)
        return value

    return wait


# Importing PyTorch takes seconds, so this process does it once and then splits into others.
_SERVER = """
import json, os, runpy, sys, traceback
import sklearn.datasets, torch._dynamo
import experiments.launch.execute, experiments.launch.processes, experiments.launch.plan
from experiments.folder.environment import git_commit

git_commit()  # remembered
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        process, status = os.waitpid(request["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)
    elif process := os.fork():
        print(process, flush=True)
    else:
        break
else:
    os._exit(0)
os.chdir(request["directory"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(request["output"], start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv = [request["module"], *request["arguments"]]
exec(request["before"])
code = 1
try:
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
os._exit(code)  # taking PyTorch apart takes seconds, too
"""


@pytest.fixture(scope="session")
def ask_server():
    """The function that sends a request to the server of processes and returns its answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout.readline() == "ready\n"

        def ask(**request: Any) -> Any:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask


class StartedProcess:
    """What `python -m MODULE ARGUMENTS` does, in a process of its own."""

    def __init__(self, ask: Callable[..., Any], scratch: Path, module: str, arguments: list[str], before: str) -> None:
        self._ask, self._code = ask, None
        self._output, self._errors = scratch / "output", scratch / "errors"
        self.id = ask(
            module=module,
            arguments=arguments,
            directory=str(Path.cwd()),
            output=[str(self._output), str(self._errors)],
            before=before,
        )

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it, None while it runs."""
        if self._code is None:
            self._code = self._ask(wait=self.id)
        return self._code

    def wait(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                pytest.fail(f"a process has not ended within {seconds} s")
            time.sleep(0.005)
        return code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.id, number)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()


@pytest.fixture
def start(ask_server, tmp_path_factory):
    """Start `python -m MODULE ARGUMENTS` here, after the Python code `before`."""
    started: list[StartedProcess] = []

    def start_process(module: str, *arguments: object, before: str = "") -> StartedProcess:
        scratch = tmp_path_factory.mktemp("process")
        started.append(StartedProcess(ask_server, scratch, module, list(map(str, arguments)), before))
        return started[-1]

    yield start_process
    for process in started:
        process.send(signal.SIGKILL)
        process.wait()
