"""The table of runs: how each stands, how far it is and what is left, from what the folders hold."""

import signal
from pathlib import Path

import pytest

from experiments import run, sweep
from experiments.command.errors import RecordError
from experiments.config import dump_config, load_config
from experiments.folder.read import find_runs, read_run
from experiments.show import main

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = Path("results/configs")
HEADER = "epoch,minibatch_loss,train_loss,train_accuracy,val_loss,val_accuracy,epoch_seconds"
BATCHES = 3  # of the tiny config's epoch


def table(capsys, folder="results", note=""):
    """The rows by their runs' names, and the line of counts."""
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (err.startswith(note) and err.count("\n") == 1) if note else err == ""
    heading, *lines, counts = out.splitlines()
    assert heading.split() == ["run", "status", "epoch", "train", "loss", "val.", "acc.", "test", "acc.", "s/epoch",
                               "time", "left"]  # fmt: skip
    return {line.split()[0]: line.split()[1:] for line in lines}, counts


def make_up(write_config, name, seconds, epochs, loss=1.0):
    """A run that was broken off, whose epochs took so long each."""
    config = load_config(write_config(name, epochs=epochs))
    folder = RUNS / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    rows = [f"{epoch},1,{loss},0.25,1,0.125,{value}" for epoch, value in enumerate([0, *seconds])]
    (folder / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return folder


def test_a_finished_and_a_diverged_run(write_config, capsys):
    path = str(write_config())
    assert run.main([path]) == 0
    assert run.main([path, "optimizer.lr=1e30", "epochs=9", "--output", str(RUNS / "wild")]) == 0
    capsys.readouterr()
    rows, counts = table(capsys)
    finished, diverged = read_run(RUNS / "tiny"), read_run(RUNS / "wild")
    assert rows["configs/tiny"] == [
        "finished",
        "2/2",
        f"{finished.metrics['train_loss'].iloc[-1]:.4g}",
        f"{finished.metrics['val_accuracy'].iloc[-1]:.2%}",
        f"{finished.summary['test_accuracy']:.2%}",
        f"{finished.metrics['epoch_seconds'].iloc[1:].median():.3g}",
    ]
    assert rows["configs/wild"][:3] == ["diverged", "1/9", "nan"]
    assert (finished.status, diverged.status) == ("finished", "diverged")
    assert finished.seconds_left is None
    assert diverged.seconds_left is None
    assert sorted(counts.split(", ")) == ["1 diverged", "1 finished"]


def test_an_interrupted_run_and_one_without_a_checkpoint(write_config, run_until, capsys):
    assert run_until(BATCHES + 1, [str(write_config(epochs=5))]) == 143
    make_up(write_config, "crashed", [], epochs=7)
    capsys.readouterr()
    rows, counts = table(capsys)
    assert rows["configs/tiny"][:2] == ["interrupted", "1/5"]
    assert rows["configs/crashed"] == ["interrupted", "0/7", "1", "12.50%"]  # no epoch tells how long one takes
    assert counts == "2 interrupted"


def test_a_run_that_another_process_has(write_config, start, wait_until, capsys):
    process = start("experiments.run", write_config(epochs=10**9))
    metrics = RUNS / "tiny" / "metrics.csv"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    rows, counts = table(capsys)
    assert rows["configs/tiny"][0] == "running"
    assert counts == "1 running"
    process.send(signal.SIGKILL)
    process.wait()
    rows, counts = table(capsys)
    assert rows["configs/tiny"][0] == "interrupted"
    assert rows["configs/tiny"][1].endswith("/1000000000")


@pytest.mark.parametrize(
    ("seconds", "epochs", "per_epoch", "left"),
    [
        ([0.5], 3, "0.5", ["1", "s"]),
        ([2, 2], 22, "2", ["40", "s"]),
        ([0.001], 2, "0.001", ["1", "s"]),
        ([100, 2, 2], 33, "2", ["1", "min"]),  # the first epoch may be slow
        ([59.5], 2, "59.5", ["60", "s"]),
        ([30], 6, "30", ["3", "min"]),
        ([61], 2, "61", ["2", "min"]),
        ([1200], 4, "1.2e+03", ["1", "h", "00", "min"]),
        ([1000], 5, "1e+03", ["1", "h", "07", "min"]),
        ([3600], 31, "3.6e+03", ["30", "h", "00", "min"]),
        ([1, 1], 2, "1", ["0", "s"]),  # only the test is left
    ],
)
def test_time_left_goes_by_the_median_epoch(write_config, capsys, seconds, epochs, per_epoch, left):
    make_up(write_config, "a", seconds, epochs)
    rows, _ = table(capsys)
    assert rows["configs/a"] == ["interrupted", f"{len(seconds)}/{epochs}", "1", "12.50%", per_epoch, *left]


def test_a_row_that_is_just_being_copied_is_left_out(write_config, capsys):
    folder = make_up(write_config, "a", [1, 1, 1], epochs=9)
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text[:-4])
    rows, _ = table(capsys)
    assert rows["configs/a"][1] == "2/9"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", ""),
        ("metrics.csv", "rubbish"),
        ("metrics.csv", "a,b\n1,2\n"),
        ("metrics.csv", HEADER + "\nx,y,z,u,v,w,t\n"),
        ("metrics.csv", b"\xff\xfe\n"),
        ("config.yaml", ""),
        ("config.yaml", "name: a\n"),
        ("summary.json", ""),
        ("summary.json", "[1]"),
        ("summary.json", '{"status": "finished"}'),
        ("summary.json", b"\xff\xfe"),
    ],
)
def test_what_cannot_be_read_is_said_in_its_row(write_config, capsys, name, content):
    make_up(write_config, "a", [1], epochs=2)
    folder = make_up(write_config, "b", [1], epochs=2)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, counts = table(capsys, note=f"note: {folder}")
    assert rows == {"configs/a": ["interrupted", "1/2", "1", "12.50%", "1", "1", "s"], "configs/b": ["unreadable"]}
    assert sorted(counts.split(", ")) == ["1 interrupted", "1 unreadable"]
    with pytest.raises(RecordError, match=r"configs/b"):
        read_run(folder)


def test_all_runs_below_a_folder_and_nothing_else(write_config, capsys):
    for name in ("b", "a"):
        make_up(write_config, name, [1], epochs=2)
    (RUNS / "started" / "only").mkdir(parents=True)
    (RUNS / "started" / "config.yaml").write_text("name: started\n")  # its metrics are still to come
    (RUNS / "metrics.csv").write_text("a,b\n1,2\n")  # a table of a user's own
    assert find_runs(Path("results")) == [RUNS / "a", RUNS / "b"]
    assert list(table(capsys)[0]) == ["configs/a", "configs/b"]
    assert list(table(capsys, RUNS)[0]) == ["a", "b"]
    assert list(table(capsys, RUNS / "a")[0]) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none"], "error: none is no folder"),
        (["file"], "error: file is no folder"),
        (["empty"], "error: empty holds no run"),
        (["x" * 300], "error: xxx"),
        ([], "error: the following arguments are required: DIR"),
        (["empty", "more"], "error: unrecognized arguments: more"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_sweep_ends_with_the_table_of_its_runs(write_config, capsys):
    for name in "ab":
        write_config(name)
    Path("out/configs").mkdir(parents=True)
    Path("out/configs/b").write_text("in the way")
    assert sweep.main(["configs", "--output", str(Path("out").absolute())]) == 1
    lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert lines[1].split()[:3] == ["configs/a", "finished", "2/2"]  # relative to the folder asked for
    assert lines[2].split() == ["configs/b", "failed"]
    assert sorted(lines[3].split(", ")) == ["1 failed", "1 finished"]
