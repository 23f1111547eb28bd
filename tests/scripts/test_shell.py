"""The entry scripts, with stand-ins for Python so that nothing is installed."""

import os
import subprocess
from pathlib import Path

import pytest

ENTRIES = ["get_data.sh", "paper_experiments.sh", "run_tests.sh", ".ci/run"]

# A Python of the version $1 that claims to have nothing installed; `-m venv` copies it, and
# `-m pip install` logs a line and does as $FAKE_PIP says.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *"%d.%d"*) echo {version} ;;
    *"version_info[:2] < "*) exit {too_old} ;;
    *check_environment.py*) echo "torch>=2.6"; exit 1 ;;
    *hashlib*) cksum < "${{@: -1}}" ;;
    *ensurepip*) exit {no_ensurepip} ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    *"pip install"*) echo pip >> "$FAKE_LOG"; exit "${{FAKE_PIP:-0}}" ;;
esac
"""


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """What environment.sh needs of the repository, in a folder with a space in its name."""
    copy = tmp_path / "a checkout"
    (copy / "scripts").mkdir(parents=True)
    for name in ("requirements.txt", "scripts/environment.sh", "paper_experiments.sh"):
        (copy / name).write_text((root / name).read_text())
    return copy


def fake_python(tmp_path: Path, name: str = "python3", version: str = "3.12", ensurepip: bool = True) -> None:
    too_old = int(tuple(map(int, version.split("."))) < (3, 10))
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE_PYTHON.format(version=version, too_old=too_old, no_ensurepip=int(not ensurepip)))
    path.chmod(0o755)


def use_environment(checkout: Path, tmp_path: Path, **variables: str):
    """Sources environment.sh from another folder, where PATH has the stand-ins alone."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for tool in ("bash", "cat", "cp", "dirname", "mkdir", "rm", "cksum"):
        link = tmp_path / "bin" / tool
        if not link.exists():
            link.symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
    script = f'set -euo pipefail; . "{checkout}/scripts/environment.sh"; use_environment dev'
    return subprocess.run(
        ["/bin/bash", "-c", f'{script}; echo "PYTHON=$PYTHON"'],
        cwd="/",
        env={"PATH": str(tmp_path / "bin"), "FAKE_LOG": str(tmp_path / "log"), **variables},
        capture_output=True,
        text=True,
    )


def installs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("name", [*ENTRIES, "scripts/environment.sh"])
def test_syntax(name: str, root: Path) -> None:
    subprocess.run(["bash", "-n", root / name], check=True)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_executable(name: str, root: Path) -> None:
    assert os.access(root / name, os.X_OK)


def test_installs_once_and_again_when_the_pins_change(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    first = use_environment(checkout, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "installing requirements.txt into .venv with Python 3.12 (minutes" in first.stdout
    assert f"PYTHON={checkout}/.venv/bin/python" in first.stdout
    second = use_environment(checkout, tmp_path)
    assert "environment: .venv (3.12)" in second.stdout
    assert installs(tmp_path) == 1

    (checkout / "requirements.txt").write_text("torch==9.9\n")
    assert use_environment(checkout, tmp_path).returncode == 0
    assert installs(tmp_path) == 2


def test_a_failed_install_is_done_again(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    failed = use_environment(checkout, tmp_path, FAKE_PIP="1")
    assert failed.returncode == 2
    assert "error: pip could not install requirements.txt" in failed.stderr
    assert use_environment(checkout, tmp_path).returncode == 0
    assert installs(tmp_path) == 2


def test_an_active_environment_that_has_all_is_used(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    active = tmp_path / "active" / "bin" / "python"
    active.parent.mkdir(parents=True)
    active.write_text("#!/bin/bash\ncase \"$*\" in *'%d.%d'*) echo 3.11 ;; esac\n")
    active.chmod(0o755)
    done = use_environment(checkout, tmp_path, VIRTUAL_ENV=str(tmp_path / "active"))
    assert f"PYTHON={active}" in done.stdout
    assert not (checkout / ".venv").exists()


def test_a_newer_python_is_found_behind_an_old_one(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, version="3.8")
    fake_python(tmp_path, name="python3.11", version="3.11")
    assert "with Python 3.11 " in use_environment(checkout, tmp_path).stdout


def test_no_python(checkout: Path, tmp_path: Path) -> None:
    done = use_environment(checkout, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: Python 3.10 or newer is needed; found none on PATH\n"


def test_only_an_old_python(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, version="3.8")
    done = use_environment(checkout, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: Python 3.10 or newer is needed; found python3 is 3.8\n"


def test_a_python_without_ensurepip(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, version="3.11", ensurepip=False)
    done = use_environment(checkout, tmp_path)
    assert done.returncode == 2
    assert "apt install python3.11-venv" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unknown option --fast"),
        (["epochs"], "expected key=value, got 'epochs'"),
        (["--device"], "--device needs a value"),
        (["--output", ""], "--output needs a value"),
        (["--quick", "--seeds"], "--seeds needs a value"),
    ],
)
def test_paper_experiments_names_a_wrong_argument(arguments: list[str], message: str, root: Path) -> None:
    command = [root / "paper_experiments.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}; see ./paper_experiments.sh --help\n"
