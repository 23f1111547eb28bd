"""Compiled steps: the directions of plain ones, in as many graphs as plain layers need."""

import copy
import dataclasses
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from torch import nn

from proxprop import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConv3d,
    ProxPropConvTranspose2d,
    ProxPropEmbedding,
    ProxPropLinear,
    proxprop_module_generator,
    revert,
    row_mask,
)
from proxprop.compiled import CompiledStep
from proxprop.function import Settings
from proxprop.modes import parse_mode

MODES = ["prox_exact", "prox_cg1", "prox_cg3", "gradient", "published_cg3"]
LAYERS = {
    "Linear": (lambda **k: ProxPropLinear(5, 3, **k), (4, 5)),
    "Linear of sequences": (lambda **k: ProxPropLinear(5, 3, **k), (2, 3, 5)),
    "Linear of one row": (lambda **k: ProxPropLinear(5, 3, **k), (5,)),
    "Linear without bias": (lambda **k: ProxPropLinear(5, 3, bias=False, **k), (4, 5)),
    "Linear of one output": (lambda **k: ProxPropLinear(5, 1, **k), (4, 5)),
    "Conv1d": (lambda **k: ProxPropConv1d(2, 3, 3, stride=2, **k), (4, 2, 9)),
    "Conv2d": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, **k), (4, 2, 6, 6)),
    "Conv2d of one image": (lambda **k: ProxPropConv2d(2, 3, 3, **k), (2, 6, 6)),
    "Conv2d in groups": (lambda **k: ProxPropConv2d(4, 6, 3, groups=2, dilation=2, **k), (3, 4, 7, 7)),
    "Conv2d, reflected": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, padding_mode="reflect", **k), (3, 2, 5, 5)),
    "Conv2d, circular": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, padding_mode="circular", **k), (3, 2, 5, 5)),
    "Conv2d, replicated": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, padding_mode="replicate", **k), (3, 2, 5, 5)),
    "Conv2d, same": (lambda **k: ProxPropConv2d(2, 3, 2, padding="same", bias=False, **k), (3, 2, 5, 5)),
    "Conv3d": (lambda **k: ProxPropConv3d(2, 3, 2, **k), (2, 2, 4, 4, 4)),
}
FROZEN = {"all trained": (), "bias frozen": ("bias",), "weight frozen": ("weight",)}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiled code of former tests counts towards a limit of recompilations."""
    torch.compiler.reset()


def prepared(name, frozen=(), dtype=torch.float64, **settings):
    """A layer and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make(**{"tau_prox": 0.7, "optimization_mode": "prox_exact", **settings}).to(dtype)
    for parameter in frozen:
        getattr(layer, parameter).requires_grad_(False)
    return layer, torch.randn(shape, dtype=dtype)


def network(mode, **settings):
    """Two layers with a step, one without, and what follows them in place."""
    torch.manual_seed(0)
    settings = {"tau_prox": 0.5, "optimization_mode": mode, **settings}
    return nn.Sequential(
        ProxPropConv2d(2, 3, 3, **settings),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        ProxPropLinear(27, 5, **settings),
        nn.ReLU(inplace=True),
        nn.Linear(5, 2),
    ).double()


def images(batch):
    return torch.randn(batch, 2, 5, 5, dtype=torch.float64)


def directions(model, run, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Counted:
    """A compiler's backend that counts graphs and runs them as they are."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


# The operator.


def operator_call(layer, x):
    """The operator with what a layer gives to it in a backward pass."""
    trained = [p is not None and p.requires_grad for p in (layer.weight, layer.bias)]
    operator = layer._operator(layer._used(), trained)
    parameters = (layer.weight, layer.bias) if layer._proximal.mode.needs_parameters else ()
    parameters = [None if p is None else p.detach() for p in parameters]
    gradient = torch.randn_like(layer(x))
    return operator, (gradient, x, parameters, layer._proximal.text)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "gradient", "published_cg2"])
@pytest.mark.parametrize("name", ["Linear", "Linear of one output", "Conv2d", "Conv2d in groups", "Conv2d, reflected"])
def test_the_operator_is_what_it_says(name, mode):
    operator, arguments = operator_call(*prepared(name, optimization_mode=mode))
    torch.library.opcheck(operator.func, arguments, operator.keywords)


@pytest.mark.parametrize("frozen", [("bias",), ("weight",)])
@pytest.mark.parametrize("name", ["Linear", "Conv2d in groups"])
def test_the_operator_of_a_layer_that_is_frozen_in_part(name, frozen):
    operator, arguments = operator_call(*prepared(name, frozen, optimization_mode="published_cg2"))
    torch.library.opcheck(operator.func, arguments, operator.keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Linear", "Conv1d"])
def test_the_operator_in_other_precisions(name, dtype):
    layer, x = prepared(name, dtype=dtype)
    operator, arguments = operator_call(layer, x)
    torch.library.opcheck(operator.func, arguments, operator.keywords)
    assert all(d.dtype == torch.float32 for d in operator(*arguments))


def test_the_operator_is_given_all_settings():
    settings = Settings()
    settings.tau, settings.mode, settings.reduction = 1 / 3, parse_mode("prox_cg7"), "mean"
    assert Settings.parse(settings.text) == settings
    # A setting that is not in the text would not count in compiled code. What is collected for a deferred step is none.
    assert {field.name for field in dataclasses.fields(Settings)} == {"tau", "mode", "reduction", "collector", "text"}


# Compiled layers.


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_is_one_graph_and_agrees(mode):
    model, x = network(mode), images(4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert oracle.relative_error(directions(model, compiled, x), directions(model, model, x)) < 1e-9


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_compiles(name, frozen):
    if name in ("Linear without bias", "Conv2d, same") and frozen != "all trained":
        pytest.skip("it has no bias")
    layer, x = prepared(name, FROZEN[frozen])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in ("prox_exact", "published_cg2"):
        layer.optimization_mode = mode
        results = [directions(layer, run, x) for run in (compiled, layer)]
        assert set(results[0]) == {"weight", "bias"} & set(dict(layer.named_parameters())) - set(FROZEN[frozen])
        assert oracle.relative_error(*results) < 1e-9


def test_the_input_of_a_compiled_layer_gets_its_gradient():
    layer, x = prepared("Conv2d")
    gradients = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", ["prox_exact", "published_cg3"])
def test_mixed_precision(mode):
    model = network(mode).float()
    x = torch.randn(4, 2, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(x)
        model.zero_grad()
        output.float().square().sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert all(d.dtype == torch.float32 for d in results[-1].values())
    assert oracle.relative_error(*results) < 1e-5


def test_low_precision():
    layer, x = prepared("Linear", dtype=torch.bfloat16)
    results = [directions(layer, run, x) for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)]
    assert results[0]["weight"].dtype == torch.bfloat16
    assert oracle.relative_error(*results) < 0.01


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_code_is_generated_for_it():
    model, x = network("prox_exact"), images(4)
    model[0].optimization_mode = "prox_cg3"
    model[0].to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    assert oracle.relative_error(directions(model, compiled, x), directions(model, model, x)) < 1e-9


# Settings.


def test_settings_that_change_take_effect():
    model, x = network("prox_cg1"), images(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for tau, mode in ((0.5, "prox_cg1"), (1e-3, "prox_cg1"), (2, "prox_cg1"), (2, "prox_cg2"), (2, "prox_cg3")):
        for layer in model:
            if hasattr(layer, "tau_prox"):
                layer.tau_prox, layer.optimization_mode = tau, mode
        results = [directions(model, run, x) for run in (compiled, model)]
        assert oracle.relative_error(*results) < 1e-9
        seen.append(results[0])
    assert all(oracle.relative_error(a, b) > 1e-6 for a, b in itertools.pairwise(seen))


def test_settings_are_those_of_the_forward_pass():
    layer, x = prepared("Linear")
    expected = directions(layer, layer, x)
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum()
    layer.zero_grad()
    layer.tau_prox, layer.optimization_mode = 1e-3, "gradient"
    output.backward()
    assert oracle.relative_error({n: p.grad for n, p in layer.named_parameters()}, expected) < 1e-9


def test_equal_layers_are_one_graph():
    torch.manual_seed(0)
    layers = [ProxPropLinear(4, 4).double() for _ in range(3)]
    layers.append(copy.deepcopy(layers[0]))
    counted = Counted()
    x = torch.randn(6, 4, dtype=torch.float64)
    step = torch.compile(lambda layer, x: layer(x).square().sum(), fullgraph=True, backend=counted)
    for layer in layers:
        layer.optimization_mode = "prox_exact"
        step(layer, x).backward()
        assert (
            oracle.relative_error({n: p.grad for n, p in layer.named_parameters()}, directions(layer, layer, x)) < 1e-9
        )
    assert counted.graphs == 1


# Sizes.


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mode", ["prox_exact", "published_cg2"])
def test_batches_of_other_sizes_make_as_many_graphs_as_with_plain_layers(mode, dynamic):
    model, plain = network(mode), network(mode)
    revert(plain)
    counts = []
    for net in (plain, model):
        torch.compiler.reset()  # it learns from a former call which sizes change
        counted = Counted()
        compiled = torch.compile(net, fullgraph=True, backend=counted, dynamic=dynamic)
        for batch in (8, 5, 3, 12, 1, 2, 7, 20, 33, 40):
            x = images(batch)
            assert oracle.relative_error(directions(net, compiled, x), directions(net, net, x)) < 1e-9
        counts.append(counted.graphs)
    assert counts[1] == counts[0] < 8


def test_an_empty_batch_gives_zero():
    layer, x = prepared("Linear")
    found = directions(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x[:0])
    assert not any(d.any() for d in found.values())


# What is not compiled.


def generated_network():
    torch.manual_seed(0)
    generated = proxprop_module_generator(nn.LayerNorm)(6, optimization_mode="prox_cg2")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.generated, self.last = ProxPropLinear(4, 6), generated, nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.generated(self.first(x).tanh()).tanh())

    return Network().double(), torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_generated_layer_runs_uncompiled_between_two_graphs():
    model, x = generated_network()
    counted = Counted()
    compiled = directions(model, torch.compile(model, backend=counted), x)
    assert counted.graphs >= 2
    assert oracle.relative_error(compiled, directions(model, model, x)) < 1e-9


UNCOMPILED = {
    "Embedding": (lambda **k: ProxPropEmbedding(7, 3, **k), torch.tensor([[0, 3, 3], [5, 0, 1]])),
    "ConvTranspose2d": (lambda **k: ProxPropConvTranspose2d(2, 3, 2, stride=2, **k), (3, 2, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("name", UNCOMPILED)
def test_layers_without_an_operator_run_uncompiled_and_have_the_oracles_direction(name):
    torch.manual_seed(0)
    make, x = UNCOMPILED[name]
    layer = make(tau_prox=0.7, optimization_mode="prox_exact").double()
    x = x if isinstance(x, torch.Tensor) else torch.randn(x, dtype=torch.float64)
    output = torch.compile(nn.Sequential(layer, nn.Tanh()), backend="aot_eager")(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    before = gradient * (1 - output.detach().square())
    expected = oracle.exact(layer, [x], before, 0.7)
    assert oracle.relative_error({n: p.grad for n, p in layer.named_parameters()}, expected) < 1e-9


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_a_compiled_layer_with_the_mean_over_rows(name):
    layer, x = prepared(name, gram_reduction="mean")
    rows = layer(x)[:, 0].numel() if name == "Conv2d" else len(x)
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    # (AᵀA/m + I/τ)⁻¹ AᵀG/τ: the step of τ/m for m/τ times the gradient.
    expected = oracle.exact(layer, [x], gradient * rows / 0.7, 0.7 / rows)
    assert oracle.relative_error({n: p.grad for n, p in layer.named_parameters()}, expected) < 1e-9


def test_a_generated_layer_in_one_graph_says_so():
    model, x = generated_network()
    reason = "this layer runs uncompiled"
    if torch.__version__ < (2, 7):
        reason = "builtin: vars"  # PyTorch's own line
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    with torch.no_grad():  # where it is its base class
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_inputs_are_refused():
    layer = ProxPropLinear(3, 2).to(torch.complex64)
    with pytest.raises(TypeError, match=r"ProxPropLinear works on real numbers, got torch\.complex64"):
        torch.compile(layer, backend="aot_eager")(torch.randn(4, 3, dtype=torch.complex64))


def test_a_second_derivative_is_refused():
    layer, x = prepared("Linear")
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum()
    (first,) = torch.autograd.grad(output, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.sum().backward()


def test_uncompiled_steps_do_not_use_the_operator(monkeypatch):
    monkeypatch.setattr(CompiledStep, "apply", None)
    layer, x = prepared("Linear")
    assert directions(layer, layer, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_mask_of_another_thread_leaves_compiled_code_alone():
    layer, x = prepared("Linear of sequences")
    mask = torch.tensor([[True, False, True], [True, True, False]])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = [(torch.ones_like(mask), compiled(x))]
    with ThreadPoolExecutor(1) as executor:
        elsewhere = row_mask(mask)
        executor.submit(elsewhere.__enter__).result()
        outputs.append((torch.ones_like(mask), compiled(x)))
        outputs.append((mask, executor.submit(torch.compile(layer, backend="aot_eager"), x).result()))
        executor.submit(elsewhere.__exit__, None, None, None).result()
        outputs.append((torch.ones_like(mask), executor.submit(compiled, x).result()))
    for rows, output in outputs:
        reference = oracle.exact(layer, [x[rows]], torch.ones(int(rows.sum()), 3).double(), 0.7)
        layer.zero_grad()
        output.sum().backward()
        assert oracle.relative_error({name: p.grad for name, p in layer.named_parameters()}, reference) < 1e-9
