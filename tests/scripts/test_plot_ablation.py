"""The published solver taken apart: the table's and the page's numbers, their order, and what is refused."""

import csv
from dataclasses import fields
from pathlib import Path

import pytest

from experiments.config.sweep_file import load_config_file
from experiments.folder.read import read_run
from experiments.training.diagnostics import LayerRecord
from scripts.plot_ablation import main
from scripts.plots import style
from scripts.plots.ablation import LAYERS, draw_ablation, read_parts, to_markdown
from scripts.report import fill

from .pages import assert_all_is_on_the_paper, y_tick_labels
from .synthetic import write_run

COLUMNS = [field.name for field in fields(LayerRecord)]


def write_part(root: Path, model: str, mode: str, cosine: float | None = 0.5, decay: float = 0.05) -> Path:
    settings = {"model": {"name": model}, "proxprop": {"optimization_mode": mode, "tau_prox": 0.1}}
    folder = write_run(root / f"optimization_mode={mode}", settings=settings, decay=decay)
    with (folder / "diagnostics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval=0.1)
        writer.writeheader()
        for epoch in (1, 2):
            for index, layer in enumerate(("1", "3", "5")):
                beside = ["nan"] * 2 if cosine is None else [cosine + 0.1 * index + 0.02 * epoch, 10.0**-index * epoch]
                row = {"epoch": epoch, "layer": layer, "steps": 20, "not_descent": 0, "failed": 0}
                writer.writerow(row | {"stated_cosine": beside[0], "stated_ratio": beside[1]})
    return folder


@pytest.fixture
def both(root: Path, tmp_path: Path) -> Path:
    """All solvers of the two sweep files."""
    for model in ("convnet", "mlp"):
        for config in load_config_file(root / f"configs/sweeps/ablation_{model}.yaml").configs:
            mode = config.proxprop.optimization_mode
            folder = tmp_path / "cpu-5-epochs" / f"ablation_{model}"
            write_part(folder, model, mode, None if mode == "prox_cg3" else 0.5)
    return tmp_path / "cpu-5-epochs"


def parts_in(root: Path):
    return read_parts([read_run(folder.parent) for folder in sorted(root.rglob("config.yaml"))])


def test_from_the_stated_solver_to_the_whole_published_one(both: Path) -> None:
    networks = parts_in(both)
    assert list(networks) == ["mlp", "convnet"]
    assert [part.label for part in networks["convnet"]] == [
        "stated",
        "plain recurrence: none",
        *(f"only {n}" for n in ("lost conjugacy", "absolute damping", "early stop", "one step length", "cancellation")),
        *(f"all but {n}" for n in ("lost conjugacy", "absolute damping", "early stop", "one step length")),
        "all but cancellation",
        "published: all",
    ]
    assert len(networks["mlp"]) == 11  # a fully connected layer has a step length for each output, always


def test_a_row_of_the_table_is_means_over_epochs(tmp_path: Path) -> None:
    write_part(tmp_path / "runs", "mlp", "published_cg3-only-stop", 0.2)
    write_part(tmp_path / "runs", "mlp", "prox_cg3", None)
    lines = to_markdown(parts_in(tmp_path)["mlp"]).splitlines()
    loss = 2.3 * 1.05 ** -(4 + 0.7)
    assert lines[2] == f"| stated | {loss:#.4g} | – | – |"
    assert lines[3] == f"| only early stop | {loss:#.4g} | 0.23, 0.33, 0.43 | 1.5, 0.15, 0.015 |"


def test_the_report_has_the_table_or_a_dash(both: Path) -> None:
    table = fill("{{ablation mlp}}", both.parent)
    assert table + "\n" == to_markdown(parts_in(both)["mlp"])
    assert fill("{{ablation mlp}}", both / "nothing") == "–"


def test_the_page_draws_these_numbers_and_stays_on_the_paper(both: Path) -> None:
    style.apply()
    page = draw_ablation(parts_in(both))
    loss, cosines, ratios = page.axes[3:]
    assert len(loss.lines[0].get_ydata()) == 13
    assert list(cosines.lines[1].get_xdata())[1:] == pytest.approx([0.63] * 12)
    assert list(ratios.lines[2].get_xdata())[1:] == pytest.approx([0.015] * 12)
    assert [text.get_text() for text in ratios.get_legend().get_texts()] == list(LAYERS)
    assert_all_is_on_the_paper(page, *y_tick_labels(page))


def test_the_command_writes_the_same_bytes(both: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.pdf"
    arguments = [str(both / "ablation_mlp"), str(both / "ablation_convnet"), "--output", str(output)]
    assert main(arguments) == 0
    once = output.read_bytes()
    assert once.startswith(b"%PDF")
    assert main(arguments) == 0
    assert output.read_bytes() == once


def test_runs_that_are_no_part_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "mlp_sgd_exact")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.pdf")]) == 2
    assert (
        capsys.readouterr().err
        == "error: none of the runs is over, with a solver that is a part of the published one\n"
    )


def test_two_runs_of_one_solver_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        write_part(tmp_path / name, "mlp", "published_cg3")
    assert main([str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "page.pdf")]) == 2
    assert "are of one solver: leave one of them out" in capsys.readouterr().err
