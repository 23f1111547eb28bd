"""run_tests.sh, with a stand-in for Python that has all packages and writes down what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = """#!/bin/bash
case "$*" in
    *"%d.%d"*) echo 3.12 ;;
    "-m "*) echo "$OMP_NUM_THREADS threads: $*" >> "$ASKED" ;;&
    "-m ${FAILS:-nothing}"*) echo "$FAILS: wrong"; exit 3 ;;
esac
"""


def run_tests(root: Path, tmp_path: Path, arguments: list[str], fails: str = ""):
    """run_tests.sh in the folder `tmp_path`, where one of the tools may fail."""
    (tmp_path / "scripts").mkdir()
    for name in ("run_tests.sh", "scripts/environment.sh"):
        (tmp_path / name).write_text((root / name).read_text())
    python = tmp_path / "active" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": str(python.parents[1]), "ASKED": str(tmp_path / "asked")}
    command = ["bash", tmp_path / "run_tests.sh", *arguments]
    return subprocess.run(command, env=environment | {"FAILS": fails}, capture_output=True, text=True)


def asked_of_python(tmp_path: Path, tool: str) -> list[str]:
    """What it is asked to do with one of the tools."""
    return [line for line in (tmp_path / "asked").read_text().splitlines() if f" -m {tool} " in line]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], "-n auto --maxprocesses 4 --dist worksteal"),
        (["-k", "a or b"], "-k a or b"),  # no workers to start for a few tests
        (["-n", "2"], "-n 2"),
    ],
)
def test_all_run_side_by_side_and_a_selection_in_one_process(
    root: Path, tmp_path: Path, arguments: list[str], asked: str
) -> None:
    assert run_tests(root, tmp_path, arguments).returncode == 0
    assert asked_of_python(tmp_path, "pytest") == [f"1 threads: -m pytest {asked}"]
    assert len(asked_of_python(tmp_path, "mypy")) == 1


@pytest.mark.parametrize("fails", ["ruff", "mypy", "pytest"])
def test_each_failure_is_shown_and_counts(root: Path, tmp_path: Path, fails: str) -> None:
    done = run_tests(root, tmp_path, [], fails)
    assert done.returncode == 3
    assert f"{fails}: wrong\n" in done.stdout


@pytest.mark.parametrize("tracked", [["a.py", "é b.py", "gone.py", "notes.md"], []])
def test_what_git_tracks_is_linted_and_all_where_there_is_no_git(
    root: Path, tmp_path: Path, tracked: list[str]
) -> None:
    for name in (*tracked, "own.py"):
        (tmp_path / name).touch()
    if tracked:
        if shutil.which("git") is None:
            pytest.skip("no git here")
        # No repository around this one, and none of the user's settings.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        for command in (["init", "-q"], ["add", *tracked]):
            subprocess.run(["git", *command], cwd=tmp_path, env=variables, check=True)
        (tmp_path / "gone.py").unlink()
    assert run_tests(root, tmp_path, []).returncode == 0
    checked, formatted = asked_of_python(tmp_path, "ruff")
    files = "a.py é b.py" if tracked else "."
    assert checked.endswith(f"-m ruff check pyproject.toml {files}")
    assert formatted.endswith(f"-m ruff format --check {files}")
