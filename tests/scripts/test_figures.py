"""The data behind the figures, the notes and the table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Page

from experiments.command.errors import RecordError
from experiments.folder.read import read_run
from scripts.plots.draw import Drawn, draw_figure, draw_panel, in_percent, loss_limits, time_note, x_ends, x_unit
from scripts.plots.figures import (
    ACCURACY_BY_EPOCH,
    FIGURE_2,
    FIGURE_3,
    FIGURES,
    LOSS_BY_EPOCH,
    LOSS_BY_TIME,
    Curve,
    Reference,
)
from scripts.plots.notes import (
    Footer,
    band_note,
    describe_data,
    provenance,
    seconds_note,
    short_commit,
    status_note,
)
from scripts.plots.runs import Replicates, Stat, load_runs, points, with_seconds_of
from scripts.plots.table import cell, make_table, to_markdown

from .synthetic import write_run, write_suite


def drawn(figure, runs: dict[str, Replicates]) -> list[Drawn]:
    return [Drawn(curve, runs[curve.run]) for curve in figure.curves if curve.run in runs]


def test_figures_show_the_runs_of_the_paper_configs(root: Path) -> None:
    shown = {curve.run for figure in FIGURES for curve in figure.curves}
    assert shown == {p.stem for folder in ("paper", "paper_text") for p in (root / "configs" / folder).glob("*.yaml")}


def test_time_is_the_sum_of_the_epochs(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", epoch_seconds=2.0, epochs=3))
    assert list(run.metrics["seconds"]) == [0, 2, 4, 6]


def test_a_run_without_rows_is_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    (folder / "metrics.csv").write_text(header + "\n")
    with pytest.raises(RecordError, match="holds no run that has recorded anything"):
        load_runs(tmp_path)


def test_status_of_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", finished=False, epochs=3)
    write_run(tmp_path / "c", diverges=True, epochs=2)
    runs = load_runs(tmp_path)
    note = status_note(["a", "b", "c", "d"], runs)
    assert note == "missing: d · interrupted: b (epoch 3) · diverged: c (epoch 2)"


def test_load_runs_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="absent is no folder"):
        load_runs(tmp_path / "absent")
    with pytest.raises(RecordError, match="holds no run"):
        load_runs(tmp_path)


def test_points_reach_just_past_the_axis(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", epochs=9))
    shown = points([run], "epoch", "train_loss", x_end=4)
    assert list(shown.xs) == [0, 1, 2, 3, 4, 5]
    assert shown.ys[0] == pytest.approx(2.3)
    assert np.isnan([shown.low, shown.high]).all()


def test_points_of_a_diverged_run_end_with_the_last_finite_value(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", diverges=True, epochs=3))
    shown = points([run], "epoch", "train_loss", x_end=50)
    assert list(shown.xs) == [0, 1, 2]
    assert np.isfinite(shown.ys).all()
    assert len(points([run], "epoch", "val_accuracy", x_end=50).xs) == 3


def write_seeds(results: Path, decays: list[float], **options) -> None:
    for seed, decay in enumerate(decays):
        name = "mlp_sgd_cg3" + (f",seed={seed}" if seed else "")
        write_run(results / name, decay=decay, seed=seed, **options)


def test_seeds_of_a_config_are_one_curve_with_a_band(tmp_path: Path) -> None:
    write_seeds(tmp_path, [0.04, 0.05, 0.09], epochs=3)
    (group,) = load_runs(tmp_path).values()
    assert (group.name, group.status, len(group.runs)) == ("mlp_sgd_cg3", "finished", 3)
    losses = [run.metrics["train_loss"].iloc[2] for run in group.runs]
    shown = points(group.runs, "epoch", "train_loss", x_end=50)
    assert list(shown.xs) == [0, 1, 2, 3]
    assert shown.ys[2] == pytest.approx(sum(losses) / 3)
    assert (shown.low[2], shown.high[2]) == (min(losses), max(losses))
    deviation = math.sqrt(sum((loss - sum(losses) / 3) ** 2 for loss in losses) / 2)
    assert group.train_loss(2) == Stat(*map(pytest.approx, (sum(losses) / 3, deviation, min(losses), max(losses))))


def test_a_band_leaves_out_seeds_that_diverged_and_epochs_that_some_have_not_come_to(tmp_path: Path) -> None:
    write_seeds(tmp_path, [0.04, 0.05], epochs=5)
    write_run(tmp_path / "mlp_sgd_cg3,seed=2", seed=2, epochs=3, finished=False, settings={"epochs": 5})
    write_run(tmp_path / "mlp_sgd_cg3,seed=3", seed=3, epochs=1, diverges=True, settings={"epochs": 5})
    (group,) = load_runs(tmp_path).values()
    assert group.status == "1 of 4 interrupted, 1 of 4 diverged"
    assert math.isfinite(group.stat(lambda run: run.value("train_loss")).mean)
    assert list(points(group.runs, "epoch", "train_loss", x_end=50).xs) == [0, 1, 2, 3]
    note = status_note(["mlp_sgd_cg3"], {"mlp_sgd_cg3": group})
    assert note == "interrupted: mlp_sgd_cg3,seed=2 (epoch 3) · diverged: mlp_sgd_cg3,seed=3 (epoch 1)"


def test_seeds_that_differ_in_more_are_refused(tmp_path: Path) -> None:
    write_seeds(tmp_path, [0.04], epochs=3)
    write_run(tmp_path / "mlp_sgd_cg3,seed=1", seed=1, epochs=3, settings={"batch_size": 100})
    with pytest.raises(RecordError, match="two seeds of one config, but they also differ in batch_size"):
        load_runs(tmp_path)


def test_seeds_may_have_read_their_images_from_different_folders(tmp_path: Path) -> None:
    write_seeds(tmp_path, [0.04], epochs=3)
    write_run(tmp_path / "mlp_sgd_cg3,seed=1", seed=1, epochs=3, settings={"data": {"root": "elsewhere"}})
    (group,) = load_runs(tmp_path).values()
    assert len(group.runs) == 2


@pytest.mark.parametrize("settings", [{}, {"order_seed": 0}])
def test_a_seed_is_counted_once(tmp_path: Path, settings: dict[str, int]) -> None:
    write_seeds(tmp_path, [0.04], epochs=3)
    write_run(tmp_path / "mlp_sgd_cg3,seed=0", epochs=3, settings=settings)
    with pytest.raises(RecordError, match=r"mlp_sgd_cg3 and \S+,seed=0 are of one config and one seed: leave one of"):
        load_runs(tmp_path)


def test_time_of_seeds_is_their_mean(tmp_path: Path) -> None:
    for seed, seconds in enumerate((2.0, 4.0)):
        write_run(tmp_path / f"a,seed={seed}", seed=seed, epoch_seconds=seconds, epochs=2)
    (group,) = load_runs(tmp_path).values()
    assert list(points(group.runs, "seconds", "train_loss", x_end=50).xs) == [0, 3, 6]


def test_seconds_of_quiet_runs_take_the_place_of_a_runs_own(tmp_path: Path) -> None:
    def mode(name: str) -> dict[str, Any]:
        return {"proxprop": {"optimization_mode": name}, "epochs": 4}

    write_run(tmp_path / "runs" / "mlp_sgd_cg3", epochs=4, epoch_seconds=90)
    write_run(tmp_path / "runs" / "mlp_sgd_cg3,seed=1", epochs=4, epoch_seconds=80, seed=1)
    write_run(tmp_path / "runs" / "mlp_sgd_cg5", epochs=4, epoch_seconds=90)
    write_run(tmp_path / "published" / "mlp_sgd_cg3", epochs=4, settings=mode("published_cg3"))
    quiet = [
        read_run(write_run(tmp_path / "quiet" / "a_cg3", epochs=2, epoch_seconds=3)),
        read_run(write_run(tmp_path / "quiet" / "b", epochs=2, epoch_seconds=7, settings=mode("published_cg3"))),
    ]
    runs = with_seconds_of(load_runs(tmp_path / "runs"), quiet)
    published = with_seconds_of(load_runs(tmp_path / "published"), quiet)
    for run in runs["mlp_sgd_cg3"].runs:
        assert list(run.metrics["seconds"]) == [0, 3, 6, 9, 12]
    assert (runs["mlp_sgd_cg3"].seconds, runs["mlp_sgd_cg3"].seconds_per_epoch) == (12, 3)
    assert published["mlp_sgd_cg3"].seconds == 28
    assert math.isnan(runs["mlp_sgd_cg5"].seconds)
    assert len(points(runs["mlp_sgd_cg5"].runs, "seconds", "train_loss", x_end=50).xs) == 0
    assert x_ends(FIGURE_2, drawn(FIGURE_2, runs)) == {"epoch": 4, "seconds": 12}
    note = seconds_note(quiet, [*runs.values(), *published.values()])
    assert note.endswith("on a quiet machine (Example GPU, 8 threads, PyTorch 2.14.1); none for mlp_sgd_cg5")
    assert seconds_note([], runs.values()) == ""


def test_seconds_of_quiet_runs_on_fewer_images_go_by_steps(tmp_path: Path) -> None:
    cifar = {"data": {"name": "cifar10"}}
    fewer = {"data": {"name": "cifar10", "train_samples": 4600}}  # ten steps of 500 in place of 90
    write_run(tmp_path / "runs" / "mlp_sgd_cg3", epochs=4, settings=cifar)
    quiet = [read_run(write_run(tmp_path / "quiet" / "a_cg3", epochs=2, epoch_seconds=3, settings=fewer))]
    runs = with_seconds_of(load_runs(tmp_path / "runs"), quiet)
    assert list(runs["mlp_sgd_cg3"].runs[0].metrics["seconds"]) == [0, 27, 54, 81, 108]


def test_seconds_are_the_median_of_the_quiet_runs_that_ran_as_fast(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mlp_sgd_cg3")
    quiet = [
        read_run(write_run(tmp_path / "quiet" / f"{name}_cg3", epochs=epochs, epoch_seconds=seconds, settings=settings))
        for name, epochs, seconds, settings in [
            ("a", 2, 3, {}),
            ("b", 2, 50, {}),
            ("c", 2, 4, {}),
            ("begun", 0, 1, {}),  # in its first epoch
            ("compiled", 2, 1, {"compile": "default"}),
            ("observed", 2, 9, {"diagnostics_every": 1}),
        ]
    ]
    assert with_seconds_of(load_runs(tmp_path / "runs"), quiet)["mlp_sgd_cg3"].seconds_per_epoch == 4
    assert math.isnan(with_seconds_of(load_runs(tmp_path / "runs"), quiet[3:])["mlp_sgd_cg3"].seconds)


def test_a_sweep_over_seeds_alone_is_one_curve_of_its_name(tmp_path: Path) -> None:
    for sweep in ("one", "two"):
        for seed in range(3):
            write_run(tmp_path / sweep / f"seed={seed}", epoch_seconds=(3, 50, 4)[seed], seed=seed)
    groups = load_runs(tmp_path / "one", tmp_path / "two")
    assert {name: len(group.runs) for name, group in groups.items()} == {"one": 3, "two": 3}
    assert groups["one"].seconds_per_epoch == 4  # the median over seeds


def test_folders_with_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in "ab":
        write_run(tmp_path / folder / "mlp_sgd_cg3")
    with pytest.raises(RecordError, match=r"a/mlp_sgd_cg3 and .*b/mlp_sgd_cg3: two runs of one name"):
        load_runs(tmp_path / "a", tmp_path / "b")
    assert load_runs(tmp_path / "a").keys() == {"mlp_sgd_cg3"}


@pytest.mark.parametrize("commits", [1, 4, 30])
def test_footers_stay_on_the_page_and_off_the_axes(tmp_path: Path, commits: int) -> None:
    for index in range(commits):
        seed = f",seed={index}" if index else ""
        write_run(tmp_path / f"mlp_sgd_cg3{seed}", seed=index, git_commit=f"{index:040x}-dirty")
    items = drawn(FIGURE_2, load_runs(tmp_path))
    long = "missing: " + ", ".join(f"mlp_sgd_cg{n}" for n in range(40))
    page = draw_figure(FIGURE_2, "title", items, Footer.of([r for i in items for r in i.group.runs], [long]))
    canvas = FigureCanvasAgg(page)
    canvas.draw()
    box = page.bbox
    texts = [text.get_window_extent() for text in page.texts]
    assert all(text.x0 >= 0 and text.x1 <= box.x1 and text.y0 >= 0 for text in texts)
    lowest = min(axes.get_tightbbox().y0 for axes in page.axes)
    assert max(text.y1 for text in texts if text.y1 < box.y1 / 2) < lowest
    written = " ".join(text.get_text() for text in page.texts)
    assert all(f"{index:040x}"[:10] in written for index in range(commits))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_what_the_paper_states_is_drawn_where_it_belongs(figure, tmp_path: Path) -> None:
    for data in ("digits", "cifar10"):
        for curve in figure.curves:
            write_run(tmp_path / data / curve.run, epochs=9, settings={"data": {"name": data}})
    digits = draw_figure(figure, "", drawn(figure, load_runs(tmp_path / "digits")), Footer.of([], []))
    assert not any(axes.get_legend() for axes in digits.axes)
    items = drawn(figure, load_runs(tmp_path / "cifar10"))
    page = draw_figure(figure, figure.title, items, Footer.of([], []))
    FigureCanvasAgg(page).draw()
    for axes, panel in zip(page.axes, figure.panels, strict=True):
        legend = axes.get_legend()
        if panel.y != "val_accuracy":
            assert legend is None
            continue
        accuracies = sorted((reference.value for reference in figure.references), reverse=True)
        for text, value in zip(legend.get_texts(), accuracies, strict=True):
            assert text.get_text().startswith("paper, ")
            assert text.get_text().endswith(f"{100 * value:g} %")
            low, high = axes.get_ylim()
            assert low < value < high
        box = legend.get_window_extent()  # where no curve is
        for line in axes.lines:
            assert not any(box.contains(x, y) for x, y in axes.transData.transform(np.column_stack(line.get_data())))


@pytest.mark.parametrize(
    ("stat", "form", "text"),
    [
        (Stat(0.27561, 0.00432), "#.3g", "0.276 ± 0.004"),
        (Stat(0.27561), "#.3g", "0.276"),
        (Stat(12.3, 4.567), "#.3g", "12.3 ± 4.6"),
        (Stat(0.5258, 0.0031), ".2%", "52.58 ± 0.31%"),
        (Stat(2.114e-4, 3.6e-5), "#.3g", "(2.11 ± 0.36)e-4"),
        (Stat(2.114e-5), "#.3g", "2.11e-05"),
        (Stat(math.nan), ".2%", "–"),
    ],
)
def test_cells_of_several_seeds(stat: Stat, form: str, text: str) -> None:
    assert cell(stat, form) == text


def test_accuracy_axes_start_below_all_but_the_start_of_training(tmp_path: Path) -> None:
    for seed, decay in enumerate((0.5, 0.9)):
        write_run(tmp_path / f"a,seed={seed}", decay=decay, epochs=4, seed=seed)
    items = [Drawn(Curve("a", "A", "gradient"), load_runs(tmp_path)["a"])]
    accuracies = [read_run(tmp_path / f"a,seed={seed}").metrics["val_accuracy"].iloc[1:] for seed in (0, 1)]
    lowest, highest = min(map(min, accuracies)), max(map(max, accuracies))
    low, high = axes_of(items).get_ylim()
    assert lowest - 0.1 * (highest - lowest) < low < lowest
    assert highest < high
    assert axes_of(items, [Reference("val_accuracy", lowest / 2, "the paper's", "gradient")]).get_ylim()[0] < lowest / 2
    write_run(tmp_path / "b", epochs=0)
    nothing = [Drawn(Curve("b", "B", "gradient"), load_runs(tmp_path)["b"])]
    assert math.isfinite(axes_of(nothing).get_ylim()[0])


@pytest.mark.parametrize(("low", "high", "texts"), [(0.3, 0.6, ["40%", "60%"]), (0.521, 0.528, ["52.2%", "52.8%"])])
def test_an_accuracy_axis_says_where_its_ticks_are(low: float, high: float, texts: list[str]) -> None:
    axes = Page().add_subplot()
    axes.set_ylim(low, high)
    in_percent(axes)
    FigureCanvasAgg(axes.figure).draw()
    labels = {label.get_text(): label.get_position()[1] for label in axes.get_yticklabels()}
    assert set(texts) <= set(labels)
    assert all(float(text.removesuffix("%")) / 100 == pytest.approx(at) for text, at in labels.items())


def axes_of(items: list[Drawn], references: Sequence[Reference] = ()) -> Axes:
    axes = Page().add_subplot()
    draw_panel(axes, ACCURACY_BY_EPOCH, items, 4, references)
    return axes


def test_axes_end_with_the_proxprop_runs(tmp_path: Path) -> None:
    runs = load_runs(write_suite(tmp_path / "paper"))
    assert x_ends(FIGURE_2, drawn(FIGURE_2, runs)) == {"epoch": 50, "seconds": 300}  # exact: 50 * 6
    assert x_ends(FIGURE_3, drawn(FIGURE_3, runs)) == {"epoch": 50, "seconds": 150}  # cg3: 50 * 3


def test_axes_without_a_proxprop_run_end_with_the_baseline(tmp_path: Path) -> None:
    write_run(tmp_path / "mlp_sgd_gradient", epochs=7, epoch_seconds=1)
    ends = x_ends(FIGURE_2, drawn(FIGURE_2, load_runs(tmp_path)))
    assert ends == {"epoch": 7, "seconds": 7}


def test_curves_that_the_time_axis_cuts_off_are_named(tmp_path: Path) -> None:
    runs = load_runs(write_suite(tmp_path))
    assert time_note(FIGURE_3, drawn(FIGURE_3, runs)) == (
        "time axes end with Adam + ProxProp (3 cg); longer, and cut off there: Adam + BackProp, Adam + ProxProp (10 cg)"
    )
    del runs["mlp_sgd_gradient"], runs["mlp_sgd_exact"]
    assert time_note(FIGURE_2, drawn(FIGURE_2, runs)) == ""
    assert time_note(FIGURE_2, []) == ""


@pytest.mark.parametrize(("seconds", "size", "unit"), [(0, 1, "seconds"), (300, 60, "minutes"), (9000, 3600, "hours")])
def test_time_unit_suits_the_axis(seconds: float, size: int, unit: str) -> None:
    assert x_unit(LOSS_BY_TIME, seconds) == (size, f"Training time ({unit})")


def test_a_diverging_curve_does_not_flatten_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "mlp_sgd_cg3", epochs=5)
    write_run(tmp_path / "mlp_sgd_cg5", epochs=30, diverges=True)
    items = drawn(FIGURE_2, load_runs(tmp_path))
    low, high = loss_limits(LOSS_BY_EPOCH, items, 30)
    assert 1 < low < 2.3
    assert 2.3 < high < 6


def test_a_band_is_within_the_loss_axis(tmp_path: Path) -> None:
    for spread in (0.2, 0.99):
        group = Replicates("mlp_sgd_cg3", tuple(read_run(write_run(tmp_path / f"{spread},{n}")) for n in range(2)))
        for sign, run in zip((-1, 1), group.runs, strict=True):
            run.metrics["train_loss"] = 1.0 + sign * spread
        low, high = loss_limits(LOSS_BY_EPOCH, [Drawn(FIGURE_2.curves[1], group)], 30)
        assert low == pytest.approx(0.85 * (1 - spread))
        assert high == pytest.approx(1.2 * (1 + spread))


def test_nothing_is_drawn_over_time_where_no_run_has_seconds(tmp_path: Path) -> None:
    write_run(tmp_path / "mlp_sgd_cg3", epochs=3)
    timed = drawn(FIGURE_2, load_runs(tmp_path))
    without = drawn(FIGURE_2, with_seconds_of(load_runs(tmp_path), []))
    for items, titles in ((timed, ["Loss over epochs", "Loss over time", "Accuracy over epochs"]),
                          (without, ["Loss over epochs", "Accuracy over epochs"])):  # fmt: skip
        page = draw_figure(FIGURE_2, FIGURE_2.title, items, Footer.of([], []))
        FigureCanvasAgg(page).draw()
        assert [axes.get_title() or axes.get_title(loc="left") for axes in page.axes] == titles


def test_provenance_lists_what_differs(tmp_path: Path) -> None:
    unofficial = {"name": "cifar10", "official": False, "train_samples": 100, "files_md5": {}}
    write_run(tmp_path / "a_gradient", epochs=9)
    write_run(tmp_path / "b", seed=3, data=unofficial, date="2026-06-01T00:00:00+00:00")
    text = provenance([read_run(folder) for folder in sorted(tmp_path.iterdir())]).replace("\N{NO-BREAK SPACE}", " ")
    assert "seed: 0, 3" in text
    assert "CIFAR-10, official copy, 45,000 training images" in text
    assert "CIFAR-10, NOT the official copy, 100 training images" in text
    assert "epochs run: 4 (ProxProp), 9 (BackProp)" in text
    assert "date: 2026-05-04 to 2026-06-01" in text
    assert text.count("Example GPU (cuda)") == 1
    earlier = {"git_commit": "abc-dirty", "torch": "2.12.0", "device": "cpu", "device_name": "Old CPU", "threads": 2}
    run = read_run(write_run(tmp_path / "moved", earlier_environments=[{"until_epoch": 2, **earlier}]))
    text = provenance([run]).replace("\N{NO-BREAK SPACE}", " ")
    assert "Hardware: Old CPU (cpu), Example GPU (cuda) · threads: 2, 8" in text
    assert "PyTorch: 2.12.0, 2.14.1 · commit: abc-dirty, 0123456789" in text
    rival = {"proxprop": {"optimization_mode": "gradient"}, "optimizer": {"name": "adamw", "lr": 1.0}}
    text = provenance([read_run(write_run(tmp_path / "c", settings=rival))]).replace("\N{NO-BREAK SPACE}", " ")
    assert "epochs run: 4 (without ProxProp)" in text


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        ([1, 1], ""),
        ([1, 3, 3], "bands: lowest to highest of 3 seeds; a single run has none"),
        ([3, 2], "bands: lowest to highest of 2 or 3 seeds"),
    ],
)
def test_a_band_is_explained(seeds: list[int], text: str) -> None:
    assert band_note(seeds) == text


def test_provenance_of_digits_claims_no_copy() -> None:
    data = {"name": "digits", "official": None, "train_samples": 1200}
    assert describe_data(data) == "scikit-learn digits, 1,200 training images"


@pytest.mark.parametrize(
    ("commit", "text"),
    [(None, "unknown"), ("0123456789abc", "0123456789"), ("0123456789abc-dirty", "0123456789-dirty")],
)
def test_short_commit(commit: str | None, text: str) -> None:
    assert short_commit(commit) == text


def test_table_compares_with_backprop(tmp_path: Path) -> None:
    write_run(tmp_path / "paper" / "mlp_sgd_gradient", epochs=20, epoch_seconds=2)
    write_run(tmp_path / "paper" / "mlp_sgd_cg3", epochs=10, epoch_seconds=5, decay=0.1)
    write_run(tmp_path / "published" / "mlp_sgd_cg3", epochs=10, epoch_seconds=8)
    runs = load_runs(tmp_path / "paper")
    mlp, convnet = make_table([FIGURE_2, FIGURE_3], runs, load_runs(tmp_path / "published"))

    rows = {row.label: row for row in mlp.rows}
    assert mlp.common_epoch == 10
    assert rows["BackProp"].ratio == "1.00"
    assert rows["ProxProp (cg3)"].ratio == "2.50"
    assert rows["ProxProp (cg3), published solver"].ratio == "4.00"
    assert rows["ProxProp (cg3)"].final_loss == f"{runs['mlp_sgd_cg3'].train_loss(10).mean:#.3g}"
    assert rows["BackProp"].loss_at_common_epoch == f"{runs['mlp_sgd_gradient'].train_loss(10).mean:#.3g}"
    assert rows["ProxProp (cg3)"].test_accuracy == "51.25%"
    assert rows["ProxProp (exact)"].status == "missing"
    assert {row.status for row in convnet.rows} == {"missing"}


def test_table_of_an_unfinished_run_has_no_test_accuracy(tmp_path: Path) -> None:
    write_run(tmp_path / "mlp_sgd_cg3", finished=False)
    run = load_runs(tmp_path)["mlp_sgd_cg3"]
    assert math.isnan(run.stat(lambda one: one.test_accuracy).mean)
    (row,) = [row for row in make_table([FIGURE_2], {run.name: run}, {})[0].rows if row.status != "missing"]
    assert (row.test_accuracy, row.ratio, row.status) == ("–", "–", "interrupted")


def test_markdown_rows_have_equal_cells(tmp_path: Path) -> None:
    table = to_markdown(make_table([FIGURE_2, FIGURE_3], load_runs(write_suite(tmp_path / "paper")), {}))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 8 + 2 * 2
    assert {line.count("|") for line in rows} == {10}


def test_a_figure_without_a_run_says_so() -> None:
    page = draw_figure(FIGURE_2, FIGURE_2.title, [], Footer.of([], []))
    assert "no run of this figure is there" in [text.get_text() for text in page.texts]
    assert not page.axes
