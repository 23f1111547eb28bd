"""Configs that train in a blink, CIFAR-10 files made byte by byte, and processes that can be killed."""

import itertools
import signal
import struct
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

from . import processes


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

    def wait(condition: Callable[[], Any], seconds: float = processes.PATIENCE) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                pytest.fail(f"waited for {seconds} s in vain")
            time.sleep(0.005)
        return value

    return wait


@pytest.fixture(scope="session")
def ask_server():
    """One server of processes for all tests."""
    with processes.server() as ask:
        yield ask


@pytest.fixture
def start(ask_server, tmp_path_factory):
    """Start `python -m MODULE ARGUMENTS` here, after the Python code `before`."""
    started: list[processes.StartedProcess] = []

    def start_process(module: str, *arguments: object, before: str = "") -> processes.StartedProcess:
        scratch = tmp_path_factory.mktemp("process")
        started.append(processes.StartedProcess(ask_server, scratch, module, list(map(str, arguments)), before))
        return started[-1]

    yield start_process
    for process in started:
        process.send(signal.SIGKILL)
        process.wait()
