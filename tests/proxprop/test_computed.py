"""Weights that are computed from parameters: the step is on those parameters, so that it descends."""

import copy
import warnings

import oracle
import pytest
import torch
from test_directions import expected
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from proxprop import ProxPropConv2d, ProxPropLinear, proxprop_module_generator, revert

ProxPropLayerNorm = proxprop_module_generator(nn.LayerNorm)
MODES = ["prox_cg1", "prox_cg3", "gradient", "published_cg2"]


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Shifted(nn.Module):
    """Affine, and it mixes entries."""

    def forward(self, weight):
        return weight + weight.flip(-1) / 2 + 1


class Dropped(nn.Module):
    """A random mask, which is another one at each call."""

    def forward(self, weight):
        Dropped.mask = torch.bernoulli(torch.full_like(weight, 0.5))
        return weight * Dropped.mask


def mask_like(weight):
    return torch.bernoulli(torch.full_like(weight, 0.5), generator=torch.Generator().manual_seed(1))


def pruned(layer):
    return prune.custom_from_mask(layer, "weight", mask_like(layer.weight))


def masked(layer):
    return parametrize.register_parametrization(layer, "weight", Mask(mask_like(layer.weight)))


def shifted(layer):
    return parametrize.register_parametrization(layer, "weight", Shifted())


def both(layer):
    prune.custom_from_mask(layer, "weight", mask_like(layer.weight))
    return prune.custom_from_mask(layer, "bias", torch.tensor([1.0, 0.0, 1.0], dtype=layer.bias.dtype))


def low_rank(layer):
    """A frozen weight and a trained product of two factors, as adapters have it."""
    base, weight = layer.weight.detach(), layer.weight
    del layer.weight
    layer.down = nn.Parameter(weight.new_ones(2, weight.shape[1]))
    layer.up = nn.Parameter(weight.new_zeros(weight.shape[0], 2))
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", base + layer.up @ layer.down))
    return layer


def plain_tensor(layer):
    weight = layer.weight
    del layer.weight
    layer.register_parameter("under", weight)
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", layer.under * mask_like(layer.under)))
    return layer


LAYERS = {
    "Linear": (lambda **k: ProxPropLinear(5, 3, tau_prox=0.7, **k), (6, 5)),
    "Linear, no bias": (lambda **k: ProxPropLinear(5, 3, bias=False, tau_prox=0.7, **k), (6, 5)),
    "Conv2d": (lambda **k: ProxPropConv2d(2, 3, 2, tau_prox=0.7, **k), (2, 2, 4, 4)),
}


def prepared(name, change, mode):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = change(make(optimization_mode=mode).double())
    x = torch.randn(shape, dtype=torch.float64)
    output = layer(x)
    return layer, x, output, torch.randn_like(output)


def directions(layer):
    return {name: p.grad for name, p in layer.named_parameters()}


def by_role(tensors):
    """Whatever a mask has made of their names."""
    return {"bias" if "bias" in name else "weight": tensor for name, tensor in tensors.items()}


def reference_of_masked(make, x, seed, mode):
    """By a parametrization, which can be copied, unlike tensors that hooks compute."""
    torch.manual_seed(0)
    layer = masked(make(optimization_mode=mode).double())
    return by_role(expected(layer, [x], seed, mode, 0.7, stacked=True))


def linearised(layer, x):
    """The design matrix of a layer at its current parameters, by finite differences of an affine map's output."""
    a, shapes = oracle.design_matrix(layer, [x])
    zero = torch.func.functional_call(
        copy.deepcopy(layer), {n: torch.zeros_like(p) for n, p in layer.named_parameters()}, (x,)
    )
    return a - zero.detach().flatten()[:, None], shapes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [pruned, masked, plain_tensor])
@pytest.mark.parametrize("name", LAYERS)
def test_masked_layers_take_the_step_of_the_entries_that_are_left(name, change, mode):
    layer, x, output, seed = prepared(name, change, mode)
    output.backward(seed)
    reference = reference_of_masked(LAYERS[name][0], x, seed, mode)
    assert oracle.relative_error(by_role(directions(layer)), reference) < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_on_weight_and_bias(mode):
    layer, x, output, seed = prepared("Linear", both, mode)
    output.backward(seed)

    def make(**settings):
        layer = LAYERS["Linear"][0](**settings)
        return parametrize.register_parametrization(layer, "bias", Mask(torch.tensor([1.0, 0.0, 1.0])))

    reference = reference_of_masked(make, x, seed, mode)
    assert oracle.relative_error(by_role(directions(layer)), reference) < 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_many_iterations_reach_the_exact_step_of_an_affine_weight(name, recwarn):
    layer, x, output, seed = prepared(name, shifted, "prox_cg200")
    output.backward(seed)
    a, shapes = linearised(layer, x)
    system = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / 0.7
    reference = oracle.split(torch.linalg.solve(system, a.T @ seed.flatten()), shapes)
    assert oracle.relative_error(directions(layer), reference) < 1e-8
    assert not recwarn.list


def test_the_smallest_case():
    """Two inputs, one output, the second weight masked; the solve over the effective weight gives −132 for +1."""
    layer = ProxPropLinear(2, 1, bias=False, tau_prox=1e3, optimization_mode="prox_cg5")
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[1.0, -0.99], [0.0, 0.1]])
    layer(x).backward(torch.tensor([[1.0], [0.0]]))
    assert torch.allclose(layer.weight_orig.grad, torch.tensor([[1 / (1 + 1e-3), 0.0]]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "change",
    [
        *(pruned, masked, shifted, low_rank),
        *(parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal),
    ],
)
@pytest.mark.filterwarnings("ignore:.*ProxPropLinear. a weight is not linear")
def test_directions_descend(change, seed):
    torch.manual_seed(seed)
    layer = change(ProxPropLinear(6, 4, tau_prox=1e3, optimization_mode="prox_cg4").double())
    x = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)  # badly conditioned
    found = {}
    for mode in ("gradient", "prox_cg4"):
        layer.zero_grad()
        layer.optimization_mode = mode
        layer(x).square().sum().backward()
        found[mode] = torch.cat([p.grad.flatten() for p in layer.parameters()]).clone()
    assert found["gradient"] @ found["prox_cg4"] > 0


def test_a_weight_that_is_not_linear_takes_the_linearised_step_and_says_so_once():
    torch.manual_seed(0)
    layer = ProxPropLinear(5, 3, bias=False, tau_prox=0.7, optimization_mode="prox_cg200").double()
    parametrizations.weight_norm(layer)
    x = torch.randn(6, 5, dtype=torch.float64)
    seed = torch.randn(6, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="a weight is not linear in the parameters") as warned:
        layer(x).backward(seed)
    assert len(warned) == 1
    actual = directions(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)

    names = list(actual)
    values = [p.detach() for p in layer.parameters()]

    def output(*parameters):
        g, v = parameters
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T

    jacobians = torch.autograd.functional.jacobian(output, tuple(values))
    a = torch.cat([j.reshape(18, -1) for j in jacobians], dim=1)
    system = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / 0.7
    reference = oracle.split(
        torch.linalg.solve(system, a.T @ seed.flatten()), {n: v.shape for n, v in zip(names, values, strict=True)}
    )
    assert oracle.relative_error(actual, reference) < 1e-8


def test_a_parametrization_after_another_is_told_in_its_turn():
    layer = ProxPropLinear(5, 3, bias=False, optimization_mode="prox_cg2")
    x = torch.randn(6, 5)
    prune.l1_unstructured(layer, "weight", 2)
    layer(x)
    prune.remove(layer, "weight")
    layer(x)
    parametrizations.weight_norm(layer)
    with pytest.warns(UserWarning, match="a weight is not linear in the parameters"):
        layer(x)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.* is deprecated")
def test_weights_that_hooks_compute_are_no_different():
    results = []
    for norm in (parametrizations.weight_norm, nn.utils.weight_norm):
        torch.manual_seed(0)
        layer = norm(ProxPropLinear(5, 3, tau_prox=0.7, optimization_mode="prox_cg3").double())
        with pytest.warns(UserWarning, match="a weight is not linear"):
            layer(torch.ones(6, 5, dtype=torch.float64)).square().sum().backward()
        results.append(sorted(float(p.grad.norm()) for p in layer.parameters()))
    assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_a_random_mask_is_the_one_of_the_forward_pass():
    torch.manual_seed(0)
    layer = ProxPropLinear(5, 3, bias=False, tau_prox=0.7, optimization_mode="prox_cg200").double()
    parametrize.register_parametrization(layer, "weight", Dropped())
    x, seed = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    output = layer(x)
    mask, state = Dropped.mask.clone(), torch.get_rng_state()
    output.backward(seed)
    assert Dropped.mask.equal(mask)  # it is not computed again
    assert torch.get_rng_state().equal(state)
    for row, m, s in zip(layer.parametrizations.weight.original.grad, mask, seed.T, strict=True):
        a = x * m
        assert torch.allclose(row, torch.linalg.solve(a.T @ a + torch.eye(5, dtype=a.dtype) / 0.7, a.T @ s))


def test_a_cached_weight_serves_two_calls():
    torch.manual_seed(0)
    layer = masked(ProxPropLinear(5, 5, tau_prox=0.7, optimization_mode="prox_cg2").double())
    x = torch.randn(6, 5, dtype=torch.float64)
    results = []
    for context in (parametrize.cached, warnings.catch_warnings):
        layer.zero_grad()
        with context():
            layer(layer(x).tanh()).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    assert oracle.relative_error(*results) < 1e-9


def test_a_penalty_on_the_computed_weight_adds_its_gradient():
    layer, x, output, seed = prepared("Linear", pruned, "prox_cg2")
    reference = reference_of_masked(LAYERS["Linear"][0], x, seed, "prox_cg2")
    reference["weight"] = reference["weight"] + 2 * layer.weight.detach() * layer.weight_mask
    ((output * seed).sum() + layer.weight.square().sum()).backward()
    assert oracle.relative_error(by_role(directions(layer)), reference) < 1e-9


def test_a_second_backward_pass_gives_the_same_and_a_freed_graph_is_pytorchs_error():
    layer, _, output, seed = prepared("Linear", masked, "prox_cg2")
    output.backward(seed, retain_graph=True)
    once = {name: d.clone() for name, d in directions(layer).items()}
    layer.zero_grad()
    output.backward(seed)
    assert oracle.relative_error(directions(layer), once) < 1e-12
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward(seed)


def test_what_is_frozen_under_a_mask_is_not_trained():
    layer, x, _, seed = prepared("Linear", masked, "prox_cg2")
    layer.parametrizations.weight.original.requires_grad_(False)
    layer(x).backward(seed)
    assert layer.parametrizations.weight.original.grad is None
    bias = {"bias": layer.bias.grad}
    assert oracle.relative_error(bias, expected(layer, [x], seed, "prox_cg2", 0.7, stacked=False)) < 1e-9


@pytest.mark.parametrize("change", [pruned, masked, shifted, parametrizations.weight_norm])
def test_the_exact_mode_is_refused_with_what_else_there_is(change):
    layer = change(ProxPropLinear(5, 3, optimization_mode="prox_exact"))
    with pytest.raises(TypeError, match=r"ProxPropLinear: 'prox_exact' needs .* use 'prox_cgN', or make the computed"):
        layer(torch.randn(6, 5))


def test_the_exact_mode_is_refused_in_the_backward_pass_too():
    layer, _, output, seed = prepared("Linear", pruned, "prox_cg1")
    layer.optimization_mode = "prox_exact"
    with pytest.raises(TypeError, match="'prox_exact' needs weights that are parameters"):
        output.backward(seed)


def test_in_evaluation_the_exact_mode_computes_and_refuses_a_backward_pass():
    layer = pruned(ProxPropLinear(5, 3, optimization_mode="prox_exact")).eval()
    x = torch.randn(6, 5, requires_grad=True)
    output = layer(x)
    assert torch.equal(output, nn.functional.linear(x, layer.weight, layer.bias))
    (gradient,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.allclose(gradient, layer.weight.sum(0).expand_as(x))
    with pytest.raises(RuntimeError, match="'prox_exact' needs weights that are parameters"):
        output.sum().backward()


@pytest.mark.parametrize("remove", ["prune", "parametrize"])
def test_the_exact_mode_works_again_once_the_mask_is_removed(remove):
    layer = {"prune": pruned, "parametrize": masked}[remove](ProxPropLinear(5, 3, optimization_mode="prox_cg1"))
    if remove == "prune":
        prune.remove(layer, "weight")
    else:
        parametrize.remove_parametrizations(layer, "weight")
    layer.double().optimization_mode = "prox_exact"
    x, seed = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    layer(x).backward(seed)
    assert oracle.relative_error(directions(layer), oracle.exact(layer, [x], seed, 1.0)) < 1e-9


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


def test_a_weight_that_cannot_be_differentiated_twice_is_refused():
    layer = ProxPropLinear(5, 3)
    weight = layer.weight
    del layer.weight
    layer.weight = Once.apply(weight)
    with pytest.raises(TypeError, match="ProxPropLinear: a weight is computed by what autograd cannot"):
        layer(torch.randn(6, 5))


def test_low_precision_masks_solve_in_float32_between_products():
    torch.manual_seed(0)
    layer = masked(ProxPropLinear(6, 4, tau_prox=0.5, optimization_mode="prox_cg2"))
    low = copy.deepcopy(layer).bfloat16()
    x = torch.randn(8, 6).bfloat16()
    for each in (layer, low):
        with torch.no_grad():
            for p, q in zip(each.parameters(), low.parameters(), strict=True):
                p.copy_(q)
        each(x.to(each.bias.dtype)).backward(torch.ones(8, 4).to(each.bias.dtype))
    assert low.bias.grad.dtype == torch.bfloat16
    assert oracle.relative_error(directions(low), directions(layer)) < 0.02


@pytest.mark.parametrize("change", [pruned, masked])
def test_generated_layers_solve_for_the_parameters_under_a_mask(change):
    torch.manual_seed(0)
    x, seed = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    layer = change(ProxPropLayerNorm(5, tau_prox=0.7, optimization_mode="prox_cg2").double())
    layer(x).backward(seed)
    reference = reference_of_masked(lambda **k: ProxPropLayerNorm(5, tau_prox=0.7, **k), x, seed, "prox_cg2")
    assert oracle.relative_error(by_role(directions(layer)), reference) < 1e-9


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_a_compiled_parametrization_is_refused_and_the_layer_alone_compiles():
    torch.compiler.reset()
    layer, x, output, seed = prepared("Linear", masked, "prox_cg2")
    output.backward(seed)
    reference = {name: d.clone() for name, d in directions(layer).items()}
    layer.zero_grad()
    told = r"computed from parameters in compiled code; torch\.compiler\.disable\(layer\) leaves the layer uncompiled"
    with pytest.raises(TypeError, match=told):
        torch.compile(layer, backend="aot_eager")(x)
    model = nn.Sequential(torch.compiler.disable(layer), nn.Tanh())
    torch.compile(model, backend="aot_eager")(x).backward(seed / (1 - output.detach().tanh().square()))
    assert oracle.relative_error(directions(layer), reference) < 1e-9


class Broadcast(torch.autograd.Function):
    """Stands for the node that nn.DataParallel puts before its replicas on GPUs."""

    @staticmethod
    def forward(ctx, *parameters):
        return tuple(p.clone() for p in parameters)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


@pytest.mark.parametrize("masks", [False, True])
def test_replicas_of_data_parallel_by_their_node(masks):
    torch.manual_seed(0)
    layer = ProxPropLinear(5, 3, tau_prox=0.7, optimization_mode="prox_exact").double()
    replica = layer._replicate_for_data_parallel()
    weight, bias = Broadcast.apply(layer.weight, layer.bias)
    assert weight.grad_fn.name() == "BroadcastBackward"
    replica.weight, replica.bias = weight * torch.ones_like(weight) if masks else weight, bias
    x, seed = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    if masks:
        replica.optimization_mode = "prox_cg1"
        with pytest.raises(TypeError, match=r"computed from parameters under nn\.DataParallel"):
            replica(x)
    else:
        replica(x).backward(seed)
        assert oracle.relative_error(directions(layer), oracle.exact(layer, [x], seed, 0.7)) < 1e-9


def test_a_reverted_layer_keeps_nothing_of_a_mask_that_it_had():
    layer = ProxPropLinear(5, 3, optimization_mode="prox_cg2")
    prune.identity(layer, "weight")
    layer(torch.randn(6, 5))
    prune.remove(layer, "weight")
    revert(layer)
    assert vars(layer).keys() == vars(torch.nn.Linear(5, 3)).keys()
