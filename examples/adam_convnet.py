"""ProxProp inside Adam: a ConvNet on scikit-learn's handwritten digits, with plain layers and with ProxProp layers.

    python examples/adam_convnet.py

Only the convolutions' class and two keywords differ. Adam gets ProxProp's direction in place of the gradient.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run with nothing installed but requirements.txt

from proxprop import ProxPropConv2d


def convnet(conv: Callable[..., nn.Module]) -> nn.Module:
    """Images [N, 1, 8, 8] to logits [N, 10]."""
    return nn.Sequential(
        conv(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        conv(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> list[float]:
    """Mean loss over the minibatches of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(images))
    return losses


def main(epochs: int = 15) -> None:
    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0..16
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(classes)
    proximal = functools.partial(ProxPropConv2d, tau_prox=0.1, optimization_mode="prox_cg3")
    for name, conv in [("Adam + BackProp", nn.Conv2d), ("Adam + ProxProp", proximal)]:
        torch.manual_seed(0)  # the same start and the same minibatches
        losses = train(convnet(conv), images, labels, epochs)
        print(f"{name}: loss", " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
