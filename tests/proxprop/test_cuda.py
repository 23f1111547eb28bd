"""On a GPU: every layer and mode against the same oracle, in both precisions, without waiting for the device."""

import copy

import oracle
import pytest
import torch
from test_directions import GENERATED, LAYERS, expected, prepared

from proxprop import defer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    # Told by the first product of a process, as autograd's thread has none yet.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
DEVICE = "cuda"
MODES = ["prox_exact", "prox_cg1", "prox_cg3", "gradient", "published_cg3"]
PROTOTYPE = "ignore:Synchronization debug mode is a prototype feature"
EVEN = "ignore:Using padding='same' with even kernel lengths"


def directions(layer, inputs, gradient):
    """What a backward pass on the GPU writes into ``.grad``, on the CPU."""
    layer = layer.to(DEVICE)
    layer(*(tensor.to(DEVICE) for tensor in inputs)).backward(gradient.to(DEVICE))
    return {name: p.grad.cpu() for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_directions_agree_with_the_dense_oracle(name, mode):
    layer, x, gradient = prepared(*LAYERS[name], mode, tau=0.7)
    wanted = expected(layer, [x], gradient, mode, 0.7)
    assert oracle.relative_error(directions(layer, [x], gradient), wanted) < 1e-9


@pytest.mark.parametrize("mode", ["prox_cg1", "prox_cg3", "gradient"])
@pytest.mark.parametrize("name", GENERATED)
def test_generated_layers_agree_with_the_dense_oracle(name, mode):
    make, inputs = GENERATED[name]
    layer = make(tau_prox=0.7, optimization_mode=mode).double()
    with torch.no_grad():
        shape = layer(*inputs).shape
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = expected(layer, inputs, gradient, mode, 0.7, stacked=True)
    assert oracle.relative_error(directions(layer, inputs, gradient), wanted) < 1e-9


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg3", "gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_float32_has_the_digits_of_float32(name, mode, monkeypatch):
    # Convolutions of three digits are PyTorch's default: for the pass itself, but no solve takes them.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", mode != "gradient")
    layer, x, gradient = prepared(*LAYERS[name], mode, tau=0.7)
    layer, gradient = layer.float(), gradient.float()
    x = x.float() if x.is_floating_point() else x
    wanted = expected(
        copy.deepcopy(layer).double(), [x.double() if x.is_floating_point() else x], gradient.double(), mode, 0.7
    )
    assert oracle.relative_error(directions(layer, [x], gradient), wanted) < 1e-4


@pytest.mark.filterwarnings(EVEN, PROTOTYPE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_backward_pass_waits_for_the_gpu(name, mode):
    layer, x, gradient = prepared(*LAYERS[name], mode, tau=0.7)
    layer, x, gradient = layer.float().to(DEVICE), x.to(DEVICE), gradient.float().to(DEVICE)
    x = x.float() if x.is_floating_point() else x
    layer(x).backward(gradient)  # libraries are loaded
    layer.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype, mode):
    layer, x, gradient = prepared(*LAYERS["wide"], mode, tau=0.7)
    layer, x, gradient = layer.float(), x.to(dtype), gradient.to(dtype)
    wanted = expected(copy.deepcopy(layer).double(), [x.double()], gradient.double(), mode, 0.7)
    layer = layer.to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        output = layer(x.to(DEVICE))
    output.backward(gradient.to(DEVICE))
    actual = {name: p.grad.cpu() for name, p in layer.named_parameters()}
    assert oracle.relative_error(actual, wanted) < 1e-4


def test_a_deferred_step():
    layer, x, gradient = prepared(*LAYERS["tall"], "prox_exact", tau=0.7)
    wanted = expected(layer, [x], gradient, "prox_exact", 0.7)
    step = defer(layer.to(DEVICE))
    for part in (slice(0, 4), slice(4, 9)):
        layer(x[part].to(DEVICE)).backward(gradient[part].to(DEVICE))
    step.solve()
    actual = {name: p.grad.cpu() for name, p in layer.named_parameters()}
    assert oracle.relative_error(actual, wanted) < 1e-9
