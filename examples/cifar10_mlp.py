"""A network of your own on CIFAR-10, trained by back-propagation and by ProxProp: data, model, training, figure.

    ./get_data.sh
    python examples/cifar10_mlp.py --epochs 3 --train-samples 10000 --output cifar10_mlp.pdf

The two networks start from the same parameters and see the same minibatches.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run with nothing installed but requirements.txt

from experiments.command.cli import Parser, run_command, user_path
from experiments.config import DataConfig
from experiments.data.datasets import Data, Split, load
from proxprop import ProxPropLinear

DATA = Path(__file__).resolve().parents[1] / "data"
TAU = 0.05
BATCH = 500
CURVES = {"gradient": "BackProp", "prox_cg3": "ProxProp (3 cg)"}
FORMATS = (".pdf", ".png", ".svg")


class MLP(nn.Module):
    """3072-1000-1000-10: images [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first = ProxPropLinear(3072, 1000, tau_prox=TAU, optimization_mode=mode)
        self.second = ProxPropLinear(1000, 1000, tau_prox=TAU, optimization_mode=mode)
        self.last = nn.Linear(1000, 10)  # the last layer stays as it is

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.first(images.flatten(1)))
        return self.last(F.relu(self.second(hidden)))


def train(model: nn.Module, data: Data, epochs: int, lr: float) -> list[tuple[float, float]]:
    """Training loss and validation accuracy before training and after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.95, nesterov=True)
    order = torch.Generator().manual_seed(0)
    curve = [(evaluate(model, data.train)[0], evaluate(model, data.val)[1])]
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(data.train), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.images[rows]), data.train.labels[rows]).backward()
            optimizer.step()
        curve.append((evaluate(model, data.train)[0], evaluate(model, data.val)[1]))
        print(f"  epoch {epoch}: training loss {curve[-1][0]:.4f}, validation accuracy {curve[-1][1]:.1%}")
    return curve


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits = torch.cat([model(images) for images in split.images.split(2500)])
    correct = logits.argmax(1) == split.labels
    return F.cross_entropy(logits, split.labels).item(), correct.float().mean().item()


def draw(curves: dict[str, list[tuple[float, float]]], output: Path) -> None:
    with matplotlib.style.context("default"):  # whatever your matplotlibrc says
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        axes = figure.subplots(1, 2)
        for label, curve in curves.items():
            for axis, values in zip(axes, zip(*curve, strict=True), strict=True):
                axis.plot(values, marker="o", label=label)
        for axis, name in zip(axes, ["training loss", "validation accuracy"], strict=True):
            axis.set(xlabel="epoch", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()
        figure.savefig(output)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train a network on CIFAR-10 by back-propagation and by ProxProp.")
    parser.add_argument("--data", default=str(DATA), help="holds cifar-10-batches-py (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--train-samples", type=int, default=45_000, help="the first so many (default: all 45000)")
    parser.add_argument("--output", type=user_path, default=Path("cifar10_mlp.pdf"), help="pdf, png or svg")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.train_samples < 1:
        parser.error("--epochs and --train-samples must be at least 1")
    if options.output.suffix not in FORMATS or not options.output.parent.is_dir():
        parser.error(f"--output must end in {', '.join(FORMATS)} and be in a folder that exists, got {options.output}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load(DataConfig(name="cifar10", root=options.data, train_samples=options.train_samples), device)
    curves = {}
    for mode, label in CURVES.items():
        print(label)
        torch.manual_seed(0)
        # ProxProp's step is taken as it is, its length set by TAU; for BackProp, TAU is the learning rate.
        curves[label] = train(MLP(mode).to(device), data, options.epochs, lr=TAU if mode == "gradient" else 1.0)
    draw(curves, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
