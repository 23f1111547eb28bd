"""Generated layers: what is checked at construction and at first use, and that settings of torch do not change it."""

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
