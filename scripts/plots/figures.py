"""What the paper's figures show, as data: to change a figure, edit it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scripts.plots.paper_numbers import CONVNET_BEST_VAL_ACCURACY, MLP_TEST_ACCURACY


@dataclass(frozen=True)
class Curve:
    """One run in a figure: the name of its folder, its label and the key of its style."""

    run: str
    label: str
    style: str

    @property
    def is_proxprop(self) -> bool:
        return self.style != "gradient"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a quantity of metrics.csv over epochs or over training time."""

    title: str
    y: Literal["train_loss", "val_accuracy"]
    x: Literal["epoch", "seconds"]


@dataclass(frozen=True)
class Reference:
    """A number that the paper states, as a thin line in the panels that show ``y``, in the colour of ``style``."""

    y: Literal["train_loss", "val_accuracy"]
    value: float
    label: str
    style: str


@dataclass(frozen=True)
class Figure:
    """One page. Its time axis ends with the longest of the runs ``time_ends_with``."""

    title: str
    curves: tuple[Curve, ...]
    panels: tuple[Panel, ...]
    time_ends_with: tuple[str, ...]
    references: tuple[Reference, ...]


LOSS_BY_EPOCH = Panel("Loss over epochs", "train_loss", "epoch")
LOSS_BY_TIME = Panel("Loss over time", "train_loss", "seconds")
ACCURACY_BY_EPOCH = Panel("Accuracy over epochs", "val_accuracy", "epoch")
ACCURACY_BY_TIME = Panel("Accuracy over time", "val_accuracy", "seconds")

FIGURE_2 = Figure(
    title="Figure 2: MLP, Nesterov SGD",
    curves=(
        Curve("mlp_sgd_gradient", "BackProp", "gradient"),
        Curve("mlp_sgd_cg3", "ProxProp (cg3)", "cg3"),
        Curve("mlp_sgd_cg5", "ProxProp (cg5)", "cg5"),
        Curve("mlp_sgd_cg10", "ProxProp (cg10)", "cg10"),
        Curve("mlp_sgd_exact", "ProxProp (exact)", "exact"),
    ),
    panels=(LOSS_BY_EPOCH, LOSS_BY_TIME, ACCURACY_BY_EPOCH),
    time_ends_with=("mlp_sgd_cg3", "mlp_sgd_cg5", "mlp_sgd_cg10", "mlp_sgd_exact"),
    references=(
        Reference("val_accuracy", MLP_TEST_ACCURACY["gradient"], "paper, test: BackProp, about", "gradient"),
        Reference("val_accuracy", MLP_TEST_ACCURACY["proxprop"], "paper, test: ProxProp, about", "cg10"),
    ),
)


def _figure_3(title: str, network: str) -> Figure:
    return Figure(
        title=title,
        curves=(
            Curve(f"{network}_adam_gradient", "Adam + BackProp", "gradient"),
            Curve(f"{network}_adam_cg3", "Adam + ProxProp (3 cg)", "cg3"),
            Curve(f"{network}_adam_cg10", "Adam + ProxProp (10 cg)", "cg10"),
        ),
        panels=(LOSS_BY_EPOCH, LOSS_BY_TIME, ACCURACY_BY_EPOCH, ACCURACY_BY_TIME),
        time_ends_with=(f"{network}_adam_cg3",),
        references=(
            Reference("val_accuracy", CONVNET_BEST_VAL_ACCURACY["gradient"], "paper, best: BackProp", "gradient"),
            Reference("val_accuracy", CONVNET_BEST_VAL_ACCURACY["proxprop"], "paper, best: ProxProp", "cg10"),
        ),
    )


FIGURE_3 = _figure_3("Figure 3: ConvNet, Adam", "convnet")
FIGURE_3_TEXT = _figure_3("Figure 3: ConvNet of the paper's text (three poolings), Adam", "convnet_text")

FIGURES = (FIGURE_2, FIGURE_3, FIGURE_3_TEXT)
