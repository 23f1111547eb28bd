"""Float32 directions of the paper's networks on a real batch, against float64.

Real images matter: their largest Gram eigenvalue is millions of times the smallest, which no random batch shows. The
batch is 500 crops of 32×32 pixels from scikit-learn's two photographs. The reference for the exact direction is a
dense float64 solve; for conjugate gradients it is the minimiser over the Krylov space, found by a method of its own
(an orthonormal basis and a small dense solve), since the textbook recurrence loses it to rounding even in float64.
"""

import copy
import functools

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from proxprop import ProxPropConv2d, ProxPropLinear
from proxprop.design import LinearDesign, MatrixDesign
from proxprop.systems import Primal

BATCH = 500
ITERATIONS = (1, 3, 10)


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


class Reference:
    """Directions of one layer at one input and output gradient, in dense float64."""

    def __init__(self, layer, x, gradient):
        self.layer, self.x, self.gradient = layer, x, gradient
        x, gradient = x.double(), gradient.double()
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, 5, padding=2).transpose(1, 2).reshape(-1, layer.weight[0].numel())
            gradient = gradient.flatten(2).transpose(1, 2).reshape(-1, layer.out_channels)
        a = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)  # [m, d]
        self.rhs = a.T @ gradient
        self.wide = a.shape[0] < a.shape[1]
        self.matrix = a @ a.T if self.wide else a.T @ a
        self.a, self.g = (a, gradient) if self.wide else (None, None)

    @functools.cached_property
    def outputs(self):
        """A few outputs that are alive."""
        size = self.rhs.norm(dim=0)
        return torch.nonzero(size > 1e-3 * size.max()).flatten()[:4]

    @functools.cached_property
    def bases(self):
        """An orthonormal Krylov basis for each of ``outputs``."""
        return [self.krylov(self.rhs[:, output]) for output in self.outputs]

    def gram_times(self, v):
        return self.a.T @ (self.a @ v) if self.wide else self.matrix @ v

    def krylov(self, rhs):
        basis = rhs[:, None] / rhs.norm()
        while basis.shape[1] < max(ITERATIONS):
            vector = self.gram_times(basis[:, -1])
            for _ in range(2):  # once leaves rounding, twice is enough
                vector = vector - basis @ (basis.T @ vector)
            basis = torch.cat([basis, (vector / vector.norm())[:, None]], 1)
        return basis

    def exact(self, tau):
        """(AᵀA + I/τ)⁻¹ AᵀG through the smaller of the two dense systems, ``[d, o]``."""
        shifted = self.matrix + torch.eye(len(self.matrix), dtype=torch.float64) / tau
        return self.a.T @ torch.linalg.solve(shifted, self.g) if self.wide else torch.linalg.solve(shifted, self.rhs)

    def conjugate_gradients(self, tau, iterations):
        """The minimiser over the Krylov space, which is the same for every τ, for ``outputs``."""
        columns = []
        for output, basis in zip(self.outputs, self.bases, strict=True):
            q = basis[:, :iterations]
            small = q.T @ self.gram_times(q) + torch.eye(iterations, dtype=torch.float64) / tau
            columns.append(q @ torch.linalg.solve(small, q.T @ self.rhs[:, output]))
        return torch.stack(columns, 1)

    def actual(self, tau, mode):
        """What the layer gives in float32, ``[d, o]``."""
        return direction(self.layer, self.x, self.gradient, tau, mode)


def direction(layer, x, gradient, tau, mode):
    """What the layer gives in its own precision, ``[d, o]``."""
    layer.tau_prox, layer.optimization_mode = tau, mode
    layer.zero_grad()
    layer(x).backward(gradient)
    return torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1).double().T


def capture(network, images, labels):
    """The references of a network's ProxProp layers, the first layer's first."""
    captured = {}

    def remember(layer, inputs, output):
        output.register_hook(lambda g: captured.__setitem__(layer, (inputs[0].detach(), g.clone())))

    layers = [m for m in network if isinstance(m, (ProxPropLinear, ProxPropConv2d))]
    handles = [layer.register_forward_hook(remember) for layer in layers]
    nn.functional.cross_entropy(network(images), labels).backward()
    for handle in handles:
        handle.remove()
    return [Reference(layer, *captured[layer]) for layer in layers]


@pytest.fixture(
    scope="module", params=[(n, s) for n in SETTINGS for s in (0, 10)], ids=lambda p: f"{p[0]}-{p[1]} steps"
)
def problem(request, images):
    """The paper's τ and the reference of each hidden layer, at the start or after some training steps."""
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
    return tau, capture(network, images, labels)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def bounds(paper_tau):
    return (paper_tau, 5e-4), (5e-4, 5e-3), (50.0, 5e-3)


def test_exact_directions_in_float32(problem):
    paper_tau, references = problem
    for reference in references:
        for tau, bound in bounds(paper_tau):
            assert error(reference.actual(tau, "prox_exact"), reference.exact(tau)) < bound


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_conjugate_gradients_in_float32(problem, iterations):
    paper_tau, references = problem
    for reference in references:
        for tau, bound in bounds(paper_tau):
            actual = reference.actual(tau, f"prox_cg{iterations}")[:, reference.outputs]
            assert error(actual, reference.conjugate_gradients(tau, iterations)) < bound


def test_layers_of_the_papers_networks_are_solved_once(problem, monkeypatch):
    """In float32: a look at what rounding has of a direction finds enough digits."""

    def refuse(design, dtype):
        raise AssertionError(f"solved again in {dtype}")

    monkeypatch.setattr(MatrixDesign, "in_precision", refuse)
    paper_tau, references = problem
    for reference in references:
        for mode in ("prox_exact", "prox_cg3", "prox_cg10"):
            assert reference.actual(paper_tau, mode).isfinite().all()


class Cancellation:
    """How the published solver's direction compares with one without its cancellation: norms' ratio and cosine."""

    def __init__(self, actual, expected):
        self.ratio = float(actual.norm() / expected.norm())
        self.cosine = float((actual * expected).sum() / actual.norm() / expected.norm())


@pytest.fixture(scope="module")
def mlp_layers(images):
    """The MLP's hidden layers at initialisation, with their inputs and output gradients."""
    torch.manual_seed(0)
    return capture(mlp(), images, torch.randint(10, (BATCH,)))


def test_the_published_solver_cancels_most_digits_of_the_first_layers_direction(mlp_layers):
    found = []
    for reference in mlp_layers:
        layer, x, gradient = reference.layer, reference.x, reference.gradient
        single = direction(layer, x, gradient, 0.05, "published_cg3")
        double = direction(copy.deepcopy(layer).double(), x.double(), gradient.double(), 0.05, "published_cg3")
        found.append(Cancellation(single, double))
    first, second, third = found
    # Only the size of the effect: which digits are lost depends on the processor's matrix products.
    assert first.cosine < 0.3 < second.cosine < third.cosine
    assert third.cosine > 0.9


def test_an_exact_solve_for_the_new_parameters_is_mostly_rounding_in_the_first_layer(mlp_layers):
    first, _, third = (Cancellation(solved_for_new_parameters(r, 0.05), r.exact(0.05)) for r in mlp_layers)
    assert first.cosine < 0.3
    assert first.ratio > 3
    assert third.cosine > 0.97
    assert third.ratio == pytest.approx(1, abs=0.05)


def solved_for_new_parameters(reference, tau):
    """What ``ParameterSystem`` describes, by a factorisation, ``[d, o]``."""
    layer = reference.layer
    design = LinearDesign(reference.x, layer.weight.shape, (True, True))
    weight, bias = Primal(
        design, reference.gradient, 1 / tau, start=(layer.weight.detach(), layer.bias.detach())
    ).solve()
    return torch.cat([weight, bias[:, None]], 1).double().T


@pytest.mark.parametrize("ratio", [1e2, 1e3])
def test_many_iterations_on_one_large_singular_value_stay_finite_and_short(ratio):
    """Where columns have converged to rounding, residuals are no longer orthogonal, and must not grow."""
    for seed in range(6):
        torch.manual_seed(seed)
        singular = torch.cat([torch.tensor([ratio]), torch.rand(99) + 0.01])
        left, right = torch.linalg.qr(torch.randn(200, 100))[0], torch.linalg.qr(torch.randn(100, 100))[0]
        x, gradient = ((left * singular) @ right).T.contiguous(), torch.randn(100, 7)
        layer = ProxPropLinear(200, 7, bias=False, tau_prox=10.0, optimization_mode="prox_cg30")
        layer(x).backward(gradient)
        a = x.double()
        exact = torch.linalg.solve(a.T @ a + torch.eye(200, dtype=a.dtype) / 10, a.T @ gradient.double()).T
        assert float(layer.weight.grad.double().norm()) < 2 * float(exact.norm())
