"""The paper's Table 1: rows, the figure and the text."""

import math
from pathlib import Path

import pytest

from experiments.command.errors import RecordError, counted
from experiments.folder.read import read_runs
from scripts.plot_paper import main
from scripts.plots.paper_numbers import STEP_SIZES, TABLE_1
from scripts.plots.table1 import TOP, as_text, draw_table1, read_table, title, to_markdown

from .synthetic import write_run


def write_table(root: Path, mode: str, epochs: int = 50, diverges=lambda lr: False, step_sizes=STEP_SIZES) -> None:
    for lr in step_sizes:
        write_run(
            root / f"optimization_mode={mode},lr={lr:g}",
            decay=0.02 + lr / 500,
            epochs=3 if diverges(lr) else epochs,
            diverges=diverges(lr),
            settings={
                "optimizer": {"name": "sgd", "lr": lr},
                "proxprop": {"optimization_mode": mode, "tau_prox": 1.0},
                "epochs": 50,
            },
        )


@pytest.fixture
def table(tmp_path: Path):
    root = tmp_path / "table1"
    write_table(root, "gradient", diverges=lambda lr: lr >= 0.5)
    write_table(root, "published_cg3")
    write_table(root, "prox_cg3", epochs=15, step_sizes=STEP_SIZES[2:])
    return root


def loss_after(epoch: int, root: Path, mode: str, lr: float) -> float:
    text = (root / f"optimization_mode={mode},lr={lr:g}" / "metrics.csv").read_text()
    return float(text.splitlines()[1:][epoch].split(",")[2])


def test_numbers_stand_beside_the_papers(table: Path) -> None:
    rows, _ = read_table(read_runs(table))
    lines = {line[0]: line[1:] for line in as_text(rows)}
    assert lines["τ"] == ["50", "10", "5", "1", "0.5", "0.1", "0.05", "0.005", "0.0005"]
    assert lines["BackProp"][:5] == ["diverged"] * 5
    assert lines["BackProp"][6] == f"{loss_after(-1, table, 'gradient', 0.05):#.3g}"
    assert lines["BackProp, the paper"] == ["NaN"] * 5 + ["0.524", "0.091", "0.637", "1.531"]
    short = lines["ProxProp (cg3), as stated (15 epochs)"]
    assert short == ["–", "–", *(f"{loss_after(-1, table, 'prox_cg3', lr):#.3g}" for lr in STEP_SIZES[2:])]
    assert list(lines) == [
        "τ",
        "BackProp",
        "BackProp, the paper",
        "ProxProp (cg1), the paper",
        "ProxProp (cg3), published solver",
        "ProxProp (cg3), as stated (15 epochs)",
        "ProxProp (cg3), the paper",
        "ProxProp (cg5), the paper",
    ]
    assert {line.count("|") for line in to_markdown(rows).splitlines()} == {len(STEP_SIZES) + 2}


@pytest.mark.parametrize("least", [7, 1])  # behind the third epoch, with which a run diverges, and before
def test_a_row_that_is_not_over_counts_as_far_as_all_its_runs_have_come(tmp_path: Path, least: int) -> None:
    write_table(tmp_path, "prox_cg3", diverges=lambda lr: True, step_sizes=[50.0])
    for lr, epochs in ((10.0, 9), (5.0, least), (0.5, 0)):
        write_table(tmp_path, "prox_cg3", epochs, step_sizes=[lr])
        (tmp_path / f"optimization_mode=prox_cg3,lr={lr:g}" / "summary.json").unlink()
    write_table(tmp_path, "prox_cg3", step_sizes=[1.0])
    write_table(tmp_path, "gradient")
    rows, found = read_table(read_runs(tmp_path))
    lines = {line[0]: line[1:] for line in as_text(rows)}
    losses = [f"{loss_after(least, tmp_path, 'prox_cg3', lr):#.3g}" for lr in (10, 5, 1)]
    first = "diverged" if least > 3 else f"{loss_after(least, tmp_path, 'prox_cg3', 50):#.3g}"
    assert lines[f"ProxProp (cg3), as stated ({counted(least, 'epoch')})"] == [first, *losses, *["–"] * 5]
    assert not found.note


def test_a_run_made_in_two_places_counts_once(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write_table(here, "prox_cg3", 7)
    write_table(there, "prox_cg3", 9, step_sizes=STEP_SIZES[:2])
    for folder in (*here.iterdir(), there / "optimization_mode=prox_cg3,lr=10"):
        (folder / "summary.json").unlink()
    rows, found = read_table(read_runs(here, there))
    assert [line[0] for line in as_text(rows) if "stated" in line[0]] == ["ProxProp (cg3), as stated (7 epochs)"]
    assert len(found.runs) == len(STEP_SIZES)
    assert sum(run.folder.parent == there for run in found.runs) == 2  # one that is over, and one that is farther


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"batch_size": 100}, "batch_size"),
        ({"proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 0.5}}, "proxprop.tau_prox"),
    ],
)
@pytest.mark.parametrize("mode", ["prox_cg3", "prox_cg1"])  # in the same cell, and in another row
def test_runs_of_other_settings_are_no_part_of_the_table(tmp_path: Path, mode: str, settings, keys: str) -> None:
    write_table(tmp_path, "prox_cg3", step_sizes=[1.0])
    settings = {"optimizer": {"name": "sgd", "lr": 1.0}, "proxprop": {"tau_prox": 1.0}, "epochs": 50} | settings
    settings["proxprop"] = settings["proxprop"] | {"optimization_mode": mode}
    write_run(tmp_path / "other", epochs=50, settings=settings)
    with pytest.raises(RecordError, match=rf"lr=1 and \S+other differ in {keys}: the runs of a Table 1 differ in"):
        read_table(read_runs(tmp_path))


def test_the_title_names_the_step_size_of_the_layers(tmp_path: Path) -> None:
    settings = {"optimizer": {"name": "sgd", "lr": 1.0}, "proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 0.5}}
    write_run(tmp_path / "one", settings=settings)
    assert title(read_table(read_runs(tmp_path))[1]).endswith("τ_θ = 0.5")


def test_seeds_that_diverged_are_told(tmp_path: Path) -> None:
    for seed in range(3):
        settings = {"optimizer": {"name": "sgd", "lr": 1.0}, "proxprop": {"optimization_mode": "prox_cg3"}}
        write_run(tmp_path / f"lr=1,seed={seed}", seed=seed, diverges=seed == 2, settings=settings)
    rows, _ = read_table(read_runs(tmp_path))
    assert any("(1 of 3 diverged)" in cell for line in as_text(rows) for cell in line)


def test_where_nothing_has_begun_one_line_says_so(tmp_path: Path) -> None:
    write_table(tmp_path, "prox_cg3", 0, step_sizes=[1.0])
    (tmp_path / "optimization_mode=prox_cg3,lr=1" / "summary.json").unlink()
    with pytest.raises(RecordError, match=r"^none of the runs is over yet"):
        read_table(read_runs(tmp_path))


def test_the_figure_has_every_number_of_the_paper_within_its_axis_or_marked_above(table: Path) -> None:
    rows, found = read_table(read_runs(table))
    page = draw_table1(rows, found)
    (axes,) = page.axes
    marks = [text.get_text() for text in axes.texts]
    papers = [loss for losses in TABLE_1.values() for loss in losses]
    assert marks.count("⊗") == sum(map(math.isnan, papers)) == 5
    assert marks.count("△") == sum(loss > TOP for loss in papers) == 3
    assert marks.count("×") == 5
    drawn = [y for line in axes.lines if line.get_linestyle() == "None" for y in line.get_ydata() if math.isfinite(y)]
    assert sorted(drawn) == sorted(loss for loss in papers if loss <= TOP)
    low, high = axes.get_ylim()
    assert all(low < loss < high for loss in drawn)
    notes = " ".join(text.get_text() for text in page.texts)
    assert "in place of 50 epochs: ProxProp (cg3), as stated: 15 epochs" in notes
    (legend,) = page.legends
    assert {f"{method}, the paper" for method in ("BackProp", "ProxProp (cg3)")} < {
        text.get_text() for text in legend.get_texts()
    }
    assert "missing: ProxProp (cg3), as stated at 50, ProxProp (cg3), as stated at 10" in notes


def test_two_more_pages_and_a_table(table: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mlp_sgd_cg3")
    pdf, markdown = tmp_path / "paper.pdf", tmp_path / "table.md"
    command = [str(tmp_path / "runs"), "--table1", str(table), "--output", str(pdf), "--table", str(markdown)]
    assert main(command) == 0
    assert pdf.read_bytes().count(b"/Type /Page ") == 4
    assert "| BackProp, the paper | NaN |" in markdown.read_text()
