"""Runs in other processes, here or as jobs of a cluster, are the same runs; their failures are told one by one."""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.command import interrupts
from experiments.command.errors import Interrupted
from experiments.folder.checkpoint import CHECKPOINT
from experiments.folder.lock import holder
from experiments.folder.read import read_summary
from experiments.launch import cluster, processes
from experiments.launch.board import Board
from experiments.launch.outcome import Outcome
from experiments.launch.plan import plan
from experiments.launch.watch import watch
from experiments.run import main as run_one
from experiments.sweep import main

pytestmark = pytest.mark.usefixtures("one_thread")

OUT = Path("out/configs")
SERIAL = Path("serial/configs")


def numbers(folder):
    """The text of metrics.csv without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def facts(folder):
    """The summary without what is of the time."""
    summary = read_summary(folder)
    return {key: value for key, value in summary.items() if key not in ("seconds", "date")}


@pytest.fixture
def as_here(monkeypatch):
    """Let other processes compute with as many threads as this one, and leave its environment alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


# --- side by side on this machine ---------------------------------------------------------------------------------


def test_side_by_side_is_as_one_after_the_other_whatever_happens_to_some(
    write_config, as_here, wait_until, capsys, monkeypatch
):
    """One run has a file in its way, one is killed, and the others are what they always are.

    What they say is read back, whatever this process is told to print in.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    folder = Path("é/configs")
    optimizer = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
    proxprop = {"optimization_mode": "prox_cg3", "tau_prox": 0.1}
    write_config("a", device="auto", optimizer=optimizer, proxprop=proxprop, epochs=3)
    assert main(["configs", "device=cpu", "--output", "serial"]) == 0
    capsys.readouterr()
    write_config("endless", epochs=10**9)
    write_config("in_the_way")
    folder.mkdir(parents=True)
    (folder / "in_the_way").write_text("")

    def kill():
        owner = folder / "endless" / ".owner.json"
        try:
            wait_until(lambda: owner.exists() and len(numbers_or_none(folder / "endless")) > 2)
        finally:  # it would not end by itself
            os.kill(json.loads(owner.read_text())["process"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code = main(["configs", "--output", "é", "--jobs", "2", "--devices", "cpu"])
    killer.join()
    assert code == 1
    out, err = capsys.readouterr()
    assert sorted(err.splitlines()) == [
        "error: endless: ended by SIGKILL",
        "error: in_the_way: é/configs/in_the_way: cannot write the run here: File exists; choose another --output",
    ]
    assert re.search(r"a: finished, 3 epochs, train loss .* wrote é/configs/a\n", out)
    assert numbers(folder / "a") == numbers(SERIAL / "a")
    assert facts(folder / "a") == facts(SERIAL / "a")
    rows = [line.split()[:2] for line in out.split("\n\n")[-1].splitlines()[1:-1]]
    assert rows == [["configs/a", "finished"], ["configs/endless", "failed"], ["configs/in_the_way", "failed"]]
    assert holder(folder / "endless") is None


def numbers_or_none(folder):
    return numbers(folder) if (folder / "metrics.csv").exists() else []


@pytest.mark.parametrize(
    ("with_state", "line"),
    [
        ("", "0 of 4 runs have ended, 3 were stopped before there was a state to save"),
        ("a", "0 of 4 runs have ended, 1 was stopped with its state saved, 2 were stopped before there was a state to "
              "save"),
        ("abc", "0 of 4 runs have ended, 3 were stopped with their state saved"),
        ("abd", "1 of 4 runs has ended, 2 were stopped with their state saved"),
    ],
)  # fmt: skip
def test_what_is_said_of_runs_that_were_stopped_is_true_of_each(write_config, with_state, line):
    """`d` is a run that ends well while the others are stopped."""

    class Job:
        def __init__(self, run):
            self.run, self._is_stopped = run, False
            if run.config.name == names[2]:
                signal.raise_signal(signal.SIGINT)

        def outcome(self):
            return Outcome(self.run, self.run.config.name != "d", "") if self._is_stopped else None

        def stop(self):
            self._is_stopped = True
            if self.run.config.name in with_state and self.run.config.name != "d":
                self.run.folder.mkdir(parents=True)
                (self.run.folder / CHECKPOINT).touch()

    for name in "abcd":
        write_config(name)
    names = "abdc" if "d" in with_state else "abcd"
    runs = plan([Path(f"configs/{name}.yaml") for name in names], [], Path("out"))
    with interrupts.raised(), pytest.raises(Interrupted, match=f"^{line}; the same command goes on from there$"):
        list(watch(runs, Job, 3))


def test_nothing_to_do_starts_no_process(write_config, monkeypatch, capsys):
    write_config()
    assert main(["configs", "--output", "out"]) == 0
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a process"))
    for how in (["--jobs", "2"], ["--devices", "cpu,cpu"], ["--launcher", "submitit", "--submitit", "cluster=local"]):
        capsys.readouterr()
        assert main(["configs", "--output", "out", *how]) == 0
        assert "tiny: skipped, already in out/configs/tiny" in capsys.readouterr().out


def test_missing_data_is_known_before_any_process_starts(write_config, monkeypatch, capsys):
    write_config(data={"name": "cifar10"})
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a process"))
    for how in (["--jobs", "2"], ["--launcher", "submitit", "--submitit", "cluster=local"]):
        assert main(["configs", *how]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: data/cifar-10-batches-py: no such folder")
        assert err.count("\n") == 1
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--jobs", "-2"], "--jobs must be at least 1, got -2"),
        (["--jobs", "many"], "argument --jobs: invalid int value: 'many'"),
        (["--devices", "nonsense"], "device.*nonsense"),
        (["--devices", "cpu,nonsense"], "device.*nonsense"),
        (["--devices", "cpu,"], "device.*"),
        (["--devices", ""], "device.*"),
        (["--devices", "meta"], "device.*meta"),
        (["--devices", "cuda:x"], "device.*cuda:x"),
        (["--devices", "cuda:٣"], "device.*cuda:٣"),
        (["--devices", "cuda:00"], "device.*cuda:00"),
        (["--devices", "cuda:0"], "device: cuda:0 asked for, but PyTorch sees no CUDA device"),
        (["--launcher", "ship"], "argument --launcher: invalid choice: 'ship'"),
        (["--submitit", "cluster=local"], "--submitit needs --launcher submitit"),
        (["--launcher", "submitit", "--devices", "cpu"], "--devices is for this machine"),
        (["--launcher", "submitit", "--submitit", "local"], "'local': an override has the form key=value"),
        (["--launcher", "submitit", "--submitit", "cluster=mars"], "--submitit: .*mars"),
        (["--launcher", "submitit", "--submitit", "cluster=local", "--submitit", "warp=9"], "--submitit: .*warp"),
        (["--launcher", "submitit", "--submitit", "cluster=local", "--submitit", "timeout_min=x"], "--submitit: "),
        (["--launcher", "submitit", "--submitit", "cluster=[1]"], "--submitit: "),
        (["--launcher", "submitit", "--check", "--submitit", "cluster=mars"], "--submitit: .*mars"),
        (
            ["--launcher", "submitit", "--check", "--submitit", "slurm_partition=gpu"],
            ".*: no SLURM here .*cluster=local",
        ),
    ],
)
def test_options_that_cannot_be_met_are_one_line(write_config, monkeypatch, capsys, arguments, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a process"))
    write_config()
    assert main(["configs", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"error: {line}", err), err
    assert err.count("\n") == 1
    assert not Path("results/configs").exists()


# --- jobs of a cluster --------------------------------------------------------------------------------------------


def test_runs_as_jobs_are_the_same_runs(write_config, as_here, capsys):
    """With submitit's stand-in for a cluster, which is this machine."""
    pytest.importorskip("submitit")
    for name in "ab":
        write_config(name, seed=ord(name))
    assert main(["configs", "--output", "serial"]) == 0
    capsys.readouterr()
    arguments = ["configs", "--output", "out", "--launcher", "submitit"]
    assert main([*arguments, "--submitit", "cluster=local", "--submitit", "timeout_min=20"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in "ab":
        assert f"{name}: finished, 2 epochs, train loss " in out
        assert numbers(OUT / name) == numbers(SERIAL / name)
        assert facts(OUT / name) == facts(SERIAL / name)
    assert len(list(Path("out/submitit").glob("*/*_log.err"))) == 2


def test_a_cluster_that_takes_no_job_says_so_in_one_line(write_config, tmp_path, monkeypatch, capfd):
    pytest.importorskip("submitit")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in [("srun", "exit 0"), ("sbatch", "echo 'sbatch: error: invalid partition: nope' >&2; exit 1")]:
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    write_config()
    arguments = ["configs", "--launcher", "submitit", "--submitit", "cluster=slurm"]
    assert main([*arguments, "--submitit", "slurm_partition=nope"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "error: tiny: cannot be submitted: sbatch: error: invalid partition: nope"
    assert set(lines[:-1]) <= {"sbatch: error: invalid partition: nope"}  # which submitit passes on


@pytest.mark.parametrize("given", [None, "3"])
def test_threads_and_devices_are_shared_out(write_config, monkeypatch, given):
    started = []

    class Popen:
        def __init__(self, command, *, env, **options):
            started.append((command[-1], env["OMP_NUM_THREADS"]))

        def poll(self):
            return 0

    monkeypatch.setattr(processes.subprocess, "Popen", Popen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    runs = plan([write_config()], [], Path("out"), seeds=6)
    assert len(list(processes.launch(runs, 2, ["cuda:0", "cuda:1"]))) == 6
    assert [threads for _, threads in started] == [given or "4"] * 6
    devices = [device for device, _ in started]
    assert devices[:2] == ["device=cuda:0", "device=cuda:1"]
    assert sorted(devices) == ["device=cuda:0"] * 3 + ["device=cuda:1"] * 3


def test_a_job_that_dies_is_told_with_its_log_and_one_that_is_stopped_is_cancelled(tmp_path):
    utils = pytest.importorskip("submitit.core.utils")

    class Died:
        job_id, paths = "17", SimpleNamespace(stderr=tmp_path / "17.err", stdout=tmp_path / "17.out")
        cancelled = None

        def __init__(self, error):
            self.error = error

        def done(self):
            return True

        def result(self):
            raise self.error

        def cancel(self, check):
            Died.cancelled = check

    def text(error):
        outcome = cluster._Job(None, Died(error)).outcome()
        assert outcome.failed
        return outcome.text

    assert text(RuntimeError("the node is gone")) == "job 17: the node is gone"
    Died.paths.stderr.touch()
    Died.paths.stdout.write_text("slurmstepd")
    killed = utils.UncompletedJobError(f"Job 17 has not produced any output\n{'-' * 40}\nslurmstepd\n")
    assert text(killed) == f"job 17: ended without a result (killed?) (its log: {tmp_path}/17.out)"
    Died.paths.stderr.write_text("Traceback")
    frames = "Traceback (most recent call last):\n" + '  File "a.py", line 1\n' * 30
    raised = utils.FailedJobError(f"Job failed with trace:\n------\n{frames}KeyError: 'no'\n\n------\nYou can check")
    assert text(raised) == f"job 17: KeyError: 'no' (its log: {tmp_path}/17.err)"
    cluster._Job(None, Died(None)).stop()
    assert Died.cancelled is False


def test_submitit_that_is_not_installed_is_one_line(write_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)  # importing it fails
    write_config()
    assert main(["configs", "--launcher", "submitit"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: --launcher submitit needs a package that is not installed: pip install submitit\n",
    )


def test_a_job_tells_its_error_and_is_queued_again_to_go_on(write_config, monkeypatch, run_until):
    """What a job does, without a job."""
    pytest.importorskip("submitit")
    path = write_config(epochs=3)
    here = Path.cwd()
    assert run_until(4, [str(path), "--output", "out/configs/tiny"]) == 143
    (run,) = plan([path], [], Path("out"), afresh=True)
    task = cluster._Task(run, here)
    again = task.checkpoint().function
    assert not again.run.afresh  # what was to be replaced has been
    monkeypatch.chdir("/")  # jobs may start anywhere
    before = (here / OUT / "tiny" / "metrics.csv").read_text()
    failed, text = again()
    assert not failed
    assert text.startswith("tiny: finished, 3 epochs")
    assert (here / OUT / "tiny" / "metrics.csv").read_text().startswith(before)

    (run,) = plan([path], [], Path("other"))
    Path("other/configs").mkdir(parents=True)
    Path("other/configs/tiny").write_text("in the way")
    failed, text = cluster._Task(run, here)()
    assert failed
    assert text.startswith("other/configs/tiny: cannot write the run here: File exists")


# --- the live view ------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_how_far_the_runs_are(write_config, run_until, monkeypatch):
    for name in "abc":
        write_config(name, epochs=4)
    assert run_until(7, ["configs/a.yaml"]) == 143  # two epochs and a minibatch
    runs = plan([Path("configs")], [], Path("results"))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Board(runs) as board:
        board.show(runs[:2])
        text = sys.stderr.getvalue()
        assert re.search(r"3 runs:\s+17%.*2/12", text)  # of 3 times 4 epochs
        assert re.search(r"a\s+50%.*2/4 epochs, train loss \d\.\d{4}", text)
        board.ended(Outcome(runs[0], True, ""))
        board.show(runs[1:])
        assert "2/10" in sys.stderr.getvalue()
        board.show([])


def test_no_terminal_gets_a_line_at_each_start_and_one_about_all_each_minute(
    write_config, run_until, monkeypatch, capsys
):
    for name in "abc":
        write_config(name, epochs=4)
    assert run_until(7, ["configs/a.yaml"]) == 143  # two epochs and a minibatch
    runs = plan([Path("configs")], [], Path("results"))
    capsys.readouterr()
    with Board(runs) as board:
        for run in runs[:2]:
            board.started(run)
        board.show(runs[:2])
        assert capsys.readouterr() == ("a: started\nb: started\n", "")
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        board.show(runs[:2])
        board.show(runs[:2])
        assert capsys.readouterr() == ("0 of 3 runs ended, 2 under way: 2/12 epochs\n", "")
        board.ended(Outcome(runs[0], True, ""))  # after two of its four epochs
        board.ended(Outcome(runs[1], False, ""))  # of which nothing is recorded
        monkeypatch.setattr(time, "monotonic", lambda: now + 122)
        board.show(runs[2:])
        assert capsys.readouterr() == ("2 of 3 runs ended (1 failed), 1 under way: 2/6 epochs\n", "")


def test_one_run_says_that_it_is_under_way_and_each_minute_how_far(write_config, run_until, monkeypatch, capsys):
    path = str(write_config(epochs=4))
    assert run_until(7, [path]) == 143  # two epochs and a minibatch
    assert capsys.readouterr().out == "tiny: under way, epoch 0/4\n"
    assert run_one([path]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "tiny: under way, epoch 2/4"
    assert last.startswith("tiny: finished, 4 epochs")

    monkeypatch.setattr("experiments.launch.progress.LINE_SECONDS", 0)
    assert run_one([path, "--overwrite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = ["under way", *(f"epoch {epoch}/4" for epoch in range(4)), "finished"]
    assert all(line.startswith(f"tiny: {start}") for line, start in zip(lines, starts, strict=True))
    assert re.fullmatch(r"tiny: epoch 1/4, train loss \d\.\d{4}, val loss \d\.\d{4}, [\d,]+ images/s", lines[2])
