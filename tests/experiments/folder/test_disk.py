"""Full, read-only and vanishing file systems: one line, and what was written before stays whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.folder.atomic import write_atomically
from experiments.folder.checkpoint import CHECKPOINT, load_checkpoint
from experiments.folder.lock import holder
from experiments.folder.read import read_config, read_metrics, read_summary
from experiments.run import main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path("results/configs/tiny")
BATCHES = 3  # of the tiny config's epoch: 40, 40 and 20 examples


def numbers(folder):
    """The text of metrics.csv without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def assert_one_line(text, reason):
    assert text == f"error: {TINY}: cannot write the run here: {reason}; choose another --output\n"


# --- files that grow too large ------------------------------------------------------------------------------------

LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
"""


def test_a_checkpoint_that_does_not_fit_leaves_the_former_one(write_config, run_until, start):
    path = str(write_config(epochs=4))
    assert main([path, "--output", "whole"]) == 0
    assert run_until(BATCHES + 1, [path]) == 143
    before = (TINY / CHECKPOINT).read_bytes()
    process = start("experiments.run", path, before=LIMIT.format(bytes=len(before) // 2))
    assert process.wait() == 2
    assert process.output == "tiny: under way, epoch 1/4\n"
    assert_one_line(process.errors, "File too large")
    assert (TINY / CHECKPOINT).read_bytes() == before
    assert numbers(TINY) == numbers(Path("whole"))[: 2 + 2]  # the next epoch, too, is recorded
    assert read_config(TINY) == load_config(path)
    assert not list(TINY.glob("*.tmp"))
    assert holder(TINY) is None

    assert main([path]) == 0
    assert numbers(TINY) == numbers(Path("whole"))
    assert read_summary(TINY)["test_loss"] == read_summary(Path("whole"))["test_loss"]


def test_the_first_checkpoint_may_not_fit_either(write_config, start):
    path = write_config(epochs=4)
    process = start("experiments.run", path, before=LIMIT.format(bytes=20_000))
    assert process.wait() == 2
    assert_one_line(process.errors, "File too large")
    assert sorted(file.name for file in TINY.iterdir()) == [".lock", "config.yaml", "metrics.csv"]
    assert read_metrics(TINY)["epoch"].tolist() == [0, 1]
    assert read_config(TINY) == load_config(path)


def test_metrics_that_do_not_fit_leave_the_rows_before(write_config, start):
    path = write_config(epochs=50, checkpoint_every=50, data={"name": "digits", "train_samples": 20})
    process = start("experiments.run", path, before=LIMIT.format(bytes=700))
    assert process.wait() == 2
    assert_one_line(process.errors, "File too large")
    text = (TINY / "metrics.csv").read_text()
    assert text.endswith("\n")
    assert 700 - 150 < len(text) <= 700
    assert read_metrics(TINY)["epoch"].tolist() == list(range(text.count("\n") - 1))
    assert main([str(path)]) == 0
    assert len(read_metrics(TINY)) == 51


def test_a_config_that_does_not_fit_is_known_before_training(write_config, start):
    process = start("experiments.run", write_config(), before=LIMIT.format(bytes=300))
    assert process.wait() == 2
    assert_one_line(process.errors, "File too large")
    assert sorted(file.name for file in TINY.iterdir()) == [".lock"]


def test_a_checkpoint_that_does_not_fit_when_a_signal_comes(write_config, run_until, monkeypatch, capsys):
    """The error is told; the signal is obeyed all the same."""

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("experiments.folder.checkpoint.torch.save", full)
    assert run_until(2, [str(write_config())]) == 2
    assert_one_line(capsys.readouterr().err, "No space left on device")
    assert read_metrics(TINY)["epoch"].tolist() == [0]


@pytest.mark.parametrize("kibibytes", [2, 20])
def test_events_that_do_not_fit_are_one_line(write_config, start, kibibytes):
    pytest.importorskip("tensorboard")
    path = write_config(
        epochs=300, checkpoint_every=300, tensorboard=True, data={"name": "digits", "train_samples": 20}
    )
    process = start("experiments.run", path, before=LIMIT.format(bytes=1024 * kibibytes))
    assert process.wait() == 2
    assert process.errors.count("\n") == 1, process.errors
    assert_one_line(process.errors, "File too large")
    assert read_metrics(TINY)["epoch"].tolist() == list(range(len(read_metrics(TINY))))


# --- a small file system ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(write_config, tmp_path):
    """The function that (re)mounts a file system of its own at `results`."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root can mount a file system, and only Linux has tmpfs")
    results = tmp_path / "results"
    results.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(results)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"mount failed: {done.stderr.strip()}")

    mount("size=64k")
    yield mount
    subprocess.run(["umount", "--lazy", str(results)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(small_disk, write_config, capsys):
    path = str(write_config(epochs=4))
    assert main([path, "--output", "whole"]) == 0
    capsys.readouterr()
    assert main([path]) == 2
    out, err = capsys.readouterr()
    assert out == "tiny: under way, epoch 0/4\n"
    assert_one_line(err, "No space left on device")
    assert numbers(TINY) == numbers(Path("whole"))[: 1 + 2]
    assert sorted(file.name for file in TINY.iterdir()) == [".lock", "config.yaml", "metrics.csv"]

    small_disk("remount,ro")
    assert main([path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, "Read-only file system")
    assert holder(TINY) is None

    small_disk("remount,rw,size=10m")
    assert main([path]) == 0
    assert numbers(TINY) == numbers(Path("whole"))


# --- folders that are gone, or not ours ---------------------------------------------------------------------------


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_folder_removed_while_running_is_one_line(write_config, monkeypatch, capsys, tensorboard):
    if tensorboard:
        pytest.importorskip("tensorboard")
    monkeypatch.setattr(
        "experiments.launch.execute.Progress.show",
        lambda self, record, seconds: record.epoch == 1 and shutil.rmtree("results"),
    )
    assert main([str(write_config(epochs=4)), f"tensorboard={tensorboard}".lower()]) == 2
    out, err = capsys.readouterr()
    assert out == "tiny: under way, epoch 0/4\n"
    assert_one_line(err, "No such file or directory")
    assert not TINY.exists()


def test_a_folder_without_permission_is_one_line(write_config, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    Path("results").mkdir(mode=0o500)
    assert main([str(write_config())]) == 2
    assert_one_line(capsys.readouterr().err, "Permission denied")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "summary.json", "checkpoint.pt", ".lock"])
def test_a_folder_in_place_of_a_file_is_one_line(write_config, capsys, name):
    (TINY / name).mkdir(parents=True)
    assert main([str(write_config())]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {TINY}")
    assert err.count("\n") == 1


# --- writing a file whole or not at all ---------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"and two", b""):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_until_it_is_whole_the_old_one_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, ")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"all of it")

    write_atomically(path, write)
    assert path.read_bytes() == b"new, all of it"


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("a bug"), KeyboardInterrupt("now")])
def test_an_error_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new" * 100_000)
        raise error

    with pytest.raises(type(error), match=str(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """Else a power cut could leave the new name with nothing behind it."""
    steps = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr("os.fsync", lambda number: steps.append("sync") or sync(number))
    monkeypatch.setattr(Path, "replace", lambda *paths: steps.append("rename") or replace(*paths))
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert steps == ["sync", "rename"]


def test_a_former_half_written_file_is_no_obstacle(tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"half" * 1000)
    write_atomically(tmp_path / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_written_whole(tmp_path, monkeypatch):
    """An error in the midst of it, whatever it is, leaves what there was before."""
    import torch

    from experiments.folder.checkpoint import save_checkpoint

    save_checkpoint(tmp_path, {"weight": torch.ones(3)})
    with pytest.raises(Exception, match="lambda"):
        save_checkpoint(tmp_path, {"weight": torch.zeros(100_000), "bug": lambda: None})
    assert torch.equal(load_checkpoint(tmp_path)["weight"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
