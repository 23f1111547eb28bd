"""The command scripts/plot_diagnostics.py: the numbers it draws, what it refuses, and what it says of the runs."""

from pathlib import Path

import pytest

from experiments.folder.read import read_diagnostics, read_run
from scripts.plot_diagnostics import main
from scripts.plots import style
from scripts.plots.diagnostics import Observed, draw_diagnostics

from .pages import assert_all_is_on_the_paper, y_tick_labels
from .synthetic import write_run

HEADER = "epoch,layer,steps,min_cosine,mean_cosine,not_descent,mean_step_ratio,mean_weight_ratio,failed"


def write_observed(folder: Path, mode: str, layers=("1", "3"), cosine=0.5, not_descent=0, ratio=0.1, **options) -> Path:
    write_run(folder, settings={"proxprop": {"optimization_mode": mode, "tau_prox": 0.1}}, **options)
    lines = [
        f"{epoch},{layer},20,{cosine / epoch:g},0.6,{not_descent},{ratio * epoch + column:g},1e-3,0"
        for epoch in (1, 2, 3, 4)
        for column, layer in enumerate(layers)
    ]
    (folder / "diagnostics.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return folder


def plot(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_figures_are_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    run = write_observed(tmp_path / "runs" / "one", "prox_cg3")
    output = tmp_path / f"figure{suffix}"
    assert plot(run, "--output", output) == 0
    once = output.read_bytes()
    assert once.startswith(start)
    assert plot(tmp_path / "runs", run, "--output", output) == 0  # the same run once more
    assert output.read_bytes() == once


def test_curves_are_the_rows_and_labels_the_modes(tmp_path: Path) -> None:
    folders = [write_observed(tmp_path / mode, mode) for mode in ("prox_cg3", "published_cg3")]
    style.apply()
    page = draw_diagnostics([Observed(read_run(folder), read_diagnostics(folder)) for folder in folders])
    above, below, _, right = page.axes
    cosine, _zero = above.lines[0], above.lines[-1]
    assert list(cosine.get_xdata()) == [1, 2, 3, 4]
    assert list(cosine.get_ydata()) == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125], abs=1e-5)
    assert list(below.lines[1].get_ydata()) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert list(right.lines[0].get_ydata()) == pytest.approx([1.1, 1.2, 1.3, 1.4])
    assert [text.get_text() for text in page.legends[0].get_texts()] == ["prox_cg3", "published_cg3"]
    assert [axes.get_title(loc="left") for axes in page.axes] == ["Layer 1", "", "Layer 3", ""]
    assert above.get_ylim()[0] < 0 < above.get_ylim()[1]


@pytest.mark.parametrize("ratio", [0.1, 1e-6])
@pytest.mark.parametrize("count", [1, 6, 10])
def test_text_stays_on_the_page(tmp_path: Path, count: int, ratio: float) -> None:
    layers = [f"block.{index}" for index in range(6)]
    for index in range(count):
        folder = tmp_path / f"a-run-of-some-length,{index}"
        write_observed(folder, "prox_cg3", layers, cosine=-1e-3 * index, ratio=ratio * 100**index)
    style.apply()
    page = draw_diagnostics([Observed(read_run(f), read_diagnostics(f)) for f in sorted(tmp_path.iterdir())])
    assert_all_is_on_the_paper(page, *y_tick_labels(page))
    texts = [*page.texts, *page.legends[0].get_texts()]
    texts += [*y_tick_labels(page), *(label for axes in page.axes for label in (axes.xaxis.label, axes.yaxis.label))]
    assert not [text for text in texts if "$" in text.get_text()]
    legend = page.legends[0].get_window_extent()
    assert all(axes.get_window_extent().y1 < legend.y0 for axes in page.axes)


def test_the_page_says_what_does_not_descend(tmp_path: Path) -> None:
    good = write_observed(tmp_path / "good", "prox_cg3")
    bad = write_observed(tmp_path / "bad", "prox_cg1", not_descent=2, finished=False)
    style.apply()
    page = draw_diagnostics([Observed(read_run(folder), read_diagnostics(folder)) for folder in (good, bad)])
    text = " ".join(text.get_text() for text in page.texts)
    assert "320 directions observed; those that do not descend: prox_cg1 16" in text
    assert "not finished: bad (interrupted)" in text
    alone = draw_diagnostics([Observed(read_run(good), read_diagnostics(good))])
    assert "160 directions observed; those that do not descend: none" in " ".join(t.get_text() for t in alone.texts)


def test_runs_without_diagnostics_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_observed(tmp_path / "runs" / "one", "prox_cg3")
    write_run(tmp_path / "runs" / "other")
    assert plot(tmp_path / "runs", "--output", tmp_path / "figure.pdf") == 0
    assert capsys.readouterr().out == "note: without diagnostics.csv: other\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: write_run(root / "one"), "no run has a diagnostics.csv; runs record it with diagnostics_every=1"),
        (lambda root: root.mkdir(), "holds no run"),
        (lambda root: None, "is no folder"),
        (lambda root: [write_observed(root / n, "prox_cg3", n) for n in ("ab", "cd")],
         "have different layers (a, b and c, d); draw them in two figures"),
        (lambda root: write_observed(root / "one", "prox_cg3", "abcdefg"), "has 7 layers, and a page room for 6"),
        (lambda root: (write_observed(root / "one", "prox_cg3") / "diagnostics.csv").write_text("x\n"),
         "must have the columns epoch,layer"),
        (lambda root: (write_observed(root / "one", "prox_cg3") / "diagnostics.csv").write_text(HEADER + "\n"),
         "has no rows"),
    ],
    ids=["without", "empty", "missing", "layers", "many", "damaged", "no rows"],
)  # fmt: skip
def test_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], make, words: str) -> None:
    make(tmp_path / "runs")
    assert plot(tmp_path / "runs", "--output", tmp_path / "figure.pdf") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "figure.pdf").exists()


def test_a_format_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_observed(tmp_path / "one", "prox_cg3")
    assert plot(run, "--output", tmp_path / "figure.jpg") == 2
    assert capsys.readouterr().err.startswith("error: --output must end in .pdf, .png, .svg, got ")
