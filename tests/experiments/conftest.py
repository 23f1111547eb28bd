"""Configs that train in a blink, and processes that can be killed."""

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
