"""Fills the numbers into the reports in docs/, each from its template: docs/NAME.md from docs/NAME.in.md.

python scripts/report.py

In a template {{FOLDER NUMBER}} stands for a number of the run in results/FOLDER, over its seeds where there are some:

    {{cpu-50-epochs/paper/mlp_sgd_cg3 train_loss}}     after the last epoch; train_loss@5: after epoch 5
    {{cpu-50-epochs/paper/mlp_sgd_cg3 val_accuracy}}   likewise; best_val_accuracy and best_val_accuracy@5: until then
    {{cpu-50-epochs/paper/mlp_sgd_cg3 test_accuracy}}  after the last epoch
    {{table1}}, {{tau_prox}}                           the paper's Table 1 beside the measured one; the sweep over τ_θ
    {{ablation mlp}}, {{ablation convnet}}             what each deviation of the published solver does
    {{rivals mlp}}, {{rivals convnet}}                 other optimizers beside ProxProp, the best ones first
    {{of mlp ProxProp (cg3) in Adam test_accuracy}}    one of the numbers above, of a method of that comparison
    {{search mlp}}, {{search convnet}}                 how their learning rates were chosen; resnet18 as well
    {{times mlp Adam / SGD}}                           the seconds of a step with the one over those with the other
    {{rates mlp}}, {{rates convnet}}                   what each came to over all epochs at several rates
    {{left}}                                           what is left of scripts/full_length.py

A run that is not there, or not over, is a dash; in Table 1 a row counts as far as all of its runs have come.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, UsageError, run_command
from experiments.command.errors import RecordError
from experiments.folder.read import RecordedRun, find_runs, read_run
from scripts.full_length import UNITS
from scripts.full_length import table as left_table
from scripts.plots import ablation, rivals, sweep_table, table1
from scripts.plots.output import write
from scripts.plots.runs import Replicates, load_runs
from scripts.plots.sweep import Question, answer
from scripts.plots.table import cell_in_text

ROOT = Path(__file__).resolve().parents[1]
REPORTS = {path: path.with_name(path.name.replace(".in.", ".")) for path in sorted((ROOT / "docs").glob("*.in.md"))}
"""Each by its template."""
TABLE_1, TAU_PROX = ("h100-50-epochs/table1", "cpu-50-epochs/table1"), "cpu-10-epochs/tau_prox"
ABLATION = "cpu-5-epochs/ablation"
RIVALS = {"convnet": "cpu-rivals", "mlp": "h200-rivals", "resnet18": "h200-rivals"}
"""Where the networks' comparisons were made."""
MISSING = "–"
NUMBER = re.compile(r"(train_loss|val_accuracy|best_val_accuracy)(@[0-9]+)?|test_accuracy")

Groups = Callable[[Path], dict[str, Replicates]]
"""The runs in a folder that are over, by name."""


def fill(template: str, results: Path) -> str:
    """``template`` with its numbers.

    Raises:
        UsageError: a placeholder that asks for nothing known.
    """
    groups = functools.cache(_groups)  # a folder is read once
    return re.sub(r"\{\{(.*?)\}\}", lambda match: _value(match[1].strip(), results, groups), template)


def _value(asked: str, results: Path, groups: Groups) -> str:
    match asked.split():
        case ["table1"]:
            begun = [run for folder in TABLE_1 for run in _runs(results / folder)]
            return table1.to_markdown(table1.read_table(begun)[0] if begun else []).rstrip()
        case ["tau_prox"]:
            question = Question("proxprop.tau_prox", "proxprop.optimization_mode", "train_loss")
            over = _runs_over(results / TAU_PROX)
            return sweep_table.to_markdown(answer(question, over)).rstrip() if over else MISSING
        case ["ablation", network] if network in ablation.NETWORKS:
            over = _runs_over(results / f"{ABLATION}_{network}")
            return ablation.to_markdown(ablation.read_parts(over)[network]).rstrip() if over else MISSING
        case ["rivals", network] if network in rivals.NETWORKS:
            methods = _methods(network, results, groups, _costs(results, network))
            return rivals.to_markdown(methods).rstrip() if methods else MISSING
        case ["times", network, *names] if network in rivals.NETWORKS and names.count("/") == 1:
            costs = _costs(results, network)
            one, other = (costs.seconds(network, name) for name in " ".join(names).split(" / "))
            return MISSING if one is None or other is None else f"{one / other:.1f}"
        case ["search", network] if network in rivals.NETWORKS:
            runs = _runs_over(results / RIVALS[network] / f"search_{network}")
            return rivals.search_to_markdown(runs).rstrip() if runs else MISSING
        case ["rates", network] if network in rivals.NETWORKS:
            runs = _runs_over(results / RIVALS[network] / f"rates_{network}")
            return rivals.rates_to_markdown(runs).rstrip() if runs else MISSING
        case ["left"]:
            return left_table({unit.title: unit.runs([], results) for unit in UNITS})
        case ["of", network, *name, number] if network in rivals.NETWORKS and name and NUMBER.fullmatch(number):
            methods = _methods(network, results, groups, rivals.Costs())
            return _number(next((method.group for method in methods if method.label == " ".join(name)), None), number)
        case [folder, number] if NUMBER.fullmatch(number):
            return _number(groups((results / folder).parent).get(Path(folder).name), number)
    raise UsageError(f"{{{{{asked}}}}} is no placeholder; see the top of scripts/report.py")


def _costs(results: Path, network: str) -> rivals.Costs:
    file = results / RIVALS[network] / "costs.json"
    return rivals.Costs.read(file) if file.exists() else rivals.Costs()


def _methods(network: str, results: Path, groups: Groups, costs: rivals.Costs) -> list[rivals.Method]:
    """Those that were compared on the network; none where no run is over."""
    over = groups(results / RIVALS[network] / network)
    return rivals.by_network(over.values(), costs).get(network, []) if over else []


def _number(group: Replicates | None, number: str) -> str:
    name, _, epoch = number.partition("@")
    if group is None or (epoch and any(run.epochs < int(epoch) and run.status != "diverged" for run in group.runs)):
        return MISSING

    def of(run: RecordedRun) -> float | None:
        if name == "test_accuracy":
            return run.test_accuracy
        rows = run.metrics[run.metrics["epoch"] <= int(epoch)] if epoch else run.metrics
        if name == "best_val_accuracy":
            return float(rows["val_accuracy"].max())
        return float(rows[name].iloc[-1])

    if all(run.status == "diverged" for run in group.runs):
        return "diverged"
    return cell_in_text(group.stat(of), "#.3g" if name == "train_loss" else ".2%")


def _groups(root: Path) -> dict[str, Replicates]:
    """The runs in `root` that are over, by name, seeds together."""
    groups = load_runs(root) if any(len(run.metrics) for run in _runs(root)) else {}
    over = {name: tuple(run for run in group.runs if run.summary) for name, group in groups.items()}
    return {name: Replicates(name, runs) for name, runs in over.items() if runs}


def _runs(root: Path) -> list[RecordedRun]:
    """None where there is no such folder, or none has begun in it; one that cannot be read is an error."""
    try:
        folders = find_runs(root)
    except RecordError:
        return []
    return [read_run(folder) for folder in folders]


def _runs_over(root: Path) -> list[RecordedRun]:
    return [run for run in _runs(root) if run.summary]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: _fill(make_parser().parse_args(arguments)))


def _fill(options: argparse.Namespace) -> int:
    for template, report in REPORTS.items():
        write(report, fill(template.read_text(), ROOT / "results").encode())
    return 0


def make_parser() -> argparse.ArgumentParser:
    return Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    sys.exit(main())
