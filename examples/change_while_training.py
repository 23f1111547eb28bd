"""Step size τ and mode of the layers, changed while training goes on.

    python examples/change_while_training.py

τ is halved after every epoch, as a schedule does with a learning rate, and the last epochs are solved exactly.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run with nothing installed but requirements.txt

from proxprop import ProxPropLinear


def main(epochs: int = 10) -> None:
    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0..16
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    torch.manual_seed(0)
    model = nn.Sequential(
        ProxPropLinear(64, 200, tau_prox=5.0, optimization_mode="prox_cg3"), nn.ReLU(),
        ProxPropLinear(200, 200, tau_prox=5.0, optimization_mode="prox_cg3"), nn.ReLU(),
        nn.Linear(200, 10),
    )  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, ProxPropLinear)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            value = F.cross_entropy(model(images), labels)
        print(f"epoch {epoch}: {layers[0].optimization_mode}, τ = {layers[0].tau_prox:.4g}: loss {value:.4f}")
        for layer in layers:  # takes effect at the next backward pass
            layer.tau_prox /= 2
            if epoch >= epochs // 2:
                layer.optimization_mode = "prox_exact"


if __name__ == "__main__":
    main()
