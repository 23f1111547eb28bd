"""SIGINT and SIGTERM end a run after the step under way, with its state saved and one line that says how to go on."""

import json
import re
import signal
from pathlib import Path

import pytest

from experiments import sweep
from experiments.command import interrupts
from experiments.command.errors import Interrupted
from experiments.folder.checkpoint import CHECKPOINT, load_checkpoint
from experiments.folder.lock import holder
from experiments.folder.read import read_summary
from experiments.run import main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path("results/configs/tiny")
BATCHES = 3  # of the tiny config's epoch: 40, 40 and 20 examples


def numbers(folder):
    """The text of metrics.csv without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def rows(folder):
    try:
        return len((folder / "metrics.csv").read_text().splitlines())
    except FileNotFoundError:
        return 0


# --- signals from outside -----------------------------------------------------------------------------------------


# Time for a signal from outside to come in the midst of training, however busy the machine is.
SLOWLY = """
import time
from experiments.launch.progress import Progress

advance = Progress.advance

def advance_slowly(self, examples):
    time.sleep(0.05)
    advance(self, examples)

Progress.advance = advance_slowly
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(write_config, start, wait_until, number, code):
    # Epochs of 200 minibatches, so that the signal comes in the middle of one.
    data = {"name": "digits", "train_samples": 400}
    path = write_config(data=data, batch_size=2, epochs=2, optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.9})
    process = start("experiments.run", path, before=SLOWLY)
    wait_until(lambda: rows(TINY) >= 2 or process.poll() is not None)  # the header, and the start
    process.send(number)
    assert process.wait() == code
    assert process.output == "tiny: under way, epoch 0/2\n"
    line = re.fullmatch(
        r"interrupted: tiny: stopped after epoch (\d)(?: and (\d+) minibatch(?:es)?)?, its state saved in "
        r"results/configs/tiny; the same command goes on from there\n",
        process.errors,
    )
    assert line, process.errors
    training = load_checkpoint(TINY)["training"]
    assert (training["epoch"], training["batch"]) == (int(line[1]), int(line[2] or 0))
    assert rows(TINY) == training["epoch"] + 2
    assert not (TINY / "summary.json").exists()
    assert holder(TINY) is None
    assert not list(TINY.glob("*.tmp"))

    assert start("experiments.run", path).wait() == 0
    assert start("experiments.run", path, "--output", "whole").wait() == 0
    assert numbers(TINY) == numbers(Path("whole"))
    assert read_summary(TINY)["test_loss"] == read_summary(Path("whole"))["test_loss"]


# In place of subprocess.Popen: the same process, but with all modules imported already.
FORK = """
import os, runpy, signal, subprocess, sys

class Forked:
    def __init__(self, command, stdout, stderr, env, start_new_session):
        assert command[:3] == [sys.executable, "-m", "experiments.run"]
        self.id, self.code = os.fork(), None
        if self.id:
            return
        if start_new_session:
            os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        os.environ.update(env)
        sys.argv = command[2:]
        code = 1
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.code is None:
            process, status = os.waitpid(self.id, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.id, number)

subprocess.Popen = Forked
"""


def test_a_sweep_side_by_side_stops_its_runs_and_goes_on(write_config, start, wait_until):
    for name in "abc":
        write_config(name, epochs=20)
    assert start("experiments.sweep", "configs", "--output", "whole").wait() == 0

    process = start("experiments.sweep", "configs", "--jobs", 2, before=FORK + SLOWLY)
    folders = [Path("results/configs") / name for name in "abc"]
    wait_until(lambda: all(rows(folder) >= 3 for folder in folders[:2]) or process.poll() is not None)
    children = [json.loads(path.read_text())["process"] for path in Path("results").rglob(".owner.json")]
    process.send(signal.SIGTERM)
    assert process.wait() == 143
    assert len(children) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert process.errors == (
        "interrupted: 0 of 3 runs have ended, 2 were stopped with their state saved; the same command goes on from "
        "there\n"
    )
    for folder in folders[:2]:
        assert (folder / CHECKPOINT).exists()
        assert holder(folder) is None
    assert not folders[2].exists()
    before = [(folder / "metrics.csv").read_text() for folder in folders[:2]]

    assert start("experiments.sweep", "configs", "--jobs", 2, before=FORK).wait() == 0
    for folder in folders:
        assert read_summary(folder)["status"] == "finished"
        assert numbers(folder) == numbers(Path("whole/configs") / folder.name)
    for folder, kept in zip(folders, before, strict=False):
        assert (folder / "metrics.csv").read_text().startswith(kept)


# --- signals at a chosen moment -----------------------------------------------------------------------------------


@pytest.fixture
def expected(write_config):
    """The numbers of the run that nothing interrupts."""
    path = str(write_config(epochs=3))
    assert main([path, "--output", "whole"]) == 0
    return numbers(Path("whole"))


@pytest.mark.parametrize("minibatches", [1, 3, 4, 9])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stops_after_the_minibatch_it_is_in(expected, run_until, capsys, minibatches, number, code):
    epoch, batch = divmod(minibatches, BATCHES)
    if batch == 0:
        epoch, batch = epoch - 1, BATCHES
    capsys.readouterr()
    assert run_until(minibatches, ["configs/tiny.yaml"], [number]) == code
    assert capsys.readouterr() == (
        "tiny: under way, epoch 0/3\n",
        f"interrupted: tiny: stopped after epoch {epoch} and {batch} minibatch{'es' * (batch != 1)}, its state saved "
        f"in {TINY}; the same command goes on from there\n",
    )
    assert numbers(TINY) == expected[: epoch + 2]
    assert main(["configs/tiny.yaml"]) == 0
    assert numbers(TINY) == expected


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_signal_during_an_evaluation_is_not_lost(expected, monkeypatch, capsys, epoch):
    """Not even in that of the last epoch, after which there is only the summary to do."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.launch.execute.Progress.show",
            lambda self, record, seconds: record.epoch == epoch and signal.raise_signal(signal.SIGTERM),
        )
        assert main(["configs/tiny.yaml"]) == 143
    assert f"stopped after epoch {epoch}, its state saved" in capsys.readouterr().err
    assert numbers(TINY) == expected[: epoch + 2]
    assert load_checkpoint(TINY)["training"]["epoch"] == epoch
    assert main(["configs/tiny.yaml"]) == 0
    assert numbers(TINY) == expected
    assert read_summary(TINY)["test_loss"] == read_summary(Path("whole"))["test_loss"]


def test_a_run_can_be_stopped_again_and_again(expected, run_until):
    for _ in range(3 * BATCHES):
        assert run_until(1, ["configs/tiny.yaml"]) == 143
    assert main(["configs/tiny.yaml"]) == 0
    assert numbers(TINY) == expected


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(expected, run_until, monkeypatch, capsys, second):
    """What there is then is the last epoch's checkpoint."""
    monkeypatch.setattr("experiments.command.interrupts._ONE_SIGNAL_SECONDS", 0)
    assert run_until(BATCHES + 2, ["configs/tiny.yaml"], [signal.SIGTERM, second]) == 128 + second
    assert capsys.readouterr().err == "interrupted: the files written so far are kept\n"
    assert load_checkpoint(TINY)["training"]["batch"] == 0
    assert holder(TINY) is None
    assert main(["configs/tiny.yaml"]) == 0
    assert numbers(TINY) == expected


def test_a_signal_passed_on_twice_is_one(expected, run_until, capsys):
    assert run_until(BATCHES + 2, ["configs/tiny.yaml"], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]) == 130
    assert "stopped after epoch 1 and 2 minibatches, its state saved" in capsys.readouterr().err
    assert main(["configs/tiny.yaml"]) == 0
    assert numbers(TINY) == expected


def test_a_signal_before_training_is_one_line(write_config, monkeypatch, capsys):
    monkeypatch.setattr("experiments.run.load", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main([str(write_config())]) == 130
    assert capsys.readouterr() == ("", "interrupted: the files written so far are kept\n")
    assert not Path("results").exists()


def test_handlers_are_put_back(write_config, run_until):
    def handle(number, frame):
        raise AssertionError("not for the project")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert run_until(1, [str(write_config())]) == 143
        assert main([str(write_config())]) == 0
        assert all(signal.getsignal(number) is handle for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_serial_sweep_is_stopped_in_the_run_it_is_in(write_config, run_until, capsys):
    for name in "abc":
        write_config(name)
    assert run_until(2 * BATCHES + 1, ["configs"], [signal.SIGINT], sweep.main) == 130
    assert capsys.readouterr().err.startswith("interrupted: b: stopped after epoch 0 and 1 minibatch, its state saved")
    assert sorted(path.name for path in Path("results/configs").iterdir()) == ["a", "b"]
    assert sweep.main(["configs"]) == 0
    assert sum(read_summary(path)["status"] == "finished" for path in Path("results/configs").iterdir()) == 3


def test_a_signal_that_nobody_asked_for_is_told_at_the_end():
    """As one that comes in the last evaluation: the run is finished, and no other is begun."""
    with pytest.raises(Interrupted, match="what was under way is finished") as caught, interrupts.deferred():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
