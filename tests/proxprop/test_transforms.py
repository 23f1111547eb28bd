"""What turns a model into something else: torch.func, forward-mode derivatives, torch.jit, torch.fx, torch.export.

What a plain layer can do in evaluation works. Nothing passes the plain gradient off as a direction.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers_like import Conv1D

from proxprop import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConvTranspose2d,
    ProxPropEmbedding,
    ProxPropLinear,
    proxprop_module_generator,
)

LAYERS = {
    "Linear": (lambda: ProxPropLinear(5, 4, optimization_mode="prox_exact"), nn.Linear, (5, 4), {}, (6, 5)),
    "no bias": (lambda: ProxPropLinear(5, 4, bias=False), nn.Linear, (5, 4), {"bias": False}, (6, 5)),
    "Conv1d": (lambda: ProxPropConv1d(2, 3, 2), nn.Conv1d, (2, 3, 2), {}, (2, 2, 5)),
    "Conv2d": (
        lambda: ProxPropConv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d,
        (2, 3, 3),
        {"padding": 1, "padding_mode": "reflect"},
        (2, 2, 4, 4),
    ),
    "ConvTranspose2d": (
        lambda: ProxPropConvTranspose2d(2, 3, 3, stride=2),
        nn.ConvTranspose2d,
        (2, 3, 3),
        {"stride": 2},
        (2, 2, 3, 3),
    ),
    "Conv1D": (lambda: proxprop_module_generator(Conv1D)(4, 5), Conv1D, (4, 5), {}, (6, 5)),
    "generated": (lambda: proxprop_module_generator(nn.LayerNorm)(5), nn.LayerNorm, (5,), {}, (6, 5)),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    """A ProxProp layer, the plain one with the same parameters, both in evaluation, and an input."""
    make, plain_class, arguments, keywords, shape = LAYERS[request.param]
    torch.manual_seed(0)
    proximal, plain = make().eval(), plain_class(*arguments, **keywords).eval()
    plain.load_state_dict(proximal.state_dict())
    return proximal, plain, torch.randn(shape)


def loss(layer):
    return lambda x: layer(x).square().sum()


TRANSFORMS = {
    "grad": lambda layer, x: torch.func.grad(loss(layer))(x),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "vmap of grad": lambda layer, x: torch.vmap(torch.func.grad(loss(layer)))(x),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x),
    "hessian": lambda layer, x: torch.func.hessian(loss(layer))(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda layer, x: torch.func.vjp(loss(layer), x)[1](torch.ones(()))[0],
    "jacobian": lambda layer, x: torch.autograd.functional.jacobian(layer, x),
    "vectorised jacobian": lambda layer, x: torch.autograd.functional.jacobian(layer, x, vectorize=True),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_by_the_input_are_those_of_the_plain_layer(pair, name, training):
    proximal, plain, x = pair
    proximal.train(training)
    torch.testing.assert_close(TRANSFORMS[name](proximal, x), TRANSFORMS[name](plain, x))
    with torch.no_grad():
        torch.testing.assert_close(TRANSFORMS[name](proximal, x), TRANSFORMS[name](plain, x))


def test_derivatives_by_frozen_layers_inputs_can_be_trained_through(pair):
    """A gradient penalty: the plain layers before it get its gradient."""
    proximal, plain, x = pair
    results = []
    for layer in (proximal, plain):
        layer.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        torch.func.grad(loss(layer))(leaf * 2).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: torch.func.grad(loss(layer))(x).square().sum().backward(),
        lambda layer, x: torch.vmap(layer)(x).sum().backward(),
        lambda layer, x: torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(
            dict(layer.named_parameters())
        ),
        lambda layer, x: torch.func.jacrev(lambda p: torch.func.functional_call(layer, p, (x,)))(
            dict(layer.named_parameters())
        ),
    ],
    ids=["penalty", "vmap", "grad", "jacrev"],
)
def test_gradients_by_parameters_under_transforms_are_an_error(pair, run, training):
    proximal, _, x = pair
    proximal.train(training)
    with pytest.raises(RuntimeError, match=r"^ProxProp\w+: no proximal step under torch.func transforms \(grad, vmap"):
        run(proximal, x)
    assert all(p.grad is None for p in proximal.parameters())


def test_ensembles_evaluate_and_refuse_to_train(pair):
    proximal, _, x = pair
    members = [copy.deepcopy(proximal) for _ in range(3)]
    for member in members:
        for p in member.parameters():
            nn.init.normal_(p)
    parameters, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(proximal).to("meta")
    outputs = torch.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), (0, 0, None))(
        parameters, buffers, x
    )
    torch.testing.assert_close(outputs, torch.stack([member(x) for member in members]))
    with pytest.raises(RuntimeError, match=r"no proximal step under torch\.func transforms"):
        outputs.sum().backward()
    assert all(p.grad is None for p in parameters.values())


def test_forward_mode_derivatives_by_input_and_parameters(pair):
    proximal, plain, x = pair
    tangents = []
    for layer in (proximal, plain):
        with forward_ad.dual_level():
            values = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in layer.named_parameters()}
            output = torch.func.functional_call(layer, values, (forward_ad.make_dual(x, torch.ones_like(x)),))
            tangents.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*tangents)


# Traced, scripted and exported models compute the same, with frozen parameters.


def check_recorded(recorded, plain, x):
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(recorded(leaf), plain(x))
    recorded(leaf).square().sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None for p in recorded.parameters())


JIT = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
pytestmark = JIT


@pytest.mark.parametrize("grad", [False, True])
def test_traced_in_evaluation(pair, grad):
    proximal, plain, x = pair
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(nn.Sequential(proximal, nn.Tanh()), x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    check_recorded(torch.jit.load(file), nn.Sequential(plain, nn.Tanh()), x)


def test_tracing_for_training_is_refused(pair):
    proximal, _, x = pair
    with pytest.raises(RuntimeError, match=r"no proximal step in a traced or scripted model; call \.eval\(\) first"):
        torch.jit.trace(proximal.train(), x)


def test_scripted_in_evaluation(pair):
    proximal, plain, x = pair
    model = nn.Sequential(proximal, nn.Tanh()).eval()
    if isinstance(proximal, nn.LayerNorm):
        with pytest.raises(TypeError, match=r"ProxPropLayerNorm: torch\.jit\.script knows no generated layers; use"):
            torch.jit.script(model)
        return
    scripted = torch.jit.script(model)
    check_recorded(scripted, nn.Sequential(plain, nn.Tanh()), x)
    assert model[0] is proximal
    scripted.train()
    with pytest.raises(torch.jit.Error, match=r"no proximal step in a traced or scripted model; call \.eval\(\) first"):
        scripted(x)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), plain(x).tanh())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_exported(pair, grad, training):
    proximal, plain, x = pair
    model = nn.Sequential(proximal, nn.Tanh()).train(training)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (x,), strict=False).module()
    check_recorded(exported, nn.Sequential(plain, nn.Tanh()), x)


def test_embeddings_are_recorded_in_evaluation():
    layer, tokens = ProxPropEmbedding(5, 3, padding_idx=1).eval(), torch.tensor([[0, 1, 4]])
    output = layer(tokens).detach()
    exported = torch.export.export(layer, (tokens,), strict=False).module()
    scripted = torch.jit.script(nn.Sequential(layer))
    for recorded in (torch.jit.trace(layer, tokens), scripted, exported):
        assert torch.equal(recorded(tokens), output)
        assert not recorded(tokens).requires_grad
    scripted.train()
    with pytest.raises(torch.jit.Error, match=r"no proximal step in a traced or scripted model; call \.eval\(\) first"):
        scripted(tokens)


def test_a_scripted_transposed_convolution_takes_an_output_size():
    layer, x = ProxPropConvTranspose2d(2, 3, 3, stride=2).eval(), torch.randn(2, 2, 3, 3)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x, [8, 7]), layer(x, [8, 7]))


# A graph of torch.fx calls the layer, which keeps its step.


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_symbolically_traced_models_keep_the_step(pair, training, grad):
    proximal, _, x = pair
    model = nn.Sequential(nn.Sequential(proximal), nn.Tanh()).train(training)
    with torch.set_grad_enabled(grad):
        traced = torch.fx.symbolic_trace(model)
    assert traced.get_submodule("0.0") is proximal
    results = []
    for run in (model, traced):
        model.zero_grad()
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for actual, reference in zip(*results, strict=True):
        assert torch.equal(actual, reference)


def test_features_are_extracted_with_the_step(pair):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    proximal, _, x = pair
    model = nn.Sequential(proximal, nn.Tanh())
    features = extraction.create_feature_extractor(model, {"0": "features"})(x)["features"]
    torch.testing.assert_close(features, proximal(x))
    features.square().sum().backward()
    directions = [p.grad.clone() for p in proximal.parameters()]
    proximal.zero_grad()
    proximal(x).square().sum().backward()
    assert all(torch.equal(d, p.grad) for d, p in zip(directions, proximal.parameters(), strict=True))


class Twice(ProxPropLinear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("model", [ProxPropLinear(5, 4), nn.Sequential(Twice(5, 4))], ids=["root", "own forward"])
def test_what_cannot_be_a_node_is_refused(model):
    with pytest.raises(TypeError, match=r"torch\.fx traces a model that contains the layer, not the layer itself or a"):
        torch.fx.symbolic_trace(model)


# Kinds of tensors that a design matrix cannot be made of.


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors(layout):
    layer, rows = ProxPropLinear(5, 4), [torch.randn(2, 5), torch.randn(3, 5)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(TypeError, match="ProxPropLinear: no proximal step for nested tensors"):
        layer(nested)
    output = layer.eval()(nested)
    torch.testing.assert_close(output.unbind()[1], nn.functional.linear(rows[1], layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="ProxPropLinear: no proximal step for nested tensors"):
        output.unbind()[1].sum().backward()


@pytest.mark.parametrize("to_sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "gradient"])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_inputs_have_the_direction_of_dense_ones(to_sparse, mode, frozen):
    torch.manual_seed(0)
    layer = ProxPropLinear(5, 4, tau_prox=0.7, optimization_mode=mode).double()
    if frozen is not None:
        getattr(layer, frozen).requires_grad_(False)
    x = torch.relu(torch.randn(6, 5, dtype=torch.float64))
    results = []
    for input in (x, to_sparse(x)):
        layer.zero_grad()
        layer(input).square().sum().backward()
        results.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    for actual, reference in zip(*results, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_tensor_parallel_layers(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        layer = ProxPropLinear(5, 4)
        model = parallelize_module(nn.Sequential(layer), init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        x = torch.randn(6, 5)
        with pytest.raises(TypeError, match=r"ProxPropLinear: no proximal step for a DTensor"):
            model(x)
        model.eval()(x)
        with pytest.raises(RuntimeError, match=r"ProxPropLinear: no proximal step for a DTensor"):
            model(x).sum().backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2"])
@pytest.mark.parametrize("make", [lambda **k: ProxPropLinear(4, 3, **k), lambda **k: ProxPropConv1d(2, 3, 3, **k)])
def test_no_step_of_several_gradients_at_a_time(make, mode):
    layer = make(optimization_mode=mode)
    output = layer(torch.randn(5, 4) if isinstance(layer, torch.nn.Linear) else torch.randn(5, 2, 6))
    seeds = torch.randn(2, *output.shape)
    with pytest.raises(RuntimeError, match="no proximal step of several gradients at a time"):
        torch.autograd.grad(output, [layer.weight], seeds, is_grads_batched=True)
