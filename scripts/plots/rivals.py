"""ProxProp beside the optimizers that a user would pick instead: their learning rates, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Page

from experiments.command.errors import RecordError, reason
from experiments.config import Config
from experiments.config.schema import what_a_step_costs
from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.draw import Drawn, draw_figure, time_note
from scripts.plots.figures import ACCURACY_BY_EPOCH, LOSS_BY_EPOCH, LOSS_BY_TIME, Curve, Figure
from scripts.plots.notes import Footer, band_note, distinct, joined, machine, status_note
from scripts.plots.runs import Replicates, Stat, steady, steps_per_epoch, with_seconds
from scripts.plots.table import cell, cell_in_text

OPTIMIZERS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "kfac": "K-FAC",
    "isaac": "ISAAC",
}
HEADINGS = (
    "optimizer",
    "training loss",
    "best validation accuracy (after epoch)",
    "test accuracy at the end",
    "s / epoch",
    "peak memory, MiB",
    "settings",
)
NETWORKS = {"mlp": "MLP", "convnet": "ConvNet", "resnet18": "resnet18"}


@dataclass(frozen=True)
class Costs:
    """What `benchmarks/optimizer_cost.py` measured, by the settings that it is for, and where."""

    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    where: str = ""

    @classmethod
    def read(cls, path: Path) -> Costs:
        """
        Raises:
            RecordError: it is not a file of that benchmark.
        """
        try:
            content = json.loads(path.read_text())
            rows = {what_a_step_costs(row): row for row in content["rows"]}
            where = machine(content["device"], content["threads"], content["torch"])
            if any(not isinstance(row[key], float) for row in rows.values() for key in ("step_seconds", "peak_bytes")):
                raise ValueError("its rows need step_seconds and peak_bytes")
        except OSError as error:
            raise RecordError(f"{path}: cannot be read as costs of optimizers: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}: is no file of benchmarks/optimizer_cost.py ({reason(error)})") from error
        return cls(rows, where)

    def of(self, config: Config) -> dict[str, Any] | None:
        """The row for the settings of ``config``, whatever its learning rate."""
        return self.rows.get(what_a_step_costs(config.model_dump()))

    def seconds(self, network: str, name: str) -> float | None:
        """Of a step of a network with the method that `label` calls so; None where that was not measured.

        Raises:
            RecordError: several rows are of that method, with other settings each.
        """
        found = [
            float(row["step_seconds"])
            for row in self.rows.values()
            if row["model"]["name"] == network
            and _label(row["optimizer"]["name"], row["proxprop"]["optimization_mode"]) == name
        ]
        if len(found) > 1:
            on = NETWORKS[network]
            raise RecordError(f"{len(found)} rows of the costs ({self.where}) are of {name} on the {on}: keep one")
        return found[0] if found else None


@dataclass(frozen=True)
class Method:
    """An optimizer, perhaps with ProxProp's directions: its runs on one network, which differ in their seeds alone."""

    group: Replicates
    cost: dict[str, Any] | None

    @property
    def config(self) -> Config:
        return self.group.runs[0].config

    @property
    def label(self) -> str:
        return label(self.config)

    @property
    def is_proxprop(self) -> bool:
        return self.group.is_proxprop

    @property
    def seconds_per_epoch(self) -> float:
        """Those of a quiet machine, where they were measured."""
        return math.nan if self.cost is None else float(steps_per_epoch(self.config) * self.cost["step_seconds"])

    @property
    def mebibytes(self) -> float:
        return math.nan if self.cost is None else float(self.cost["peak_bytes"] / 2**20)

    def timed(self) -> Replicates:
        """The runs, with the seconds of a quiet machine; with none where they are not known."""
        runs = (with_seconds(run, self.seconds_per_epoch) for run in self.group.runs)
        return dataclasses.replace(self.group, runs=tuple(runs))


def label(config: Config) -> str:
    """'Adam', 'ProxProp (cg3) in Adam'."""
    return _label(config.optimizer.name, config.proxprop.optimization_mode)


def _label(optimizer: str, mode: str) -> str:
    name = OPTIMIZERS[optimizer]
    return name if mode == "gradient" else f"ProxProp ({mode.removeprefix('prox_')}) in {name}"


def settings(config: Config) -> str:
    """What was chosen and what was given: 'lr 0.03, momentum 0.95 (Nesterov), τ 0.05'."""
    optimizer = config.optimizer
    parts = [f"lr {optimizer.lr:g}"]
    if optimizer.momentum:
        parts.append(f"momentum {optimizer.momentum:g}" + " (Nesterov)" * optimizer.nesterov)
    if optimizer.weight_decay:
        parts.append(f"weight decay {optimizer.weight_decay:g}")
    if optimizer.damping is not None:
        parts.append(f"damping {optimizer.damping:g}")
    if optimizer.update_every is not None:
        parts.append(f"renewed every {optimizer.update_every} steps")
    if config.proxprop.optimization_mode != "gradient":
        parts.append(f"τ {config.proxprop.tau_prox:g}")
    return ", ".join(parts)


def by_network(groups: Iterable[Replicates], costs: Costs) -> dict[str, list[Method]]:
    """The methods of each network, those without ProxProp first; runs that are not over are left out.

    Raises:
        RecordError: two of one network are the same optimizer, or none is over.
    """
    found: dict[str, dict[str, Method]] = {}
    for group in groups:
        over = tuple(run for run in group.runs if run.summary)
        if not over:
            continue
        config = over[0].config
        methods = found.setdefault(config.model.name, {})
        if other := methods.get(label(config)):
            raise RecordError(f"{other.group.runs[0].folder} and {over[0].folder} are both {label(config)}: leave one "
                              "of them out")  # fmt: skip
        methods[label(config)] = Method(dataclasses.replace(group, runs=over), costs.of(config))
    if not found:
        raise RecordError("none of the runs is over yet; see python -m experiments.show")
    return {
        name: sorted(found[name].values(), key=lambda method: _place(method.config))
        for name in NETWORKS
        if name in found
    }


def without_costs(methods: Sequence[Method], path: Path) -> str:
    """Which methods the costs in ``path`` are not for; nothing where they are for all.

    Raises:
        RecordError: they are for none.
    """
    without = [method for method in methods if method.cost is None]
    if len(without) == len(methods):
        raise RecordError(f"{path}: has no row for the settings of any of these runs (model, optimizer but for its lr, "
                          "proxprop and batch_size)")  # fmt: skip
    return f"no costs for {distinct(method.label for method in without)} in {path}" if without else ""


def _place(config: Config) -> tuple[bool, int, str]:
    mode = config.proxprop.optimization_mode
    return mode != "gradient", list(OPTIMIZERS).index(config.optimizer.name), mode


def loss(method: Method) -> Stat:
    return method.group.stat(lambda run: run.value("train_loss"))


def best_accuracy(method: Method) -> Stat:
    return method.group.stat(lambda run: run.best_val_accuracy)


def best_epochs(method: Method) -> str:
    """After which epochs the runs were at their best validation accuracy: '12', '4 to 6'."""
    epochs = [int(run.metrics["val_accuracy"].idxmax()) for run in steady(method.group.runs)]
    return " to ".join(map(str, sorted({min(epochs), max(epochs)})))


def test_accuracy(method: Method) -> Stat:
    return method.group.stat(lambda run: run.test_accuracy)


def to_markdown(methods: Sequence[Method]) -> str:
    """Who is first, and the best of the other kind; then a row for each method, the lowest training loss first."""
    number, percent = "#.3g", ".2%"
    lines = [
        _verdict("training loss", methods, loss, number, lower_is_better=True),
        _verdict("best validation accuracy", methods, best_accuracy, percent),
        _verdict("test accuracy", methods, test_accuracy, percent),
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|",
    ]
    for method in sorted(methods, key=lambda method: _rank(loss(method).mean)):
        status = method.group.status
        cells = [
            cell(loss(method), number) + (f" ({status})" if status != "finished" else ""),
            f"{cell_in_text(best_accuracy(method), percent)} ({best_epochs(method)})",
            cell_in_text(test_accuracy(method), percent),
            cell(method.seconds_per_epoch, "#.3g"),
            cell(method.mebibytes, ".0f"),
            settings(method.config),
        ]
        lines.append(f"| {method.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(
    name: str, methods: Sequence[Method], of: Callable[[Method], Stat], form: str, lower_is_better: bool = False
) -> str:
    """'- Training loss: first of 14 is SOAP (0.021); ProxProp loses: its best, ProxProp (cg3) in Adam, is …'

    Which others are as good, as far as the seeds tell, is said as well.
    """
    sign = 1 if lower_is_better else -1

    def place(method: Method) -> tuple[bool, float]:
        return all(run.status == "diverged" for run in method.group.runs), _rank(sign * of(method).mean)

    order = sorted(methods, key=place)

    def shown(method: Method) -> str:
        return cell_in_text(of(method), form)

    first = order[0]
    text = f"{name[0].upper()}{name[1:]}: first of {len(order)} is {first.label} ({shown(first)})"
    alike = [method for method in order[1:] if _alike(of(first), of(method))]
    if alike:
        text += f", with {distinct(method.label for method in alike)} no further off than seeds differ"
    other = next((method for method in order if method.is_proxprop != first.is_proxprop), None)
    if other is not None:
        loses = "ProxProp's best" if other in alike else "ProxProp loses: its best"
        kind = "the best without ProxProp" if first.is_proxprop else loses
        text += f"; {kind}, {other.label}, is number {order.index(other) + 1} ({shown(other)})"
    return f"- {text}."


def _alike(one: Stat, other: Stat) -> bool:
    """Whether means differ by no more than the standard deviation of the difference of two single runs."""
    return abs(one.mean - other.mean) <= math.hypot(one.std, other.std)


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def search_to_markdown(runs: Sequence[RecordedRun]) -> str:
    """A row for each method: the validation loss at each learning rate tried, the chosen one in bold.

    Of a method with fewer runs than others none is bold: its search is not over.
    """
    tried = _by_rate(runs)
    lines = ["| optimizer | validation loss at each learning rate |", "|---|---|"]
    all_tried = max(map(len, tried.values()))
    for name, members in tried.items():
        best = chosen(members) if len(members) == all_tried else None
        lines.append(f"| {name} | {_at_each_rate(members, _val_loss_text, best)} |")
    return "\n".join(lines) + "\n"


def rates_to_markdown(runs: Sequence[RecordedRun]) -> str:
    """A row for each method: what it came to at each learning rate, the best in bold."""
    lines = ["| optimizer | training loss | best validation accuracy | test accuracy at the end |", "|---|---|---|---|"]
    for name, members in _by_rate(runs).items():
        cells = (
            _numbers(members, lambda run: run.value("train_loss"), "#.3g", min),
            _numbers(members, lambda run: run.best_val_accuracy, ".2%", max),
            _numbers(members, lambda run: run.test_accuracy, ".2%", max),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _numbers(
    runs: Sequence[RecordedRun],
    of: Callable[[RecordedRun], float | None],
    form: str,
    better: Callable[..., RecordedRun | None],
) -> str:
    """`better`: `min` or `max`."""

    def value(run: RecordedRun) -> float:
        return math.nan if (found := of(run)) is None else found

    def text(run: RecordedRun) -> str:
        return "diverged" if run.status == "diverged" else cell_in_text(value(run), form)

    ended_well = (run for run in runs if run.status != "diverged")
    return _at_each_rate(runs, text, better(ended_well, key=value, default=None))


def _by_rate(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """The runs of each method, the smallest learning rate first."""
    found: dict[str, list[RecordedRun]] = {}
    for run in sorted(runs, key=lambda run: (_place(run.config), run.config.optimizer.lr)):
        found.setdefault(label(run.config), []).append(run)
    return found


def _at_each_rate(runs: Sequence[RecordedRun], text: Callable[[RecordedRun], str], best: RecordedRun | None) -> str:
    """'0.01: 1.2, **0.1: 0.9**'."""
    parts = ((run, f"{run.config.optimizer.lr:g}: {text(run)}") for run in runs)
    return ", ".join(f"**{part}**" if run is best else part for run, part in parts)


def chosen(runs: Sequence[RecordedRun]) -> RecordedRun | None:
    """The one with the lowest validation loss at its end; None where all diverged."""
    best = min(runs, key=_val_loss)
    return best if math.isfinite(_val_loss(best)) else None


def _val_loss(run: RecordedRun) -> float:
    value = run.value("val_loss")
    return math.inf if run.status == "diverged" or value is None else _rank(value)


def _val_loss_text(run: RecordedRun) -> str:
    value = _val_loss(run)
    return f"{value:#.3g}" if math.isfinite(value) else "diverged"


def draw_rivals(methods: Sequence[Method], costs: Costs, note: str = "") -> Page:
    """One page for one network: the loss over epochs and over time, and the validation accuracy over epochs.

    A curve for each method; ``note`` below them.
    """
    network = NETWORKS[methods[0].config.model.name]
    figure = _figure(network, methods)
    drawn = [
        Drawn(curve, method.timed() if costs.rows else method.group)
        for curve, method in zip(figure.curves, methods, strict=True)
    ]
    groups = {method.label: method.group for method in methods}
    notes = [
        # Two lines at the most; the command prints the whole note.
        textwrap.shorten(note, 320, placeholder=" …"),
        joined(band_note(len(item.group.runs) for item in drawn), status_note(groups, groups)),
        time_note(figure, drawn),
    ]
    if costs.rows:
        without = distinct(item.label for item in drawn if not math.isfinite(item.group.seconds))
        notes.append(f"seconds: of steps measured alone ({costs.where})" + (f"; none for {without}" if without else ""))
    else:
        notes.append("seconds: the runs' own, which may be compared only if each had its machine to itself")
    footer = Footer.of([run for item in drawn for run in item.group.runs], notes)
    return draw_figure(figure, f"ProxProp beside other optimizers: {network}", drawn, footer)


def _figure(title: str, methods: Sequence[Method]) -> Figure:
    """As the paper's figures are described; the time axis ends with ProxProp's longest."""
    names = tuple(method.group.name for method in methods if method.is_proxprop)
    panels = (LOSS_BY_EPOCH, LOSS_BY_TIME, ACCURACY_BY_EPOCH)
    return Figure(title, tuple(map(_curve, methods)), panels, names, ())


def _curve(method: Method) -> Curve:
    name, mode = method.config.optimizer.name, method.config.proxprop.optimization_mode
    key = name if mode == "gradient" else f"{mode.removeprefix('prox_')}_{name}"
    if key not in style.LINES:
        raise RecordError(f"{method.group.runs[0].folder}: there is no line for {mode}; there are some for gradient, "
                          f"{', '.join(f'prox_{mode}' for mode in style.INSIDE)}")  # fmt: skip
    return Curve(method.group.name, method.label, key)
