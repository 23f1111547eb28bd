"""The command scripts/plot_paper.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.plot_paper import main

from .synthetic import PUBLISHED, write_run, write_suite


def count_pages(pdf: Path) -> int:
    return len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))


def assert_one_line_error(capsys: pytest.CaptureFixture[str], text: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error
    assert error.count("\n") == 1


def test_pages_and_table(tmp_path: Path) -> None:
    results, published = write_suite(tmp_path / "a"), write_suite(tmp_path / "b", PUBLISHED)
    pdf, table = tmp_path / "paper.pdf", tmp_path / "table.md"
    options = ["--published", str(published), "--output", str(pdf), "--table", str(table)]
    assert main([str(results), *options]) == 0
    assert count_pages(pdf) == 5
    assert b"/Type /Font /Subtype /Type0" in pdf.read_bytes()  # TrueType (fonttype 42), not Type 3
    assert b"/Subtype /Type3" not in pdf.read_bytes()
    assert "ProxProp (cg10), published solver" in table.read_text()


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    results = write_suite(tmp_path / "a")
    first, second = tmp_path / "1.pdf", tmp_path / "2.pdf"
    assert main([str(results), "--output", str(first)]) == 0
    assert main([str(results), "--output", str(second)]) == 0
    assert count_pages(first) == 3
    assert first.read_bytes() == second.read_bytes()


def test_missing_unfinished_and_diverged_runs_are_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "mlp_sgd_cg3", epochs=0)
    write_run(tmp_path / "a" / "mlp_sgd_cg5", diverges=True)
    write_run(tmp_path / "a" / "mlp_sgd_cg10", diverges=True, epochs=0)  # no finite loss at all
    write_run(tmp_path / "a" / "mlp_sgd_gradient", finished=False)
    pdf = tmp_path / "paper.pdf"
    assert main([str(tmp_path / "a"), "--output", str(pdf)]) == 0
    assert count_pages(pdf) == 2  # no run of Figure 3 is there


@pytest.mark.parametrize("make", [False, True], ids=["absent", "empty"])
def test_no_results(make: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if make:
        (tmp_path / "a").mkdir()
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "paper.pdf")]) == 2
    assert_one_line_error(capsys, "holds no run" if make else "is no folder")
    assert not (tmp_path / "paper.pdf").exists()


def test_runs_of_which_the_paper_has_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "mine")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "x.pdf")]) == 2
    assert_one_line_error(capsys, "runs: no run of the paper's figures")
    known = str(write_suite(tmp_path / "suite"))
    assert main([known, "--published", str(tmp_path / "runs"), "--output", str(tmp_path / "x.pdf")]) == 2
    assert_one_line_error(capsys, "runs: no run of the paper's figures")
    assert not (tmp_path / "x.pdf").exists()


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a" / "mlp_sgd_cg3")
    (tmp_path / "paper.pdf").mkdir()
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "paper.pdf")]) == 2
    assert_one_line_error(capsys, "cannot be written: Is a directory")


@pytest.mark.parametrize("option", ["--output", "--table"])
def test_a_file_without_a_folder_is_refused_before_anything_is_read(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--output": "a.pdf", "--table": "a.md", option: str(tmp_path / "no" / "a.pdf")}
    assert main(["absent", *(text for pair in files.items() for text in pair)]) == 2
    assert_one_line_error(capsys, f"argument {option}: there is no folder {tmp_path / 'no'} (see --help)")


def test_broken_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a" / "mlp_sgd_cg3")
    (folder / "metrics.csv").write_text("epoch,loss\n0,1\n")
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "paper.pdf")]) == 2
    assert_one_line_error(capsys, "must have the columns")


def test_runs_as_a_file_from_another_folder(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "plot_paper.py"), "absent", "--output", "a.pdf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: absent is no folder\n")


def test_what_the_figures_lack_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_suite(tmp_path / "runs")
    (tmp_path / "runs" / "mlp_sgd_cg5").rename(tmp_path / "runs" / "mine")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "f.pdf")]) == 0
    assert capsys.readouterr().out == (
        "note: missing: mlp_sgd_cg5\nnote: no figure shows (see scripts/plots/figures.py): mine\n"
    )
