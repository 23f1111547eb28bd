"""Every mode, layer and option against the dense float64 oracle."""

import copy
import dataclasses

import oracle
import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers_like import Conv1D

from proxprop import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConv3d,
    ProxPropConvTranspose1d,
    ProxPropConvTranspose2d,
    ProxPropConvTranspose3d,
    ProxPropEmbedding,
    ProxPropLinear,
    proxprop_module_generator,
)
from proxprop.cost import COSTS
from proxprop.design import conv
from proxprop.modes import parse_mode

ProxPropConv1D = proxprop_module_generator(Conv1D)

LAYERS = {
    "wide": (lambda **k: ProxPropLinear(11, 6, **k), (4, 11)),
    "tall": (lambda **k: ProxPropLinear(3, 5, **k), (9, 3)),
    "no bias": (lambda **k: ProxPropLinear(5, 4, bias=False, **k), (7, 5)),
    "one output": (lambda **k: ProxPropLinear(5, 1, **k), (7, 5)),
    "one row": (lambda **k: ProxPropLinear(5, 3, **k), (1, 5)),
    "unbatched": (lambda **k: ProxPropLinear(5, 3, **k), (5,)),
    "sequence": (lambda **k: ProxPropLinear(5, 3, **k), (2, 3, 5)),
    "sequence of sequences, no bias": (lambda **k: ProxPropLinear(5, 3, bias=False, **k), (2, 2, 3, 5)),
    "conv1d": (lambda **k: ProxPropConv1d(2, 4, 3, **k), (3, 2, 9)),
    "conv1d strided": (lambda **k: ProxPropConv1d(2, 3, 3, stride=2, padding=1, **k), (2, 2, 9)),
    "conv2d": (lambda **k: ProxPropConv2d(3, 4, 3, padding=1, **k), (2, 3, 6, 5)),
    "conv2d valid": (lambda **k: ProxPropConv2d(2, 3, (2, 3), padding="valid", **k), (2, 2, 5, 5)),
    "conv2d same": (lambda **k: ProxPropConv2d(2, 3, (2, 4), padding="same", **k), (2, 2, 5, 4)),
    "conv2d same dilated": (
        lambda **k: ProxPropConv2d(2, 3, 3, padding="same", dilation=2, **k),
        (2, 2, 6, 5),
    ),
    "conv2d strided": (lambda **k: ProxPropConv2d(2, 3, 3, stride=(2, 3), padding=(1, 2), **k), (2, 2, 7, 8)),
    "conv2d dilated": (lambda **k: ProxPropConv2d(2, 3, 2, dilation=(2, 3), **k), (2, 2, 6, 7)),
    "conv2d groups": (lambda **k: ProxPropConv2d(4, 6, 3, groups=2, padding=1, **k), (2, 4, 5, 5)),
    "conv2d depthwise": (lambda **k: ProxPropConv2d(3, 3, 3, groups=3, **k), (2, 3, 5, 5)),
    "conv2d no bias": (lambda **k: ProxPropConv2d(2, 3, 3, bias=False, **k), (2, 2, 5, 5)),
    "conv2d unbatched": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, **k), (2, 5, 5)),
    "conv2d pointwise": (lambda **k: ProxPropConv2d(4, 3, 1, **k), (2, 4, 3, 3)),
    "conv2d few rows": (lambda **k: ProxPropConv2d(4, 3, 3, **k), (2, 4, 4, 3)),
    "conv3d": (lambda **k: ProxPropConv3d(2, 3, (2, 3, 2), padding=(1, 0, 1), **k), (2, 2, 3, 4, 3)),
    "conv3d groups strided": (
        lambda **k: ProxPropConv3d(2, 4, 2, stride=(1, 2, 1), dilation=(1, 1, 2), groups=2, **k),
        (2, 2, 3, 5, 4),
    ),
    "transposed linear wide": (lambda **k: ProxPropConv1D(6, 11, **k), (4, 11)),
    "transposed linear tall": (lambda **k: ProxPropConv1D(5, 3, **k), (3, 3, 3)),
    "embedding": (lambda **k: ProxPropEmbedding(7, 3, **k), torch.tensor([[0, 3, 3], [6, 1, 0]])),
    "embedding few tokens": (lambda **k: ProxPropEmbedding(4, 5, **k), torch.tensor([[0, 3, 3], [1, 1, 0]])),
    "embedding one row": (lambda **k: ProxPropEmbedding(4, 5, **k), torch.tensor(2)),
    "conv_transpose1d": (lambda **k: ProxPropConvTranspose1d(2, 4, 3, **k), (3, 2, 7)),
    "conv_transpose1d dilated": (
        lambda **k: ProxPropConvTranspose1d(2, 3, 3, stride=3, dilation=2, padding=1, **k),
        (2, 2, 5),
    ),
    "conv_transpose2d": (lambda **k: ProxPropConvTranspose2d(3, 4, 3, padding=1, **k), (2, 3, 5, 4)),
    "conv_transpose2d strided": (
        lambda **k: ProxPropConvTranspose2d(2, 3, (3, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 2), **k),
        (2, 2, 3, 4),
    ),
    "conv_transpose2d no bias": (lambda **k: ProxPropConvTranspose2d(4, 3, 2, stride=2, bias=False, **k), (2, 4, 2, 3)),
    "conv_transpose2d groups": (
        lambda **k: ProxPropConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=(1, 2), **k),
        (2, 4, 3, 2),
    ),
    "conv_transpose2d depthwise": (lambda **k: ProxPropConvTranspose2d(3, 3, 2, groups=3, **k), (2, 3, 3, 3)),
    "conv_transpose2d unbatched": (lambda **k: ProxPropConvTranspose2d(2, 3, 3, stride=2, **k), (2, 3, 3)),
    "conv_transpose2d cut": (lambda **k: ProxPropConvTranspose2d(2, 3, 2, stride=2, padding=2, **k), (2, 2, 4, 5)),
    "conv_transpose3d": (
        lambda **k: ProxPropConvTranspose3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), groups=2, **k),
        (2, 2, 3, 2, 3),
    ),
}
"""Each with the shape of a random input, or an input."""
for _mode in ("reflect", "replicate", "circular"):
    LAYERS[f"conv1d {_mode}"] = (
        lambda m=_mode, **k: ProxPropConv1d(2, 3, 3, padding=2, padding_mode=m, **k),
        (2, 2, 6),
    )
    LAYERS[f"conv2d {_mode}"] = (
        lambda m=_mode, **k: ProxPropConv2d(2, 3, 3, padding=(1, 2), padding_mode=m, **k),
        (2, 2, 5, 4),
    )
    LAYERS[f"conv2d same {_mode}"] = (
        lambda m=_mode, **k: ProxPropConv2d(2, 3, (2, 3), padding="same", padding_mode=m, **k),
        (2, 2, 5, 4),
    )

_SEEDED = torch.Generator().manual_seed(0)


def _randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=_SEEDED)


GENERATED = {
    "LayerNorm": (
        lambda **k: proxprop_module_generator(nn.LayerNorm)(6, **k),
        [_randn(4, 6)],
    ),
    "BatchNorm1d": (
        lambda **k: proxprop_module_generator(nn.BatchNorm1d)(6, **k),
        [_randn(5, 6)],
    ),
    "Bilinear": (
        lambda **k: proxprop_module_generator(nn.Bilinear)(3, 4, 2, **k),
        [_randn(5, 3), _randn(5, 4)],
    ),
    "EmbeddingBag": (
        lambda **k: proxprop_module_generator(nn.EmbeddingBag)(7, 3, **k),
        [torch.tensor([[0, 3, 3], [6, 1, 0]])],
    ),
}


def directions(layer, inputs, gradient):
    """What a backward pass from ``gradient`` writes into ``.grad``."""
    layer(*inputs).backward(gradient)
    return {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}


def prepared(make, shape, mode, tau):
    generator = torch.Generator().manual_seed(3)
    layer = make(tau_prox=tau, optimization_mode=mode).double()
    given = isinstance(shape, torch.Tensor)
    x = shape if given else torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(layer(x).shape, generator=generator, dtype=torch.float64)
    return layer, x, gradient


def expected(layer, inputs, gradient, mode, tau, stacked=False):
    if mode == "prox_exact":
        return oracle.exact(layer, inputs, gradient, tau)
    if mode == "gradient":
        a, shapes = oracle.design_matrix(layer, inputs)
        return oracle.split(a.T @ gradient.flatten(), shapes)
    kind, steps = mode.split("_cg")
    published = kind == "published"
    stacked = stacked or (published and isinstance(layer, _ConvNd))
    return oracle.conjugate_gradients(layer, inputs, gradient, tau, int(steps), published, stacked)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg2", "prox_cg4", "gradient", "published_cg3"])
@pytest.mark.parametrize("name", LAYERS)
def test_direction_agrees_with_the_dense_oracle(name, mode):
    make, shape = LAYERS[name]
    layer, x, gradient = prepared(make, shape, mode, tau=0.7)
    actual = directions(layer, [x], gradient)
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "gradient", "published_cg2"])
@pytest.mark.parametrize(
    "name",
    [
        *("wide", "tall", "conv2d", "conv2d groups", "conv2d few rows"),
        *("transposed linear wide", "transposed linear tall", "conv_transpose2d", "conv_transpose2d groups"),
    ],
)
def test_only_what_is_trained_is_solved_for(name, mode, frozen):
    make, shape = LAYERS[name]
    layer, x, gradient = prepared(make, shape, mode, tau=0.7)
    getattr(layer, frozen).requires_grad_(False)
    actual = directions(layer, [x], gradient)
    assert getattr(layer, frozen).grad is None
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9


@pytest.mark.parametrize("mode", ["prox_cg1", "prox_cg3", "gradient", "published_cg3"])
@pytest.mark.parametrize("name", GENERATED)
def test_generated_layers_treat_all_parameters_as_one_vector(name, mode):
    make, inputs = GENERATED[name]
    layer = make(tau_prox=0.7, optimization_mode=mode).double()
    gradient = torch.randn(layer(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = directions(layer, inputs, gradient)
    assert oracle.relative_error(actual, expected(layer, inputs, gradient, mode, 0.7, stacked=True)) < 1e-9


def test_generated_layers_honour_frozen_parameters():
    make, inputs = GENERATED["Bilinear"]
    layer = make(tau_prox=0.7, optimization_mode="prox_cg2").double()
    layer.bias.requires_grad_(False)
    gradient = torch.randn(layer(*inputs).shape, dtype=torch.float64)
    actual = directions(layer, inputs, gradient)
    assert layer.bias.grad is None
    assert oracle.relative_error(actual, expected(layer, inputs, gradient, "prox_cg2", 0.7, stacked=True)) < 1e-9


@pytest.mark.parametrize("tau", [5e-4, 0.05, 50.0])
def test_many_iterations_reach_the_exact_direction(tau):
    make, shape = LAYERS["conv2d"]
    layer, x, gradient = prepared(make, shape, "prox_cg200", tau)
    assert oracle.relative_error(directions(layer, [x], gradient), oracle.exact(layer, [x], gradient, tau)) < 1e-9


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("name", ["wide", "conv2d"])
def test_directions_scale_with_the_gradient(name, mode, scale):
    make, shape = LAYERS[name]
    layer, x, gradient = prepared(make, shape, mode, 0.7)
    layer, x, gradient = layer.float(), x.float(), gradient.float()
    once = {k: v.clone() for k, v in directions(layer, [x], gradient).items()}
    layer.zero_grad()
    scaled = {k: v / scale for k, v in directions(layer, [x], gradient * scale).items()}
    assert oracle.relative_error(scaled, once) < 1e-5


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "published_cg3"])
@pytest.mark.parametrize("name", ["wide", "tall", "conv2d"])
def test_dead_outputs_get_no_step(name, mode):
    make, shape = LAYERS[name]
    layer, x, gradient = prepared(make, shape, mode, 0.7)
    gradient[:, 0] = 0
    actual = directions(layer, [x], gradient)
    assert all(torch.isfinite(d).all() for d in actual.values())
    assert actual["weight"][0].abs().max() == 0
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9


@pytest.mark.parametrize("name", ["wide", "tall", "conv2d", "conv2d groups"])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("iterations", [2, 5, 12])
def test_published_rules_hold_where_damping_and_early_stop_matter(name, scale, iterations):
    make, shape = LAYERS[name]
    mode = f"published_cg{iterations}"
    layer, x, gradient = prepared(make, shape, mode, tau=0.05)
    gradient *= scale
    reference = expected(layer, [x], gradient, mode, 0.05)
    assert oracle.relative_error(directions(layer, [x], gradient), reference) < 1e-6
    textbook = expected(layer, [x], gradient, f"prox_cg{iterations}", 0.05)
    assert oracle.relative_error(textbook, reference) > 1e-4  # the rules do matter here


@pytest.mark.parametrize("scale", [1e-20, 1e-30])
def test_columns_of_any_size_get_their_direction(scale):
    make, shape = LAYERS["wide"]
    layer, x, gradient = prepared(make, shape, "prox_cg3", 0.7)
    gradient[:, 1] *= scale
    layer, x32, gradient32 = layer.float(), x.float(), gradient.float()
    actual = directions(layer, [x32], gradient32)
    reference = expected(layer, [x], gradient, "prox_cg3", 0.7)
    row = {"weight": actual["weight"][1]}, {"weight": reference["weight"][1]}
    assert oracle.relative_error(*row) < 1e-4


PARTS = ["conjugacy", "damping", "stop", "step_length", "cancellation"]


@pytest.mark.parametrize("part", ["only-recurrence", *(f"{k}-{name}" for k in ("only", "without") for name in PARTS)])
@pytest.mark.parametrize("name", ["wide", "conv2d"])
def test_parts_of_the_published_solver(name, part):
    """In float64 cancellation has no effect but for rounding; for fully connected layers nor has the step length."""
    kind, _, chosen = part.partition("-")
    rules = [rule for rule in PARTS if (rule == chosen) == (kind == "only")]
    for scale in (1e-3, 1.0):  # damping matters for small gradients, stopping for any after so many steps
        layer, x, gradient = prepared(*LAYERS[name], f"published_cg5-{part}", tau=0.05)
        assert layer.optimization_mode == f"published_cg5-{part}"
        gradient *= scale
        stacked = "step_length" in rules and name == "conv2d"
        reference = oracle.conjugate_gradients(layer, [x], gradient, 0.05, 5, rules, stacked)
        assert oracle.relative_error(directions(layer, [x], gradient), reference) < 1e-6


@pytest.mark.parametrize(("rule", "steps"), [("conjugacy", 5), ("damping", 5), ("stop", 12), ("step_length", 5)])
def test_each_part_of_the_published_solver_matters(rule, steps):
    layer, x, gradient = prepared(*LAYERS["conv2d"], f"published_cg{steps}-only-{rule}", tau=0.05)
    gradient *= 1e-3
    with_it = {key: d.clone() for key, d in directions(layer, [x], gradient).items()}
    layer.zero_grad()
    layer.optimization_mode = f"published_cg{steps}-only-recurrence"
    assert oracle.relative_error(with_it, directions(layer, [x], gradient)) > 1e-4


def test_in_float32_solving_for_the_new_parameters_cancels_digits():
    layer, x, gradient = prepared(*LAYERS["wide"], "published_cg3-only-cancellation", tau=0.05)
    layer, x, gradient = layer.float(), x.float(), gradient.float() * 1e-5
    reference = oracle.conjugate_gradients(layer, [x.double()], gradient, 0.05, 3)
    assert oracle.relative_error(directions(layer, [x], gradient), reference) > 1e-4
    layer.zero_grad()
    layer.optimization_mode = "published_cg3-only-recurrence"
    assert oracle.relative_error(directions(layer, [x], gradient), reference) < 1e-5


@pytest.mark.parametrize("mode", ["published_cg3-without-all", "published_cg3-only-", "published_cg3-with-stop"])
def test_an_unknown_part_of_the_published_solver_is_told(mode):
    with pytest.raises(ValueError, match=r"^optimization_mode of a part .* of conjugacy, .* \(or .*\), got"):
        ProxPropLinear(2, 2, optimization_mode=mode)


def test_the_whole_published_solver_without_one_part_is_named_so():
    for part in ("", "-without-stop", "-only-stop", "-only-recurrence"):
        assert str(parse_mode(f"published_cg3{part}")) == f"published_cg3{part}"


def test_the_published_early_stop_looks_at_all_outputs(monkeypatch):
    # Where outputs are solved for in sets, a set is one output.
    monkeypatch.setitem(COSTS, "cpu", dataclasses.replace(COSTS["cpu"], working_set=1))
    torch.manual_seed(0)
    layer = ProxPropLinear(3, 60, tau_prox=0.05, optimization_mode="published_cg4").double()
    x = torch.randn(5, 3, dtype=torch.float64)
    gradient = torch.randn(5, 60, dtype=torch.float64)
    gradient[:, :44] *= 1e-3  # these alone would stop early
    reference = expected(layer, [x], gradient, "published_cg4", 0.05)
    assert oracle.relative_error(directions(layer, [x], gradient), reference) < 1e-6
    one = {"": layer.weight.grad[0]}, {"": reference["weight"][0]}
    assert oracle.relative_error(*one) < 1e-6


@pytest.mark.parametrize(
    "name",
    ["conv2d", "conv2d groups", "conv2d strided", "conv3d", "conv_transpose2d strided", "conv_transpose2d groups"],
)
@pytest.mark.parametrize("elements", [1, conv.PATCH_ELEMENTS])  # image by image, and all at a time
def test_right_hand_sides_by_patches_and_by_convolutions_agree(name, elements, monkeypatch):
    monkeypatch.setattr(conv, "PATCH_ELEMENTS", elements)
    make, shape = LAYERS[name]
    layer, x, gradient = prepared(make, shape, "gradient", 1.0)
    _, make_design, _ = layer._linearised(layer._used(), (True, True), x)
    design = make_design(x)
    by_convolutions = design.right_hand_side(gradient)
    assert torch.allclose(design._by_patches(gradient, gradient.dtype), by_convolutions, rtol=1e-12)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2"])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_transposed_convolution_of_a_given_output_size(mode, as_keyword):
    layer, x, _ = prepared(*LAYERS["conv_transpose2d no bias"], mode, 0.7)
    layer.stride = (3, 2)
    size = torch.Size([2, 3, 7, 7])
    output = layer(x, output_size=size) if as_keyword else layer(x, size)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    same = copy.deepcopy(layer)
    same.output_padding = (2, 1)
    reference = expected(same, [x], gradient, mode, 0.7)
    assert output.shape == same(x).shape == size
    assert oracle.relative_error({"weight": layer.weight.grad}, reference) < 1e-9


def test_rank_deficient_inputs_keep_their_digits_in_float32():
    torch.manual_seed(0)
    x = torch.randn(200, 5) @ torch.randn(5, 20)
    gradient = torch.randn(200, 3)
    for tau in (1.0, 50.0):
        layer = ProxPropLinear(20, 3, bias=False, tau_prox=tau, optimization_mode="prox_exact")
        assert oracle.relative_error(directions(layer, [x], gradient), oracle.exact(layer, [x], gradient, tau)) < 1e-5
