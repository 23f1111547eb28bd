"""ProxProp beside other optimizers: the tables' and the page's numbers, who is said to be first, what is refused."""

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.command.errors import RecordError
from experiments.config.sweep_file import load_config_file
from experiments.folder.read import RecordedRun, read_run
from scripts.plot_rivals import main
from scripts.plots import style
from scripts.plots.rivals import OPTIMIZERS, Costs, by_network, draw_rivals, search_to_markdown, to_markdown
from scripts.plots.runs import load_runs
from scripts.report import RIVALS, fill

from .pages import assert_all_is_on_the_paper
from .synthetic import write_run

EXTRAS: dict[str, dict[str, Any]] = {
    "soap": {"update_every": 10},
    "shampoo": {"update_every": 10},
    "kfac": {"update_every": 10, "damping": 0.1},
    "isaac": {"damping": 0.04},
}


def write_method(
    root: Path,
    optimizer: str,
    mode: str = "gradient",
    *,
    model: str = "mlp",
    lr: float = 0.1,
    seed: int = 0,
    **run: Any,
) -> Path:
    settings = {
        "model": {"name": model},
        "data": {"name": "cifar10"},
        "optimizer": {"name": optimizer, "lr": lr, **EXTRAS.get(optimizer, {})},
        "proxprop": {"optimization_mode": mode, "tau_prox": 0.05},
    }
    name = f"name={optimizer},optimization_mode={mode},lr={lr:g}" + f",seed={seed}" * (seed > 0)
    return write_run(root / name, settings=settings, seed=seed, **run)


def write_costs(path: Path, folders: list[Path], step_seconds: float = 0.5) -> Path:
    rows = []
    for folder in folders:
        config = read_run(folder).config
        rows.append({**config.model_dump(include={"model", "optimizer", "proxprop", "batch_size"}),
                     "step_seconds": step_seconds, "peak_bytes": 3.0 * 2**20})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": "Example CPU", "threads": 1, "torch": "2.14.1", "rows": rows}))
    return path


def final(folder: Path, column: str) -> float:
    with (folder / "metrics.csv").open() as file:
        return float(list(csv.DictReader(file))[-1][column])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three methods on the MLP with three seeds each, two on the ConvNet; of the MLP's, Adam is first, SGD last."""
    folder = tmp_path / "results" / RIVALS["mlp"]
    written = []
    for seed in range(3):
        written.append(write_method(folder / "mlp", "adam", decay=0.2 + 0.01 * seed, seed=seed))
        written.append(write_method(folder / "mlp", "adam", "prox_cg3", decay=0.1 + 0.01 * seed, seed=seed))
        written.append(write_method(folder / "mlp", "sgd", decay=0.01 + 0.001 * seed, seed=seed))
    written.append(write_method(folder / "convnet", "sgd", model="convnet", decay=0.1))
    written.append(write_method(folder / "convnet", "sgd", "prox_exact", model="convnet", decay=0.2))
    write_costs(folder / "costs.json", written)
    return folder


def methods_in(folder: Path, costs: Costs | None = None):
    costs = costs or Costs()
    return by_network([group for root in ("mlp", "convnet") for group in load_runs(folder / root).values()], costs)


def test_a_row_of_the_table_is_means_over_seeds_and_measured_costs(results: Path) -> None:
    table = to_markdown(methods_in(results, Costs.read(results / "costs.json"))["mlp"]).splitlines()
    losses = [final(results / "mlp" / f"name=sgd,optimization_mode=gradient,lr=0.1{s}", "train_loss")
              for s in ("", ",seed=1", ",seed=2")]  # fmt: skip
    mean = sum(losses) / 3
    std = (sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5
    row = table[-1].split(" | ")
    assert row[0] == "| SGD"
    assert row[1] == f"{mean:#.3g} ± {std:.2f}"
    assert row[3] == "51.25 ± 0.00 %"
    assert row[4:6] == ["45.0", "3"]  # 45,000 images in batches of 500, half a second each
    assert row[6] == "lr 0.1 |"


def test_rows_go_from_the_lowest_loss_up(results: Path) -> None:
    table = to_markdown(methods_in(results)["mlp"]).splitlines()
    assert [line.split(" | ")[0] for line in table[6:]] == ["| Adam", "| ProxProp (cg3) in Adam", "| SGD"]


def test_the_first_sentence_says_where_proxprop_loses(results: Path) -> None:
    mlp, convnet = methods_in(results).values()
    adam, prox = (
        [final(folder, "train_loss") for folder in (results / "mlp").glob(f"name=adam,*={kind}*")]
        for kind in ("gradient", "prox_cg3")
    )
    assert to_markdown(mlp).splitlines()[0] == (
        f"- Training loss: first of 3 is Adam ({statistics.mean(adam):#.3g} ± {statistics.stdev(adam):.3f}); ProxProp "
        f"loses: its best, ProxProp (cg3) in Adam, is number 2 ({statistics.mean(prox):#.3g} ± "
        f"{statistics.stdev(prox):.2f})."
    )
    assert to_markdown(convnet).startswith("- Training loss: first of 2 is ProxProp (exact) in SGD (")
    assert "; the best without ProxProp, SGD, is number 2 (" in to_markdown(convnet)


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ([0.1, 0.12, 0.14], ", with Adam no further off than seeds differ; ProxProp's best"),
        ([0.01, 0.02, 0.03], "; ProxProp loses: its best"),
    ],
)
def test_what_seeds_cannot_tell_apart_is_no_loss(tmp_path: Path, others: list[float], text: str) -> None:
    for seed, (decay, other) in enumerate(zip([0.11, 0.13, 0.15], others, strict=True)):
        write_method(tmp_path / "mlp", "sgd", decay=decay, seed=seed)
        write_method(tmp_path / "mlp", "adam", "prox_cg3", decay=other, seed=seed)
    first = to_markdown(by_network(load_runs(tmp_path / "mlp").values(), Costs())["mlp"]).splitlines()[0]
    assert text.replace("Adam", "ProxProp (cg3) in Adam") + ", ProxProp (cg3) in Adam, is number 2 (" in first


def test_the_best_accuracy_is_given_with_its_epochs(tmp_path: Path) -> None:
    for seed, best in enumerate((2, 4)):
        folder = write_method(tmp_path / "mlp", "sgd", seed=seed, epochs=5)
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        rows[1 + best][rows[0].index("val_accuracy")] = "0.99"
        (folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    table = to_markdown(by_network(load_runs(tmp_path / "mlp").values(), Costs())["mlp"])
    assert "| 99.00 ± 0.00 % (2 to 4) |" in table


def test_settings_are_all_that_was_given(tmp_path: Path) -> None:
    for optimizer in OPTIMIZERS:
        write_method(tmp_path / "mlp", optimizer)
    write_run(tmp_path / "mlp" / "muon_cg3", settings={
        "optimizer": {"name": "muon", "lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.01},
        "proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 0.05}})  # fmt: skip
    rows = to_markdown(by_network(load_runs(tmp_path / "mlp").values(), Costs())["mlp"])
    for name, text in [
        ("SGD", "lr 0.1"),
        ("SOAP", "lr 0.1, renewed every 10 steps"),
        ("K-FAC", "lr 0.1, damping 0.1, renewed every 10 steps"),
        ("ISAAC", "lr 0.1, damping 0.04"),
        ("ProxProp (cg3) in Muon", "lr 0.02, momentum 0.95 (Nesterov), weight decay 0.01, τ 0.05"),
    ]:
        (row,) = [line for line in rows.splitlines() if line.startswith(f"| {name} |")]
        assert row.endswith(f"| – | – | {text} |")


def test_a_diverged_seed_is_told_and_is_in_no_mean(tmp_path: Path) -> None:
    kept = write_method(tmp_path / "mlp", "sgd", seed=0)
    write_method(tmp_path / "mlp", "sgd", seed=1, diverges=True)
    table = to_markdown(by_network(load_runs(tmp_path / "mlp").values(), Costs())["mlp"])
    assert f"| SGD | {final(kept, 'train_loss'):#.3g} (1 of 2 diverged) |" in table


def test_what_diverged_is_neither_first_nor_chosen(tmp_path: Path) -> None:
    write_method(tmp_path / "mlp", "sgd", decay=0.01)
    for seed in range(2):
        folder = write_method(tmp_path / "mlp", "soap", seed=seed, diverges=True, test_accuracy=0.9)
        text = (folder / "metrics.csv").read_text()
        (folder / "metrics.csv").write_text(text.replace(",0.1,", ",0.9,"))  # the accuracies
    table = to_markdown(by_network(load_runs(tmp_path / "mlp").values(), Costs())["mlp"])
    assert [line.split(" (")[0] for line in table.splitlines()[:3]] == [
        f"- {number}: first of 2 is SGD" for number in ("Training loss", "Best validation accuracy", "Test accuracy")
    ]
    assert "**" not in search_to_markdown([read_run(folder) for folder in (tmp_path / "mlp").glob("*soap*")])


def test_the_search_shows_all_rates_and_the_chosen_one(tmp_path: Path) -> None:
    for lr, decay in [(0.1, 0.05), (0.01, 0.2), (0.03, 0.1)]:
        write_method(tmp_path / "search", "adam", lr=lr, decay=decay)
    write_method(tmp_path / "search", "adam", lr=1.0, diverges=True)
    for lr in (1.0, 2.0, 3.0, 4.0):
        write_method(tmp_path / "search", "sgd", "prox_exact", lr=lr, decay=lr / 10)
    write_method(tmp_path / "search", "soap", lr=1.0)
    runs = [read_run(folder) for folder in sorted((tmp_path / "search").iterdir())]
    shown = {
        run.config.optimizer.lr: f"{final(run.folder, 'val_loss'):#.3g}" for run in runs if "adam" in str(run.folder)
    }
    lines = search_to_markdown(runs).splitlines()
    assert lines[2] == f"| Adam | **0.01: {shown[0.01]}**, 0.03: {shown[0.03]}, 0.1: {shown[0.1]}, 1: diverged |"
    assert lines[3].startswith("| SOAP | 1: ")  # the only one so far, so none is chosen
    assert ", **4: " in lines[4]


def test_the_rates_tried_over_all_epochs_are_shown_with_the_best_of_each_number(tmp_path: Path) -> None:
    assert fill("{{rates mlp}}", tmp_path) == "–"
    root = tmp_path / RIVALS["mlp"] / "rates_mlp"
    at = {
        lr: write_method(root, "adam", lr=lr, decay=decay, test_accuracy=accuracy)
        for lr, decay, accuracy in [(0.001, 0.01, 0.6), (0.01, 0.1, 0.7), (0.1, 0.2, 0.5)]
    }
    write_method(root, "sgd", lr=0.1, diverges=True)
    write_method(root, "sgd", lr=0.01)
    losses = {lr: f"{final(folder, 'train_loss'):#.3g}" for lr, folder in at.items()}
    best = {lr: f"{100 * read_run(folder).metrics['val_accuracy'].max():.2f} %" for lr, folder in at.items()}
    lines = fill("{{rates mlp}}", tmp_path).splitlines()
    assert lines[3] == (
        f"| Adam | 0.001: {losses[0.001]}, 0.01: {losses[0.01]}, **0.1: {losses[0.1]}** | "
        f"0.001: {best[0.001]}, 0.01: {best[0.01]}, **0.1: {best[0.1]}** | "
        "0.001: 60.00 %, **0.01: 70.00 %**, 0.1: 50.00 % |"
    )
    assert lines[2].startswith("| SGD | **0.01: ")
    assert lines[2].count("0.1: diverged") == 3


def test_the_report_compares_what_steps_take(results: Path) -> None:
    costs = results / "costs.json"
    content = json.loads(costs.read_text())
    for row in content["rows"]:
        if row["optimizer"]["name"] == "adam" and row["model"]["name"] == "mlp":
            row["step_seconds"] = 0.9 if row["proxprop"]["optimization_mode"] == "prox_cg3" else 0.4
    costs.write_text(json.dumps(content))
    assert fill("{{times mlp ProxProp (cg3) in Adam / Adam}}", results.parent) == "2.2"
    assert fill("{{times mlp Adam / SGD}}", results.parent) == "0.8"
    assert fill("{{times mlp Muon / SGD}} {{times convnet Adam / SGD}}", results.parent) == "– –"
    content["rows"].append({**content["rows"][0], "batch_size": 7})
    costs.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"^2 rows of the costs \(Example CPU.*\) are of Adam on the MLP: keep one$"):
        fill("{{times mlp Adam / SGD}}", results.parent)


def test_the_report_has_single_numbers_of_a_method(results: Path) -> None:
    (row,) = [line for line in fill("{{rivals mlp}}", results.parent).splitlines() if line.startswith("| Adam |")]
    loss, best, at_the_end = row.split(" | ")[1:4]
    assert fill("{{of mlp Adam train_loss}}", results.parent) == loss
    assert fill("{{of mlp Adam best_val_accuracy}}", results.parent) == best.split(" (")[0]
    assert fill("{{of mlp Adam test_accuracy}}", results.parent) == at_the_end
    assert fill("{{of mlp Adam train_loss@1}}", results.parent) not in ("–", loss)
    assert fill("{{of mlp Muon train_loss}} {{of resnet18 SGD train_loss}}", results.parent) == "– –"


def test_the_report_has_the_tables_or_a_dash(results: Path) -> None:
    write_method(results / "search_mlp", "adam")
    table = fill("{{rivals mlp}}", results.parent)
    assert table + "\n" == to_markdown(methods_in(results, Costs.read(results / "costs.json"))["mlp"])
    assert fill("{{search mlp}}", results.parent).splitlines()[2].startswith("| Adam | **0.1: ")
    assert fill("{{rivals mlp}} {{search mlp}}", results.parent / "nothing") == "– –"


def test_the_page_draws_these_numbers_and_stays_on_the_paper(results: Path) -> None:
    style.apply()
    costs = Costs.read(results / "costs.json")
    page = draw_rivals(methods_in(results, costs)["mlp"], costs)
    assert [axes.get_title(loc="left") for axes in page.axes] == [
        "Loss over epochs", "Loss over time", "Accuracy over epochs"
    ]  # fmt: skip
    by_epoch, over_time, accuracy = ({line.get_label(): line for line in axes.lines} for axes in page.axes)
    assert list(over_time["SGD"].get_xdata()) == pytest.approx([0, 0.75, 1.5, 2.25, 3])  # minutes
    folders = sorted((results / "mlp").glob("name=adam,optimization_mode=prox_cg3*"))
    for lines, column in ((by_epoch, "train_loss"), (accuracy, "val_accuracy")):
        mean = statistics.fmean(final(folder, column) for folder in folders)
        assert lines["ProxProp (cg3) in Adam"].get_ydata()[-1] == pytest.approx(mean)
    assert len(page.axes[0].collections) == 3  # a band each
    assert {text.get_text() for text in page.legends[0].get_texts()} == {"SGD", "Adam", "ProxProp (cg3) in Adam"}
    assert_all_is_on_the_paper(page)


@pytest.mark.parametrize(("network", "count"), [("mlp", 14), ("convnet", 13)])
def test_all_that_the_configs_compare_has_a_line_of_its_own_and_room(
    root: Path, tmp_path: Path, network: str, count: int
) -> None:
    for config in load_config_file(root / f"configs/rivals/search_{network}.yaml").configs:
        optimizer, mode = config.optimizer.name, config.proxprop.optimization_mode
        if not list(tmp_path.glob(f"name={optimizer},optimization_mode={mode},*")):
            write_method(tmp_path, optimizer, mode, model=network)
    methods = by_network(load_runs(tmp_path).values(), Costs())[network]
    style.apply()
    page = draw_rivals(methods, Costs())
    looks = [(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in page.axes[0].lines]
    assert len(methods) == len(looks) == len(set(looks)) == count
    assert_all_is_on_the_paper(page)


def test_the_command_writes_the_same_bytes(results: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.pdf"
    arguments = [str(results / "mlp"), "--costs", str(results / "costs.json")]
    assert main([*arguments, "--output", str(output)]) == 0
    once = output.read_bytes()
    assert once.startswith(b"%PDF")
    assert main([*arguments, "--output", str(output)]) == 0
    assert output.read_bytes() == once


def test_two_networks_in_one_figure_are_refused(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.pdf"
    assert main([str(results / "mlp"), str(results / "convnet"), "--output", str(output)]) == 2
    assert capsys.readouterr().err == (
        "error: a figure is for one network, and these runs are of mlp and convnet: give one network's folder at a "
        "time\n"
    )
    assert not output.exists()


def test_what_is_no_comparison_is_told(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "page.pdf")]
    other = write_method(results / "mlp", "sgd", lr=0.3)
    assert main([str(results / "mlp"), *output]) == 2
    assert f"{other} are both SGD: leave one of them out" in capsys.readouterr().err
    write_method(tmp_path / "unfinished", "sgd", finished=False)
    assert main([str(tmp_path / "unfinished"), *output]) == 2
    assert capsys.readouterr().err == "error: none of the runs is over yet; see python -m experiments.show\n"


def test_runs_that_are_not_over_are_told_on_the_page_and_in_print(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_method(results / "mlp", "muon", finished=False, epochs=3)
    begun = write_method(results / "mlp", "sgd", seed=3, finished=False)
    (begun / "metrics.csv").write_text((begun / "metrics.csv").read_text().splitlines()[0] + "\n")
    output = tmp_path / "page.svg"
    assert main([str(results / "mlp"), "--output", str(output)]) == 0
    muon, sgd = (f"name={name},optimization_mode=gradient,lr=0.1" for name in ("muon", "sgd"))
    note = f"not over, and left out: {muon} (interrupted, epoch 3), {sgd},seed=3 (interrupted, epoch 0)"
    assert capsys.readouterr().out == f"note: {note}\n"
    style.apply()
    page = draw_rivals(methods_in(results)["mlp"], Costs(), note)
    assert note in " ".join(text.get_text() for text in page.texts)
    assert_all_is_on_the_paper(page)


@pytest.mark.parametrize("mode", ["prox_cg2", "prox_cg20", "published_cg3"])
def test_a_mode_without_a_line_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    folder = write_method(tmp_path / "runs", "sgd", mode)
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.pdf")]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder}: there is no line for {mode}; there are some for gradient, prox_cg1, prox_cg3, prox_cg5, "
        "prox_cg10, prox_exact\n"
    )


HEADER = {"device": "x", "threads": 1, "torch": "2"}
MEASURED = {"step_seconds": 1.0, "peak_bytes": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"device": "x"}',
        json.dumps({**HEADER, "rows": [{**MEASURED, "step_seconds": "1"}]}),
        json.dumps({**HEADER, "rows": [MEASURED]}),
        json.dumps(
            {**HEADER, "rows": [{**MEASURED, "model": {}, "optimizer": "sgd", "proxprop": {}, "batch_size": 1}]}
        ),
    ],
)
def test_a_file_without_costs_is_told(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert main([str(results / "mlp"), "--costs", str(path), "--output", str(tmp_path / "page.pdf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: is no file of benchmarks/optimizer_cost.py (")
    assert error.count("\n") == 1


def test_costs_of_other_settings_are_told(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = write_costs(tmp_path / "costs.json", [write_method(tmp_path / "other", "muon")])
    output = ["--output", str(tmp_path / "page.pdf")]
    assert main([str(results / "mlp"), "--costs", str(costs), *output]) == 2
    assert capsys.readouterr().err == (
        f"error: {costs}: has no row for the settings of any of these runs (model, optimizer but for its lr, proxprop "
        "and batch_size)\n"
    )
    assert not (tmp_path / "page.pdf").exists()
    write_costs(costs, sorted((results / "mlp").glob("*prox_cg3*")))
    assert main([str(results / "mlp"), "--costs", str(costs), *output]) == 0
    assert capsys.readouterr().out == f"note: no costs for SGD, Adam in {costs}\n"
    assert main([str(results / "mlp"), "--costs", str(results / "costs.json"), *output]) == 0
    assert capsys.readouterr().out == ""


def test_costs_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"costs.json: cannot be read as costs of optimizers: No such file"):
        Costs.read(tmp_path / "costs.json")


Method = tuple[str, str]
"""The optimizer's name and ProxProp's mode."""


def by_method(root: Path, number: Callable[[RecordedRun], float | None]) -> dict[Method, dict[float, float]]:
    """Of the runs in `root`, which all are over, a number by method and learning rate; infinite where one diverged."""
    found: dict[Method, dict[float, float]] = {}
    for run in map(read_run, root.iterdir()):
        assert run.summary
        value = number(run)
        assert value is not None
        method = run.config.optimizer.name, run.config.proxprop.optimization_mode
        found.setdefault(method, {})[run.config.optimizer.lr] = math.inf if run.status == "diverged" else value
    return found


@pytest.mark.parametrize(("network", "seeds", "epochs"), [("convnet", 3, 12), ("mlp", 3, 12), ("resnet18", 1, 10)])
def test_learning_rates_of_the_comparison_are_those_that_the_search_chose(
    root: Path, network: str, seeds: int, epochs: int
) -> None:
    results = root / "results" / RIVALS[network]
    losses = by_method(results / f"search_{network}", lambda run: run.value("val_loss"))
    assert {len(tried) for tried in losses.values()} == {5}
    chosen = {method: min(tried, key=tried.__getitem__) for method, tried in losses.items()}
    if network == "convnet":  # the second part of its search
        accuracies = by_method(results / f"rates_{network}", lambda run: run.best_val_accuracy)
        assert {len(tried) for tried in accuracies.values()} == {3, 4}
        assert [method for method, tried in accuracies.items() if len(tried) == 4] == [("sgd", "gradient")]
        assert {method: max(tried) for method, tried in accuracies.items()} == chosen
        chosen = {method: max(tried, key=tried.__getitem__) for method, tried in accuracies.items()}
        assert all(chosen[method] > min(tried) for method, tried in accuracies.items())  # inside the range
    searched = load_config_file(root / f"configs/rivals/search_{network}.yaml").configs
    compared = load_config_file(root / f"configs/rivals/{network}.yaml").configs
    assert len(compared) == seeds * len(chosen)
    for config in compared:
        assert config.optimizer.lr == chosen[config.optimizer.name, config.proxprop.optimization_mode]
        assert losses[config.optimizer.name, config.proxprop.optimization_mode][config.optimizer.lr] < math.inf
        assert config.epochs == epochs
        assert any(config.optimizer == one.optimizer and config.proxprop == one.proxprop for one in searched)
