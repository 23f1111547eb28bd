"""Generated layers: what is checked at construction and at first use, and that settings of torch do not change it."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from test_directions import GENERATED, expected
from torch import nn

from proxprop import ProxPropEmbedding, ProxPropLinear, proxprop_module_generator


@pytest.fixture
def defaults():
    """Sets torch's default dtype and device for a test."""

    def change(dtype=None, device=None):
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


CHANGES = [{"device": "meta"}, *({"dtype": d} for d in (torch.float64, torch.float16, torch.bfloat16))]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("name", GENERATED)
def test_torchs_defaults_do_not_matter(name, change, defaults):
    """They are for tensors that are made anew; the layer's stay what they are."""
    make, inputs = GENERATED[name]
    results = []
    for changes in ({}, change):
        torch.manual_seed(0)
        layer = make(tau_prox=0.7, optimization_mode="prox_cg2").double()
        defaults(**changes)
        layer(*inputs).square().sum().backward()
        results.append({key: p.grad for key, p in layer.named_parameters()})
    assert oracle.relative_error(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
def test_nor_do_they_matter_to_layers_of_known_structure(mode, change, defaults):
    torch.manual_seed(0)
    layer = ProxPropLinear(5, 3, optimization_mode=mode).double()
    x, seed = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    reference = expected(layer, [x], seed, mode, 1.0)
    defaults(**change)
    layer(x).backward(seed)
    assert oracle.relative_error({key: p.grad for key, p in layer.named_parameters()}, reference) < 1e-9


@pytest.mark.parametrize("base", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_of_embeddings_that_a_step_does_not_know_are_refused_at_construction(base, option):
    name = next(iter(option))
    with pytest.raises(TypeError, match=f"ProxProp{base.__name__}: {name}=.* proximal step is not defined"):
        proxprop_module_generator(base)(5, 3, **option)


def test_a_padding_index_has_no_direction():
    layer = proxprop_module_generator(nn.Embedding)(5, 3, padding_idx=0, tau_prox=4.0, optimization_mode="prox_cg3")
    output = layer(torch.tensor([0, 2, 2]))
    output.backward(torch.ones_like(output))
    reference = torch.zeros(5, 3)
    reference[2] = 2 / (2 + 1 / 4)  # two rows of A pick it
    assert torch.allclose(layer.weight.grad, reference)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))


class Normalised(Base):
    """Changes its parameter in the forward pass, as Embedding does with max_norm."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(1.0)
        return x @ self.weight


class Sparse(Base):
    def forward(self, x):
        return nn.functional.embedding(x.argmax(1), self.weight, sparse=True)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return None, x.T @ (gradient * torch.arange(1, 7, dtype=x.dtype)[:, None])


class ScaledGradient(Base):
    """Its backward pass is not the transpose of its forward pass."""

    def forward(self, x):
        return Scaled.apply(x, self.weight)


class Random(Base):
    def forward(self, x):
        return nn.functional.dropout(x @ self.weight)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (Normalised, "the forward pass changes its parameters"),
        (Sparse, "the gradient is sparse"),
        (ScaledGradient, "the gradient is not that of the output"),
        (Random, "the output must be one tensor, linear in all parameters together"),
    ],
)
def test_modules_that_are_linear_by_chance_alone_are_refused_at_first_use(base, reason):
    layer = proxprop_module_generator(base)()
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"ProxProp{base.__name__}: {reason} \(weight\); a proximal step is not def"):
        layer(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    if base is not Random:
        assert torch.equal(torch.get_rng_state(), state)


class Part(Base):
    """Uses a part of its parameters."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("mode", ["prox_cg2", "gradient"])
@pytest.mark.parametrize("frozen", [[], ["unused"], ["weight"]])
def test_parameters_that_the_module_does_not_use_have_no_direction(mode, frozen):
    layer = proxprop_module_generator(Part)(tau_prox=0.7, optimization_mode=mode).double()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x, seed = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    reference = expected(layer, [x], seed, mode, 0.7, stacked=True)
    layer(x).backward(seed)
    for name, p in layer.named_parameters():
        if name in frozen:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, reference[name], rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.first(x) + self.second(2 * x)


@pytest.mark.parametrize("plain", [False, True])
def test_a_parameter_under_two_names_is_one(plain):
    layer = proxprop_module_generator(Tied)(tau_prox=0.7, optimization_mode="prox_cg200").double()
    weight = layer.first.weight
    if plain:  # as wrappers set it
        tensor = weight * 1
        for part in (layer.first, layer.second):
            del part.weight
            part.weight = tensor
    x, seed = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    layer(x).backward(seed)
    a = 3 * x
    reference = torch.linalg.solve(a.T @ a + torch.eye(4, dtype=a.dtype) / 0.7, a.T @ seed).T
    torch.testing.assert_close(weight.grad, reference, rtol=1e-9, atol=1e-12)


def test_replaced_tensors_are_back_after_a_module_fails():
    class Failing(Base):
        fail = False

        def forward(self, x):
            if Failing.fail:
                raise ArithmeticError("the module's own error")
            return x @ self.weight

    layer = proxprop_module_generator(Failing)()
    before = layer.weight
    Failing.fail = True
    with pytest.raises(ArithmeticError, match="the module's own error"):
        layer(torch.randn(6, 4))
    assert layer.weight is before


@pytest.mark.parametrize("cls", [ProxPropEmbedding, proxprop_module_generator(torch.nn.EmbeddingBag)])
@pytest.mark.parametrize(("option", "value"), [("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)])
def test_an_option_that_is_set_later(cls, option, value):
    layer, tokens = (
        cls(5, 3, mode="sum") if issubclass(cls, torch.nn.EmbeddingBag) else cls(5, 3),
        torch.tensor([[0, 1]]),
    )
    layer(tokens)
    before = layer.weight.clone()
    setattr(layer, option, value)
    with pytest.raises(TypeError, match=rf"^{cls.__name__}: {option}={value} changes the parameters or their gradient"):
        layer(tokens)
    assert torch.equal(layer.weight, before)


# The backward pass runs the base class again: on what was there in the forward pass.


class Stateful(Base):
    """Reads all kinds of state, and changes some of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(4))
        self.factor = torch.tensor(2.0)
        self.gain, self.calls = 3.0, 0
        self.part = nn.Dropout(0.0)

    def rows(self, x):
        rows = (x * self.gain + self.shift) * self.factor * (1 + self.calls)
        return rows + 1 if self.part.training else rows

    def forward(self, x):
        output = self.rows(x) @ self.weight
        self.calls += 1
        self.shift += 1
        self.factor = self.factor + 1
        return output


def delete(layer):
    layer.register_buffer("shift", torch.zeros(()))
    del layer.factor
    layer.other = 1


BETWEEN = {
    "nothing": lambda layer: None,
    "evaluation": lambda layer: layer.eval(),
    "a buffer, in place": lambda layer: layer.shift.zero_(),
    "a buffer, replaced": lambda layer: setattr(layer, "shift", torch.zeros(4)),
    "a tensor, in place": lambda layer: layer.factor.zero_(),
    "a setting": lambda layer: setattr(layer, "gain", 0.0),
    "a part": lambda layer: setattr(layer, "part", nn.Identity().eval()),
    "attributes that come and go": delete,
    "another forward pass": lambda layer: layer(torch.ones(6, 4)),
}


@pytest.mark.parametrize("change", BETWEEN)
def test_what_changes_between_forward_and_backward_has_no_part_in_the_step(change):
    torch.manual_seed(0)
    layer = proxprop_module_generator(Stateful)(tau_prox=0.7, optimization_mode="prox_cg200").double()
    x, seed = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    a = layer.rows(x)
    reference = torch.linalg.solve(a.T @ a + torch.eye(4, dtype=a.dtype) / 0.7, a.T @ seed)
    output = layer(x)
    assert (layer.calls, float(layer.shift[0]), float(layer.factor)) == (1, 2.0, 3.0)
    BETWEEN[change](layer)
    state = copy.deepcopy(layer)
    output.backward(seed)
    torch.testing.assert_close(layer.weight.grad, reference, rtol=1e-9, atol=1e-12)
    assert vars(layer).keys() == vars(state).keys()
    for name in ("calls", "gain", "factor", "training", "other"):
        assert getattr(layer, name, None) == getattr(state, name, None)
    assert torch.equal(layer.shift, state.shift)
    assert layer.part.training == state.part.training


@pytest.mark.parametrize("mode", ["prox_cg2", "gradient"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_that_changes_its_mode_between_forward_and_backward(training, mode):
    torch.manual_seed(0)
    layer = proxprop_module_generator(nn.BatchNorm1d)(4, tau_prox=0.7, optimization_mode=mode).double()
    layer.train(training)
    x, seed = 3 * torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    reference = expected(layer, [x], seed, mode, 0.7, stacked=True)
    output = layer(x)
    layer.train(not training)
    layer.running_var.fill_(9.0)
    output.backward(seed)
    assert oracle.relative_error({name: p.grad for name, p in layer.named_parameters()}, reference) < 1e-9


class Several(Base):
    def forward(self, inputs, *, scaled):
        return sum(x @ self.weight for x in inputs) + scaled["by 2"][0] @ (2 * self.weight)


def test_tensors_within_lists_are_inputs():
    torch.manual_seed(0)
    layer = proxprop_module_generator(Several)(tau_prox=0.7, optimization_mode="prox_cg200").double()
    x, y, z, seed = (torch.randn(6, width, dtype=torch.float64) for width in (4, 4, 4, 3))
    x.requires_grad_()
    a = (x + y + 2 * z).detach()
    reference = torch.linalg.solve(a.T @ a + torch.eye(4, dtype=a.dtype) / 0.7, a.T @ seed)
    inputs, scaled = [x, y], {"by 2": (z,)}
    output = layer(inputs, scaled=scaled)
    inputs.clear()
    scaled.clear()
    output.backward(seed)
    torch.testing.assert_close(layer.weight.grad, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, seed @ layer.weight.detach().T)
    output = layer([x, y], scaled={"by 2": (z,)})
    z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(seed)


@pytest.mark.parametrize("slow", ["forward", "backward"])
def test_threads_may_share_a_layer(slow):
    """One is within the base class, with other tensors in place of the parameters, while the other one comes."""
    inside, calls = threading.Event(), []

    class Slow(Base):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread() and len(calls) >= (slow == "backward"):
                inside.set()
                time.sleep(0.2)
            calls.append(x)
            return x @ self.weight

    torch.manual_seed(0)
    layer = proxprop_module_generator(Slow)(tau_prox=0.7, optimization_mode="prox_cg2").double()
    x, seed = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    reference = expected(layer, [x], seed, "prox_cg2", 0.7, stacked=True)
    layer(x)  # which looks whether it is linear

    def step(layer):
        layer(x).backward(seed)

    for twin in (layer, copy.deepcopy(layer)):
        calls.clear()
        inside.clear()
        twin.zero_grad()
        with ThreadPoolExecutor(1) as executor:
            other = executor.submit(step, twin)
            assert inside.wait(60)
            step(twin)
            other.result()
        assert oracle.relative_error({"weight": twin.weight.grad / 2}, reference) < 1e-9


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.dropout(x))


def test_a_part_that_is_set_to_training_by_itself_is_looked_at_again():
    """As for samples of a network with dropout: random, though the layer is in evaluation."""
    layer = proxprop_module_generator(Dropped)(optimization_mode="prox_cg1").eval()
    layer(torch.ones(4, 3)).sum().backward()
    layer.dropout.train()
    with pytest.raises(TypeError, match="ProxPropDropped: the output must be one tensor, linear in all parameters"):
        layer(torch.ones(4, 3))
