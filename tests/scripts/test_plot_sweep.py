"""The command scripts/plot_sweep.py: the numbers it draws, what it refuses, and what it says was left out."""

import math
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.folder.read import find_runs, read_run, read_runs
from scripts.plot_sweep import main
from scripts.plots import sweep_draw
from scripts.plots.sweep import Question, answer, label, sort_key

from .pages import assert_all_is_on_the_paper
from .synthetic import write_run

X, HUE = "proxprop.tau_prox", "proxprop.optimization_mode"
TAUS = [50.0, 0.5, 0.005]


def write_sweep(results: Path, modes=("gradient", "prox_cg3"), seeds=1, diverges=lambda mode, tau, seed: False) -> Path:
    for mode in modes:
        for tau in TAUS:
            for seed in range(seeds):
                write_run(
                    results / f"optimization_mode={mode},tau_prox={tau:g},seed={seed}",
                    decay=0.05 + tau / 1000 + seed / 100,
                    diverges=diverges(mode, tau, seed),
                    seed=seed,
                    settings={"proxprop": {"optimization_mode": mode, "tau_prox": tau}},
                )
    return results


def plot(results: Path, *options: str, output: str = "figure.pdf") -> tuple[int, Path]:
    path = results.parent / output
    return main([str(results), "--x", X, "--hue", HUE, "--output", str(path), *options]), path


def error_of(capsys: pytest.CaptureFixture[str], results: Path, *options: str) -> str:
    code, path = plot(results, *options)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not path.exists()
    return error


def last_loss(run: Path) -> float:
    return float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[2])


def test_figure_and_tables_are_written_side_by_side(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs")
    code, pdf = plot(results)
    assert code == 0
    assert len(re.findall(rb"/Type /Page\b", pdf.read_bytes())) == 1
    table = pd.read_csv(pdf.with_suffix(".csv"))
    assert list(table.columns) == [HUE, X, "train_loss_mean", "train_loss_std", "runs", "diverged"]
    assert table[X].tolist() == [0.005, 0.5, 50] * 2  # by size
    for _, row in table.iterrows():
        run = results / f"optimization_mode={row[HUE]},tau_prox={row[X]:g},seed=0"
        assert row["train_loss_mean"] == pytest.approx(last_loss(run), rel=1e-7)
    markdown = pdf.with_suffix(".md").read_text().splitlines()
    assert markdown[0] == f"| {X} | gradient | prox_cg3 |"
    assert len(markdown) == 2 + len(TAUS)


def test_seeds_are_a_mean_and_a_standard_deviation(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs", modes=["prox_cg3"], seeds=3)
    _, pdf = plot(results)
    row = pd.read_csv(pdf.with_suffix(".csv")).iloc[1]
    losses = [last_loss(results / f"optimization_mode=prox_cg3,tau_prox=0.5,seed={seed}") for seed in range(3)]
    assert row["runs"] == 3
    assert row["train_loss_mean"] == pytest.approx(statistics.mean(losses), rel=1e-6)
    assert row["train_loss_std"] == pytest.approx(statistics.stdev(losses), rel=1e-6)


def test_diverged_runs_are_counted_and_not_averaged(tmp_path: Path) -> None:
    def diverges(mode: str, tau: float, seed: int) -> bool:
        return mode == "gradient" and (tau == 50 or (tau == 0.5 and seed == 0))

    results = write_sweep(tmp_path / "runs", seeds=2, diverges=diverges)
    _, pdf = plot(results)
    table = pd.read_csv(pdf.with_suffix(".csv")).set_index([HUE, X])
    assert table.loc[("gradient", 50), "diverged"] == 2
    assert math.isnan(table.loc[("gradient", 50), "train_loss_mean"])
    left = last_loss(results / "optimization_mode=gradient,tau_prox=0.5,seed=1")
    assert table.loc[("gradient", 0.5), "train_loss_mean"] == pytest.approx(left, rel=1e-7)
    assert table.loc["prox_cg3"]["diverged"].sum() == 0
    rows = pdf.with_suffix(".md").read_text().splitlines()
    assert rows[-1].startswith("| 50 | diverged | ")
    assert "(1 of 2 diverged)" in rows[-2]


def test_means_over_runs_of_different_lengths_are_told(tmp_path: Path) -> None:
    for seed, epochs in enumerate((3, 5, 2)):
        folder = tmp_path / "runs" / f"lr=1,seed={seed}"
        write_run(folder, epochs=epochs, seed=seed, diverges=epochs == 2, settings={"epochs": 5})
    write_run(tmp_path / "runs" / "lr=2", epochs=4, settings={"optimizer": {"name": "sgd", "lr": 2.0}})
    found = answer(Question("optimizer.lr", None, "train_loss"), read_runs(tmp_path / "runs"))
    assert found.note == "means over runs of different lengths: optimizer.lr=1 (3 and 5 epochs)"


def test_the_drawing_breaks_a_curve_where_all_diverged_and_marks_it(tmp_path: Path, monkeypatch) -> None:
    pages = []
    monkeypatch.setattr(
        "scripts.plot_sweep.draw_sweep", lambda *args: pages.append(sweep_draw.draw_sweep(*args)) or pages[-1]
    )
    plot(write_sweep(tmp_path / "runs", diverges=lambda mode, tau, seed: mode == "gradient" and tau == 50))
    (axes,) = pages[0].axes
    assert axes.get_xscale() == "log"
    gradient, prox, *_ = axes.lines
    assert list(gradient.get_xdata()) == [0.005, 0.5, 50]
    assert [math.isnan(y) for y in gradient.get_ydata()] == [False, False, True]
    assert not any(math.isnan(y) for y in prox.get_ydata())
    assert [text.xy for text in axes.texts if text.get_text() == "×"] == [(50.0, 1.0)]
    assert any("diverged: gradient at 50" in text.get_text() for text in pages[0].texts)


def drawn_axes(results: Path):
    found = answer(Question(X, HUE, "train_loss"), [read_run(folder) for folder in find_runs(results)])
    return sweep_draw.draw_sweep(found).axes[0]


def test_the_legend_of_many_curves_stays_off_the_axes(tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs", modes=[f"prox_cg{n}" for n in range(1, 21)])
    page = drawn_axes(tmp_path / "runs").figure
    FigureCanvasAgg(page).draw()
    legend = page.legends[0].get_window_extent()
    assert legend.y0 > page.axes[0].get_window_extent().y1
    assert 0 <= legend.x0 < legend.x1 <= page.bbox.x1


def test_diverged_runs_at_the_ends_are_within_the_axis(tmp_path: Path) -> None:
    axes = drawn_axes(write_sweep(tmp_path / "runs", diverges=lambda mode, tau, seed: tau != 0.5))
    left, right = axes.get_xlim()
    assert left < 0.005
    assert right > 50


def test_losses_far_above_the_start_are_drawn_upright(tmp_path: Path) -> None:
    for tau in TAUS:
        settings = {"proxprop": {"optimization_mode": "gradient", "tau_prox": tau}}
        write_run(tmp_path / "runs" / f"{tau}", decay=-0.9, epochs=6, settings=settings)
    bottom, top = drawn_axes(tmp_path / "runs").get_ylim()
    assert bottom < last_loss(tmp_path / "runs" / "0.5") < top


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_bands_are_within_the_axis(tmp_path: Path, scale: str) -> None:
    write_sweep(tmp_path / "runs", seeds=3)
    found = answer(Question(X, HUE, "train_loss"), [read_run(folder) for folder in find_runs(tmp_path / "runs")])
    low = min(cell.stat.low for cell in found.cells)
    bottom, top = sweep_draw.draw_sweep(found, yscale=scale).axes[0].get_ylim()
    assert bottom < low
    assert max(cell.stat.high for cell in found.cells) < top


def test_logarithms_of_what_is_not_positive_are_refused(tmp_path: Path, capsys) -> None:
    for lr in (0.0, 1.0):
        settings = {"optimizer": {"name": "sgd", "lr": 1.0, "momentum": lr / 2}}
        write_run(tmp_path / "runs" / f"{lr}", settings=settings)
    line = error_of(capsys, tmp_path / "runs", "--x", "optimizer.momentum", "--xscale", "log")
    assert "--xscale: log needs positive numbers, but optimizer.momentum is 0 in a run" in line


def test_one_run_twice_is_no_second_seed(tmp_path: Path, capsys) -> None:
    results = write_sweep(tmp_path / "runs", modes=["gradient"])
    settings = {"proxprop": {"optimization_mode": "gradient", "tau_prox": 0.5}}
    write_run(results / "copy", settings=settings)
    assert "are of one config and one seed: leave one of them out" in error_of(capsys, results)


@pytest.mark.parametrize("number", ["test_accuracy", "best_val_accuracy", "test_loss", "seconds_per_epoch", "val_loss"])
def test_other_numbers_and_file_formats(tmp_path: Path, number: str) -> None:
    results = write_sweep(tmp_path / "runs")
    for output in ("a.png", "a.svg"):
        code, path = plot(results, "--y", number, "--xscale", "linear", "--yscale", "log", output=output)
        assert code == 0
        assert path.stat().st_size > 1000


def test_a_key_of_words_is_an_axis_too(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs")
    output = tmp_path / "f.pdf"
    assert main([str(results), "--x", HUE, "--hue", X, "--output", str(output)]) == 0
    assert pd.read_csv(output.with_suffix(".csv"))[HUE].tolist() == ["gradient", "prox_cg3"] * 3


@pytest.mark.parametrize("scale", [None, "log"])
def test_between_words_there_is_no_line_and_accuracies_are_per_cent(tmp_path: Path, scale: str | None) -> None:
    for name, accuracy in {"sgd": 0.05, "adam": 0.6}.items():
        for mode in ("gradient", "prox_cg3"):
            for seed in (1, 0):
                settings = {"optimizer": {"name": name, "lr": 1.0}, "proxprop": {"optimization_mode": mode}}
                folder = tmp_path / f"{name},{mode},seed={seed}"
                write_run(folder, settings=settings, seed=seed, test_accuracy=accuracy + 0.01 * seed)
    runs = [read_run(folder) for folder in sorted(tmp_path.iterdir(), reverse=True)]
    page = sweep_draw.draw_sweep(answer(Question("optimizer.name", HUE, "test_accuracy"), runs), yscale=scale)
    (axes,) = page.axes
    assert axes.get_yscale() == (scale or "linear")
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"
    points = {line.get_label(): line for line in axes.lines if line.get_label() in ("gradient", "prox_cg3")}
    assert [line.get_linestyle() for line in points.values()] == ["None", "None"]
    assert list(points["gradient"].get_ydata()) == pytest.approx([0.605, 0.055])
    assert list(points["gradient"].get_xdata() + 0.1) == pytest.approx(list(points["prox_cg3"].get_xdata()))
    bars = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments()]
    assert [top - bottom for bottom, top in bars] == pytest.approx([0.01] * 4)
    texts = " ".join(text.get_text() for text in page.texts).replace("\N{NO-BREAK SPACE}", " ")
    assert "bars: lowest to highest of 2 seeds" in texts
    assert "seed: 0, 1 " in texts
    assert_all_is_on_the_paper(page)


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs")
    first, second = (plot(results, output=name)[1].read_bytes() for name in ("1.pdf", "2.pdf"))
    assert first == second


def test_runs_that_are_not_over_are_left_out_and_said_to_be(tmp_path: Path, capsys) -> None:
    results = write_sweep(tmp_path / "runs")
    write_run(
        results / "late", finished=False, settings={"proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 7.0}}
    )
    code, pdf = plot(results)
    assert code == 0
    assert capsys.readouterr().out == "note: not over, and left out: late (interrupted, epoch 4)\n"
    assert 7 not in pd.read_csv(pdf.with_suffix(".csv"))[X].tolist()


def test_runs_that_differ_in_more_than_the_figure_shows(tmp_path: Path, capsys) -> None:
    results = write_sweep(tmp_path / "runs")
    settings = {"proxprop": {"optimization_mode": "gradient", "tau_prox": 0.5}, "batch_size": 100}
    write_run(results / "other", settings=settings)
    line = error_of(capsys, results)
    assert "runs with proxprop.tau_prox=0.5, proxprop.optimization_mode=gradient also differ in batch_size" in line
    assert plot(results, "--where", "batch_size=500")[0] == 0


def test_where_takes_some_of_the_runs(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs")
    _, pdf = plot(results, "--where", f"{X}=0.5")
    assert pd.read_csv(pdf.with_suffix(".csv"))[X].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--y", "loss"], "--y: must be one of train_loss, "),
        (["--x", "proxprop.tau"], f"--x: no run has the key 'proxprop.tau'; keys that vary here: {HUE}, {X}"),
        (["--hue", "mode"], "--hue: no run has the key 'mode'"),
        (["--where", "seed=7"], "--where: no run has seed=7"),
        (["--where", "seed"], "--where has the form key=value, got 'seed'"),
        (["--output", "figure.gif"], "--output must end in .pdf, .png, .svg, got figure.gif"),
        (["--output", "absent/figure.pdf"], "argument --output: there is no folder absent"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, capsys, options: list[str], message: str) -> None:
    assert message in error_of(capsys, write_sweep(tmp_path / "runs"), *options)


def test_a_folder_without_runs(tmp_path: Path, capsys) -> None:
    assert "is no folder" in error_of(capsys, tmp_path / "absent")


def test_modes_are_ordered_by_their_number(tmp_path: Path) -> None:
    results = write_sweep(tmp_path / "runs", modes=["prox_cg10", "prox_cg3", "gradient"])
    found = answer(Question(X, HUE, "train_loss"), [read_run(folder) for folder in find_runs(results)])
    assert found.hues == ["gradient", "prox_cg3", "prox_cg10"]


@pytest.mark.parametrize(
    ("value", "text"), [(50.0, "50"), (5e-4, "0.0005"), ((8, 4), "8x4"), (None, "null"), (True, "true"), ("a", "a")]
)
def test_labels(value: object, text: str) -> None:
    assert label(value) == text


def test_digits_that_are_no_numbers_are_text() -> None:
    assert sorted(["cg10", "²", "cg3", "٣"], key=sort_key) == ["cg3", "cg10", "²", "٣"]
