"""stdout and stderr that are closed, full, or of another alphabet: the work is done, with the usual exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import sweep
from experiments.command.cli import run_command
from experiments.folder.read import find_runs, read_summary

ROOT = Path(__file__).resolve().parents[3]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")


def python(code, redirection="", environment=None):
    """What a Python process does with its streams redirected by a shell; the exit code is its own."""
    process = [sys.executable, "-c", f"import os, sys\nfrom experiments.command.cli import run_command\n{code}"]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"', "bash", *process],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )


def command(code, **options):
    return f"def command():\n    {code}\nsys.exit(run_command(command, **{options}))"


MUCH = "print('line\\n' * 100_000)"  # more than a pipe holds


@pytest.mark.parametrize("code", [0, 1, 143])
@pytest.mark.parametrize("redirection", ["| true", "| head -1", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("answers", [False, True])
def test_a_reader_that_has_enough_is_no_error(redirection, code, answers):
    done = python(command(f"{MUCH}; print('more', flush=True); return {code}", answers=answers), redirection)
    assert done.returncode == code
    assert done.stderr == ""


@needs_full
@pytest.mark.parametrize(("answers", "word", "code"), [(False, "note", 0), (True, "error", 2)])
@pytest.mark.parametrize("flush", [False, True])
def test_text_that_is_lost_is_told_and_an_error_only_of_a_command_that_answers(answers, word, code, flush):
    done = python(command(f"print('text', flush={flush}); print('more'); return 0", answers=answers), "> /dev/full")
    assert done.returncode == code
    assert done.stderr == f"{word}: standard output: No space left on device\n"


@needs_full
@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_an_error_that_nobody_hears_has_its_exit_code(redirection):
    raising = "from experiments.command.errors import DataError; raise DataError('no data ' * 10_000)"
    done = python(command(raising), redirection)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed):
    """Else what a library says would be written into it."""
    assert python(command("return 10 + os.open(os.devnull, os.O_RDONLY)"), closed).returncode > 12


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", rb"\xe9 \u03c4"), ("latin-1", b"\xe9 \\u03c4"), ("utf-8", "é τ".encode())]
)
@pytest.mark.parametrize(("stream", "prefix"), [("stdout", b""), ("stderr", b"error: ")])
def test_letters_that_the_output_does_not_have_are_escaped(encoding, printed, stream, prefix):
    do = {"stdout": "print('é τ'); return 0", "stderr": "raise FileNotFoundError(2, 'é τ')"}[stream]
    code = f"import os, sys\nfrom experiments.command.cli import run_command\n{command(do)}"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert getattr(done, stream) == prefix + printed + b"\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "error: Resource temporarily unavailable\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "error: 'a/b': No such file or directory\n"),
        (OSError("of\na library"), "error: of a library\n"),
        (OSError(), "error: OSError\n"),
    ],
)
def test_only_a_path_is_named_as_one(error, line, capsys):
    def fail():
        raise error

    assert run_command(fail) == 2
    assert capsys.readouterr() == ("", line)


def test_the_streams_are_given_back(capsys):
    outside = sys.stdout, sys.stderr
    assert run_command(lambda: 0 if (sys.stdout, sys.stderr) != outside else 1) == 0
    assert (sys.stdout, sys.stderr) == outside


# --- commands -----------------------------------------------------------------------------------------------------

NOBODY_READS = "read, write = os.pipe(); os.close(read); os.dup2(write, {number})"
IS_FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {number})"


@needs_full
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("state", [NOBODY_READS, IS_FULL])
def test_a_sweep_goes_on_whatever_becomes_of_its_output(write_config, start, number, state):
    for name in "abc":
        write_config(name)
    Path("out/configs").mkdir(parents=True)
    Path("out/configs/b").write_text("in the way")  # which is said on stderr
    process = start("experiments.sweep", "configs", "--output", "out", before=state.format(number=number))
    assert process.wait() == 1
    assert [folder.name for folder in find_runs(Path("out"))] == ["a", "c"]
    assert [read_summary(folder)["status"] for folder in find_runs(Path("out"))] == ["finished"] * 2
    assert "Traceback" not in process.errors + process.output


@needs_full
def test_show_says_that_its_table_was_lost(write_config, start):
    assert sweep.main([str(write_config())]) == 0
    process = start("experiments.show", "results", before=IS_FULL.format(number=1))
    assert process.wait() == 2
    assert process.errors == "error: standard output: No space left on device\n"
    process = start("experiments.show", "results", before=NOBODY_READS.format(number=1))
    assert (process.wait(), process.errors) == (0, "")


def test_a_folder_of_another_alphabet(write_config, start):
    ascii_alone = "sys.stdout.reconfigure(encoding='ascii')"
    path = write_config()
    process = start("experiments.sweep", path, "--output", "é\udcff", before=ascii_alone)
    assert process.wait() == 0
    assert r"wrote \xe9\udcff/configs/tiny" in process.output
    process = start("experiments.show", ".", before=ascii_alone)
    assert process.wait() == 0
    assert process.output.splitlines()[1].startswith(r"\xe9\udcff/configs/tiny finished")
