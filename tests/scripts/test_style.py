"""Figures look the same whatever a user's matplotlib is set to, and no two curves of one look alike."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.plot_paper import main as plot_paper
from scripts.plot_sweep import main as plot_sweep
from scripts.plots.style import LINES, lines_of

from .synthetic import write_run

MATPLOTLIBRC = "text.usetex: True\naxes.facecolor: red\nfont.size: 30\nlines.linewidth: 9\nbackend: TkAgg\n"


def run(root: Path, arguments: list[str], **environment: str) -> None:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["plot_paper.py", "plot_sweep.py"])
def test_the_users_backend_and_settings_do_not_matter(root: Path, tmp_path: Path, script: str) -> None:
    write_run(tmp_path / "runs" / "mlp_sgd_cg3")
    (tmp_path / "rc").mkdir()
    (tmp_path / "rc" / "matplotlibrc").write_text(MATPLOTLIBRC)
    arguments = [f"scripts/{script}", str(tmp_path / "runs")]
    arguments += ["--x", "proxprop.tau_prox"] if script == "plot_sweep.py" else []
    run(root, [*arguments, "--output", str(tmp_path / "plain.pdf")])
    run(
        root,
        [*arguments, "--output", str(tmp_path / "odd.pdf")],
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        MATPLOTLIBRC=str(tmp_path / "rc"),
        MPLCONFIGDIR=str(tmp_path / "rc"),
    )
    assert (tmp_path / "plain.pdf").read_bytes() == (tmp_path / "odd.pdf").read_bytes()


@pytest.mark.parametrize("title", ["costs $5, or $6", r"$\frac{1}$", "x_1^2 $", "unbalanced $ and \\"])
def test_dollars_are_text(tmp_path: Path, title: str) -> None:
    folder = tmp_path / "with $ and $" / "runs"
    write_run(folder / "a")
    output = tmp_path / "figure.svg"
    assert plot_sweep([str(folder), "--x", "proxprop.tau_prox", "--title", title, "--output", str(output)]) == 0
    assert f"<!-- {title} -->" in output.read_text()


def test_the_papers_figures_are_a_pdf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "mlp_sgd_cg3")
    assert plot_paper([str(tmp_path / "runs"), "--output", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == f"error: --output must end in .pdf, got {tmp_path / 'x.png'}\n"
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("values", "ordered"),
    [
        (["prox_cg1", "prox_cg2", "prox_cg3"], True),
        (["gradient", "prox_cg1", "prox_cg3", "prox_cg5", "prox_cg10", "prox_exact"], False),
        (["prox_cg3", "published_cg3", "prox_cg5", "published_cg5"], False),
        (["prox_cg3", "3"], False),
        ([f"prox_cg{n}" for n in range(1, 21)], True),
        ([f"{n}" for n in range(40)], True),
        ([f"value {n}" for n in range(40)], False),
    ],
)
def test_no_two_curves_look_alike(values: list[str], ordered: bool) -> None:
    lines = lines_of(values, ordered)
    assert len(lines) == len(values)
    for one, other in itertools.combinations(lines, 2):
        assert (one.color, one.marker, one.linestyle) != (other.color, other.marker, other.linestyle)


def test_modes_of_the_papers_figures_keep_their_lines() -> None:
    assert lines_of(["prox_cg3", "prox_exact"], False) == [LINES["cg3"], LINES["exact"]]


def test_ordered_values_go_from_dark_to_light() -> None:
    def lightness(color: str) -> float:
        return sum(weight * int(color[i : i + 2], 16) for weight, i in ((0.2, 1), (0.7, 3), (0.1, 5)))

    shades = [lightness(line.color) for line in lines_of([str(n) for n in range(9)], True)]
    assert shades == sorted(shades)
    assert shades[-1] > shades[0] + 80
