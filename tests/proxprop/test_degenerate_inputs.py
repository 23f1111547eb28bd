"""Float32 directions where inputs are nearly the same, of low rank, or huge: what rounding leaves there, τ multiplies.

The reference for the exact direction is a float64 singular value decomposition of A; for conjugate gradients it is the
textbook with numbers of fifty digits, which no rounding reaches.
"""

import mpmath
import pytest
import torch
from torch import nn

from proxprop import ProxPropConv2d, ProxPropConvTranspose2d, ProxPropLinear

BOUND = 2e-3


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def years(rows, columns):
    x = normal(rows, columns)
    x[:, 0] = 2000 + 20 * x[:, 0]
    return x


ROWS = {
    "equal": lambda m, d: normal(1, d).expand(m, d),
    "each twice": lambda m, d: normal(m // 2, d).repeat(2, 1),
    "rank three": lambda m, d: normal(m, 3) @ normal(3, d, seed=2),
    "a large mean": lambda m, d: 1 + 1e-3 * normal(m, d),
    "a column of years": years,
    "huge": lambda m, d: 1e9 * normal(m, d),
    "tiny": lambda m, d: 1e-25 * normal(m, d),
    "zero": lambda m, d: torch.zeros(m, d),
}

RAMP = torch.linspace(0, 1, 8)
IMAGES = {
    "one colour": torch.full((4, 1, 8, 8), 0.7),
    "large mean": 100 + 0.01 * normal(4, 1, 8, 8),
    "a channel of ones": torch.cat([normal(4, 1, 8, 8), torch.ones(4, 1, 8, 8)], 1),
    "ramps": normal(4, 1, 1, 1) * RAMP[:, None] + normal(4, 1, 1, 1, seed=2) * RAMP,
    "many channels of one colour": torch.full((2, 48, 4, 4), 0.7),
}


def exact(a, gradient, tau):
    """(AᵀA + I/τ)⁻¹ AᵀG, ``[o, d]``, for A ``[m, d]`` and G ``[m, o]``."""
    left, singular, right = torch.linalg.svd(a.double(), full_matrices=False)
    return ((left.T @ gradient.double()).T * (singular / (singular**2 + 1 / tau))) @ right


def conjugate_gradients(a, gradient, tau, iterations):
    """The same by the textbook, a column at a time."""
    columns = []
    with mpmath.workdps(50):
        a = mpmath.matrix(a.double().tolist())
        for output in gradient.T:
            r = a.T * mpmath.matrix(output.double().tolist())
            p, d, norm = r.copy(), 0 * r, mpmath.fdot(r, r)
            first = norm
            for _ in range(iterations):
                if norm <= first * mpmath.mpf(10) ** -60:  # converged, or zero
                    break
                product = a.T * (a * p) + p / mpmath.mpf(tau)
                length = norm / mpmath.fdot(p, product)
                d, r = d + length * p, r - length * product
                norm, previous = mpmath.fdot(r, r), norm
                p = r + (norm / previous) * p
            columns.append([float(entry) for entry in d])
    return torch.tensor(columns, dtype=torch.float64)


def expected(a, gradient, tau, mode):
    if mode == "prox_exact":
        return exact(a, gradient, tau)
    return conjugate_gradients(a, gradient, tau, int(mode.removeprefix("prox_cg")))


def error(actual, reference):
    size = float(reference.norm())
    return float((actual.double() - reference).norm()) / (size or 1.0)


@pytest.mark.parametrize("tau", [0.05, 1.0, 1000.0])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg2", "prox_cg5"])
@pytest.mark.parametrize("shape", [(12, 40, 5), (12, 40, 60), (40, 12, 5), (64, 48, 40)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows, shape, mode, tau):
    m, d, o = shape
    x, gradient = ROWS[rows](m, d), normal(m, o, seed=3)
    layer = ProxPropLinear(d, o, bias=rows != "tiny", tau_prox=tau, optimization_mode=mode)
    layer(x).backward(gradient)
    a, actual = x, layer.weight.grad
    if layer.bias is not None:
        a, actual = torch.cat([x, torch.ones(m, 1)], 1), torch.cat([actual, layer.bias.grad[:, None]], 1)
    few = slice(3)  # outputs do not mix
    reference = expected(a, gradient[:, few], tau, mode)
    assert error(actual[few], reference) < BOUND


@pytest.mark.parametrize("tau", [1.0, 1000.0])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2"])
@pytest.mark.parametrize("images", IMAGES)
def test_convolutions(images, mode, tau):
    x = IMAGES[images]
    layer = ProxPropConv2d(x.shape[1], 16, 3, tau_prox=tau, optimization_mode=mode)
    output = layer(x)
    gradient = normal(*output.shape, seed=3)
    output.backward(gradient)
    patches = nn.functional.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1)
    a = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    actual = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)[:2]
    reference = expected(a, gradient.movedim(1, -1).flatten(0, 2)[:, :2], tau, mode)
    assert error(actual, reference) < BOUND


@pytest.mark.parametrize("mean", [3.0, 10.0, 30.0])
@pytest.mark.parametrize("mode", ["prox_cg3", "prox_cg5", "prox_cg6", "prox_cg8"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 4, 2, 6), (4, 8, 4, (4, 2), (0, 2), (3, 0), 2, True, (3, 1))), ((4, 8, 2, 8), (8, 8, 4, 2))],
    ids=["groups", "stride two"],
)
def test_transposed_convolutions(shape, sizes, mode, mean):
    """There is a block of AᵀA for each phase of the stride, and so its largest eigenvalue several times."""
    torch.manual_seed(1)
    layer = ProxPropConvTranspose2d(*sizes, tau_prox=100.0, optimization_mode=mode, gram_reduction="mean")
    x = normal(*shape) + mean
    output = layer(x)
    gradient = normal(*output.shape, seed=3)
    output.backward(gradient)
    outputs = output.shape[1] // layer.groups
    inputs = shape[1] // layer.groups
    # Of the first group: a column for each entry of an output's kernel, the layer's output where that alone is one.
    weight = torch.zeros_like(layer.weight, dtype=torch.float64)
    columns = []
    for channel in range(inputs):
        for place in range(weight[0, 0].numel()):
            weight.zero_()[channel, 0].view(-1)[place] = 1
            columns.append(
                nn.functional.conv_transpose2d(
                    x.double(),
                    weight,
                    None,
                    layer.stride,
                    layer.padding,
                    layer.output_padding,
                    layer.groups,
                    layer.dilation,
                )[:, 0].flatten()
            )
    rows = len(columns[0])
    a = torch.stack([*columns, torch.ones(rows, dtype=torch.float64)], 1)
    few = min(2, outputs)
    reference = conjugate_gradients(
        a, gradient[:, :few].movedim(1, -1).flatten(0, 2) * rows / 100, 100.0 / rows, int(mode[7:])
    )
    actual = torch.cat(
        [layer.weight.grad[:inputs, :few].flatten(2).movedim(1, 0).flatten(1), layer.bias.grad[:few, None]], 1
    )
    assert error(actual, reference) < 1e-2
