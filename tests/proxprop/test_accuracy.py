"""Float32 directions of the paper's networks on a real batch, against float64.

Real images matter: their largest Gram eigenvalue is millions of times the smallest, which no random batch shows. The
batch is 500 crops of 32×32 pixels from scikit-learn's two photographs. The reference for the exact direction is a
dense float64 solve; for conjugate gradients it is the minimiser over the Krylov space, found by a method of its own
(an orthonormal basis and a small dense solve), since the textbook recurrence loses it to rounding even in float64.
"""

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from proxprop import ProxPropConv2d, ProxPropLinear

BATCH = 500


@pytest.fixture(scope="module")
def images():
    crops = []
    for photo in load_sample_images().images:
        pixels = torch.tensor(photo).permute(2, 0, 1) / 255
        tiles = pixels.unfold(1, 32, 32).unfold(2, 32, 32)  # [3, rows, columns, 32, 32]
        crops.append(tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32))
    return torch.cat(crops)[:BATCH]


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        ProxPropLinear(3072, 4000), nn.ReLU(),
        ProxPropLinear(4000, 1000), nn.ReLU(),
        ProxPropLinear(1000, 4000), nn.ReLU(),
        nn.Linear(4000, 10),
    )  # fmt: skip


def convnet():
    return nn.Sequential(
        ProxPropConv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        ProxPropConv2d(16, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        ProxPropConv2d(20, 20, 5, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1280, 10),
    )  # fmt: skip


SETTINGS = {  # network, optimizer and step size of the paper; learned in a few steps, so that activations are trained
    "mlp": (mlp, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.95, nesterov=True), 0.05),
    "convnet": (convnet, lambda p: torch.optim.Adam(p, lr=1e-3), 1.0),
}


@pytest.fixture(
    scope="module", params=[(n, s) for n in SETTINGS for s in (0, 10)], ids=lambda p: f"{p[0]}-{p[1]} steps"
)
def problem(request, images):
    """The paper's τ, and (layer, input, gradient) of each hidden layer after some training steps."""
    name, steps = request.param
    make, optimizer_of, tau = SETTINGS[name]
    torch.manual_seed(0)
    network = make()
    labels = torch.randint(10, (BATCH,))
    layers = [m for m in network if isinstance(m, (ProxPropLinear, ProxPropConv2d))]
    for layer in layers:
        layer.tau_prox, layer.optimization_mode = tau, "prox_exact" if name == "mlp" else "prox_cg3"
    optimizer = optimizer_of(network.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    captured = {}

    def capture(layer, inputs, output):
        output.register_hook(lambda g: captured.__setitem__(layer, (inputs[0].detach(), g.clone())))

    handles = [layer.register_forward_hook(capture) for layer in layers]
    nn.functional.cross_entropy(network(images), labels).backward()
    for handle in handles:
        handle.remove()
    network.zero_grad()
    return tau, [(layer, *captured[layer]) for layer in layers]


def dense(layer, x, gradient):
    """A with its column of ones, and G, in float64: ``[m, d]`` and ``[m, o]``."""
    x, gradient = x.double(), gradient.double()
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, 5, padding=2).transpose(1, 2).reshape(-1, layer.weight[0].numel())
        gradient = gradient.flatten(2).transpose(1, 2).reshape(-1, layer.out_channels)
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1), gradient


def exact(a, gradient, tau):
    """(AᵀA + I/τ)⁻¹ AᵀG, through the smaller of the two dense systems."""
    m, d = a.shape
    if d <= m:
        return torch.linalg.solve(a.T @ a + torch.eye(d, dtype=a.dtype) / tau, a.T @ gradient)
    return a.T @ torch.linalg.solve(a @ a.T + torch.eye(m, dtype=a.dtype) / tau, gradient)


def krylov(a, gradient, tau, iterations):
    """For a few outputs: the minimiser of the quadratic over the Krylov space, which N CG steps define."""
    columns = []
    for g in gradient.T:
        rhs = a.T @ g
        basis = rhs[:, None] / rhs.norm()
        while basis.shape[1] < iterations:
            vector = a.T @ (a @ basis[:, -1])
            for _ in range(2):  # twice is enough
                vector = vector - basis @ (basis.T @ vector)
            basis = torch.cat([basis, (vector / vector.norm())[:, None]], 1)
        product = a @ basis
        small = product.T @ product + basis.T @ basis / tau
        columns.append(basis @ torch.linalg.solve(small, basis.T @ rhs))
    return torch.stack(columns, 1)


def direction(layer, x, gradient, tau, mode):
    """D as ``[d, o]``, in the layout of the references."""
    layer.tau_prox, layer.optimization_mode = tau, mode
    layer.zero_grad()
    layer(x).backward(gradient)
    return torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1).double().T


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_exact_directions_in_float32(problem):
    paper_tau, layers = problem
    for layer, x, gradient in layers:
        a, g = dense(layer, x, gradient)
        for tau, bound in ((paper_tau, 5e-4), (5e-4, 5e-3), (50.0, 5e-3)):
            assert error(direction(layer, x, gradient, tau, "prox_exact"), exact(a, g, tau)) < bound


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_conjugate_gradients_in_float32(problem, iterations):
    paper_tau, layers = problem
    for layer, x, gradient in layers:
        a, g = dense(layer, x, gradient)
        alive = torch.nonzero(g.abs().amax(0) > 1e-6 * g.abs().max()).flatten()[:4]
        for tau, bound in ((paper_tau, 5e-4), (5e-4, 5e-3), (50.0, 5e-3)):
            actual = direction(layer, x, gradient, tau, f"prox_cg{iterations}")[:, alive]
            assert error(actual, krylov(a, g[:, alive], tau, iterations)) < bound
