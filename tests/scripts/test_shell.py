"""The entry scripts, with stand-ins for Python so that nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENTRIES = ["get_data.sh", "paper_experiments.sh", "run_tests.sh", ".ci/run"]

# A Python that claims to have nothing installed; `-m venv` copies it, and `-m pip install` logs a line and does as
# $FAKE_PIP says. With a file `no-pip` beside it, it has none until `-m ensurepip`.
FAKE_PYTHON = """#!/bin/bash
no_pip="$(dirname "$0")/no-pip"
case "$*" in
    *" pip "*) [ ! -e "$no_pip" ] || exit 1 ;;&
    *"pip config list"*) echo "$FAKE_PIP_CONFIG" ;;
    "-m ensurepip") [ {no_ensurepip} = 0 ] && rm "$no_pip" ;;
    *"%d.%d"*) echo {version} ;;
    *"version_info[:2] < "*) exit {too_old} ;;
    *check_environment.py*) echo "torch>=2.6"; exit 1 ;;
    *hashlib*) cksum < "${{@: -1}}" ;;
    *ensurepip*) exit {no_ensurepip} ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    *"pip install"*) [ "$PIP_USER$PIP_TARGET$PIP_PREFIX$PIP_ROOT" = 0 ] || exit 1
        echo pip >> "$FAKE_LOG"; exit "${{FAKE_PIP:-0}}" ;;
esac
"""

# Makes environments without pip.
FAKE_UV = """#!/bin/bash
echo "uv $1" >> "$FAKE_LOG"
case "$1" in
    venv) mkdir -p "${@: -1}/bin" && cp "$(command -v python3)" "${@: -1}/bin/python" && echo > "${@: -1}/bin/no-pip" ;;
    *) exit "${FAKE_UV:-0}" ;;
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


def fake_uv(tmp_path: Path) -> None:
    path = tmp_path / "bin" / "uv"
    path.write_text(FAKE_UV)
    path.chmod(0o755)


def venv_without_pip(checkout: Path, tmp_path: Path) -> None:
    """As `uv venv` makes it."""
    folder = checkout / ".venv" / "bin"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", folder / "python")
    (folder / "no-pip").touch()


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


def log(tmp_path: Path) -> list[str]:
    path = tmp_path / "log"
    return path.read_text().splitlines() if path.exists() else []


def installs(tmp_path: Path) -> int:
    return len(log(tmp_path))


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


def test_pip_is_put_into_an_environment_without_it(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    venv_without_pip(checkout, tmp_path)
    done = use_environment(checkout, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert log(tmp_path) == ["pip"]
    assert not (checkout / ".venv" / "bin" / "no-pip").exists()


def test_an_environment_that_pip_cannot_be_put_into(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, ensurepip=False)
    venv_without_pip(checkout, tmp_path)
    done = use_environment(checkout, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: .venv has no pip, and its Python no ensurepip to get it: remove {checkout}/.venv and run this again\n"
    )
    assert log(tmp_path) == []


@pytest.mark.parametrize("there", [False, True])
def test_uv_installs_where_it_is_on_the_path(checkout: Path, tmp_path: Path, there: bool) -> None:
    fake_python(tmp_path)
    fake_uv(tmp_path)
    if there:
        venv_without_pip(checkout, tmp_path)
    done = use_environment(checkout, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "environment: with uv, which is on PATH\n" in done.stdout
    assert log(tmp_path) == ["uv pip"]
    assert "environment: .venv (3.12)" in use_environment(checkout, tmp_path).stdout
    assert log(tmp_path) == ["uv pip"]


def test_uv_makes_the_environment_where_python_cannot(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path, ensurepip=False)
    fake_uv(tmp_path)
    done = use_environment(checkout, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert log(tmp_path) == ["uv venv", "uv pip"]


def test_pip_installs_what_uv_could_not(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    fake_uv(tmp_path)
    done = use_environment(checkout, tmp_path, FAKE_UV="1")
    assert done.returncode == 0
    assert "environment: uv could not (its message is above); with pip\n" in done.stdout
    assert log(tmp_path) == ["uv pip", "pip"]


@pytest.mark.parametrize("setting", ["global.index-url='https://mirror'", ":env:.find-links='/wheels'"])
def test_pip_installs_where_it_is_told_where_packages_are(checkout: Path, tmp_path: Path, setting: str) -> None:
    fake_python(tmp_path)
    fake_uv(tmp_path)
    assert use_environment(checkout, tmp_path, FAKE_PIP_CONFIG=setting).returncode == 0
    assert log(tmp_path) == ["pip"]


def test_uv_is_not_kept_from_it_by_other_settings_of_pip(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    fake_uv(tmp_path)
    assert use_environment(checkout, tmp_path, FAKE_PIP_CONFIG="global.timeout='60'").returncode == 0
    assert log(tmp_path) == ["uv pip"]


@pytest.mark.parametrize("name", ["PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"])
def test_pip_installs_into_the_environment_whatever_the_users_settings(
    checkout: Path, tmp_path: Path, name: str
) -> None:
    fake_python(tmp_path)
    done = use_environment(checkout, tmp_path, **{name: "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert log(tmp_path) == ["pip"]


def test_python_finds_this_folder_whatever_the_users_settings(checkout: Path) -> None:
    script = f'. "{checkout}/scripts/environment.sh" && cd "$ROOT/.." && exec {sys.executable} -c "import beside"'
    (checkout.parent / "beside.py").write_text("print('found')")
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("found\n", "")


def linked_venv(checkout: Path, tmp_path: Path, python: str | None) -> Path:
    """`.venv` as a link to an environment with this Python, or to nothing."""
    folder = tmp_path / "elsewhere"
    (checkout / ".venv").symlink_to(folder)
    if python is not None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(f'#!/bin/bash\ncase "$*" in\n{python}\nesac\n')
        (folder / "bin" / "python").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("python", "line"),
    [
        (None, "is a link to what has no Python 3.10 or newer: remove the link and run this again"),
        (
            "*version_info*) exit 1 ;;",
            "is a link to what has no Python 3.10 or newer: remove the link and run this again",
        ),
        (
            "*check_environment*) echo torch; exit 1 ;;",
            "is a link to an environment that lacks torch: install that there, or remove the link, and run this again",
        ),
    ],
    ids=["nothing", "old", "lacking"],
)
def test_a_link_to_an_environment_that_does_not_do_is_left_alone(
    checkout: Path, tmp_path: Path, python: str | None, line: str
) -> None:
    fake_python(tmp_path)
    fake_uv(tmp_path)
    folder = linked_venv(checkout, tmp_path, python)
    done = use_environment(checkout, tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {checkout}/.venv {line}\n")
    assert log(tmp_path) == []
    assert (checkout / ".venv").is_symlink()
    assert folder.exists() == (python is not None)


def test_a_link_to_an_environment_that_has_all_is_used(checkout: Path, tmp_path: Path) -> None:
    fake_python(tmp_path)
    linked_venv(checkout, tmp_path, "*%d.%d*) echo 3.11 ;;")
    done = use_environment(checkout, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"PYTHON={checkout}/.venv/bin/python" in done.stdout
    assert log(tmp_path) == []


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_an_output_that_nobody_reads_stops_nothing(checkout: Path, tmp_path: Path, redirection: str) -> None:
    fake_python(tmp_path)
    use_environment(checkout, tmp_path)
    script = f"trap '' PIPE; . '{checkout}/scripts/environment.sh'; use_environment dev && exit 7"
    done = subprocess.run(
        ["bash", "-c", f"""bash -c '{script.replace("'", '"')}' {redirection}; exit "${{PIPESTATUS[0]}}" """],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (7, "")


# --- other ways to start them -------------------------------------------------------------------------------------

SCRIPTS = ENTRIES[:3]


def started(command: list[str | Path], folder: Path, **variables: str):
    return subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.fixture
def entries(checkout: Path, tmp_path: Path, root: Path) -> Path:
    """A checkout whose scripts get as far as a stand-in for Python, which says where it was started."""
    for name in SCRIPTS:
        shutil.copy(root / name, checkout / name)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\ncase "$*" in *%d.%d*) echo 3.12 ;; *"version_info[:2] < "*) ;;\n'
                      '*check_environment*) ;; *) echo "$PWD: $*" ;; esac\n')  # fmt: skip
    python.chmod(0o755)
    return checkout


@pytest.mark.parametrize("shell", [[], ["bash"], ["sh"], ["bash", "--posix"]])
@pytest.mark.parametrize("where", ["here", "by path", "by symlink", "by two symlinks"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_the_same_however_it_is_started(
    entries: Path, tmp_path: Path, name: str, where: str, shell: list[str]
) -> None:
    folder, script = entries, f"./{name}"
    if where != "here":
        folder, script = tmp_path, str(entries / name)
    if "symlink" in where:
        script = "./link"
        (tmp_path / "link").symlink_to(f"a checkout/{name}")
    if where == "by two symlinks":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "link").symlink_to("../link")
        folder = tmp_path / "elsewhere"
    options, line = {
        "get_data.sh": (["--from", "a b"], "{folder}: {root}/scripts/get_data.py --from a b"),
        "paper_experiments.sh": (["--quick"], "wrote the runs to {root}/results/local and the figures to {root}/paper"),
        "run_tests.sh": (["-k", "a b"], "{root}: -m pytest -k a b"),
    }[name]
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CDPATH": f"{tmp_path}:{entries}:/usr",
                 "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}  # fmt: skip
    done = started([*shell, script, *options], folder, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    expected = line.format(folder=folder, root=entries)
    assert any(said.startswith(expected) for said in done.stdout.splitlines())


def test_what_the_papers_suite_runs(entries: Path, root: Path, tmp_path: Path) -> None:
    """ProxProp, then each BackProp as long as the longest curve of its figure; a tilde is left to the commands."""
    shutil.copytree(root / "configs", entries / "configs")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    done = started(["./paper_experiments.sh", "data.root=~/d", "--output", "~/runs"], entries, **variables)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix(f"{entries}: ") for line in done.stdout.splitlines()]
    check, data, proxprop, *baselines, figures, last = lines[1:]
    assert data == f"{entries}/scripts/get_data.py --data ~/d"
    names = [f"configs/paper/{name}.yaml" for name in ("convnet_adam_cg10", "convnet_adam_cg3", "mlp_sgd_cg10",
             "mlp_sgd_cg3", "mlp_sgd_cg5", "mlp_sgd_exact")]  # fmt: skip
    names += ["configs/paper_published", "configs/paper_text/convnet_text_adam_cg10.yaml"]
    names += ["configs/paper_text/convnet_text_adam_cg3.yaml", "configs/paper_text_published"]
    assert proxprop == f"-m experiments.sweep {' '.join(names)} data.root=~/d --output ~/runs"
    assert check.startswith("-m experiments.sweep --check configs/paper/convnet_adam_cg10.yaml ")
    assert "configs/paper/mlp_sgd_gradient.yaml" in check
    expected = [("paper", "convnet_adam"), ("paper", "mlp_sgd"), ("paper_text", "convnet_text_adam")]
    for line, (folder, name) in zip(baselines, expected, strict=True):
        # The stand-in prints what it was called with, which here is the limit.
        limit = f"{entries}: scripts/longest_curve.py ~/runs/{folder} {name}_gradient"
        config = f"configs/{folder}/{name}_gradient.yaml"
        assert line == f"-m experiments.sweep {config} time_limit={limit} data.root=~/d --output ~/runs"
    assert figures == (
        "scripts/plot_paper.py ~/runs/paper ~/runs/paper_text --published ~/runs/paper_published "
        "~/runs/paper_text_published --output paper_plots.pdf"
    )
    assert last == f"wrote the runs to ~/runs and the figures to {entries}/paper_plots.pdf"


def test_everything_is_table_1_and_long_baselines_too(entries: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "configs", entries / "configs")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    done = started(["./paper_experiments.sh", "--everything", "--output", "/r"], entries, **variables)
    assert done.returncode == 0, done.stderr
    sweeps = [line for line in done.stdout.splitlines() if "experiments.sweep" in line]
    assert len(sweeps) == 2  # a check, and the runs
    assert "configs/paper/mlp_sgd_gradient.yaml" in sweeps[1]
    assert "configs/sweeps/table1.yaml --output /r" in sweeps[1]
    assert "time_limit" not in done.stdout
    assert "--table1 /r/table1 --output paper_plots.pdf" in done.stdout


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", "> /dev/full"])
def test_the_papers_runs_go_on_whatever_becomes_of_the_output(entries: Path, tmp_path: Path, redirection: str) -> None:
    python = tmp_path / "bin" / "python3"
    python.write_text(python.read_text().replace('echo "$PWD: $*"', f'echo "$*" >> "{tmp_path}/log"'))
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    command = f'./paper_experiments.sh --quick {redirection}; exit "${{PIPESTATUS[0]}}"'
    done = started(["bash", "-c", command], entries, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert log(tmp_path)[-1].startswith("scripts/plot_paper.py ")


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
