"""Layers with the same input compute its Gram matrix once."""

import copy
import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from test_directions import expected
from torch import nn

from proxprop import ProxPropConv2d, ProxPropLinear
from proxprop.design import ConvDesign, LinearDesign

CASES = {
    "dual": (LinearDesign, "_kernel", (4, 11), lambda o: ProxPropLinear(11, o)),
    "primal": (LinearDesign, "_gram", (30, 3), lambda o: ProxPropLinear(3, o)),
    "convolution": (ConvDesign, "_gram", (4, 2, 8, 8), lambda o: ProxPropConv2d(2, o, 3)),
}


@pytest.fixture
def count(monkeypatch):
    """How often a design computes a product."""

    def counting(design, name):
        calls, compute = [], getattr(design, name)
        monkeypatch.setattr(design, name, lambda self, *dtype: (calls.append(dtype), compute(self, *dtype))[1])
        return calls

    return counting


def three_layers(case, mode):
    torch.manual_seed(0)
    design, product, shape, make = CASES[case]
    layers = nn.ModuleList(make(outputs) for outputs in (3, 6, 4)).double()
    for layer in layers:
        layer.optimization_mode = mode
    return design, product, layers, torch.randn(shape, dtype=torch.float64)


def check_directions(layers, x, mode):
    """The sum of all outputs' squares was differentiated."""
    for layer in layers:
        gradient = 2 * layer(x).detach()
        actual = {name: p.grad for name, p in layer.named_parameters()}
        assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 1.0)) < 1e-9


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2"])
@pytest.mark.parametrize("case", CASES)
def test_one_product_for_all_layers_of_one_input(case, mode, count):
    design, product, layers, x = three_layers(case, mode)
    calls = count(design, product)
    sum(layer(x).square().sum() for layer in layers).backward()
    assert len(calls) == 1
    check_directions(layers, x, mode)


def test_an_input_that_was_changed_is_another_one(count):
    design, product, layers, x = three_layers("dual", "prox_exact")
    calls = count(design, product)
    before = x.clone()
    layers[0](x).square().sum().backward()
    first = layers[:1]
    x.mul_(2)
    sum(layer(x).square().sum() for layer in layers[1:]).backward()
    assert len(calls) == 2
    check_directions(first, before, "prox_exact")
    check_directions(layers[1:], x, "prox_exact")


def test_layers_that_train_other_parameters_have_products_of_their_own(count):
    design, product, layers, x = three_layers("dual", "prox_exact")
    layers[1].bias.requires_grad_(False)
    calls = count(design, product)
    sum(layer(x).square().sum() for layer in layers).backward()
    assert len(calls) == 2


def test_a_second_backward_pass_gives_the_same():
    _, _, layers, x = three_layers("dual", "prox_exact")
    loss = sum(layer(x).square().sum() for layer in layers)
    loss.backward(retain_graph=True)
    once = [copy.deepcopy(p.grad) for p in layers.parameters()]
    layers.zero_grad()
    loss.backward()
    for p, grad in zip(layers.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=0)


def test_nothing_is_held_once_the_last_layer_had_it(monkeypatch):
    design, product, layers, x = three_layers("dual", "prox_exact")
    held, compute = [], getattr(design, product)

    def remembering(self, *dtype):
        result = compute(self, *dtype)
        held.append(weakref.ref(result))
        return result

    monkeypatch.setattr(design, product, remembering)
    outputs = [layer(x) for layer in layers]  # which keep the graph alive
    sum(output.square().sum() for output in outputs).backward()
    gc.collect()
    assert [reference() for reference in held] == [None]
    assert outputs[0].grad_fn is not None


def refilled_by_numpy(shape):
    buffer = np.zeros(shape)
    return torch.from_numpy(buffer), lambda values: np.copyto(buffer, values.numpy())


def refilled_by_data(shape):
    x = torch.zeros(shape, dtype=torch.float64)
    return x, lambda values: x.data.copy_(values)


def refilled_by_swapping(shape):
    x = torch.zeros(shape, dtype=torch.float64)
    return x, lambda values: setattr(x, "data", values.clone())


@pytest.mark.parametrize("make", [refilled_by_numpy, refilled_by_data, refilled_by_swapping])
@pytest.mark.parametrize("case", CASES)
def test_memory_that_is_filled_again_behind_an_input(case, make):
    """A buffer that is used again for each batch, and a head that is not backpropagated in the first step."""
    _, _, layers, like = three_layers(case, "prox_exact")
    x, fill = make(like.shape)
    kept = []
    for step in range(3):
        batch = torch.randn_like(like)
        fill(batch)
        layers.zero_grad()
        outputs = [layer(x) for layer in layers]
        used = layers[:2] if step == 0 else layers
        sum(output.square().sum() for output in outputs[: len(used)]).backward()
        check_directions(used, batch, "prox_exact")
        kept.append(outputs)  # the graphs of all steps stay alive


def test_a_pass_that_fails_leaves_nothing_to_the_next():
    _, _, layers, like = three_layers("dual", "prox_exact")
    x, fill = refilled_by_numpy(like.shape)
    outputs = [layer(x) for layer in layers]

    def fail(gradient):
        raise ArithmeticError("a hook's own error")

    handle = outputs[0].register_hook(fail)
    with pytest.raises(ArithmeticError, match="a hook's own error"):
        sum(output.square().sum() for output in outputs).backward()
    handle.remove()
    fill(like)
    layers.zero_grad()
    for output in [layer(x) for layer in layers]:
        output.square().sum().backward()
    check_directions(layers, like, "prox_exact")


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2"])
def test_a_head_without_a_backward_pass_does_not_stop_the_others_from_sharing(mode, count, monkeypatch):
    design, product, layers, x = three_layers("dual", mode)
    held, compute = [], getattr(design, product)
    monkeypatch.setattr(
        design, product, lambda self, *dtype: (r := compute(self, *dtype), held.append(weakref.ref(r)))[0]
    )
    calls = count(design, product)
    outputs = [layer(x) for layer in layers]
    sum(output.square().sum() for output in outputs[:2]).backward()
    assert len(calls) == 1
    check_directions(layers[:2], x, mode)
    gc.collect()
    assert [reference() for reference in held] == [None]  # though the third one's graph is still there
    layers.zero_grad()
    outputs[2].square().sum().backward()
    check_directions(layers[2:], x, mode)


def test_saved_tensors_on_other_memory_are_not_mixed_up():
    """With hooks, autograd gives each layer what its input was when it was saved."""
    _, _, layers, like = three_layers("dual", "prox_exact")
    x, fill = refilled_by_data(like.shape)
    batches = [torch.randn_like(like) for _ in layers]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        losses = []
        for layer, batch in zip(layers, batches, strict=True):
            fill(batch)
            losses.append(layer(x).square().sum())
    sum(losses).backward()
    for layer, batch in zip(layers, batches, strict=True):
        check_directions([layer], batch, "prox_exact")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_share_or_not_but_agree(reentrant):
    _, _, layers, x = three_layers("dual", "prox_exact")
    x.requires_grad_()

    def run(x):
        return sum(layer(x).square().sum() for layer in layers)

    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).backward()
    check_directions(layers, x.detach(), "prox_exact")


def test_an_input_that_lives_long_is_counted_anew(count):
    """Full-batch training: one input for all steps, and the loss of the former step is alive during the next."""
    design, product, layers, x = three_layers("dual", "prox_exact")
    calls = count(design, product)
    for step in range(4):
        layers.zero_grad()
        loss = sum(layer(x).square().sum() for layer in layers)
        loss.backward()
        assert len(calls) == step + 1
        check_directions(layers, x, "prox_exact")
