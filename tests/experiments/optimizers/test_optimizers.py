"""Every `optimizer.name` trains, goes on where it stopped, and takes the steps that its paper states."""

import copy
import importlib.util
import io
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.command.errors import ConfigError
from experiments.config import load_config
from experiments.data.datasets import load
from experiments.optimizers import check_optimizer, make_optimizer
from experiments.training.networks import build
from experiments.training.train import Training
from proxprop import ProxPropConv2d, ProxPropLinear

CPU = torch.device("cpu")
NESTEROV = {"momentum": 0.9, "nesterov": True}
OPTIMIZERS = {
    "sgd": {"lr": 0.03, **NESTEROV},
    "adam": {"lr": 0.01},
    "adamw": {"lr": 0.01, "weight_decay": 0.01},
    "muon": {"lr": 0.01, "weight_decay": 0.01, **NESTEROV},
    "soap": {"lr": 0.01, "update_every": 3},
    "shampoo": {"lr": 0.03, "update_every": 3},
    "kfac": {"lr": 0.01, **NESTEROV, "damping": 0.1, "update_every": 3},
    "isaac": {"lr": 0.1, **NESTEROV, "damping": 0.1},
}
MODELS = {
    "mlp": {"name": "mlp", "hidden_features": [16, 12]},
    "convnet": {"name": "convnet", "channels": [4, 6, 4], "kernel_size": 3},
}
# Not with the MLP: preconditioners of 3,072 inputs take seconds each.
PAIRS = [
    *(("mlp", name) for name in ("sgd", "adam", "adamw", "muon", "isaac")),
    *(("convnet", name) for name in OPTIMIZERS if name != "isaac"),
]


@pytest.fixture(autouse=True)
def without_stand_ins(monkeypatch):
    """pytorch-optimizer looks for transformers, for which tests of the library may have put a stand-in."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and module.__spec__ is None:
            monkeypatch.delitem(sys.modules, name)


def config_of(write_config, name, model="mlp", **sections):
    return load_config(write_config(model=MODELS[model], optimizer={"name": name, **OPTIMIZERS[name]}, **sections))


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_it_trains(write_config, model, name):
    config = config_of(write_config, name, model, epochs=15, batch_size=20)
    records = list(Training(build(config), load(config.data, CPU), config).records())
    assert records[-1].train_loss < 0.9 * records[0].train_loss
    assert not any(record.diverged for record in records)


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_a_loss_that_is_no_number_ends_the_run(write_config, model, name):
    config = config_of(write_config, name, model, epochs=9, batch_size=3)  # an epoch has more steps than Shampoo's 25
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e30})})
    records = list(Training(build(config), load(config.data, CPU), config).records())
    assert records[-1].diverged
    assert len(records) <= 4


def test_kfac_without_inverse_factors_has_diverged(write_config):
    settings = {"lr": 0.01, "momentum": 0.9, "damping": 0.01, "update_every": 3}
    model = {"name": "convnet", "channels": [4, 4, 4], "kernel_size": 3}
    path = write_config(model=model, optimizer={"name": "kfac", **settings}, epochs=9, batch_size=25)
    config = load_config(path, ["data.train_samples=200"])
    torch.manual_seed(0)
    records = list(Training(build(config), load(config.data, CPU), config).records())
    assert records[-1].diverged
    assert math.isfinite(records[-1].train_loss)  # it is the factors that failed, not the outputs


def test_kfac_warns_of_nothing_that_its_package_does(write_config):
    config = config_of(write_config, "kfac", epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Training(build(config), load(config.data, CPU), config).records())


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_it_goes_on_to_the_bit(write_config, model, name):
    # Shampoo preconditions from its 25th step on: 10 steps an epoch, of which one has fewer examples.
    config = config_of(write_config, name, model, epochs=4, batch_size=11)
    data, seen = load(config.data, CPU), 0
    torch.manual_seed(0)  # K-FAC draws labels
    whole = list(Training(build(config), data, config).records())

    def stop(examples):
        nonlocal seen
        seen += 1
        if seen == 27:
            raise Stopped

    torch.manual_seed(0)
    stopped, records = Training(build(config), data, config), []
    with pytest.raises(Stopped, match=r"^$"):
        records += stopped.records(stop)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    other = Training(build(config), data, config)
    other.load_state_dict(torch.load(file, weights_only=True))
    rest = list(other.records())
    assert [r.train_loss for r in rest] == [r.train_loss for r in whole[-len(rest) :]]
    assert len(rest) == 2


def test_muon_takes_kernels_as_matrices_and_leaves_the_rest_to_adamw(write_config):
    config = config_of(write_config, "muon", "convnet")
    torch.manual_seed(0)
    model = nn.Sequential(ProxPropConv2d(3, 4, 3), nn.Flatten(), ProxPropLinear(16, 5), nn.Linear(5, 2))
    for layer in (model[0], model[2]):
        layer.optimization_mode = "gradient"
    kernel, weight = (nn.Parameter(model[i].weight.detach().clone().flatten(1)) for i in (0, 2))
    rest = [nn.Parameter(p.detach().clone()) for p in (model[0].bias, model[2].bias, *model[3].parameters())]
    muon = torch.optim.Muon(
        [kernel, weight], lr=0.01, weight_decay=0.01, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.01)
    optimizer = make_optimizer(model, config.optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 4, 4)).square().sum().backward()
        kernel.grad, weight.grad = model[0].weight.grad.flatten(1), model[2].weight.grad
        for own, p in zip(rest, (model[0].bias, model[2].bias, *model[3].parameters()), strict=True):
            own.grad = p.grad
        optimizer.step()
        muon.step()
        adamw.step()
    assert torch.equal(model[0].weight.flatten(1), kernel)
    assert torch.equal(model[2].weight, weight)
    assert torch.equal(model[3].weight, rest[2])
    assert torch.equal(model[0].bias, rest[0])


def directions(layer, x, gradient):
    layer.zero_grad()
    layer(x).backward(gradient)
    return layer.weight.grad


@pytest.mark.parametrize("shape", [(40, 7, 5), (6, 30, 4)])
def test_isaac_is_the_exact_step_over_tau_without_a_bias(write_config, shape):
    rows, fan_in, fan_out = shape
    torch.manual_seed(0)
    layer = ProxPropLinear(fan_in, fan_out, bias=False, optimization_mode="prox_exact").double()
    model = nn.Sequential(copy.deepcopy(layer))
    config = config_of(write_config, "isaac")
    optimizer = make_optimizer(model, config.optimizer)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert type(model[0]).__module__.startswith("isaac")
    x = torch.randn(rows, fan_in, dtype=torch.float64)
    gradient = torch.randn(rows, fan_out, dtype=torch.float64)
    damping = config.optimizer.damping
    isaac = directions(model[0], x, gradient)
    layer.tau_prox = 1 / (rows * damping)
    torch.testing.assert_close(isaac, directions(layer, x, gradient) / layer.tau_prox, rtol=1e-9, atol=1e-12)
    layer.tau_prox, layer.gram_reduction = 1 / damping, "mean"
    torch.testing.assert_close(isaac, directions(layer, x, gradient), rtol=1e-9, atol=1e-12)


def test_isaac_leaves_the_bias_out_of_its_system(write_config):
    torch.manual_seed(0)
    model = nn.Sequential(ProxPropLinear(7, 5, optimization_mode="prox_exact").double())
    config = config_of(write_config, "isaac")
    make_optimizer(model, config.optimizer)
    x, gradient = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    weight = directions(model[0], x, gradient)
    damped = x.T @ x / len(x) + config.optimizer.damping * torch.eye(7, dtype=torch.float64)
    expected = config.optimizer.damping * torch.linalg.solve(damped, x.T @ gradient).T
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[0].bias.grad, gradient.sum(0))


def kfac_step(optimizer, model, x, labels):
    """A step's mean loss, its plain gradient, and the preconditioned one."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    plain = torch.autograd.grad(loss, model[0].weight)[0]
    own = optimizer.gradients(x, labels)
    torch.testing.assert_close(own, loss, rtol=1e-9, atol=0)
    return plain, model[0].weight.grad.clone()


def test_kfac_divides_by_damped_factors_that_are_running_averages(write_config):
    torch.manual_seed(0)
    config = config_of(write_config, "kfac")
    model = nn.Sequential(ProxPropLinear(6, 5, optimization_mode="prox_cg1"), nn.Linear(5, 10)).double()
    optimizer = make_optimizer(model, config.optimizer)
    average = 0.0
    for step in range(4):  # of which the first and the last renew the factors
        x, labels = torch.randn(30 - step, 6, dtype=torch.float64), torch.randint(0, 10, (30 - step,))
        plain, preconditioned = kfac_step(optimizer, model, x, labels)
        if step % config.optimizer.update_every == 0:
            mean = x.T @ x / len(x)
            average = mean if step == 0 else 0.95 * average + 0.05 * mean
        b = model[0].fisher.kron.B
        ratio = ((average.trace() / 6) / (b.trace() / 5)).sqrt()
        root = config.optimizer.damping**0.5
        left = b + root / ratio * torch.eye(5, dtype=torch.float64)
        right = average + root * ratio * torch.eye(6, dtype=torch.float64)
        expected = torch.linalg.solve(left, plain) @ torch.linalg.inv(right)
        torch.testing.assert_close(preconditioned, expected, rtol=1e-6, atol=1e-9)
        optimizer.step()


def test_kfac_goes_on_where_its_model_is(write_config):
    config = config_of(write_config, "kfac")
    model = nn.Sequential(ProxPropLinear(6, 5), nn.Linear(5, 10)).double()
    optimizer = make_optimizer(model, config.optimizer)
    kfac_step(optimizer, model, torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 10, (30,)))
    elsewhere = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 10)).double().to("meta")
    make_optimizer(elsewhere, config.optimizer).load_state_dict(optimizer.state_dict())
    factors = elsewhere[0].fisher.kron
    assert {factors.A.device, factors.B.device, factors.A_inv.device, factors.B_inv.device} == {torch.device("meta")}


def test_kfac_is_refused_where_there_is_batch_norm(write_config):
    resnet18, kfac = {"name": "resnet18", "stem": "cifar"}, {"name": "kfac", **OPTIMIZERS["kfac"]}
    line = r"^optimizer: kfac is for networks without batch norm: model\.name must be mlp or convnet .*, got resnet18$"
    with pytest.raises(ConfigError, match=line):
        load_config(write_config(model=resnet18, optimizer=kfac))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optimizer.name=kfac"], r"optimizer\.damping: must be given with kfac; also wrong: optimizer\.update_every"),
        (["optimizer.name=soap"], r"optimizer\.update_every: must be given with soap"),
        (["optimizer.damping=1"], r"optimizer\.damping: must be left out with sgd \(it is for kfac, isaac\), got 1"),
        (["optimizer.update_every=0"], r"optimizer\.update_every: must be greater than or equal to 1, got 0"),
        (
            ["optimizer.name=isaac", "optimizer.damping=1", "proxprop.optimization_mode=prox_cg3"],
            r"proxprop: optimization_mode must be gradient with optimizer\.name: isaac, .* got prox_cg3",
        ),
        (
            ["optimizer.name=isaac", "optimizer.damping=1", "diagnostics_every=1"],
            r"diagnostics_every: must be left out with optimizer\.name: isaac .*, got 1",
        ),
        (
            ["optimizer={name: kfac, lr: 1, damping: 1, update_every: 1}", "compile=default"],
            r"compile: must be none with optimizer\.name: kfac, got default",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(write_config, overrides, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        load_config(write_config(), overrides)


def test_isaac_has_no_convolutions(write_config):
    path = write_config(model=MODELS["convnet"], optimizer={"name": "isaac", "lr": 1, "damping": 1})
    with pytest.raises(ConfigError, match=r"^optimizer: isaac has no convolutions: model\.name must be mlp"):
        load_config(path)


def test_layers_default_mode_is_checked_too(write_config):
    path = write_config(optimizer={"name": "isaac", "lr": 1, "damping": 1}, proxprop={})
    with pytest.raises(ConfigError, match=r"^proxprop: optimization_mode must be gradient .* got prox_cg1$"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("soap", "pytorch-optimizer"), ("shampoo", "pytorch-optimizer"), ("kfac", "asdfghjkl"), ("isaac", "isaac")],
)
def test_a_missing_package_is_named(write_config, monkeypatch, name, package):
    config = config_of(write_config, name).optimizer
    check_optimizer(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"^optimizer\.name: {name} needs a package .*: pip install {package}$"):
        check_optimizer(config)


def test_muon_needs_a_newer_pytorch(write_config, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"^optimizer\.name: muon needs PyTorch 2\.9 or newer, this is "):
        check_optimizer(config_of(write_config, "muon").optimizer)
