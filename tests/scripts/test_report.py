"""The reports on what was measured: every number in them comes from results/."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

from experiments.command.errors import ExperimentError
from scripts.report import REPORTS, fill

from .synthetic import write_run


@pytest.mark.parametrize("template", REPORTS, ids=lambda path: path.name)
def test_a_report_is_what_results_say(root: Path, template: Path) -> None:
    assert fill(template.read_text(), root / "results") == REPORTS[template].read_text(), "run python scripts/report.py"


NOT_OF_A_RUN = {
    *("2.14.1", "2.11", "2.30"),  # PyTorch; the loss before training
    *("71.7", "72.9", "69.6", "70.7", "0.091", "0.002"),  # the paper's
    *("1.3", "1.5", "2.1", "2.5", "1.9", "4.6"),  # costs of a step: benchmarks/README.md
    *("1.4", "1.8", "2.6", "2.9"),  # and of an epoch: results/cpu-5-epochs/table.md
    *("0.7", "0.5"),  # per cent: the standard errors of accuracies of two thirds, of 5,000 and of 10,000 images
    *("0.005", "0.05", "0.1", "0.5"),  # values of τ and τ_θ
    *("0.95", "0.9", "0.01", "0.001", "0.003", "0.0003"),  # momenta, weight decays and learning rates
}


@pytest.mark.parametrize("template", REPORTS, ids=lambda path: path.name)
def test_a_template_has_no_number_of_a_run_written_by_hand(template: Path) -> None:
    by_hand = set(re.findall(r"[0-9]+(?:\.[0-9]+)+", re.sub(r"\{\{.*?\}\}", "", template.read_text())))
    assert by_hand <= NOT_OF_A_RUN


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("number", ["train_loss", "val_accuracy", "best_val_accuracy", "test_accuracy"])
def test_numbers_are_those_of_the_runs_folder(root: Path, number: str) -> None:
    folder = root / "results/cpu-5-epochs/paper/convnet_adam_cg3"
    recorded = rows(folder)
    expected = {
        "train_loss": f"{float(recorded[-1]['train_loss']):#.3g}",
        "val_accuracy": f"{100 * float(recorded[-1]['val_accuracy']):.2f} %",
        "best_val_accuracy": f"{100 * max(float(row['val_accuracy']) for row in recorded):.2f} %",
        "test_accuracy": f"{100 * json.loads((folder / 'summary.json').read_text())['test_accuracy']:.2f} %",
    }
    asked = f"{{{{cpu-5-epochs/paper/convnet_adam_cg3 {number}}}}}"
    assert fill(asked, root / "results") == expected[number]


def test_epochs_seeds_and_what_is_missing(tmp_path: Path) -> None:
    for seed, decay in enumerate([0.05, 0.06, 0.07]):
        write_run(tmp_path / "paper" / ("a" + f",seed={seed}" * (seed > 0)), decay=decay, seed=seed, epochs=6)
    write_run(tmp_path / "paper" / "b", finished=False)
    write_run(tmp_path / "paper" / "c", diverges=True)
    losses = [2.3 * (1 + decay) ** -3 for decay in (0.05, 0.06, 0.07)]
    mean = sum(losses) / 3
    std = (sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5
    assert fill("{{paper/a train_loss@3}}", tmp_path) == f"{mean:#.3g} ± {std:.2f}"
    assert fill("{{paper/a train_loss@6}} {{paper/a train_loss@7}}", tmp_path).endswith(" –")
    assert fill("{{paper/a train_loss@6}}", tmp_path) == fill("{{paper/a train_loss}}", tmp_path)
    assert fill("{{paper/b train_loss}}, {{paper/none train_loss}}, {{no/a test_accuracy}}", tmp_path) == "–, –, –"
    assert fill("{{paper/c train_loss}}", tmp_path) == "diverged"


@pytest.mark.parametrize(
    "asked",
    [
        *("{{}}", "{{table2}}", "{{a b c}}", "{{paper/a seconds}}", "{{rivals none}}", "{{search none}}"),
        *("{{of none SGD train_loss}}", "{{of mlp SGD seconds}}", "{{of mlp train_loss}}"),
        *("{{ablation none}}", "{{paper/a test_accuracy@1}}", "{{paper/a train_loss@x}}", "{{paper/a train_loss@}}"),
    ],
)
def test_an_unknown_placeholder_is_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(ExperimentError, match=r"see the top of scripts/report.py"):
        fill(asked, tmp_path)


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        ("tau_prox", "cpu-10-epochs/tau_prox"),
        ("table1", "h100-50-epochs/table1"),
        ("ablation mlp", "cpu-5-epochs/ablation_mlp"),
        ("search mlp", "h200-rivals/search_mlp"),
        ("rivals convnet", "cpu-rivals/convnet"),
        ("paper/a train_loss", "paper"),
    ],
)
def test_what_is_not_there_is_left_open_and_what_is_damaged_is_told(tmp_path: Path, asked: str, folder: str) -> None:
    before = fill(f"{{{{{asked}}}}}", tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    assert fill(f"{{{{{asked}}}}}", tmp_path) == before
    if asked != "table1":  # which shows the paper's rows
        assert before == "–"
    write_run(tmp_path / folder / "a")
    (tmp_path / folder / "a" / "summary.json").write_text("{")
    with pytest.raises(ExperimentError, match=r"summary\.json"):
        fill(f"{{{{{asked}}}}}", tmp_path)


def test_rivals_without_costs_and_of_another_network(tmp_path: Path) -> None:
    write_run(tmp_path / "h200-rivals/mlp/a", settings={"proxprop": {"optimization_mode": "gradient"}})
    table = fill("{{rivals mlp}}", tmp_path)
    assert "| – | – |" in table
    assert fill("{{rivals convnet}}", tmp_path) == "–"


def test_seconds_of_several_processes_are_those_of_the_runs(root: Path) -> None:
    def median(folder: str) -> str:
        rows_after_the_first = rows(root / "results/cpu-processes" / folder)[2:]
        return f"{statistics.median(float(row['epoch_seconds']) for row in rows_after_the_first):.1f} s"

    page = (root / "docs/experiments.md").read_text()
    one, two = median("one_process"), median("two_processes")
    assert f"took it {one}, and two processes with a thread each {two} " in page
