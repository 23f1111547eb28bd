"""One process at a time writes a run's folder, and a crash locks nobody out."""

import errno
import fcntl
import json
import os
import platform
import signal
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from experiments import show
from experiments.command.errors import RecordError
from experiments.folder.lock import holder, locked
from experiments.folder.read import read_summary
from experiments.run import main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path("results/configs/tiny")


def test_of_two_processes_one_runs_and_a_crash_leaves_no_lock(write_config, start, wait_until, capsys):
    path = write_config(epochs=10**9)
    racers = [start("experiments.run", path) for _ in range(2)]
    wait_until(lambda: any(process.poll() is not None for process in racers))
    (loser,) = [process for process in racers if process.poll() is not None]
    (winner,) = [process for process in racers if process is not loser]
    assert loser.wait() == 2
    assert loser.output == ""
    assert loser.errors.startswith(
        f"error: {TINY}: in use by process {winner.id} on {platform.node()} (since 20"
    )  # and so on
    assert loser.errors.endswith("); wait until it ends, or choose another --output\n")
    assert loser.errors.count("\n") == 1

    # The one that lost has changed nothing; this process cannot have the folder either, not even to replace the run.
    assert holder(TINY).startswith(f"process {winner.id} on ")
    assert json.loads((TINY / ".owner.json").read_text())["process"] == winner.id
    assert main([str(path), "--overwrite"]) == 2
    assert f"in use by process {winner.id} on" in capsys.readouterr().err
    assert winner.poll() is None

    # What it left when it died is stale.
    winner.send(signal.SIGKILL)
    assert winner.wait() == -signal.SIGKILL
    assert (TINY / ".owner.json").exists()
    assert holder(TINY) is None
    assert show.main(["results"]) == 0
    assert "interrupted" in capsys.readouterr().out
    assert main([str(path), "epochs=2", "--overwrite"]) == 0
    assert read_summary(TINY)["status"] == "finished"
    assert not (TINY / ".owner.json").exists()


def test_a_lock_is_held_within_and_free_afterwards(tmp_path):
    assert holder(tmp_path / "missing") is None
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on {platform.node()} (since 20")
        with (
            pytest.raises(RecordError, match=rf"in use by process {os.getpid()} on .*; wait until it ends"),
            locked(tmp_path),
        ):
            pytest.fail("locked twice")
        assert holder(tmp_path)  # still
    assert holder(tmp_path) is None
    with locked(tmp_path):
        pass


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError, match="a bug"), locked(tmp_path):
        raise ZeroDivisionError("a bug")
    assert holder(tmp_path) is None
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("note", [None, "", "{}", "[1]", '{"process": 1}'])
def test_a_holder_without_a_note_is_another_process(tmp_path, note):
    with locked(tmp_path):
        (tmp_path / ".owner.json").unlink()
        if note is not None:
            (tmp_path / ".owner.json").write_text(note)
        assert holder(tmp_path) == "another process"


@pytest.mark.parametrize("left", [".lock", ".owner.json"])
def test_files_alone_are_no_lock(tmp_path, left):
    """As a copy of a running run's folder has them."""
    (tmp_path / left).write_text('{"process": 1, "host": "elsewhere", "since": "2020-01-01"}')
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert f"process {os.getpid()}" in holder(tmp_path)


def test_to_ask_for_the_holder_disturbs_nobody(tmp_path):
    """It takes the lock for a moment, which those who want to hold it sit out."""
    look = FileLock(tmp_path / ".lock", thread_local=False)
    look.acquire()
    threading.Timer(0.2, look.release).start()
    with locked(tmp_path):
        assert not look.is_locked
        assert f"process {os.getpid()}" in holder(tmp_path)


def test_a_folder_that_is_locked_can_be_removed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert holder(folder) is None


# --- file systems without locks -------------------------------------------------------------------------------------


def refuse_locks(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def refused(number):
    """Code for another process on such a file system."""
    return f"import fcntl\ndef flock(*_): raise OSError({number}, os.strerror({number}))\nfcntl.flock = flock"


def test_where_there_are_no_locks_a_file_stands_for_one(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOSYS)
    for _ in range(2):
        with locked(tmp_path):
            assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
            with (
                pytest.raises(RecordError, match=r"in use by process .*, or remove \.lock there if it has ended"),
                locked(tmp_path),
            ):
                pytest.fail("locked twice")
            assert holder(tmp_path)  # still: to ask takes nothing away
        assert holder(tmp_path) is None
        assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_a_crash_locks_nobody_out(write_config, start, wait_until, monkeypatch, capsys):
    path = write_config(epochs=10**9)
    process = start("experiments.run", path, before=refused(errno.ENOSYS))
    wait_until((TINY / ".owner.json").exists)
    refuse_locks(monkeypatch, errno.ENOSYS)
    assert main([str(path)]) == 2
    assert f"in use by process {process.id} on" in capsys.readouterr().err
    assert process.poll() is None
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.errors == ""  # nothing of locks
    assert (TINY / ".lock").exists()
    assert main([str(path), "epochs=2", "--overwrite"]) == 0
    assert holder(TINY) is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks_that_fail_are_one_line_and_not_taken_for_in_use(write_config, monkeypatch, capsys, number):
    refuse_locks(monkeypatch, number)
    assert main([str(write_config())]) == 2
    assert capsys.readouterr().err == (
        f"error: {TINY}: cannot write the run here: {os.strerror(number)}; choose another --output\n"
    )
    assert holder(TINY) is None
