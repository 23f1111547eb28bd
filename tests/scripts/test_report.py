"""The reports on what was measured: every number in them comes from results/."""

import csv
import json
from pathlib import Path

import pytest

from experiments.command.errors import ExperimentError
from scripts.report import REPORTS, ROOT, fill

from .synthetic import write_run

TEMPLATE = ROOT / "docs" / "reproduction.in.md"


@pytest.mark.parametrize("template", REPORTS, ids=lambda path: path.name)
def test_a_report_is_what_results_say(root: Path, template: Path) -> None:
    assert fill(template.read_text(), root / "results") == REPORTS[template].read_text(), "run python scripts/report.py"


def test_the_template_has_no_number_of_a_run_written_by_hand(root: Path) -> None:
    """Losses and accuracies in it are the paper's alone."""
    losses = [row["train_loss"] for row in rows(root / "results/cpu-5-epochs/paper/mlp_sgd_exact")]
    assert f"{float(losses[-1]):#.3g}" not in TEMPLATE.read_text()
    assert f"exact {float(losses[-1]):#.3g}" in REPORTS[TEMPLATE].read_text()


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
    assert fill("{{paper/b train_loss}}, {{paper/none train_loss}}, {{no/a test_accuracy}}", tmp_path) == "–, –, –"
    assert fill("{{paper/c train_loss}}", tmp_path) == "diverged"


@pytest.mark.parametrize("asked", ["{{}}", "{{table2}}", "{{a b c}}", "{{paper/a seconds}}"])
def test_an_unknown_placeholder_is_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(ExperimentError, match=r"see the top of scripts/report.py"):
        fill(asked, tmp_path)
