"""What a user may expect of a torch.nn layer, and of a ProxProp layer beside it."""

import copy
import inspect
import io
import pickle

import oracle
import pytest
import torch
from torch import nn
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

ProxPropNorm = proxprop_module_generator(nn.LayerNorm)  # a name other than the class's own

PAIRS = {
    "Linear": (ProxPropLinear, nn.Linear, (5, 3), (4, 5)),
    "Conv1d": (ProxPropConv1d, nn.Conv1d, (2, 3, 3), (4, 2, 7)),
    "Conv2d": (ProxPropConv2d, nn.Conv2d, (2, 3, 3), (4, 2, 6, 6)),
    "Conv3d": (ProxPropConv3d, nn.Conv3d, (2, 3, 2), (4, 2, 4, 4, 4)),
    "ConvTranspose1d": (ProxPropConvTranspose1d, nn.ConvTranspose1d, (2, 3, 3), (4, 2, 5)),
    "ConvTranspose2d": (ProxPropConvTranspose2d, nn.ConvTranspose2d, (2, 3, 3, 2), (4, 2, 5, 5)),
    "ConvTranspose3d": (ProxPropConvTranspose3d, nn.ConvTranspose3d, (2, 3, 2), (4, 2, 3, 3, 3)),
    "Conv1D": (proxprop_module_generator(Conv1D), Conv1D, (3, 5), (4, 6, 5)),
    "Embedding": (ProxPropEmbedding, nn.Embedding, (5, 3, 0), torch.tensor([[0, 4, 2, 0], [2, 2, 1, 3]])),
    "LayerNorm": (ProxPropNorm, nn.LayerNorm, (5,), (4, 5)),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    """A ProxProp layer, the plain layer with the same parameters, and an input: an embedding's is of integers."""
    proximal_class, plain_class, arguments, shape = PAIRS[request.param]
    torch.manual_seed(0)
    plain = plain_class(*arguments)
    proximal = proximal_class(*arguments, tau_prox=0.3, optimization_mode="prox_cg2")
    proximal.load_state_dict(plain.state_dict())
    return proximal, plain, shape if isinstance(shape, torch.Tensor) else torch.randn(shape)


def leaf_of(x):
    return x.clone().requires_grad_(x.is_floating_point())


def gradients(layer):
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_output_and_input_gradient_are_those_of_the_plain_layer(pair):
    proximal, plain, x = pair
    inputs = [leaf_of(x), leaf_of(x)]
    outputs = [layer(i) for layer, i in zip((proximal, plain), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert not x.is_floating_point() or torch.equal(inputs[0].grad, inputs[1].grad)


def test_gradient_mode_is_back_propagation(pair):
    proximal, plain, x = pair
    proximal.optimization_mode = "gradient"
    for layer in (proximal, plain):
        layer(x).square().sum().backward()
    assert oracle.relative_error(gradients(proximal), gradients(plain)) < 1e-6


def test_the_published_solver_must_be_chosen_before_the_forward_pass(pair):
    proximal, _, x = pair
    output = proximal(x).square().sum()
    proximal.optimization_mode = "published_cg2"
    with pytest.raises(RuntimeError, match="became 'published_cg2' after the forward pass; it must be set before it"):
        output.backward()


def test_state_dict_is_interchangeable_with_the_plain_layer(pair):
    proximal, plain, _ = pair
    assert list(proximal.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(proximal.state_dict())
    assert isinstance(proximal, type(plain))


def test_directions_accumulate(pair):
    proximal, _, x = pair
    proximal(x).square().sum().backward()
    once = gradients(proximal)
    proximal(x).square().sum().backward()
    assert oracle.relative_error(gradients(proximal), {k: 2 * v for k, v in once.items()}) < 1e-6


def test_a_layer_used_twice_gets_the_sum_of_both_directions():
    torch.manual_seed(0)
    layer = ProxPropLinear(4, 4, tau_prox=0.5, optimization_mode="prox_exact").double()
    x = torch.randn(6, 4, dtype=torch.float64)
    hidden = layer(x)
    hidden.retain_grad()
    output = layer(hidden.tanh())
    seed = torch.randn_like(output)
    output.backward(seed)
    first = oracle.exact(layer, [x], hidden.grad, 0.5)
    second = oracle.exact(layer, [hidden.tanh()], seed, 0.5)
    assert oracle.relative_error(gradients(layer), {k: first[k] + second[k] for k in first}) < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (4,), (2, 3, 4)])
@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_an_in_place_activation_may_follow_a_linear_layer(shape, needs_input_gradient):
    torch.manual_seed(1)
    check_in_place_activation(ProxPropLinear(4, 5), torch.randn(shape), needs_input_gradient)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (3, 5, 5)])
@pytest.mark.parametrize("needs_input_gradient", [False, True])
def test_an_in_place_activation_may_follow_a_convolution(shape, needs_input_gradient):
    torch.manual_seed(1)
    check_in_place_activation(ProxPropConv2d(3, 4, 3), torch.randn(shape), needs_input_gradient)


def check_in_place_activation(layer, x, needs_input_gradient):
    results = []
    for inplace in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_(needs_input_gradient)
        nn.functional.relu(layer(leaf), inplace=inplace).square().sum().backward()
        results.append(gradients(layer) | ({"input": leaf.grad} if needs_input_gradient else {}))
    assert oracle.relative_error(results[1], results[0]) < 1e-6


def test_changing_an_input_in_place_after_the_forward_pass_is_an_error():
    layer = ProxPropLinear(4, 5)
    x = torch.randn(6, 4)
    output = layer(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed with respect to module out"
)
def test_nothing_of_the_users_is_touched(pair):
    proximal, _, x = pair
    calls = []
    proximal.weight.register_hook(lambda d: calls.append("parameter"))
    proximal.register_forward_hook(lambda *_: calls.append("forward"))
    proximal.register_full_backward_hook(lambda *_: calls.append("backward"))
    before = copy.deepcopy(proximal.state_dict())
    x.requires_grad_(x.is_floating_point())
    original, state = x.detach().clone(), torch.get_rng_state()
    seed = torch.ones_like(proximal(x))
    calls.clear()
    proximal(x).backward(seed)
    assert sorted(calls) == ["backward", "forward", "parameter"]
    assert torch.equal(x, original)
    assert torch.equal(seed, torch.ones_like(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in proximal.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg2", "gradient"])
def test_a_checkpointed_layer_computes_the_same(pair, mode, reentrant):
    layer, _, x = pair
    if mode == "prox_exact" and not layer.matrix_known:
        pytest.skip("needs a known structure")
    layer.optimization_mode = mode
    scale = torch.ones((), requires_grad=True)  # for reentrant checkpoints, which want an input with a gradient
    (layer(x) * scale).square().sum().backward()
    plain, layer.weight.grad = layer.weight.grad, None

    def run(x, scale):
        return layer(x) * scale

    torch.utils.checkpoint.checkpoint(run, x, scale, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["hand", "optimizer"])
@pytest.mark.parametrize("mode", ["prox_cg2", "published_cg2", "gradient"])
def test_a_parameter_may_be_stepped_as_soon_as_it_has_its_direction(pair, mode, by):
    """As where the optimizer's step is in the backward pass; the input's gradient is that of the former parameters."""
    proximal, plain, x = pair
    proximal.optimization_mode = mode
    before = {name: p.detach().clone() for name, p in proximal.named_parameters()}
    inputs = [leaf_of(x), leaf_of(x)]
    seed = torch.randn_like(plain(x))
    for layer, input in zip((plain, proximal), inputs, strict=True):
        if layer is proximal:
            for p in layer.parameters():
                optimizer = torch.optim.SGD([p], lr=10.0)
                step = optimizer.step if by == "optimizer" else lambda p=p: p.data.sub_(10 * p.grad)
                p.register_post_accumulate_grad_hook(lambda p, step=step: (step(), None)[1])
        layer(torch.relu(input) if input.is_floating_point() else input).backward(seed)
    if x.is_floating_point():
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, p in proximal.named_parameters():
        assert p.grad.any()
        torch.testing.assert_close(p.detach(), before[name] - 10 * p.grad)


def test_double_backward_raises_pytorchs_own_error(pair):
    proximal, _, x = pair
    if not x.is_floating_point():
        pytest.skip("integers have no gradient")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(proximal(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", ["prox_exact", "gradient"])
def test_double_backward_raises_it_for_a_constant_gradient_too(mode):
    layer = ProxPropLinear(4, 1, optimization_mode=mode)
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_without_gradients_the_base_class_runs_alone(pair, monkeypatch):
    proximal, plain, x = pair
    monkeypatch.setattr(type(proximal), "_linearised", None)
    with torch.no_grad():
        assert torch.equal(proximal(x), plain(x))
    proximal.requires_grad_(False)
    leaf = leaf_of(x)
    output = proximal(leaf)
    assert output.requires_grad is x.is_floating_point()
    if output.requires_grad:
        output.sum().backward()
        assert leaf.grad is not None


def test_repr_shows_what_the_layer_does(pair):
    proximal, plain, _ = pair
    assert plain.extra_repr() in repr(proximal)
    assert "tau_prox=0.3, optimization_mode='prox_cg2'" in repr(proximal)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(pair, copied):
    proximal, _, x = pair
    if copied == "deepcopy":
        twin = copy.deepcopy(proximal)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(proximal))
    else:
        file = io.BytesIO()
        torch.save(proximal, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(proximal)
    assert twin.tau_prox == 0.3
    twin.tau_prox = 5.0
    assert proximal.tau_prox == 0.3
    twin.tau_prox = 0.3
    for layer in (proximal, twin):
        layer(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(twin).values(), gradients(proximal).values(), strict=True))


def test_a_shallow_copy_has_settings_of_its_own_and_the_same_parameters():
    layer = ProxPropLinear(3, 2, tau_prox=0.3)
    twin = copy.copy(layer)
    twin.tau_prox, twin.optimization_mode = 7.0, "prox_exact"
    assert (layer.tau_prox, layer.optimization_mode) == (0.3, "prox_cg1")
    assert twin.weight is layer.weight


CHANGES = {
    "no padding": ("Conv2d", {"padding": (0, 0)}),
    "padding": ("Conv2d", {"padding": (2, 1)}),
    "padding as a number": ("Conv2d", {"padding": 2}),
    "padding in one entry": ("Conv2d", {"padding": (2,)}),
    "same padding": ("Conv2d", {"padding": "same", "dilation": 2}),
    "same padding of even kernels": ("Conv1d", {"padding": "same", "kernel": 4}),
    "no padding by name": ("Conv3d", {"padding": "valid"}),
    "stride as a number": ("Conv2d", {"stride": 2}),
    "dilation as a number": ("Conv1d", {"dilation": 2}),
    "dilation in one entry": ("Conv2d", {"stride": (2,), "dilation": (2,)}),
    "wider kernel": ("Conv2d", {"kernel": 5}),
    "transposed, stride and padding": ("ConvTranspose2d", {"stride": (3, 2), "padding": (1, 0)}),
    "transposed, dilation": ("ConvTranspose1d", {"dilation": 2, "output_padding": 0}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("change", CHANGES)
def test_convolutions_may_be_changed_after_construction(change):
    """As surgery on backbones does it: what the forward pass takes from the layer's attributes, the step does."""
    kind, attributes = CHANGES[change]
    cls, _, arguments, shape = PAIRS[kind]
    torch.manual_seed(0)
    layer = cls(*arguments, padding=1, tau_prox=0.4, optimization_mode="prox_exact").double()
    for name, value in attributes.items():
        if name == "kernel":
            size = (value,) * (layer.weight.dim() - 2)
            layer.weight = nn.Parameter(torch.randn(*layer.weight.shape[:2], *size, dtype=torch.float64))
        else:
            setattr(layer, name, value)
    x = torch.randn(shape, dtype=torch.float64)
    gradient = torch.randn(layer(x).shape, dtype=torch.float64)
    layer(x).backward(gradient)
    assert oracle.relative_error(gradients(layer), oracle.exact(layer, [x], gradient, 0.4)) < 1e-9


@pytest.mark.parametrize("kind", ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_a_padding_mode_that_is_set_later_is_refused_as_by_the_plain_layer(kind):
    cls, plain, arguments, shape = PAIRS[kind]
    x = torch.randn(shape)
    for layer in (plain(*arguments), cls(*arguments)):
        layer.padding_mode = "reflect"
        with pytest.raises(ValueError, match=f"^Only `zeros` padding mode is supported for {kind}$"):
            layer(x)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg2", "gradient"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "ConvTranspose2d"])
def test_a_bias_alone_keeps_no_input(kind, mode):
    cls, _, arguments, shape = PAIRS[kind]
    torch.manual_seed(0)
    layer = cls(*arguments, tau_prox=0.4, optimization_mode=mode).double()
    layer.weight.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = layer(x)
    memory = {t.untyped_storage().data_ptr() for t in saved}
    assert x.untyped_storage().data_ptr() not in memory
    gradient = torch.randn_like(output)
    x.zero_()  # as a residual connection in place may do
    output.backward(gradient)
    rows = gradient.numel() // len(layer.bias)
    channels = 1 if kind in ("Conv2d", "ConvTranspose2d") else gradient.dim() - 1
    axes = [axis for axis in range(gradient.dim()) if axis != channels]
    right = gradient.sum(axes)
    expected = right if mode == "gradient" else right / (rows + 1 / 0.4 + (1e-6 if mode.startswith("published") else 0))
    assert oracle.relative_error({"bias": layer.bias.grad}, {"bias": expected}) < 1e-5
    assert layer.weight.grad is None


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg2", "gradient"])
@pytest.mark.parametrize("make", [lambda **k: ProxPropLinear(0, 5, **k), lambda **k: ProxPropLinear(5, 0, **k),
                                  lambda **k: ProxPropLinear(0, 5, bias=False, **k)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_a_layer_without_features_is_as_the_plain_one(make, mode):
    layer = make(tau_prox=0.5, optimization_mode=mode).double()
    x = torch.randn(4, layer.in_features, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == layer.weight.shape
    if layer.bias is not None and mode != "gradient":
        torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 4 / (4 + 2)), rtol=1e-5, atol=0)


def test_settings_take_effect_at_the_next_backward_pass():
    torch.manual_seed(0)
    layer = ProxPropLinear(4, 5, tau_prox=0.1, optimization_mode="gradient").double()
    x = torch.randn(6, 4, dtype=torch.float64)
    output = layer(x)
    layer.tau_prox, layer.optimization_mode = 2.0, "prox_exact"
    output.backward(torch.ones_like(output))
    assert oracle.relative_error(gradients(layer), oracle.exact(layer, [x], torch.ones_like(output), 2.0)) < 1e-9


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), 10**400, 1e-320, "1", None, True])
def test_a_bad_tau_is_refused_at_construction_and_assignment(value):
    with pytest.raises(ValueError, match="tau_prox must be a positive finite number, got"):
        ProxPropLinear(2, 2, tau_prox=value)
    layer = ProxPropLinear(2, 2)
    with pytest.raises(ValueError, match="tau_prox must be a positive finite number, got"):
        layer.tau_prox = value
    assert layer.tau_prox == 1.0


@pytest.mark.parametrize("value", ["prox_cg0", "prox_cg", "prox_cg01", "prox_cg-1", "exact", "", "prox_cg1 ", 3, None])
def test_a_bad_mode_is_refused_at_construction_and_assignment(value):
    with pytest.raises(ValueError, match="optimization_mode must be 'prox_exact', 'prox_cgN' with N >= 1"):
        ProxPropConv2d(2, 2, 3, optimization_mode=value)
    layer = ProxPropConv2d(2, 2, 3)
    with pytest.raises(ValueError, match="optimization_mode must be"):
        layer.optimization_mode = value
    assert layer.optimization_mode == "prox_cg1"


def test_a_mode_that_a_class_cannot_have_is_refused_with_those_it_can():
    with pytest.raises(ValueError, match="ProxPropLayerNorm can have 'prox_cgN'"):
        ProxPropNorm(2, optimization_mode="prox_exact")


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: proxprop_module_generator(nn.GRU)(3, 2), torch.randn(4, 3)),
        (lambda: proxprop_module_generator(nn.PReLU)(), torch.randn(4, 3)),
        (
            lambda: proxprop_module_generator(nn.Sequential)(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)),
            torch.randn(4, 3),
        ),
    ],
    ids=["GRU", "PReLU", "Sequential"],
)
def test_a_module_that_is_not_linear_is_refused_at_first_use(make, x):
    with pytest.raises(TypeError, match="must be one tensor, linear in all parameters together"):
        make()(x)


def test_linearity_is_not_taken_for_granted_from_an_input_that_shows_nothing():
    layer = proxprop_module_generator(nn.Sequential)(nn.Linear(3, 3, bias=False), nn.Tanh())
    layer(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="linear in all parameters together"):
        layer(torch.randn(4, 3))


def test_a_generated_layer_works_under_autocast():
    torch.manual_seed(0)
    layer = proxprop_module_generator(nn.Sequential)(nn.Linear(3, 4))
    layer.optimization_mode = "prox_cg2"
    x = torch.randn(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.backward(torch.ones_like(output))
    reference = oracle.conjugate_gradients(layer, [x], torch.ones_like(output), 1.0, 2, one_step_length=True)
    assert oracle.relative_error(gradients(layer), reference) < 1e-5


class Position(nn.Module):
    """An embedding of positions, whose output is a view of its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, x):
        return self.weight[: len(x)]


def test_an_output_that_is_a_view_of_a_parameter_leaves_the_parameter_alone():
    layer = proxprop_module_generator(Position)(optimization_mode="prox_cg1", tau_prox=4.0)
    output = layer(torch.zeros(2)).mul_(-1).relu_()
    assert torch.equal(layer.weight, torch.ones(5, 3))
    output = layer(torch.zeros(2))
    output.backward(torch.ones(2, 3))
    expected = torch.zeros(5, 3)
    expected[:2] = 1 / (1 + 1 / 4)  # A picks two rows: (AᵀA + I/τ)⁻¹ AᵀG
    assert torch.allclose(layer.weight.grad, expected)


def test_a_parametrized_weight_is_read_once():
    class Drop(nn.Module):
        reads = 0

        def forward(self, weight):
            Drop.reads += 1
            return weight * torch.bernoulli(torch.full_like(weight, 0.5))

    layer = ProxPropLinear(6, 5, optimization_mode="gradient")
    nn.utils.parametrize.register_parametrization(layer, "weight", Drop())
    Drop.reads = 0
    layer(torch.randn(4, 6)).sum().backward()
    assert Drop.reads == 1


def test_a_module_without_parameters_is_refused():
    with pytest.raises(TypeError, match="ProxPropReLU: the module has no parameters"):
        proxprop_module_generator(nn.ReLU)()


@pytest.mark.parametrize("base", [nn.Linear(2, 2), "Linear", int])
def test_the_generator_takes_module_classes_only(base):
    with pytest.raises(TypeError, match=r"takes a class of torch.nn modules, got"):
        proxprop_module_generator(base)


def test_the_generator_refuses_lazy_modules():
    with pytest.raises(TypeError, match=r"generate from .*Linear"):
        proxprop_module_generator(nn.LazyLinear)


def test_the_generator_returns_the_written_out_classes_and_caches_others():
    assert proxprop_module_generator(nn.Linear) is ProxPropLinear
    assert proxprop_module_generator(nn.ConvTranspose2d) is ProxPropConvTranspose2d
    assert proxprop_module_generator(nn.Embedding) is ProxPropEmbedding
    assert proxprop_module_generator(nn.LayerNorm) is ProxPropNorm
    assert proxprop_module_generator(ProxPropLinear) is ProxPropLinear


def test_the_signature_is_the_base_class_with_the_keywords(pair):
    proximal, plain, _ = pair
    own = inspect.signature(type(proximal)).parameters
    keywords = {"tau_prox": 1.0, "optimization_mode": "prox_cg1", "gram_reduction": "sum"}
    assert [name for name in own if name not in keywords] == list(inspect.signature(type(plain)).parameters)
    assert {name: own[name].default for name in keywords} == keywords

    class Subclass(type(proximal)):
        def __init__(self, width):
            super().__init__(width, width, 3)

    assert list(inspect.signature(Subclass).parameters) == ["width"]


def test_generated_batch_norm_updates_its_statistics_once():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    plain, proximal = nn.BatchNorm1d(3), proxprop_module_generator(nn.BatchNorm1d)(3)
    for layer in (plain, proximal):
        layer(x).square().sum().backward()
    assert proximal.num_batches_tracked == 1
    assert torch.equal(proximal.running_mean, plain.running_mean)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "gradient", "published_cg3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda **k: ProxPropLinear(3, 2, **k), lambda **k: ProxPropConv1d(1, 2, 2, **k)])
def test_a_non_finite_gradient_gives_a_non_finite_direction(make, bad, mode):
    layer = make(optimization_mode=mode)
    output = layer(torch.randn(4, 1, 3))
    seed = torch.ones_like(output)
    seed.view(-1)[0] = bad
    output.backward(seed)
    assert not torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
def test_a_non_finite_input_gives_a_non_finite_direction_without_an_exception(mode):
    layer = ProxPropLinear(3, 2, optimization_mode=mode)
    x = torch.randn(4, 3)
    x[1, 1] = float("nan")
    layer(x).backward(torch.ones(4, 2))
    assert not torch.isfinite(layer.weight.grad).all()


def test_a_matrix_that_cannot_be_factorised_gives_the_safe_explicit_step():
    layer = ProxPropLinear(3, 2, bias=False, tau_prox=1e30, optimization_mode="prox_exact")
    x = torch.ones(8, 3)  # AᵀA has rank 1, and 1/τ is below its rounding
    layer(x).backward(torch.ones(8, 2))
    expected = torch.full((2, 3), 8 / (8 * 3))  # AᵀG / trace(AᵀA)
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "gradient"])
def test_an_empty_batch_gives_zero_directions(pair, mode):
    layer, _, x = pair
    if mode == "prox_exact" and not layer.matrix_known:
        pytest.skip("needs a known structure")
    layer.optimization_mode = mode
    layer(x[:0]).sum().backward()
    assert layer.weight.grad.abs().max() == 0


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "gradient"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "ConvTranspose2d"])
def test_bfloat16_layers_and_autocast_solve_in_float32(kind, mode):
    torch.manual_seed(0)
    proximal_class, _, arguments, shape = PAIRS[kind]
    layer = proximal_class(*arguments, tau_prox=0.5, optimization_mode=mode)
    x = shape if kind == "Embedding" else torch.randn(shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == (torch.float32 if kind == "Embedding" else torch.bfloat16)
    seed = torch.randn(output.shape).bfloat16()
    output.backward(seed.to(output.dtype))
    assert layer.weight.grad.dtype == torch.float32
    expected = gradients(layer)
    low = copy.deepcopy(layer).bfloat16()
    low.zero_grad()
    low(x).backward(seed)
    assert low.weight.grad.dtype == torch.bfloat16
    assert torch.equal(low.weight.grad, expected["weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3", "gradient"])
def test_half_precision_has_the_oracles_direction_of_its_numbers(mode, dtype):
    """Of the values as they are rounded: under autocast to float32, in a layer of half precision to its own digits."""
    torch.manual_seed(0)
    x, seed = torch.randn(9, 6).to(dtype), torch.randn(9, 4).to(dtype)
    layer = ProxPropLinear(6, 4, tau_prox=0.5, optimization_mode=mode)
    if mode == "prox_exact":
        expected = oracle.exact(layer, [x], seed, 0.5)
    elif mode == "prox_cg3":
        expected = oracle.conjugate_gradients(layer, [x], seed, 0.5, 3)
    else:
        expected = {"weight": seed.double().T @ x.double(), "bias": seed.double().sum(0)}
    with torch.autocast("cpu", dtype=dtype):
        output = layer(x)
    assert output.dtype == dtype
    output.backward(seed)
    assert oracle.relative_error(gradients(layer), expected) < 1e-5
    layer.to(dtype).zero_grad()
    layer(x).backward(seed)
    assert layer.weight.grad.dtype == dtype
    assert oracle.relative_error(gradients(layer), expected) < torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_inputs_are_refused():
    layer = ProxPropLinear(3, 2).to(torch.complex64)
    with pytest.raises(TypeError, match=r"ProxPropLinear works on real numbers, got torch\.complex64"):
        layer(torch.randn(4, 3, dtype=torch.complex64)).abs().sum().backward()


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg1", "prox_cg3", "gradient", "published_cg3"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d", "Conv1D", "Embedding"])
def test_no_step_reads_a_number_back(kind, mode):
    """Tensors of the meta device have none; the library takes the ways there that it takes on a GPU."""
    if kind.startswith("Conv") and torch.__version__ < (2, 14):
        pytest.skip("PyTorch before 2.14 has not all convolutions on the meta device")
    proximal_class, _, arguments, shape = PAIRS[kind]
    layer = proximal_class(*arguments, optimization_mode=mode).to("meta")
    for size in (2, 1):  # an embedding of more rows than tokens, and of fewer
        x = shape[:size] if kind == "Embedding" else torch.empty(shape)
        layer(x.to("meta")).square().sum().backward()
    assert layer.weight.grad.is_meta
