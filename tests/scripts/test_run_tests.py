"""run_tests.sh, with a stand-in for Python that has all packages and writes down what it is asked to do."""

import subprocess
from pathlib import Path

import pytest

PYTHON = """#!/bin/bash
case "$*" in
    *"%d.%d"*) echo 3.12 ;;
    "-m pytest"*) echo "$OMP_NUM_THREADS threads: $*" >> "$ASKED" ;;
esac
"""


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
    (tmp_path / "scripts").mkdir()
    for name in ("run_tests.sh", "scripts/environment.sh"):
        (tmp_path / name).write_text((root / name).read_text())
    python = tmp_path / "active" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": str(python.parents[1]), "ASKED": str(tmp_path / "asked")}
    subprocess.run(["bash", tmp_path / "run_tests.sh", *arguments], env=environment, capture_output=True, check=True)
    assert (tmp_path / "asked").read_text() == f"1 threads: -m pytest {asked}\n"
