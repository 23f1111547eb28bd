"""The paper's two networks, with plain or with ProxProp layers, and the shapes of their hidden layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

BATCH = 500

Layer = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One hidden layer as a matrix problem: A is m×d (patch rows for a convolution), with o outputs.

    ``gram`` counts the multiply-adds of AᵀA by sums over windows, where that is cheaper than m·d²/2.
    """

    m: int
    d: int
    o: int
    gram: float


def mlp(linear: Layer, conv: Layer) -> nn.Sequential:
    """3072-4000-1000-4000-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        linear(3072, 4000), nn.ReLU(inplace=True),
        linear(4000, 1000), nn.ReLU(inplace=True),
        linear(1000, 4000), nn.ReLU(inplace=True),
        nn.Linear(4000, 10),
    )  # fmt: skip


def convnet(linear: Layer, conv: Layer) -> nn.Sequential:
    """Three 5×5 convolutions with ReLU, max-pooling behind the first two."""
    return nn.Sequential(
        conv(3, 16, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        conv(16, 20, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        conv(20, 20, 5, padding=2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(1280, 10),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "convnet": convnet}


def _linear_shape(fan_in: int, fan_out: int) -> Shape:
    return Shape(BATCH, fan_in + 1, fan_out, BATCH * (fan_in + 1) ** 2 / 2)


def _conv_shape(channels: int, outputs: int, size: int) -> Shape:
    # Strips 4 output columns wide read 8 image columns; 5 vertical offsets; the image is padded by 2.
    gram = BATCH * (size + 4) * (size // 4) * 5 * (channels * 8) ** 2
    return Shape(BATCH * size**2, 25 * channels + 1, outputs, gram)


SHAPES = {
    "mlp": [_linear_shape(3072, 4000), _linear_shape(4000, 1000), _linear_shape(1000, 4000)],
    "convnet": [_conv_shape(3, 16, 32), _conv_shape(16, 20, 16), _conv_shape(20, 20, 8)],
}


def floor(model: str, mode: str) -> float:
    """Multiply-adds that ``mode`` needs over those of plain back-propagation, each layer in its cheapest form."""
    plain = extra = 0.0
    for index, shape in enumerate(SHAPES[model]):
        plain += (2 if index == 0 else 3) * shape.m * shape.d * shape.o  # the first layer has no input gradient
        extra += _extra(shape, mode)
    return 1 + extra / plain


def _extra(shape: Shape, mode: str) -> float:
    m, d, o, gram = shape.m, shape.d, shape.o, shape.gram
    if mode == "gradient":
        return 0.0
    kernel = m * m * d / 2  # symmetric
    if mode == "prox_exact":
        return min(gram + d**3 / 3 + d * d * o, kernel + m**3 / 3 + m * m * o)
    n = int(mode.split("_cg")[1])
    spectral = kernel + 9 * m**3 + 2 * m * m * o  # 9 m³: a symmetric eigendecomposition with its vectors
    return min(gram + n * d * d * o, kernel + n * m * m * o, spectral, (2 * n - 1) * m * d * o)
