"""A layer of your own with a proximal step: any module whose output is linear in its parameters.

    python examples/own_layer.py

The layer is locally connected: a convolution whose filters differ from place to place.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run with nothing installed but requirements.txt

from proxprop import proxprop_module_generator


class LocallyConnected2d(nn.Module):
    """Images [N, C, size, size] to [N, O, size - 2, size - 2] by 3×3 filters, other ones at every place."""

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        places, inputs = (size - 2) ** 2, in_channels * 9
        self.weight = nn.Parameter(torch.randn(out_channels, inputs, places) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels, places))

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, kernel_size=3)  # [N, C·9, places]
        output = torch.einsum("nip,oip->nop", patches, self.weight) + self.bias
        return output.unflatten(2, (images.shape[2] - 2, images.shape[3] - 2))


ProxPropLocallyConnected2d = proxprop_module_generator(LocallyConnected2d)  # this is all


def main(epochs: int = 10) -> None:
    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0..16
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(classes)
    torch.manual_seed(0)
    local = ProxPropLocallyConnected2d(1, 8, size=8, tau_prox=1.0, optimization_mode="prox_cg3")
    print(local)
    model = nn.Sequential(local, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            print(f"epoch {epoch}: loss {F.cross_entropy(model(images), labels):.4f}")


if __name__ == "__main__":
    main()
