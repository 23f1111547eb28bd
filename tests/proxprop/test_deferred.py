"""One step of everything that was accumulated; the warning where directions are added; rows that are padding."""

import copy
import functools
import gc
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers_like import Conv1D

import proxprop.additive
import proxprop.systems
from proxprop import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConvTranspose2d,
    ProxPropEmbedding,
    ProxPropLinear,
    convert,
    defer,
    diagnose,
    proxprop_module_generator,
    row_mask,
    suggest_tau,
)
from proxprop.design import EmbeddingDesign

CASES = {
    "rows are held": (lambda **k: ProxPropLinear(40, 3, **k), (16, 40)),
    "Gram matrix is held": (lambda **k: ProxPropLinear(5, 3, **k), (16, 5)),
    "rows until they are many": (lambda **k: ProxPropLinear(9, 3, **k), (16, 9)),
    "tokens": (lambda **k: ProxPropLinear(5, 4, bias=False, **k), (16, 3, 5)),
    "convolution": (lambda **k: ProxPropConv2d(4, 6, 3, groups=2, padding=1, **k), (16, 4, 5, 5)),
    "convolution, rows are held": (lambda **k: ProxPropConv2d(8, 2, 3, stride=3, **k), (16, 8, 4, 4)),
    "transposed linear": (lambda **k: proxprop_module_generator(Conv1D)(3, 9, **k), (16, 9)),
    "transposed convolution": (lambda **k: ProxPropConvTranspose2d(4, 6, 3, 2, groups=2, **k), (16, 4, 3, 3)),
    "embedding": (lambda **k: ProxPropEmbedding(7, 3, **k), torch.arange(48).reshape(16, 3) ** 2 % 5),
    "embedding of few rows": (lambda **k: ProxPropEmbedding(60, 3, **k), torch.arange(16) ** 2 % 5),
}
MODES = ["prox_exact", "prox_cg3"]


def reference_of(layer, inputs, gradient, tau):
    if layer.optimization_mode == "prox_exact":
        return oracle.exact(layer, inputs, gradient, tau)
    return oracle.conjugate_gradients(layer, inputs, gradient, tau, 3)


def case(name, mode, **settings):
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make(tau_prox=0.7, optimization_mode=mode, **settings).double()
    x = shape if isinstance(shape, torch.Tensor) else torch.randn(shape, dtype=torch.float64)
    return layer, x, torch.randn_like(layer(x))


def outputs_of(layer):
    bias = getattr(layer, "bias", None)
    return layer.weight.shape[1 if isinstance(layer, nn.Embedding) else 0] if bias is None else len(bias)


def sgd(layer):
    return torch.optim.SGD(layer.parameters(), lr=0.0)


def gradients(layer):
    return {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}


def accumulate(layer, x, gradient, parts):
    for some, seed in zip(x.chunk(parts), gradient.chunk(parts), strict=True):
        layer(some).backward(seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_give_the_direction_of_the_batch(name, mode):
    layer, x, gradient = case(name, mode)
    reference = reference_of(layer, [x], gradient, 0.7)
    optimizer = sgd(layer)
    defer(layer, optimizer)
    for _ in range(2):  # nothing is left of the first step
        accumulate(layer, x, gradient, 8)
        optimizer.step()
        assert oracle.relative_error(gradients(layer), reference) < 1e-9
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "name", ["rows are held", "Gram matrix is held", "convolution", "transposed linear", "transposed convolution"]
)
def test_what_is_frozen_stays_out_of_a_deferred_step(name, frozen):
    layer, x, gradient = case(name, "prox_exact")
    getattr(layer, frozen).requires_grad_(False)
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    accumulate(layer, x, gradient, 4)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_rows_is_the_papers_step_of_another_tau_and_scale(name, mode):
    layer, x, gradient = case(name, mode, gram_reduction="mean")
    rows = layer(x).numel() // outputs_of(layer)
    reference = {k: d * rows / 0.7 for k, d in reference_of(layer, [x], gradient, 0.7 / rows).items()}
    layer(x).backward(gradient)
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    layer.zero_grad()
    deferred = defer(layer)
    accumulate(layer, x, gradient, 4)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_the_mean_over_rows_is_isaacs_direction_and_foofs_times_tau():
    """As docs/algorithm.md says; for a layer without bias, where they are defined."""
    layer, x, gradient = case("tokens", "prox_exact", gram_reduction="mean")
    damping = 0.3
    layer.tau_prox = 1 / damping
    layer(x).backward(gradient)
    a, g = x.flatten(0, 1), gradient.flatten(0, 1)
    second_moment, identity = a.T @ a / len(a), torch.eye(5, dtype=a.dtype)
    isaac = torch.linalg.inv(second_moment / damping + identity) @ a.T @ g
    foof = torch.linalg.inv(second_moment + damping * identity) @ a.T @ g
    torch.testing.assert_close(layer.weight.grad.T, isaac, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad.T, damping * foof, rtol=1e-9, atol=1e-12)


def test_the_mean_over_rows_is_near_the_gradient_for_a_small_tau_whatever_the_batch():
    layer, x, gradient = case("convolution", "prox_exact", gram_reduction="mean")
    layer.tau_prox = 1e-9
    layer(x).backward(gradient)
    a, _ = oracle.design_matrix(layer, [x])
    plain = a.T @ gradient.flatten()
    assert torch.cat([p.grad.flatten() for p in layer.parameters()]) == pytest.approx(plain.numpy(), rel=1e-6)


def test_the_mean_goes_with_a_mask_of_weights_and_with_gradient_mode():
    layer, x, gradient = case("tokens", "prox_cg3")
    prune.random_unstructured(layer, "weight", 0.5)
    layer.tau_prox = 0.7 / 48
    layer(x).backward(gradient)
    reference = layer.weight_orig.grad * 48 / 0.7
    layer.zero_grad()
    layer.tau_prox, layer.gram_reduction = 0.7, "mean"
    layer(x).backward(gradient)
    assert float((layer.weight_orig.grad - reference).norm() / reference.norm()) < 1e-9

    plain, x, gradient = case("tokens", "gradient", gram_reduction="mean")
    plain(x).backward(gradient)
    torch.testing.assert_close(plain.weight.grad, gradient.flatten(0, 1).T @ x.flatten(0, 1))


def test_the_mean_is_refused_where_it_has_no_meaning():
    with pytest.raises(ValueError, match="gram_reduction must be 'sum' or 'mean', got 'max'"):
        ProxPropLinear(2, 2, gram_reduction="max")
    with pytest.raises(ValueError, match="'published_cg3', the solver of the paper's code, has no gram_reduction"):
        ProxPropLinear(2, 2, optimization_mode="published_cg3", gram_reduction="mean")
    layer = ProxPropLinear(2, 2, gram_reduction="mean")
    with pytest.raises(ValueError, match="has no gram_reduction 'mean'"):
        layer.optimization_mode = "published_cg3"
    with pytest.raises(ValueError, match="the rows of ProxPropLayerNorm are not known"):
        proxprop_module_generator(nn.LayerNorm)(3, gram_reduction="mean")
    assert "gram_reduction='mean'" in repr(layer)
    assert "gram_reduction" not in repr(ProxPropLinear(2, 2))


def test_convert_gives_the_reduction_and_changes_nothing_where_it_cannot():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    report = convert(model, gram_reduction="mean")
    assert [layer.gram_reduction for layer in model] == ["mean", "mean"]
    assert "tau_prox=1, prox_cg1, gram_reduction=mean" in str(report)
    with pytest.raises(ValueError, match=r"convert: 1: optimization_mode 'published_cg2'.* has no gram_reduction"):
        convert(model, gram_reduction="mean", overrides={"1": {"optimization_mode": "published_cg2"}})
    assert [layer.optimization_mode for layer in model] == ["prox_cg1", "prox_cg1"]
    convert(model, optimization_mode="published_cg2")
    assert [layer.gram_reduction for layer in model] == ["sum", "sum"]


def test_suggested_and_diagnosed_tau_are_those_of_the_mean():
    layer, x, gradient = case("tokens", "prox_exact")
    taus = [suggest_tau(layer, x, lambda m, b: (m(b) * gradient).sum())[""]]
    layer.gram_reduction = "mean"
    taus.append(suggest_tau(layer, x, lambda m, b: (m(b) * gradient).sum())[""])
    assert taus[1] == pytest.approx(48 * taus[0])
    (row,) = diagnose(layer, x, lambda m, b: (m(b) * gradient).sum()).layers
    assert row.tau_prox == 0.7
    assert row.residual < 1e-12


# Many calls, and parameters in several places.


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_called_twice_takes_the_step_of_both_calls(mode):
    layer, x, gradient = case("rows until they are many", mode)
    reference = reference_of(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    torch.autograd.backward([layer(x[:5]), layer(x[5:])], [gradient[:5], gradient[5:]])
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_layers_with_the_same_parameters_take_one_step_together():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    twin = copy.deepcopy(layer)
    twin.weight, twin.bias = layer.weight, layer.bias
    deferred = defer(nn.ModuleList([layer, twin]))
    torch.autograd.backward([layer(x[:5]), twin(x[5:])], [gradient[:5], gradient[5:]])
    twin.tau_prox = 0.5
    before = layer.weight.grad.clone()
    with pytest.raises(RuntimeError, match="0: layers with the same parameters need the same settings"):
        deferred.solve()
    assert torch.equal(layer.weight.grad, before)
    twin.tau_prox = 0.7
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize(
    "name", ["rows are held", "Gram matrix is held", "transposed linear", "transposed convolution"]
)
def test_a_weight_whose_gradient_was_dropped_has_one_of_zeros(name):
    layer, x, gradient = case(name, "prox_exact")
    a, shapes = oracle.design_matrix(layer, [x])
    right = a.T @ gradient.flatten()
    right[: layer.weight.numel()] = 0
    d = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / 0.7, right)
    deferred = defer(layer)
    layer(x).backward(gradient)
    layer.weight.grad = None
    layer.weight.requires_grad_(False)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), {"bias": oracle.split(d, shapes)["bias"]}) < 1e-9


def test_a_tied_embeddings_gradient_is_part_of_the_right_hand_side():
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 5).double()
    head = ProxPropLinear(5, 7, bias=False, tau_prox=0.7, optimization_mode="prox_exact")
    head.weight = embedding.weight
    tokens = torch.randint(7, (12,))
    hidden = embedding(tokens).detach()
    model = nn.ModuleList([embedding, head])
    deferred = defer(model)
    head(embedding(tokens)).square().sum().backward()
    gradient = embedding.weight.grad.clone()
    deferred.solve()
    system = hidden.T @ hidden + torch.eye(5).double() / 0.7
    torch.testing.assert_close(embedding.weight.grad, torch.linalg.solve(system, gradient.T).T, rtol=1e-9, atol=1e-12)


def test_a_second_backward_pass_through_one_graph_counts_its_rows_once():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    output = layer(x)
    output.backward(gradient / 4, retain_graph=True)
    output.backward(gradient * 3 / 4)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_gradient_of_the_input_alone_collects_nothing_and_solves_nothing(monkeypatch):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x), x, gradient)
    torch.testing.assert_close(expected, gradient @ layer.weight.detach())
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9

    deferred.remove()
    monkeypatch.setattr(type(layer._proximal.mode), "direction", None)
    torch.autograd.grad(layer(x), x, gradient)
    with pytest.raises(TypeError, match="NoneType"):
        torch.autograd.grad(layer(x), layer.weight, gradient)


def test_an_input_may_change_after_its_backward_pass():
    layer, x, gradient = case("rows are held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    buffer = torch.empty_like(x[:4])
    for some, seed in zip(x.chunk(4), gradient.chunk(4), strict=True):
        buffer.data.copy_(some)
        layer(buffer).backward(seed)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


# AᵀA of more than this step.


def dense_direction(gram, right, tau):
    """(AᵀA + I/τ)⁻¹ AᵀG, where the weight is a matrix and there is no bias."""
    return torch.linalg.solve(gram + torch.eye(len(gram), dtype=gram.dtype) / tau, right.T).T


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("decay", "every"), [(0.0, 1), (0.9, 1), (0.0, 3), (0.9, 2)])
def test_a_running_average_that_is_renewed_every_few_steps(decay, every, reduction):
    layer, _, _ = case("tokens", "prox_exact", gram_reduction=reduction)
    optimizer = sgd(layer)
    defer(layer, optimizer, curvature_decay=decay, refresh_every=every)
    average, weight = torch.zeros(5, 5).double(), 0.0
    for step in range(7):
        some, gradient = torch.randn(4 + step, 3, 5).double(), torch.randn(4 + step, 3, 4).double()
        rows, plain = some.flatten(0, 1), gradient.flatten(0, 1).T @ some.flatten(0, 1)
        count = len(rows) if reduction == "mean" else 1
        if step % every == 0:
            average = decay * average + (1 - decay) * rows.T @ rows / count
            weight = decay * weight + 1 - decay
        optimizer.zero_grad()
        accumulate(layer, some, gradient, 2)
        optimizer.step()
        # As a mean it is the paper's with I/τ, too, but for the scale.
        expected = dense_direction(average / weight, plain, 0.7) / (0.7 if reduction == "mean" else 1)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_between_renewals_nothing_is_collected_and_gradients_are_watched_as_ever():
    layer, x, gradient = case("rows are held", "prox_cg3")
    deferred = defer(layer, refresh_every=2)
    for step in range(4):
        layer(x).backward(gradient)
        assert (layer._proximal.collector.design is None) == bool(step % 2)
        deferred.solve()
        with pytest.raises(RuntimeError, match="still holds the direction"):
            layer(x).backward(gradient)
        layer.zero_grad()
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match="it has a gradient, and no backward pass of its own"):
        deferred.solve()


def test_between_renewals_nothing_is_factorised(monkeypatch):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer, refresh_every=3)
    calls, factorised = [], proxprop.systems.factorised
    monkeypatch.setattr(proxprop.systems, "factorised", lambda *args: calls.append(args) or factorised(*args))
    for step in range(6):
        layer.zero_grad()
        layer(x).backward(gradient)
        deferred.solve()
        assert oracle.relative_error(gradients(layer), reference) < 1e-9
        assert len(calls) == 1 + step // 3
    layer.tau_prox = 0.2  # another system
    layer.zero_grad()
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), oracle.exact(layer, [x], gradient, 0.2)) < 1e-9
    layer.tau_prox = 0.7
    assert oracle.relative_error(gradients(layer), oracle.exact(layer, [x], gradient, 0.2)) < 1e-9


@pytest.mark.parametrize("frozen_first", [True, False])
def test_other_parameters_between_renewals_renew_at_once(frozen_first):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    deferred = defer(layer, refresh_every=10)
    for frozen in (frozen_first, not frozen_first):
        layer.zero_grad()
        layer.bias.requires_grad_(not frozen)
        reference = oracle.exact(layer, [x], gradient, 0.7)
        layer(x).backward(gradient)
        deferred.solve()
        assert oracle.relative_error(gradients(layer), reference) < 1e-9
    for _ in range(2):  # first with what AᵀA is known of, then with the other
        layer.zero_grad()
        layer(x).backward(gradient)
        layer.bias.requires_grad_(not layer.bias.requires_grad)
        with pytest.raises(RuntimeError, match="other parameters are trained than in the passes before, within one st"):
            layer(x).backward(gradient)


def test_other_parameters_begin_a_new_average():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    deferred = defer(layer, curvature_decay=0.9)
    layer(10 * x).backward(gradient)
    deferred.solve()
    layer.zero_grad()
    layer.bias.requires_grad_(False)
    reference = oracle.exact(layer, [x], gradient, 0.7)
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"curvature_decay": 1}, "curvature_decay must be at least 0 and less than 1, got 1"),
        ({"curvature_decay": float("nan")}, "curvature_decay must be at least 0 and less than 1, got nan"),
        ({"refresh_every": 0}, "refresh_every must be an integer of at least 1, got 0"),
        ({"refresh_every": 2.0}, r"refresh_every must be an integer of at least 1, got 2\.0"),
    ],
)
def test_averages_that_cannot_be_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        defer(ProxPropLinear(2, 2), **options)


# Between the backward passes and the step.


def test_clipping_loss_scaling_and_closures_mean_what_they_mean():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    optimizer = sgd(layer)
    defer(layer, optimizer)

    def closure():
        optimizer.zero_grad()
        accumulate(layer, x, 1024 * gradient, 2)
        for p in layer.parameters():
            p.grad /= 1024
        nn.utils.clip_grad_norm_(layer.parameters(), norm / 2)
        return torch.ones(())

    a, _ = oracle.design_matrix(layer, [x])
    norm = float((a.T @ gradient.flatten()).norm())
    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        assert step() == 1
        assert oracle.relative_error({k: 2 * d for k, d in gradients(layer).items()}, reference) < 1e-6  # the norm's


def test_a_grad_scaler_and_a_step_that_it_skips():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    optimizer = sgd(layer)
    defer(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (True, False):
        optimizer.zero_grad()
        loss = (layer(x) * gradient).sum()
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize("to_none", [True, False])
def test_passes_whose_gradients_were_zeroed_are_forgotten(to_none):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    layer(3 * x).backward(gradient)
    layer.zero_grad(set_to_none=to_none)
    accumulate(layer, x, gradient, 2)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    layer(3 * x).sum()
    layer.zero_grad(set_to_none=to_none)
    layer(3 * x).backward(gradient)
    deferred.discard()
    layer.zero_grad(set_to_none=to_none)
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_zeros_that_are_assigned_are_a_gradient_that_was_zeroed():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    layer(3 * x).backward(gradient)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)  # of the version that the gradient had
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def fail(gradient):
    raise MemoryError("none is left")


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_that_fails_before_its_gradient_is_there_is_not_counted(name, zeroed):
    layer, x, gradient = case(name, "prox_exact")
    done = 8 if zeroed else 0
    reference = oracle.exact(layer, [x[done:]], gradient[done:], 0.7)
    deferred = defer(layer)
    layer(x[:8]).backward(gradient[:8])
    output = layer(x[8:])
    hooks = [p.register_hook(fail) for p in layer.parameters()]
    for failing, seed in ((layer(x), gradient), (output, gradient[8:])):
        with pytest.raises(MemoryError, match="none is left"):
            failing.backward(seed, retain_graph=True)
    for hook in hooks:
        hook.remove()
    if zeroed:
        layer.zero_grad()
    output.backward(gradient[8:])  # through the same graph, again
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_what_failed_passes_had_collected_is_freed():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    defer(layer)
    hook = layer.weight.register_hook(fail)
    output = layer(x)
    with pytest.raises(MemoryError, match="none is left"):
        output.backward(gradient)
    assert not layer._proximal.collector._passes
    hook.remove()


def test_a_pass_that_fails_after_its_gradient_is_there_is_counted():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    before = x[:8].clone().requires_grad_()
    before.register_hook(fail)
    with pytest.raises(MemoryError, match="none is left"):
        layer(before * 1).backward(gradient[:8])
    layer(x[8:]).backward(gradient[8:])
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_pass_within_a_pass():
    """A reentrant checkpoint between two calls of the layer has its gradient before they have theirs."""
    layer, x, gradient = case("rows until they are many", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    first = layer(x[:4])
    within = torch.utils.checkpoint.checkpoint(layer, x[4:10].clone().requires_grad_(), use_reentrant=True)
    torch.autograd.backward([first, within, layer(x[10:])], [gradient[:4], gradient[4:10], gradient[10:]])
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_gradient_is_not_added_to_a_direction():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    deferred = defer(layer)
    layer(x).backward(gradient)
    deferred.solve()
    before = layer.weight.grad.clone()
    deferred.solve()  # a second step on the same direction, as optimizers allow
    assert torch.equal(layer.weight.grad, before)
    with pytest.raises(RuntimeError, match=r"the model itself: \.grad still holds the direction of the last step"):
        layer(x).backward(gradient)


def test_a_gradient_without_a_pass_is_told_and_all_stay_as_they_are():
    attention = nn.MultiheadAttention(4, 2).double()
    model = nn.ModuleDict({"first": nn.Linear(4, 4).double(), "attention": attention})
    convert(model, optimization_mode="prox_exact", only="first")
    attention.out_proj.__class__ = type("Handmade", (ProxPropLinear, type(attention.out_proj)), {})
    attention.out_proj._proximal = copy.deepcopy(model["first"]._proximal)
    optimizer = sgd(model)
    defer(model, optimizer)
    x = model["first"](torch.randn(3, 2, 4, dtype=torch.float64))
    attention(x, x, x)[0].sum().backward()
    before = model["first"].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"attention\.out_proj: it has a gradient, and no backward pass of its own"):
        optimizer.step()
    assert torch.equal(model["first"].weight.grad, before)


def test_modes_may_change_until_the_step():
    layer, x, gradient = case("Gram matrix is held", "prox_cg3")
    reference = oracle.exact(layer, [x], gradient, 0.2)
    deferred = defer(layer)
    layer(x).backward(gradient)
    layer.optimization_mode, layer.tau_prox = "prox_exact", 0.2
    with pytest.raises(ValueError, match="'published_cg1', the solver of the paper's code, has no deferred step"):
        layer.optimization_mode = "published_cg1"
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    layer.optimization_mode = "gradient"
    layer.zero_grad()
    layer(x).backward(gradient)
    before = layer.weight.grad.clone()
    deferred.solve()
    assert torch.equal(layer.weight.grad, before)


def test_diagnose_leaves_a_deferred_step_alone():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    layer(x).backward(gradient)
    (row,) = diagnose(layer, x, lambda m, b: (m(b) * gradient).sum()).layers
    assert row.verdict == "ok"
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_in_float32_what_the_gradients_rounding_costs():
    """The right-hand side is ``.grad``, in the parameters' precision: 1e-6 in place of float64's."""
    for name in CASES:
        layer, x, gradient = case(name, "prox_exact")
        reference = oracle.exact(layer, [x], gradient, 0.7)
        layer, gradient = layer.float(), gradient.float()
        x = x.float() if x.is_floating_point() else x
        deferred = defer(layer)
        accumulate(layer, x, gradient, 4)
        deferred.solve()
        assert oracle.relative_error(gradients(layer), reference) < 2e-5, name
        deferred.remove()


@pytest.mark.parametrize("name", ["rows are held", "Gram matrix is held"])
def test_a_tau_beyond_the_precision_gives_a_short_step_and_no_error(name):
    layer, x, gradient = case(name, "prox_exact")
    layer.tau_prox = 1e300
    x[:, 1] = x[:, 0]
    deferred = defer(layer)
    layer(x).backward(gradient)
    plain = torch.cat([p.grad.flatten() for p in layer.parameters()])
    deferred.solve()
    d = torch.cat([p.grad.flatten() for p in layer.parameters()])
    assert d.isfinite().all()
    assert float(d @ plain) > 0


@pytest.mark.parametrize("name", CASES)
def test_empty_batches_and_bad_numbers(name):
    layer, x, gradient = case(name, "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    accumulate(layer, x, gradient, 2)
    layer(x[:0]).sum().backward()
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    layer.zero_grad()
    layer(x[:0]).sum().backward()
    deferred.solve()
    assert not layer.weight.grad.any()
    layer.zero_grad()
    layer(x).backward(gradient * float("nan"))
    deferred.solve()
    assert layer.weight.grad.isnan().any()
    assert not layer.weight.grad.isfinite().any() or name.startswith("embedding")  # tokens that do not occur


# Making and ending it.


def test_a_copy_takes_its_steps_at_once_and_remove_leaves_nothing():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = oracle.exact(layer, [x], gradient, 0.7)
    optimizer = sgd(layer)
    deferred = defer(layer, optimizer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(x).backward(gradient)
        assert oracle.relative_error(gradients(twin), reference) < 1e-9
    layer(x).backward(gradient)
    deferred.remove()
    layer.zero_grad()
    layer(x).backward(gradient)
    optimizer.step()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    assert not layer.weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_what_was_collected_is_freed_after_the_step():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    deferred = defer(layer)
    layer(x).backward(gradient)
    deferred.solve()
    layer.zero_grad()
    gc.collect()
    assert layer._proximal.collector.design is None
    assert not layer._proximal.collector.holds_direction((True, True))


def test_what_cannot_be_deferred_is_refused_at_once():
    first, second = ProxPropLinear(3, 3), ProxPropLinear(3, 3)
    with pytest.raises(TypeError, match=r"defer takes a torch\.nn\.Module, got list"):
        defer([first])
    with pytest.raises(TypeError, match=r"defer takes a torch\.optim\.Optimizer, got str"):
        defer(first, "sgd")
    with pytest.raises(ValueError, match="the model has no ProxProp layer; convert it first"):
        defer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="the model itself is a ProxPropLayerNorm, of unknown structure"):
        defer(proxprop_module_generator(nn.LayerNorm)(3))
    with pytest.raises(ValueError, match=r"the model itself: optimization_mode 'published_cg1', .*no deferred step"):
        defer(ProxPropLinear(3, 3, optimization_mode="published_cg1"))
    with pytest.raises(ValueError, match="0: its weight is no parameter"):
        defer(nn.Sequential(prune.identity(ProxPropLinear(3, 3), "weight")))
    with pytest.raises(ValueError, match="the optimizer has not all parameters of 1; defer the part"):
        defer(nn.Sequential(first, second), sgd(first))
    second.weight = first.weight
    with pytest.raises(ValueError, match="0 and 1 share some of their parameters and not all"):
        defer(nn.Sequential(first, second))
    embedding, head = ProxPropEmbedding(3, 3), ProxPropLinear(3, 3, bias=False)
    head.weight = embedding.weight
    with pytest.raises(ValueError, match=r"0 and 1 share .* or multiply with them in different ways; such a step"):
        defer(nn.Sequential(embedding, head))
    defer(first)
    with pytest.raises(ValueError, match="the model itself is deferred already; remove"):
        defer(first)


def test_weights_that_became_something_else_are_told_in_the_forward_pass():
    layer, x, _ = case("Gram matrix is held", "prox_exact")
    defer(layer)
    with pytest.raises(TypeError, match="ProxPropLinear: a deferred step needs a weight and a bias that are"):
        torch.func.functional_call(layer, {"weight": layer.weight * 1}, (x,))
    prune.identity(layer, "weight")
    layer.optimization_mode = "prox_cg1"
    with pytest.raises(TypeError, match="ProxPropLinear: a deferred step needs a weight and a bias that are"):
        layer(x)


@pytest.mark.parametrize("how", ["assigned", "loaded", "functional"])
def test_parameters_that_were_replaced_are_told_in_the_forward_pass(how):
    """Their gradients would stay as they are, in silence."""
    layer, x, _ = case("Gram matrix is held", "prox_exact")
    handle = defer(layer)
    others = {name: nn.Parameter(p.detach().clone()) for name, p in layer.named_parameters()}
    line = "ProxPropLinear: its parameters are others than when its step was deferred"
    call = layer
    if how == "functional":
        call = functools.partial(torch.func.functional_call, layer, others)
    elif how == "loaded":
        layer.load_state_dict(others, assign=True)
    else:
        layer.weight = others["weight"]
    with pytest.raises(TypeError, match=line):
        call(x)
    if how != "functional":
        handle.remove()
        defer(layer)
        layer(x)


def test_what_is_held_in_float32_is_as_accurate_as_an_immediate_step():
    """Images that hardly vary: float32 products of a Gram matrix would hide what does."""
    torch.manual_seed(0)
    x = torch.randn(32, 64, 8, 8) * 0.002 + torch.rand(1, 64, 1, 1)
    layer = ProxPropConv2d(64, 4, 3, bias=False, tau_prox=1000.0, optimization_mode="prox_exact")
    gradient = torch.randn(32, 4, 6, 6)
    patches = nn.functional.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1)
    rows = gradient.double().flatten(2).transpose(1, 2).flatten(0, 1)
    identity = torch.eye(patches.shape[1], dtype=torch.float64)
    reference = torch.linalg.solve(patches.T @ patches + identity / 1000, patches.T @ rows).T.reshape(4, 64, 3, 3)
    handle = defer(layer)
    layer(x).backward(gradient)
    handle.solve()
    assert oracle.relative_error(gradients(layer), {"weight": reference}) < 2e-3


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg2"])
@pytest.mark.parametrize("tokens", [5, 60])
def test_a_padding_index_set_later_may_be_negative(tokens, mode):
    layer = ProxPropEmbedding(tokens, 3, tau_prox=0.7, optimization_mode=mode).double()
    layer.padding_idx = -1
    twin = ProxPropEmbedding(tokens, 3, padding_idx=tokens - 1, tau_prox=0.7, optimization_mode=mode).double()
    twin.load_state_dict(layer.state_dict())
    x = torch.tensor([0, 3, tokens - 1, 3, tokens - 1, 1])
    gradient = torch.randn(6, 3, dtype=torch.float64)
    for one in (layer, twin):
        one(x).backward(gradient)
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    assert not layer.weight.grad[-1].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_deferred_and_masked_layers_run_uncompiled_in_compiled_code():
    for deferred in (True, False):
        torch.compiler.reset()
        layer, x, gradient = case("tokens", "prox_exact")
        rows = torch.rand(16, 3) < 0.6 if not deferred else torch.ones(16, 3, dtype=torch.bool)
        reference = oracle.exact(layer, [x[rows]], gradient[rows], 0.7)
        model = nn.Sequential(layer, nn.Tanh())
        handle = defer(layer) if deferred else None
        with nullcontext() if deferred else row_mask(rows):
            with pytest.raises(Exception, match="without a row mask or a deferred step"):
                torch.compile(model, backend="aot_eager", fullgraph=True)(x)
            torch.compiler.reset()
            output = torch.compile(model, backend="aot_eager")(x)
        output.backward(gradient / (1 - output.detach().square()))
        if handle:
            handle.solve()
        assert oracle.relative_error(gradients(layer), reference) < 1e-9


# Where directions are added.


def told(run):
    proxprop.additive._told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


def test_added_directions_are_told_once():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    (passes,) = told(lambda: [accumulate(layer, x, gradient, 8) for _ in range(2)])
    assert "directions of several backward passes are added in .grad" in passes
    assert "proxprop.defer(model, optimizer)" in passes
    layer.zero_grad()
    (calls,) = told(lambda: torch.autograd.backward([layer(x), layer(x)], [gradient, gradient]))
    assert "a layer was called several times, or layers share parameters, and their directions are added" in calls


def test_directions_that_are_added_to_one_bias_are_told():
    one, other = (
        ProxPropLinear(3, 2, optimization_mode="prox_exact"),
        ProxPropLinear(4, 2, optimization_mode="prox_exact"),
    )
    other.bias = one.bias
    (text,) = told(lambda: (one(torch.ones(5, 3)) + other(torch.ones(5, 4))).sum().backward())
    assert "layers share parameters, and their directions are added" in text


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg3"])
def test_a_tiny_step_of_a_mean_is_the_gradient(mode, is_deferred):
    """The factor m/τ of D is beyond float32, and D is not."""
    torch.manual_seed(0)
    layer = ProxPropLinear(20, 6, tau_prox=1e-35, gram_reduction="mean", optimization_mode=mode)
    x, gradient = torch.randn(4096, 20), torch.randn(4096, 6)
    deferred = defer(layer) if is_deferred else None
    layer(x).backward(gradient)
    if deferred:
        deferred.solve()
    torch.testing.assert_close(layer.weight.grad, gradient.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("to_none", [True, False])
def test_training_as_usual_and_deferred_steps_are_not_told(to_none):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    optimizer = sgd(layer)

    def train(parts):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=to_none)
            accumulate(layer, x, gradient, parts)
            optimizer.step()

    assert told(lambda: train(1)) == []
    defer(layer, optimizer)
    assert told(lambda: train(4)) == []
    layer.optimization_mode = "gradient"
    assert told(lambda: train(4)) == []


# Padding.


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "published_cg3"])
@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("tokens", False),
        ("tokens", True),
        *((n, False) for n in ("transposed linear", "embedding", "embedding of few rows")),
    ],
)
def test_padded_rows_have_no_part_in_a_step(name, flat, mode, deferred):
    if deferred and mode.startswith("published"):
        pytest.skip("has no deferred step")
    layer, x, gradient = case(name, mode)
    mask = torch.rand(gradient.shape[:-1]) < 0.6
    if mode == "published_cg3":
        reference = oracle.conjugate_gradients(layer, [x[mask]], gradient[mask], 0.7, 3, published=True)
    else:
        reference = reference_of(layer, [x[mask]], gradient[mask], 0.7)
    handle = defer(layer) if deferred else None
    with row_mask(mask):
        output = layer(x.flatten(0, 1) if flat else x)
    output.backward(gradient.reshape(output.shape))
    if handle:
        handle.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "published_cg3", "gradient"])
@pytest.mark.parametrize("tokens", [5, 60])
def test_rows_of_an_embeddings_padding_index_are_zero(tokens, mode, deferred):
    if deferred and mode.startswith("published"):
        pytest.skip("has no deferred step")
    layer = ProxPropEmbedding(tokens, 3, padding_idx=-2, tau_prox=0.7, optimization_mode=mode).double()
    x = torch.arange(16) ** 2 % 5
    x[::3] = tokens - 2
    gradient, live = torch.randn(16, 3, dtype=torch.float64), x != tokens - 2
    plain = nn.Embedding(tokens, 3).double()
    if mode == "gradient":
        plain(x[live]).backward(gradient[live])
        reference = gradients(plain)
    elif mode == "published_cg3":
        reference = oracle.conjugate_gradients(plain, [x[live]], gradient[live], 0.7, 3, published=True)
    else:
        plain.optimization_mode = mode
        reference = reference_of(plain, [x[live]], gradient[live], 0.7)
    handle = defer(layer) if deferred else None
    layer(x).backward(gradient)
    if handle:
        handle.solve()
    assert not layer.weight.grad[tokens - 2].any()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_large_vocabulary_makes_no_large_matrix(monkeypatch):
    """One of 60,000 by 60,000 numbers would take 14 GB, and one of rows by tokens is not needed either."""
    layer = ProxPropEmbedding(60_000, 4, tau_prox=0.7)
    x, gradient = torch.tensor([[7, 59_999], [7, 0]]), torch.randn(2, 2, 4)
    reference = torch.zeros(60_000, 4)
    for token, seed in zip(x.flatten(), gradient.reshape(-1, 4), strict=True):
        reference[token] += seed
    reference[7] /= 2 + 1 / 0.7
    reference[[0, 59_999]] /= 1 + 1 / 0.7
    monkeypatch.setattr(EmbeddingDesign, "matrix", None)
    monkeypatch.setattr(EmbeddingDesign, "_kernel", None)
    for deferred in (False, True):
        handle = defer(layer) if deferred else None
        for mode in ("prox_exact", "prox_cg5"):
            layer.optimization_mode = mode
            layer.zero_grad()
            layer(x).backward(gradient)
            if handle:
                handle.solve()
            torch.testing.assert_close(layer.weight.grad, reference)


def test_layers_with_one_input_share_masked_products():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5, 6, dtype=torch.float64), torch.rand(4, 5) < 0.5
    layers = [ProxPropLinear(6, 3, tau_prox=0.7, optimization_mode="prox_exact").double() for _ in range(3)]
    gradient = torch.randn(4, 5, 3, dtype=torch.float64)
    with row_mask(mask):
        outputs = [layer(x) for layer in layers[:2]]
    outputs.append(layers[2](x))  # in one backward pass with the others, and not masked
    torch.autograd.backward(outputs, [gradient] * 3)
    for layer, rows in zip(layers, (mask, mask, torch.ones_like(mask)), strict=True):
        reference = oracle.exact(layer, [x[rows]], gradient[rows], 0.7)
        assert oracle.relative_error(gradients(layer), reference) < 1e-9


@pytest.mark.parametrize("mode", [*MODES, "published_cg3", "gradient"])
def test_a_batch_of_padding_alone_has_no_direction(mode):
    layer, x, gradient = case("tokens", mode)
    with row_mask(torch.zeros(16, 3, dtype=torch.bool)):
        layer(x).backward(gradient)
    assert not layer.weight.grad.any()


def test_a_mask_within_a_checkpoint_that_is_not_reentrant():
    layer, x, gradient = case("tokens", "prox_exact")
    mask = torch.arange(48).reshape(16, 3) % 3 > 0
    with row_mask(mask):
        output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    output.backward(gradient)  # which runs the layer again
    reference = oracle.exact(layer, [x[mask]], gradient[mask], 0.7)
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_mask_may_be_filled_again_after_its_forward_pass():
    layer, x, gradient = case("tokens", "prox_exact")
    mask = torch.rand(16, 3) < 0.6
    reference = oracle.exact(layer, [x[mask]], gradient[mask], 0.7)
    buffer = mask.clone()
    with row_mask(buffer):
        output = layer(x)
        buffer.logical_not_()
    output.backward(gradient)
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


@contextmanager
def another_thread():
    """Its executor, which runs what it is given in one thread."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda function, *args: executor.submit(function, *args).result()


def assert_steps_of_their_masks(layer, x, gradient, outputs):
    """``outputs`` are pairs of a mask and of the output that the layer gave within it."""
    for mask, output in outputs:
        reference = oracle.exact(layer, [x[mask]], gradient[mask], 0.7)
        layer.zero_grad()
        output.backward(gradient)
        assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_masks_are_those_of_their_threads():
    layer, x, gradient = case("tokens", "prox_exact")
    first, second = torch.rand(2, 16, 3) < 0.6
    everything, outer, inner = torch.ones_like(first), row_mask(first), row_mask(second)
    with another_thread() as elsewhere:
        outputs = []
        outer.__enter__()
        outputs.append((everything, elsewhere(layer, x)))
        elsewhere(inner.__enter__)
        outputs.append((first, layer(x)))
        outputs.append((second, elsewhere(layer, x)))
        outer.__exit__(None, None, None)
        outputs.append((everything, layer(x)))
        outputs.append((second, elsewhere(layer, x)))
        elsewhere(inner.__exit__, None, None, None)
        outputs.append((everything, elsewhere(layer, x)))
    assert_steps_of_their_masks(layer, x, gradient, outputs)


def test_masks_may_end_in_any_order():
    """As those within generators do."""
    layer, x, gradient = case("tokens", "prox_exact")
    masks = torch.rand(2, 16, 3) < 0.6
    first, second = map(row_mask, masks)
    first.__enter__()
    second.__enter__()
    layer(x)
    first.__exit__(None, None, None)
    outputs = [(masks[1], layer(x))]
    second.__exit__(None, None, None)
    outputs.append((torch.ones_like(masks[1]), layer(x)))
    assert_steps_of_their_masks(layer, x, gradient, outputs)


def test_replicas_of_data_parallel_have_threads_without_the_mask():
    layer, x, _ = case("tokens", "prox_exact")
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    with another_thread() as elsewhere:
        with row_mask(torch.ones(16, 3, dtype=torch.bool)):
            with pytest.raises(TypeError, match=r"^ProxPropLinear: no row mask under nn\.DataParallel$"):
                elsewhere(replica, x)
            elsewhere(layer, x)
        elsewhere(replica, x)


def test_a_convolution_is_not_masked():
    layer, x, gradient = case("tokens", "prox_exact")
    conv = ProxPropConv1d(3, 2, 2, tau_prox=0.7, optimization_mode="prox_exact").double()
    output_gradient = torch.randn(16, 2, 4, dtype=torch.float64)
    reference = oracle.exact(conv, [x], output_gradient, 0.7)
    with row_mask(torch.arange(48).reshape(16, 3) % 3 > 0):
        outputs = layer(x), conv(x)
    torch.autograd.backward(outputs, (gradient, output_gradient))
    assert oracle.relative_error(gradients(conv), reference) < 1e-9


def test_a_mask_of_tokens_in_one_dimension():
    torch.manual_seed(0)
    layer = ProxPropEmbedding(7, 3, tau_prox=0.7, optimization_mode="prox_exact").double()
    tokens, mask = torch.randint(7, (4, 5)), torch.rand(4, 5) < 0.5
    gradient = torch.randn(20, 3, dtype=torch.float64)
    with row_mask(mask):
        layer(tokens.flatten()).backward(gradient)
    reference = oracle.exact(layer, [tokens[mask]], gradient[mask.flatten()], 0.7)
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_mask_that_fits_nothing_is_told():
    layer, x, _ = case("tokens", "prox_exact")
    told = pytest.raises(ValueError, match=r"wants inputs \[16, 4, 'features'\] .*\[16, 4\] .*, got \[16, 3, 5\]$")
    with told, row_mask(torch.ones(16, 4, dtype=torch.bool)):
        layer(x)
    with pytest.raises(TypeError, match=r"row_mask takes a tensor of booleans, got torch\.float32"):
        row_mask(torch.ones(16, 3)).__enter__()
    with row_mask(torch.ones(16, 4, dtype=torch.bool)), torch.no_grad():
        layer(x)
    layer(x)


@pytest.mark.parametrize("asked", ["weight", "bias", "both"])
def test_gradients_that_are_only_asked_for_have_no_part_in_the_step(asked):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    other = torch.randn_like(x)
    reference = reference_of(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    parameters = {"weight": [layer.weight], "bias": [layer.bias], "both": list(layer.parameters())}[asked]
    torch.autograd.grad((layer(other) * gradient).sum(), parameters)
    layer(x).backward(gradient)
    torch.autograd.grad((layer(other) * gradient).sum(), parameters)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_layers_that_are_thawed_later():
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = reference_of(layer, [x], gradient, 0.7)
    layer.requires_grad_(False)
    deferred = defer(layer)
    layer.requires_grad_(True)
    layer(torch.randn_like(x)).backward(gradient)
    layer.zero_grad()  # and no step
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9
    with pytest.raises(RuntimeError, match=r"\.grad still holds the direction of the last step"):
        layer(x).backward(gradient)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_parameter_that_is_thawed_between_steps(frozen):
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = reference_of(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    getattr(layer, frozen).requires_grad_(False)
    layer(x).backward(gradient)
    deferred.solve()
    layer.zero_grad()
    getattr(layer, frozen).requires_grad_(True)
    layer(torch.randn_like(x)).backward(gradient)
    layer.zero_grad()
    layer(x).backward(gradient)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_gradients_of_zero_need_no_pass():
    """A layer that is skipped in a step, with gradients that were zeroed in place."""
    used, skipped = ProxPropLinear(3, 2), ProxPropLinear(3, 2)
    deferred = defer(nn.ModuleList([used, skipped]))
    (used(torch.ones(4, 3)) + skipped(torch.ones(4, 3))).sum().backward()
    deferred.solve()
    for parameter in (*used.parameters(), *skipped.parameters()):
        parameter.grad.zero_()
    used(torch.ones(4, 3)).sum().backward()
    deferred.solve()
    assert not skipped.weight.grad.any()


def test_a_default_device_that_is_not_the_models():
    layer = ProxPropLinear(900, 2, optimization_mode="prox_exact", dtype=torch.float64)
    x = torch.randn(1200, 900, dtype=torch.float64)
    reference = oracle.exact(layer, [x], torch.ones(1200, 2, dtype=torch.float64), 1.0)
    deferred = defer(layer)
    with torch.device("meta"):
        layer(x).sum().backward()
        deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_gradient_of_zero_is_a_pass_as_any():
    layer, x = ProxPropLinear(5, 1, optimization_mode="prox_exact", dtype=torch.float64), torch.randn(16, 5).double()
    gradient = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)[:, None]  # whose sum, the bias's, is 0
    reference = oracle.exact(layer, [x], gradient, 1.0)
    deferred = defer(layer)
    accumulate(layer, x, gradient, 4)
    deferred.solve()
    assert oracle.relative_error(gradients(layer), reference) < 1e-9


def test_a_second_stage_with_frozen_parameters():
    """The bias keeps its direction in .grad, of which the new optimizer knows nothing."""
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    deferred = defer(layer)
    layer(x).backward(gradient)
    deferred.solve()
    layer.bias.requires_grad_(False)
    layer.weight.grad = None
    layer(x).backward(gradient)
    deferred.solve()
    layer.weight.grad = None
    output = layer(x)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(True)
    output.sum().backward()  # frozen since the forward pass: PyTorch passes over it


def test_gradients_that_are_views_of_one_memory():
    """As DistributedDataParallel's buckets: the same tensor comes back as .grad."""
    layer, x, gradient = case("Gram matrix is held", "prox_exact")
    reference = reference_of(layer, [x], gradient, 0.7)
    deferred = defer(layer)
    kept = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for _ in range(3):
        for name, parameter in layer.named_parameters():
            parameter.grad = kept[name].zero_()
        accumulate(layer, x, gradient, 2)
        deferred.solve()
        assert oracle.relative_error(gradients(layer), reference) < 1e-9
        layer.zero_grad()
