"""Several processes that train together end in the numbers of one, and tell what happens to them once."""

import contextlib
import random
import re
import signal
import socket
from pathlib import Path

import pytest
import torch

from experiments import show, sweep
from experiments.command.errors import ConfigError, DeviceError
from experiments.command.torchrun import Place
from experiments.config import load_config
from experiments.folder.checkpoint import CHECKPOINT, load_checkpoint
from experiments.folder.read import read_metrics, read_summary
from experiments.folder.write import COLUMNS, RunWriter
from experiments.run import main
from experiments.training.device import resolve_device
from experiments.training.parallel import Processes, check_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path("results/configs/tiny")
SGD = {"name": "sgd", "lr": 2.0, "momentum": 0.5}
ADAM = {"name": "adam", "lr": 0.01}
# Minibatches of 20 and at last 1, of which the second process has nothing.
DATA = {"data": {"name": "digits", "train_samples": 101}, "batch_size": 20}
BATCHES = 6

# What torchrun sets, and what is then done to one of the processes.
PLACE = """
import os
os.environ.update(
    TORCHELASTIC_RUN_ID="test", RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
    MASTER_PORT="{port}"
)
"""
SECOND = "if os.environ['RANK'] == '1':\n"
SIGNAL_ITSELF = """
    import itertools
    from experiments.launch.progress import Progress
    done = itertools.count(1)
    Progress.advance = lambda self, examples: next(done) == {minibatches} and os.kill(os.getpid(), {number})
"""


def proximal(mode):
    return {"proxprop": {"optimization_mode": mode, "tau_prox": 0.1}}


def free_port():
    # Not one that the system gives to whoever asks for any, between now and its use.
    ports = random.Random()
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port := ports.randrange(20_000, 32_000)))
            return port


@pytest.fixture
def run_two(start):
    """Run `experiments.run` in two processes: their exit codes, and their output and errors one after the other."""

    def run(*arguments, before=""):
        place = PLACE.replace("{port}", str(free_port()))
        two = [start("experiments.run", *arguments, before=place.format(rank=rank) + before) for rank in range(2)]
        codes = [process.wait() for process in two]
        return codes, "".join(process.output for process in two), "".join(process.errors for process in two)

    return run


def assert_same_numbers(folder, other, tolerance=1e-4):
    ours, theirs = (read_metrics(Path(one))[COLUMNS[:-1]] for one in (folder, other))
    assert ours.shape == theirs.shape
    for column in ours.columns:
        assert ours[column].tolist() == pytest.approx(theirs[column].tolist(), rel=tolerance, abs=1e-6), column
    ours, theirs = read_summary(Path(folder)), read_summary(Path(other))
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=tolerance)
    assert ours["test_accuracy"] == theirs["test_accuracy"]


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": SGD, **proximal("prox_exact")},
        {"optimizer": ADAM, **proximal("prox_cg3"), "model": {"name": "convnet", "channels": [2, 3, 2]}},
        {"optimizer": ADAM, **proximal("prox_exact")},
        {"optimizer": SGD, **proximal("prox_cg3"), "model": {"name": "convnet", "channels": [2, 3, 2]}},
        {"optimizer": {"name": "sgd", "lr": 0.5}},
    ],
    ids=["sgd-exact", "adam-convnet-cg3", "adam-exact", "sgd-convnet-cg3", "sgd-gradient"],
)
def test_two_processes_end_in_the_numbers_of_one(write_config, run_two, sections):
    path = str(write_config(epochs=3, **DATA, **sections))
    codes, output, errors = run_two(path)
    assert (codes, errors) == ([0, 0], "")
    assert output.count("tiny: under way, ") == 1 == output.count("tiny: finished, 3 epochs, ")
    assert output.count("\n") == 2
    assert main([path, "--output", "one"]) == 0
    assert_same_numbers(TINY, "one")
    losses = read_metrics(TINY)["train_loss"]
    assert abs(losses[3] - losses[0]) > 0.02  # which another step would not have given
    assert (read_summary(TINY)["processes"], read_summary(Path("one"))["processes"]) == (2, 1)
    assert sorted(path.name for path in TINY.iterdir()) == [".lock", "config.yaml", "metrics.csv", "summary.json"]


def test_a_run_goes_on_with_another_number_of_processes(write_config, run_two, run_until, capsys):
    path = str(write_config(epochs=4, **DATA, optimizer=SGD, **proximal("prox_cg3")))
    assert run_until(BATCHES + 2, [path]) == 143
    one = capsys.readouterr().err
    # In the next epoch; the signal comes to the second process alone.
    stop = SECOND + SIGNAL_ITSELF.format(minibatches=BATCHES + 1, number=int(signal.SIGTERM))
    codes, output, two = run_two(path, before=stop)
    assert (sorted(codes), output) == ([0, 143], "tiny: under way, epoch 1/4\n")
    assert one.replace("epoch 1 and 2", "epoch 2 and 3") == two
    training = load_checkpoint(TINY)["training"]
    assert (training["epoch"], training["batch"]) == (2, 3)
    codes, _, errors = run_two(path, "time_limit=1e-9", "min_epochs=3")  # which process 0 decides by its clock
    assert (codes, errors) == ([0, 0], "")
    summary = read_summary(TINY)
    assert (summary["ended_by"], summary["processes"]) == ("time_limit", 2)
    assert [one["processes"] for one in summary["earlier_environments"]] == [1]
    assert main([path, "--output", "one", "time_limit=1e-9", "min_epochs=3"]) == 0
    assert_same_numbers(TINY, "one")


def test_what_two_processes_left_one_goes_on_with(write_config, run_two):
    path = str(write_config(epochs=3, **DATA, optimizer=ADAM, **proximal("prox_exact")))
    stop = SECOND + SIGNAL_ITSELF.format(minibatches=BATCHES + 2, number=int(signal.SIGINT))
    codes, _, errors = run_two(path, before=stop)
    assert sorted(codes) == [0, 130]
    assert errors.startswith("interrupted: tiny: stopped after epoch 1 and 2 minibatches, its state saved")
    assert errors.count("\n") == 1
    assert main([path]) == 0
    assert [one["processes"] for one in read_summary(TINY)["earlier_environments"]] == [2]
    assert main([path, "--output", "one"]) == 0
    assert_same_numbers(TINY, "one")


def test_a_diverged_run_ends_all(write_config, run_two):
    path = str(write_config(epochs=3, **DATA, **proximal("prox_exact")))
    codes, output, errors = run_two(path, "optimizer.lr=1e30")
    assert (codes, errors) == ([0, 0], "")
    assert output.splitlines()[-1].startswith("tiny: diverged, 1 epoch,")


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_error_of_all_is_told_once(write_config, run_two):
    codes, output, errors = run_two(str(write_config(**proximal("published_cg3"))))
    assert (sorted(codes), output) == ([0, 2], "")
    assert errors == (
        "error: proxprop.optimization_mode: published_cg3 has no deferred step, which 2 processes need; allowed here: "
        "prox_exact, prox_cgN, gradient\n"
    )
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("before", "codes", "error"),
    [
        (
            "    import sys\n    sys.modules['sklearn.datasets'] = None",
            [0, 2],
            "error: data.name: digits needs scikit-learn, which is not installed\n",
        ),
        (
            "    import torch\n    torch.__version__ = '9.9'\n",
            [0, 2],
            "error: process 1 has another torch than process 0; all need the same\n",
        ),
        (
            SIGNAL_ITSELF.format(minibatches=2, number=int(signal.SIGKILL)),
            [2, -signal.SIGKILL],
            "error: another process of this run has ended or cannot be reached; what was recorded so far is kept\n",
        ),
    ],
    ids=["data", "versions", "killed"],
)
def test_what_happens_to_one_alone_ends_all_and_is_told_once(write_config, run_two, before, codes, error):
    ended, output, told = run_two(str(write_config(**DATA, epochs=50)), before=SECOND + before)
    assert (ended, told) == (codes, error)
    assert output in ("", "tiny: under way, epoch 0/50\n")
    assert not (TINY / "summary.json").exists()


def test_a_folder_in_use_is_told_once(write_config, run_two):
    with RunWriter(TINY):
        codes, output, errors = run_two(str(write_config()))
    assert (codes, output) == ([2, 0], "")
    assert re.fullmatch(r"error: results/configs/tiny: in use by process \d+ on .*\n", errors)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["compile=default"], "compile: must be none with 2 processes, got default"),
        (["optimizer={name: isaac, lr: 1, damping: 1}"], "optimizer.name: isaac trains in one process, got 2"),
        (["diagnostics_every=2"], "diagnostics_every: must be left out with 2 processes .*, got 2"),
        (["device=cuda:1"], "device: must be auto, cpu or cuda with 2 processes .*, got cuda:1"),
    ],
)
def test_what_several_processes_do_not_do_is_refused(write_config, settings, error):
    config = load_config(write_config(), settings)
    with pytest.raises(ConfigError, match=f"^{error}$"):
        check_parallel(config, Processes(Place(rank=1, local_rank=1, size=2)))
    check_parallel(config, Processes())


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert resolve_device(name, local_rank=1) == torch.device("cuda:1")
        with pytest.raises(DeviceError, match="each process takes a GPU of its own, and there are only 2"):
            resolve_device(name, local_rank=2)
    assert resolve_device("cpu", local_rank=2) == torch.device("cpu")


@pytest.mark.parametrize("command", [sweep.main, show.main])
def test_other_commands_refuse_several_processes(write_config, capsys, monkeypatch, command):
    arguments = [str(write_config())]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert command(arguments) == 2
    error = "error: torchrun started 2 processes; only python -m experiments.run trains in several\n"
    assert capsys.readouterr() == ("", error)
    monkeypatch.setenv("RANK", "1")
    assert command(arguments) == 0  # with another code, torchrun might end the first before it has told why
    assert capsys.readouterr() == ("", "")
    assert not Path("results").exists()


# --- torchrun -----------------------------------------------------------------------------------------------------


def test_torchrun_passes_a_signal_on_and_both_stop_after_the_same_step(write_config, start, wait_until, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = write_config(data={"name": "digits", "train_samples": 100}, batch_size=2, epochs=5000)
    torchrun = ["--standalone", "--nproc_per_node", 2, "-m", "experiments.run", path]
    process = start("torch.distributed.run", *torchrun)
    wait_until(lambda: (TINY / CHECKPOINT).exists() or process.poll() is not None)
    process.send(signal.SIGTERM)
    assert process.wait() != 0  # torchrun's own
    told = re.findall(r"^interrupted: .*$", process.errors, re.MULTILINE)
    assert len(told) == 1, process.errors
    line = re.fullmatch(
        r"interrupted: tiny: stopped after epoch (\d+)(?: and (\d+) minibatch(?:es)?)?, its state saved in "
        r"results/configs/tiny; the same command goes on from there",
        told[0],
    )
    assert line, told
    training = load_checkpoint(TINY)["training"]
    assert (training["epoch"], training["batch"]) == (int(line[1]), int(line[2] or 0))
