"""Every form of the system against the dense oracle, whichever one the cost model would choose."""

import dataclasses

import oracle
import pytest
import torch
from test_directions import LAYERS, expected, prepared
from torch._subclasses.fake_tensor import FakeTensorMode

from proxprop import ProxPropLinear
from proxprop.choice import iterative_system
from proxprop.cost import COSTS
from proxprop.solvers import CGRules, conjugate_gradients
from proxprop.systems import Bordered, Diagonal, Dual, MatrixFree, Primal, Spectral

ITERATIVE = (Primal, Dual, Spectral, MatrixFree)
TAU = 0.7
PAIRS = [
    *((name, form) for name in ("wide", "tall", "no bias", "one row") for form in ITERATIVE),
    *((name, form) for name in ("conv2d", "conv2d groups", "conv1d strided") for form in ITERATIVE),
    *((name, form) for name in ("transposed linear wide", "conv_transpose2d strided") for form in ITERATIVE),
    *((name, form) for name in ("embedding", "embedding few tokens") for form in (Diagonal, *ITERATIVE[1:])),
]
"""An embedding's Gram matrix is known by its diagonal alone, so it has no primal form."""


def named(parameters):
    return {name: d.detach() for name, d in zip(("weight", "bias"), parameters, strict=True) if d is not None}


def design_of(layer, x):
    used = layer._used()
    _, make_design, _ = layer._linearised(used, [p is not None for p in used.values()], x)
    return make_design(x)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_conjugate_gradients_in_every_form(name, form, iterations):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    system = form(design_of(layer, x), gradient, 1 / TAU)
    actual = named(conjugate_gradients(system, iterations, CGRules()))
    assert oracle.relative_error(actual, expected(layer, [x], gradient, f"prox_cg{iterations}", TAU)) < 1e-9


@pytest.mark.parametrize(("name", "form"), [pair for pair in PAIRS if pair[1] in (Primal, Dual, Diagonal)])
def test_factorisations_in_both_forms(name, form):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    actual = named(form(design_of(layer, x), gradient, 1 / TAU).solve())
    assert oracle.relative_error(actual, expected(layer, [x], gradient, "prox_exact", TAU)) < 1e-9


@pytest.mark.parametrize(
    "name", ["wide", "sequence", "embedding", "conv2d groups", "conv2d unbatched", "conv_transpose2d strided"]
)
def test_sums_of_outputs_have_the_sums_of_their_right_hand_sides(name):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    design = design_of(layer, x)
    weights = torch.randn(3, design.outputs, dtype=gradient.dtype)
    part = design.of_outputs(range(3), gradient.dtype)
    actual = part.right_hand_side(design.sums(weights, gradient))
    assert torch.allclose(actual, weights @ design.right_hand_side(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ITERATIVE)
def test_published_rules_in_every_form(form):
    layer, x, gradient = prepared(*LAYERS["wide"], "gradient", 0.05)
    rules = CGRules(orthogonal=False, conjugate=False, damping=1e-6, stop_below=1e-2)
    actual = named(conjugate_gradients(form(design_of(layer, x), gradient, 1 / 0.05), 4, rules))
    assert oracle.relative_error(actual, expected(layer, [x], gradient, "published_cg4", 0.05)) < 1e-6


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in ("wide", "tall", "no bias", "sequence") for form in (Primal, Bordered, MatrixFree)),
        *((f"conv2d{kind}", form) for kind in ("", " groups", " unbatched") for form in (Primal, Bordered, MatrixFree)),
        *((name, form) for name in ("embedding", "embedding few tokens") for form in (Diagonal, Bordered, MatrixFree)),
    ],
)
def test_solving_for_the_new_parameters_changes_nothing_in_float64(name, form):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    start = tuple(None if p is None else p.detach() for p in layer._used().values())
    system = form(design_of(layer, x), gradient, 1 / TAU, start=start)
    actual = named(conjugate_gradients(system, 3, CGRules()))
    assert oracle.relative_error(actual, expected(layer, [x], gradient, "prox_cg3", TAU)) < 1e-9


@pytest.mark.parametrize("form", ITERATIVE)
def test_inputs_that_are_not_finite_give_directions_that_are_not(form):
    layer, x, gradient = prepared(*LAYERS["wide"], "gradient", TAU)
    x[1, 2] = torch.nan
    weight, _ = conjugate_gradients(form(design_of(layer, x), gradient, 1 / TAU), 3, CGRules())
    assert not torch.isfinite(weight).any()


@pytest.mark.parametrize("form", ITERATIVE)
def test_equal_and_empty_rows_in_every_form(form):
    layer, x, gradient = prepared(*LAYERS["wide"], "gradient", TAU)
    x[1], x[2] = x[0], 0
    actual = named(conjugate_gradients(form(design_of(layer, x), gradient, 1 / TAU), 3, CGRules()))
    assert oracle.relative_error(actual, expected(layer, [x], gradient, "prox_cg3", TAU)) < 1e-9


@pytest.mark.parametrize("name", ["wide", "sequence", "conv2d groups", "transposed linear wide"])
@pytest.mark.parametrize("form", [Dual, Bordered])
def test_few_outputs_at_a_time_give_the_same_direction(monkeypatch, name, form):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    start = {"start": tuple(None if p is None else p.detach() for p in layer._used().values())}
    monkeypatch.setitem(COSTS, "cpu", dataclasses.replace(COSTS["cpu"], working_set=1))
    system = form(design_of(layer, x), gradient, 1 / TAU, **(start if form is Bordered else {}))
    actual = named(conjugate_gradients(system, 4, CGRules()))
    assert oracle.relative_error(actual, expected(layer, [x], gradient, "prox_cg4", TAU)) < 1e-9


@pytest.mark.parametrize(
    ("name", "costs", "form"),
    [
        ("wide", {"eigen": 0.0}, Spectral),
        ("wide", {"eigen": float("inf")}, Dual),
        ("conv2d", {"eigen": float("inf"), "matrix_free": 0.0}, MatrixFree),
    ],
)
def test_the_user_can_steer_the_choice(monkeypatch, name, costs, form):
    layer, x, gradient = prepared(*LAYERS[name], "gradient", TAU)
    monkeypatch.setitem(COSTS, "cpu", dataclasses.replace(COSTS["cpu"], **costs))
    assert type(iterative_system(design_of(layer, x), gradient, 1 / TAU, 10)) is form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["prox_cg3", "prox_cg5", "prox_cg10", "prox_cg20"])
@pytest.mark.parametrize(
    ("rows", "columns", "tau", "value"), [(32, 200, 0.05, 0.0), (128, 500, 1.0, 0.0), (32, 200, 0.05, 1.0)]
)
def test_inputs_that_span_one_dimension(rows, columns, tau, value, mode, dtype):
    """Dead units, or a constant: all but one dimension of the dual form stand for nothing, and must stay so."""
    for seed in range(4):
        torch.manual_seed(seed)
        layer = ProxPropLinear(columns, 50, tau_prox=tau, optimization_mode=mode, dtype=dtype)
        x, gradient = torch.full((rows, columns), value, dtype=dtype), torch.randn(rows, 50, dtype=dtype)
        layer(x).backward(gradient)
        # One eigenvalue, m·(d·value² + 1), so that the first iteration is exact.
        expected = gradient.double().sum(0) / (rows * (columns * value**2 + 1) + 1 / tau)
        error = (layer.bias.grad.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
def test_tensors_without_numbers(mode):
    with FakeTensorMode():
        layer = ProxPropLinear(400, 300, optimization_mode=mode)
        layer(torch.randn(500, 400)).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
