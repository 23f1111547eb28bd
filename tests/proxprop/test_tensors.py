"""A layer decides from the tensors that it multiplies with, whatever has put them in its parameters' place."""

import copy
import os
import pathlib
import subprocess
import sys

import oracle
import pytest
import torch
from test_directions import expected
from torch import nn
from transformers_like import Conv1D

from proxprop import (
    ProxPropConv2d,
    ProxPropConvTranspose2d,
    ProxPropEmbedding,
    ProxPropLinear,
    proxprop_module_generator,
)

ProxPropLayerNorm = proxprop_module_generator(nn.LayerNorm)

LAYERS = {
    "Linear": (lambda **k: ProxPropLinear(5, 4, tau_prox=0.7, **k), (6, 5)),
    "Conv2d": (lambda **k: ProxPropConv2d(2, 3, 3, padding=1, tau_prox=0.7, **k), (2, 2, 5, 4)),
    "ConvTranspose2d": (lambda **k: ProxPropConvTranspose2d(2, 3, 3, stride=2, tau_prox=0.7, **k), (2, 2, 3, 2)),
    "Conv1D": (lambda **k: proxprop_module_generator(Conv1D)(4, 5, tau_prox=0.7, **k), (6, 5)),
    "generated": (lambda **k: ProxPropLayerNorm(5, tau_prox=0.7, **k), (6, 5)),
}
CASES = [
    ("Linear", "prox_exact"),
    ("Linear", "prox_cg2"),
    ("Linear", "gradient"),
    ("Conv2d", "prox_exact"),
    ("Conv2d", "published_cg2"),
    ("ConvTranspose2d", "prox_exact"),
    ("Conv1D", "prox_exact"),
    ("Conv1D", "published_cg2"),
    ("generated", "prox_cg2"),
    ("generated", "gradient"),
]


def plain(tensors):
    return {name: tensor * 1 for name, tensor in tensors.items()}


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def views_of_one_vector(tensors):
    """As FullyShardedDataParallel does it: the leaf is a vector of all parameters."""
    vector = torch.cat([t.detach().flatten() for t in tensors.values()]).requires_grad_()
    views_of_one_vector.leaf = vector
    parts = vector.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, tensors.items(), strict=True)}


def casts(tensors):
    leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    casts.leaves = leaves
    return {name: leaf.double() for name, leaf in leaves.items()}


def prepared(kind, mode):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make(optimization_mode=mode).double()
    if kind == "generated":
        nn.init.normal_(layer.weight)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        seed = torch.randn_like(layer(x))
    return layer, x, seed, expected(layer, [x], seed, mode, 0.7, stacked=kind == "generated")


def replaced(layer, make):
    """Put plain tensors in the place of the parameters, and return those parameters."""
    parameters = dict(layer.named_parameters())
    for name, tensor in make(parameters).items():
        delattr(layer, name)
        setattr(layer, name, tensor)
    assert not list(layer.parameters())
    return parameters


@pytest.mark.parametrize("make", [plain, copies])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_plain_tensors_in_place_of_parameters(kind, mode, make):
    layer, x, seed, reference = prepared(kind, mode)
    parameters = replaced(layer, make)
    layer(x).backward(seed)
    assert oracle.relative_error({k: p.grad for k, p in parameters.items()}, reference) < 1e-9


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_views_of_one_vector_in_place_of_parameters(kind, mode):
    layer, x, seed, reference = prepared(kind, mode)
    replaced(layer, views_of_one_vector)
    layer(x).backward(seed)
    flat = torch.cat([d.flatten() for d in reference.values()])
    assert oracle.relative_error({"": views_of_one_vector.leaf.grad}, {"": flat}) < 1e-9


@pytest.mark.parametrize("make", [plain, copies])
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg2", "published_cg2"])
def test_plain_tensors_in_place_of_an_embeddings_parameter(mode, make):
    layer = ProxPropEmbedding(7, 3, tau_prox=0.7, optimization_mode=mode).double()
    tokens = torch.tensor([[0, 3, 3], [6, 1, 0]])
    seed = torch.randn(2, 3, 3, dtype=torch.float64)
    reference = expected(layer, [tokens], seed, mode, 0.7)
    parameters = replaced(layer, make)
    layer(tokens).backward(seed)
    assert oracle.relative_error({k: p.grad for k, p in parameters.items()}, reference) < 1e-9


def test_casts_in_place_of_parameters():
    layer, x, seed, reference = prepared("Linear", "prox_exact")
    replaced(layer, casts)
    layer(x).backward(seed)
    assert oracle.relative_error({k: p.grad for k, p in casts.leaves.items()}, reference) < 1e-6


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_a_bias_alone_may_be_a_parameter(kind, mode):
    layer, x, seed, reference = prepared(kind, mode)
    weight = layer.weight
    del layer.weight
    layer.weight = weight * 1
    layer(x).backward(seed)
    assert oracle.relative_error({"weight": weight.grad, "bias": layer.bias.grad}, reference) < 1e-9


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_functional_calls(kind, mode):
    layer, x, seed, reference = prepared(kind, mode)
    values = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    layer.requires_grad_(False)  # the registry's parameters do not matter
    torch.func.functional_call(layer, values, (x,)).backward(seed)
    assert oracle.relative_error({k: p.grad for k, p in values.items()}, reference) < 1e-9


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_replicas_of_data_parallel_give_the_sum_of_their_directions(kind, mode):
    layer, x, seed, _ = prepared(kind, mode)
    reference = None
    for rows in (slice(0, 1), slice(1, None)):
        replica = layer._replicate_for_data_parallel()  # without a GPU, what nn.DataParallel does around it
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter.clone())
        replica(x[rows]).backward(seed[rows])
        part = expected(layer, [x[rows]], seed[rows], mode, 0.7, stacked=kind == "generated")
        reference = part if reference is None else {k: reference[k] + part[k] for k in part}
    assert oracle.relative_error({k: p.grad for k, p in layer.named_parameters()}, reference) < 1e-9


def test_frozen_plain_tensors_are_left_alone():
    layer, x, _, _ = prepared("Linear", "prox_exact")
    parameters = replaced(layer, lambda tensors: {name: t.detach().clone() for name, t in tensors.items()})
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert all(p.grad is None for p in parameters.values())
    assert torch.allclose(leaf.grad, parameters["weight"].sum(0).expand_as(x))


class Adapter(ProxPropLinear):
    """A layer with a parameter of its own, which the base class's forward pass does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input):
        return super().forward(input) * self.scale


class GeneratedAdapter(ProxPropLayerNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input):
        return super().forward(input) * self.scale


@pytest.mark.parametrize("mode", ["prox_cg2", "gradient"])
@pytest.mark.parametrize("make", [lambda **k: Adapter(5, 4, **k), lambda **k: GeneratedAdapter(5, **k)])
@pytest.mark.parametrize("frozen", [["weight", "bias"], ["weight"], []])
def test_a_subclass_trains_a_parameter_of_its_own(make, mode, frozen):
    torch.manual_seed(0)
    layer = make(tau_prox=0.7, optimization_mode=mode).double()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = torch.randn(6, 5, dtype=torch.float64)
    output = layer(x)
    seed = torch.randn_like(output)
    output.backward(seed)
    assert torch.allclose(layer.scale.grad, (seed * output.detach() / 2).sum())  # the ordinary gradient
    assert [name for name, p in layer.named_parameters() if p.grad is None] == frozen
    if len(frozen) < 2:
        base = nn.Linear if isinstance(layer, nn.Linear) else nn.LayerNorm
        plain = base(*((5, 4) if base is nn.Linear else (5,))).double()
        for name in frozen:
            getattr(plain, name).requires_grad_(False)
        actual = {name: p.grad for name, p in layer.named_parameters() if name != "scale" and p.requires_grad}
        reference = expected(plain, [x], 2 * seed, mode, 0.7, stacked=base is nn.LayerNorm)
        assert oracle.relative_error(actual, reference) < 1e-9


def test_a_frozen_layer_reads_a_parametrized_weight_once():
    class Count(nn.Module):
        reads = 0

        def forward(self, weight):
            Count.reads += 1
            return weight

    layer = ProxPropLinear(5, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Count())
    layer.requires_grad_(False)
    Count.reads = 0
    layer(torch.randn(6, 5, requires_grad=True)).sum().backward()
    assert Count.reads == 1


# requires_grad is read in the forward pass.


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_freezing_after_the_forward_pass_drops_a_part_of_the_direction(kind, mode, frozen):
    layer, x, seed, reference = prepared(kind, mode)
    output = layer(x)
    getattr(layer, frozen).requires_grad_(False)
    output.backward(seed)
    assert getattr(layer, frozen).grad is None
    other = "bias" if frozen == "weight" else "weight"
    assert oracle.relative_error({other: getattr(layer, other).grad}, {other: reference[other]}) < 1e-9


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_freezing_all_after_the_forward_pass_leaves_no_direction(kind, mode):
    layer, x, seed, _ = prepared(kind, mode)
    output = layer(x)
    layer.requires_grad_(False)
    output.backward(seed)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("thawed", ["weight", "bias"])
def test_what_is_thawed_after_the_forward_pass_is_not_trained_by_it(kind, mode, thawed):
    layer, x, seed, _ = prepared(kind, mode)
    getattr(layer, thawed).requires_grad_(False)
    reference = expected(layer, [x], seed, mode, 0.7, stacked=kind == "generated")
    output = layer(x)
    getattr(layer, thawed).requires_grad_(True)
    output.backward(seed)
    assert getattr(layer, thawed).grad is None
    other = "bias" if thawed == "weight" else "weight"
    assert oracle.relative_error({other: getattr(layer, other).grad}, reference) < 1e-9


# Sharded and replicated over processes.


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_average_their_directions(tmp_path):
    """DistributedDataParallel and FullyShardedDataParallel, old and new; what fails is in the worker's output."""
    worker = pathlib.Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, str(worker), str(tmp_path / "rendezvous")]
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen([*command, str(rank)], env=environment, **pipes) for rank in range(2)]
    try:
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


# Copies of a layer with computed weights.


def test_a_copy_of_a_layer_with_replaced_parameters_is_one_of_its_own():
    layer, x, seed, reference = prepared("Linear", "prox_exact")
    twin = copy.deepcopy(layer)
    parameters = replaced(twin, plain)
    twin(x).backward(seed)
    assert layer.weight.grad is None
    assert oracle.relative_error({k: p.grad for k, p in parameters.items()}, reference) < 1e-9
