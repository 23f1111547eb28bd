"""Run folders that were edited, or made by other hands: read right, or refused with one line by all that reads them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments import show
from experiments.command.errors import RecordError
from experiments.folder.read import RecordedRun, read_run, read_summary
from scripts import plot_paper, plot_sweep
from scripts.plots.notes import provenance
from scripts.plots.runs import Replicates, points
from scripts.plots.sweep import NUMBERS, Question, answer
from scripts.plots.sweep_table import to_csv
from scripts.plots.table import make_row

from .synthetic import HEADER, summary, write_run

NAME = "mlp_sgd_cg3"
Edit = Callable[[Path], Any]


def rows(edit: Callable[[list[str]], list[str]]) -> Edit:
    """Changes the lines of metrics.csv: the header and the epochs 0 to 4."""

    def change(folder: Path) -> None:
        path = folder / "metrics.csv"
        path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")

    return change


def facts(**changes: Any) -> Edit:
    """Changes keys of summary.json; ... removes one."""

    def change(folder: Path) -> None:
        content = {key: value for key, value in (summary(folder.name, 4) | changes).items() if value is not ...}
        (folder / "summary.json").write_text(json.dumps(content))

    return change


def content(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def a_folder(name: str) -> Edit:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


REFUSED: dict[str, tuple[Edit, str]] = {
    "no metrics": (lambda folder: (folder / "metrics.csv").unlink(), "cannot be read as metrics: No such file"),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "cannot read this config: No such file"),
    "an epoch twice": (rows(lambda lines: [*lines, lines[-1]]), "metrics.csv: must have a row for each epoch "
                       "from 0 on, but has 4 in place of 5"),
    "an epoch left out": (rows(lambda lines: lines[:2] + lines[3:]), "but has 2 in place of 1"),
    "epochs in another order": (rows(lambda lines: [lines[0], *reversed(lines[1:])]), "but has 4 in place of 0"),
    "half an epoch": (rows(lambda lines: [*lines[:2], lines[2].replace("1,", "0.5,", 1), *lines[3:]]), "has 0.5 in"),
    "no number for an epoch": (rows(lambda lines: [*lines[:2], lines[2][1:], *lines[3:]]), "has nan in place of 1"),
    "a header alone": (rows(lambda lines: lines[:1]), "metrics.csv: must end with epoch 4, as summary.json has it"),
    "rows that are missing": (rows(lambda lines: lines[:-1]), "metrics.csv: must end with epoch 4"),
    "a column more in each row": (rows(lambda lines: lines[:1] + [f"{line}," for line in lines[1:]]), "in place of 0"),
    "a column twice": (rows(lambda lines: [f"{line},{line}" for line in lines]), "must have the columns epoch,"),
    "semicolons": (content("metrics.csv", lambda text: text.replace(b",", b";")), "cannot be read as metrics: "),
    "UTF-16": (content("metrics.csv", lambda text: text.decode().encode("utf-16")), "cannot be read as metrics: "),
    "a folder of metrics": (a_folder("metrics.csv"), "metrics.csv: cannot be read as metrics: Is a directory"),
    "another status": (facts(status="done"), "summary.json: status: must be 'finished' or 'diverged', got 'done'"),
    "a status that is no text": (facts(status=["finished"]), "status: must be 'finished' or 'diverged'"),
    "accuracy as text": (facts(test_accuracy="51 %"), "test_accuracy: must be a valid number, got '51 %'"),
    "no accuracy": (facts(test_accuracy=None), "test_accuracy: must be a valid number, got None"),
    "epochs as text": (facts(epochs="4"), "epochs: must be a valid integer, got '4'"),
    "other epochs": (facts(epochs=7), "metrics.csv: must end with epoch 7"),
    "no device": (facts(device=...), "summary.json: device: missing, it must be given"),
    "no date": (facts(date=None), "summary.json: date: must be a valid string, got None"),
    "data as text": (facts(data="cifar10"), "summary.json: data: must be a mapping of keys to values, got 'cifar10'"),
    "a first part without a device": (
        facts(earlier_environments=[{"torch": "2.14.1"}]),
        "summary.json: earlier_environments.0.git_commit: missing",
    ),
    "data without a size": (facts(data={"name": "digits", "official": None}), "data.train_samples: missing"),
    "a summary of lists in lists": (content("summary.json", lambda text: b"[" * 100_000), "cannot be read as"),
    "a summary that is a number": (content("summary.json", lambda text: b"3"), "must be a JSON object, got 3"),
    "a folder of summary": (a_folder("summary.json"), "cannot be read as a summary: Is a directory"),
    "a key of a later version": (content("config.yaml", lambda text: text + b"warmup: 5\n"), "warmup: unknown key"),
    "a network of a later version": (content("config.yaml", lambda text: text.replace(b"mlp\n", b"vit\n")),
                                     "model.name: must be 'mlp', 'convnet' or 'resnet18', got 'vit'"),
    "a folder of config": (a_folder("config.yaml"), "cannot read this config: Is a directory"),
}  # fmt: skip

ACCEPTED: dict[str, Edit] = {
    "a mark in front and other line ends": content(
        "metrics.csv", lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")
    ),
    "the same of summary": content("summary.json", lambda text: b"\xef\xbb\xbf" + text.replace(b",", b",\r\n")),
    "the same of config": content("config.yaml", lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")),
    "other ways to write numbers": rows(lambda lines: [line.replace("0,2.3", "0.0, 2.30") for line in lines]),
    "more in the summary": facts(note="mine"),
    "no loss that is a number": facts(test_loss=None),
    "a line cut off at the end": content("metrics.csv", lambda text: text + b"5,0.1"),
}


def commands(folder: Path) -> list[tuple[int, str]]:
    """Exit code and errors of all that draws or lists the runs in `folder`."""
    output = str(folder.parent / "x.pdf")
    ended = []
    for main, options in (
        (plot_paper.main, ["--output", output]),
        (plot_sweep.main, ["--x", "proxprop.tau_prox", "--output", output]),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            ended.append((main([str(folder), *options]), errors.getvalue()))
    return ended


@pytest.mark.parametrize(("edit", "line"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_together_is_one_line(tmp_path: Path, edit: Edit, line: str, capsys) -> None:
    edit(write_run(tmp_path / "runs" / NAME))
    for code, error in commands(tmp_path / "runs"):
        assert code == 2
        assert error.startswith("error: ")
        assert line in error
        assert error[:-1].isprintable()
        assert error.endswith("\n")
    capsys.readouterr()
    assert show.main([str(tmp_path / "runs")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [f"{NAME} unreadable", "1 unreadable"]
    assert err == error.replace("error: ", "note: ", 1)


def test_a_summary_alone_is_refused_as_well(tmp_path: Path) -> None:
    """As a sweep reads it, to know what is done."""
    facts(device=...)(write_run(tmp_path / NAME))
    with pytest.raises(RecordError, match="device: missing"):
        read_summary(tmp_path / NAME)


@pytest.mark.parametrize("edit", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_is_only_written_in_another_way_is_read(tmp_path: Path, edit: Edit, capsys) -> None:
    plain, edited = write_run(tmp_path / "a" / NAME), write_run(tmp_path / "b" / NAME)
    edit(edited)
    one, other = read_run(plain), read_run(edited)
    assert other.metrics.equals(one.metrics)
    assert (other.config, other.status) == (one.config, "finished")
    assert commands(tmp_path / "b") == [(0, "")] * 2


def test_a_header_alone_is_right_before_the_first_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / NAME, finished=False)
    (folder / "metrics.csv").write_text(f"{HEADER}\n")
    run = read_run(folder)
    assert (run.status, run.epochs, run.value("train_loss"), run.seconds_left) == ("interrupted", 0, None, None)


# --- whatever they hold ---------------------------------------------------------------------------------------------

cells = st.one_of(
    st.integers(-1, 6).map(str),
    st.floats().map(str),
    st.sampled_from(["", "x", "1e400", "-1", "nan", "True", '"', "'", "0x1", "1;2", "\ufeff", " 1", "1\r", "\0"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just("finished")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["name", "official", "train_samples"]), inner)
    ),
    max_leaves=3,
)


@settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 6)), cells, max_size=2),
    st.dictionaries(st.sampled_from(sorted(summary(NAME, 4))), values, max_size=2),
)
@example({(5, 0): "1e400"}, {})
@example({(3, 1): "inf", (4, 6): "nan"}, {})
@example({}, {"test_loss": float("nan"), "test_accuracy": float("inf")})
@example({}, {"epochs": 2**70, "threads": -(2**70)})
@example({}, {"git_commit": "", "date": "", "device_name": "\n"})
def test_a_run_of_any_numbers_is_drawn_or_one_line(tmp_path: Path, changed: dict, facts: dict[str, Any]) -> None:
    folder = tmp_path / NAME
    if not folder.exists():
        write_run(folder)
        (folder / "plain.csv").write_text((folder / "metrics.csv").read_text())
    table = [line.split(",") for line in (folder / "plain.csv").read_text().splitlines()]
    for (row, column), cell in changed.items():
        table[row][column] = cell
    (folder / "metrics.csv").write_text("\n".join(map(",".join, table)) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary(NAME, 4) | facts))
    if (run := readable(folder)) is not None:
        assert_usable(run)


def readable(folder: Path) -> RecordedRun | None:
    try:
        return read_run(folder)
    except RecordError as error:
        said = str(error)
    assert said.startswith(str(folder))
    assert said.isprintable()
    return None


def assert_usable(run: RecordedRun) -> None:
    """By all that figures and tables do with a run, short of drawing."""
    assert show._cells(run, False)[0] == run.status
    assert provenance([run])
    group = Replicates(NAME, (run,))
    assert make_row("a", group, 4, group).status
    for x in ("epoch", "seconds"):
        points([run], x, "val_accuracy", 3.0)
    for number in NUMBERS:
        assert to_csv(answer(Question("proxprop.tau_prox", None, number), [run]))
