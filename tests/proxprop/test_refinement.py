"""Factorisations in float32 that are refined, and what stands behind them where that does not do."""

import oracle
import pytest
import torch
from test_directions import directions

from proxprop import ProxPropConv2d, ProxPropLinear, choice, row_mask, systems
from proxprop.design import LinearDesign
from proxprop.systems import Dual, Primal

FORMS = {Primal: (300, 60), Dual: (60, 300)}


def problem(form, spread, outputs=20):
    """A design matrix whose singular values fall by ``spread``, with a gradient; some columns of that are zero."""
    torch.manual_seed(0)
    rows, columns = FORMS[form]
    u, s, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    x = u * (10 * spread ** -torch.linspace(0, 1, len(s))) @ v
    gradient = torch.randn(rows, outputs)
    gradient[:, 3] = 0
    return x, gradient


def solve(form, x, gradient, tau, **options):
    system = form(LinearDesign(x, (gradient.shape[1], x.shape[1]), (True, True)), gradient, 1 / tau, **options)
    weight, bias = system.solve()
    return system, torch.cat([weight, bias[:, None]], 1)


def dense(x, gradient, tau):
    """The exact direction ``[o, d]`` for rows x, with a bias, by a dense solve in float64."""
    a = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return torch.linalg.solve(a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / tau, a.T @ gradient.double()).T


def error(x, gradient, tau, actual):
    reference = dense(x, gradient, tau)
    return float((actual - reference).norm() / reference.norm())


def by_name(direction, shape):
    return {"weight": direction[:, :-1].reshape(shape), "bias": direction[:, -1]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("spread", "tau"), [(2.0, 1.0), (1e2, 1.0), (1e3, 10.0)])
def test_a_refined_float32_factorisation_keeps_its_bound(form, spread, tau):
    x, gradient = problem(form, spread)
    system, actual = solve(form, x, gradient, tau, single=True)
    assert system.matrix.dtype == torch.float32
    assert error(x, gradient, tau, actual) < 2 * systems.ACCURATE


@pytest.mark.parametrize("form", FORMS)
def test_refinements_bring_the_digits(form, monkeypatch):
    x, gradient = problem(form, 1e3)
    monkeypatch.setattr(systems.Dual, "_keeps_digits", lambda system, value: True)  # it looks at something else
    monkeypatch.setattr(systems, "ACCURATE", 1.0)
    _, coarse = solve(form, x, gradient, 10.0, single=True)
    monkeypatch.setattr(systems, "ACCURATE", 1e-5)
    system, fine = solve(form, x, gradient, 10.0, single=True)
    assert system.matrix.dtype == torch.float32
    assert error(x, gradient, 10.0, fine) < min(3e-5, error(x, gradient, 10.0, coarse) / 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accurate", [0.0, systems.ACCURATE])
def test_where_refinement_does_not_do_the_accumulation_precision_takes_over(form, accurate, monkeypatch):
    x, gradient = problem(form, 1e3)
    tau = 10.0 if accurate == 0 else 1e6  # at the second, 1/τ is lost in float32
    monkeypatch.setattr(systems, "ACCURATE", accurate)
    system, actual = solve(form, x, gradient, tau, single=True)
    assert system.matrix.dtype == torch.float64
    assert not system.failed.any()
    assert error(x, gradient, tau, actual) < 5e-4
    if accurate == 0:
        assert torch.equal(actual, solve(form, x, gradient, tau)[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 0.0])
def test_gradients_of_any_size_are_refined(form, scale):
    x, gradient = problem(form, 1e2)
    _, actual = solve(form, x, gradient * scale, 1.0, single=True)
    expected = dense(x, gradient * scale, 1.0)
    assert float((actual - expected).norm()) <= 2 * systems.ACCURATE * float(expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["input", "gradient"])
def test_numbers_that_are_not_finite_come_through(form, what):
    x, gradient = problem(form, 1e2)
    (x if what == "input" else gradient)[0, 0] = torch.inf
    _, actual = solve(form, x, gradient, 1.0, single=True)
    assert not torch.isfinite(actual).all()


def test_large_layers_with_few_outputs_are_refined_and_keep_their_bound():
    torch.manual_seed(0)
    layer = ProxPropLinear(1100, 200, tau_prox=1.0, optimization_mode="prox_exact")
    x, gradient = torch.randn(1200, 1100).relu(), torch.randn(1200, 200)
    design = LinearDesign(x, (200, 1100), (True, True))
    assert choice.direct_system(design, gradient, 1.0).single
    actual = directions(layer, [x], gradient)
    assert oracle.relative_error(actual, by_name(dense(x, gradient, 1.0), (200, 1100))) < 2 * systems.ACCURATE


def convolution(tau):
    """One of 64 channels, with its input and gradient, and its exact direction, of patches."""
    torch.manual_seed(0)
    layer = ProxPropConv2d(64, 32, 3, padding=1, tau_prox=tau, optimization_mode="prox_exact")
    x, gradient = torch.randn(10, 64, 8, 8).relu(), torch.randn(10, 32, 8, 8)
    patches = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    return layer, x, gradient, by_name(dense(patches, rows, tau), (32, 64, 3, 3))


def test_a_convolution_of_many_channels_is_refined_and_keeps_its_bound(monkeypatch):
    layer, x, gradient, reference = convolution(tau=1.0)
    seen = []
    monkeypatch.setattr(Dual, "_refined", lambda self, call=Dual._refined: seen.append(call(self)) or seen[-1])
    monkeypatch.setattr(Primal, "_refined", lambda self, call=Primal._refined: seen.append(call(self)) or seen[-1])
    actual = directions(layer, [x], gradient)
    assert seen[0] is not None
    assert oracle.relative_error(actual, reference) < 2 * systems.ACCURATE


@pytest.mark.parametrize("tau", [1.0, 50.0])
@pytest.mark.parametrize("why", ["nobody can look", "nothing is accurate enough"])
def test_a_convolution_of_many_channels_that_is_not_refined(monkeypatch, tau, why):
    """As on a GPU, where the host does not wait for numbers; and where a look finds the quick way too inaccurate."""
    if why == "nobody can look":
        monkeypatch.setattr(systems, "numbers_at_hand", lambda tensor: False)
        monkeypatch.setattr(choice, "numbers_at_hand", lambda tensor: False)
    else:
        monkeypatch.setattr(systems, "ACCURATE", 0.0)
    layer, x, gradient, reference = convolution(tau)
    assert oracle.relative_error(directions(layer, [x], gradient), reference) < 1e-5


NEARLY_CONSTANT = {
    "strips": (16, 16, 1, 3),
    "pixels": (64, 16, 1, 3),
    "pairs": (8, 8, 8, 7),
}


@pytest.mark.parametrize("tau", [1.0, 50.0, 1000.0])
@pytest.mark.parametrize("name", NEARLY_CONSTANT)
def test_a_convolution_of_images_that_hardly_vary_keeps_its_bound(name, tau):
    """Float32 products would hide what varies, whatever the form of the Gram matrix."""
    channels, outputs, groups, size = NEARLY_CONSTANT[name]
    torch.manual_seed(0)
    layer = ProxPropConv2d(
        channels, outputs, size, padding=size // 2, groups=groups, tau_prox=tau, optimization_mode="prox_exact"
    )
    coarse = torch.randn(16, channels, 4, 4)
    x = 1 + 0.02 * torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    gradient = torch.randn(16, outputs, 8, 8)
    actual = directions(layer, [x], gradient)
    patches = torch.nn.functional.unfold(x, size, padding=size // 2).transpose(1, 2).flatten(0, 1)
    rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    parts = zip(patches.chunk(groups, 1), rows.chunk(groups, 1), strict=True)
    reference = by_name(torch.cat([dense(part, right, tau) for part, right in parts]), layer.weight.shape)
    assert oracle.relative_error(actual, reference) < 20 * systems.ACCURATE


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_layer_where_nobody_can_look(monkeypatch, form):
    monkeypatch.setattr(systems, "numbers_at_hand", lambda tensor: False)
    monkeypatch.setattr(choice, "numbers_at_hand", lambda tensor: False)
    x, gradient = problem(form, 1e2)
    layer = ProxPropLinear(x.shape[1], gradient.shape[1], tau_prox=1.0, optimization_mode="prox_exact")
    assert (
        oracle.relative_error(directions(layer, [x], gradient), by_name(dense(x, gradient, 1.0), layer.weight.shape))
        < 1e-5
    )


def test_right_hand_sides_of_float32_products_are_looked_at(monkeypatch):
    monkeypatch.setattr(systems, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(200, 5) @ torch.randn(5, 20)  # rank-deficient: τ amplifies what rounding puts outside the range
    gradient = torch.randn(200, 3)
    kept = []
    original = LinearDesign.right_hand_side
    monkeypatch.setattr(
        LinearDesign,
        "right_hand_side",
        lambda self, g, precise=True: kept.append(precise) or original(self, g, precise),
    )
    for tau, precise in ((1e-4, False), (50.0, True)):
        kept.clear()
        layer = ProxPropLinear(20, 3, bias=False, tau_prox=tau, optimization_mode="prox_exact")
        actual = oracle.relative_error(directions(layer, [x], gradient), oracle.exact(layer, [x], gradient, tau))
        assert kept[-1] is precise
        assert actual < (1e-5 if precise else 2 * systems.ACCURATE)


@pytest.mark.parametrize("size", [12, 16, 33])
def test_a_factorisation_in_blocks(size, monkeypatch):
    monkeypatch.setattr(systems, "BLOCK", 3)
    torch.manual_seed(0)
    a = torch.randn(2, size, size, dtype=torch.float64)
    matrix = a @ a.mT + torch.eye(size, dtype=torch.float64)
    factor, info = systems.cholesky(matrix)
    assert not info.any()
    assert torch.allclose(factor.tril(), torch.linalg.cholesky(matrix), rtol=0, atol=1e-12)
    for place in (0, -1):
        broken = matrix.clone()
        broken[1, place, place] = -1
        _, info = systems.cholesky(broken)
        assert info[0] == 0
        assert info[1] != 0


def test_what_is_factorised_is_as_it_was():
    matrix = torch.randn(1, 4, 4).double()
    matrix = matrix @ matrix.mT
    kept = matrix.clone()
    factor, _ = systems.factorised(matrix, 0.3)
    assert torch.equal(matrix, kept)
    assert torch.allclose(factor @ factor.mT, kept + 0.3 * torch.eye(4).double())


def test_a_mask_and_a_refinement():
    torch.manual_seed(0)
    x = torch.randn(1200, 600) @ torch.diag(torch.logspace(0, -4, 600)) @ torch.linalg.qr(torch.randn(600, 600))[0]
    mask, gradient = torch.arange(1200) < 1100, torch.randn(1200, 20)
    layer = ProxPropLinear(600, 20, tau_prox=10.0, optimization_mode="prox_exact")
    corrections = []
    with pytest.MonkeyPatch.context() as patch:
        correct = systems.DirectSystem._correction
        patch.setattr(systems.DirectSystem, "_correction", lambda *a: corrections.append(a) or correct(*a))
        with row_mask(mask):
            output = layer(x)
        output.backward(gradient)
    assert any(value.shape[1] == 20 for _, _, value in corrections)  # of all outputs, not of a few sums
    expected = by_name(dense(x[mask], gradient[mask], 10.0), (20, 600))
    assert oracle.relative_error({"weight": layer.weight.grad, "bias": layer.bias.grad}, expected) < 1e-3
