"""The loop does what a plain training loop does."""

import itertools
import math
import sys

import pytest
import torch
import torchvision
from torch import nn

from experiments.command.errors import ConfigError
from experiments.config import load_config
from experiments.data.datasets import load
from experiments.optimizers import make_optimizer
from experiments.training.networks import build
from experiments.training.train import Training, evaluate

CPU = torch.device("cpu")


def by_hand(config, data):
    """Batch size 40 on 100 examples: batches of 40, 40 and 20."""
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    order = torch.Generator().manual_seed(config.seed)
    loss_of = nn.CrossEntropyLoss()

    def losses():
        with torch.no_grad():
            logits = model(data.train.images), model(data.val.images)
            labels = data.train.labels, data.val.labels
            return [
                value
                for z, y in zip(logits, labels, strict=True)
                for value in (loss_of(z, y).item(), (z.argmax(1) == y).float().mean().item())
            ]

    first = losses()
    rows = [[first[0], *first]]
    for _ in range(config.epochs):
        permutation = torch.randperm(100, generator=order)
        weighted = 0.0
        for batch in (permutation[:40], permutation[40:80], permutation[80:]):
            optimizer.zero_grad()
            loss = loss_of(model(data.train.images[batch]), data.train.labels[batch])
            loss.backward()
            optimizer.step()
            weighted += loss.item() * len(batch)
        rows.append([weighted / 100, *losses()])
    return rows


def test_same_numbers_as_a_loop_written_by_hand(write_config):
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}
    config = load_config(write_config(optimizer=optimizer, epochs=3, seed=5))
    data = load(config.data, CPU)
    records = list(Training(build(config), data, config).records())
    assert [record.epoch for record in records] == [0, 1, 2, 3]
    rows = [[r.minibatch_loss, r.train_loss, r.train_accuracy, r.val_loss, r.val_accuracy] for r in records]
    for row, expected in zip(rows, by_hand(config, data), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert records[-1].train_loss < 0.9 * records[0].train_loss
    assert records[0].epoch_seconds == 0
    assert all(record.epoch_seconds > 0 for record in records[1:])


def test_every_mode_starts_from_the_same_parameters(write_config):
    path = write_config()
    states = [
        build(load_config(path, [f"proxprop.optimization_mode={mode}", *changes])).state_dict()
        for mode, changes in [("gradient", []), ("prox_cg3", []), ("gradient", ["seed=1"])]
    ]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0)
    assert not torch.equal(states[2]["1.weight"], states[0]["1.weight"])


def test_building_leaves_the_global_generator_alone(write_config):
    config = load_config(write_config())
    before = torch.get_rng_state()
    build(config)
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_are_the_papers(write_config):
    mlp = load_config(write_config(model={"name": "mlp"}))
    shapes = [tuple(p.shape) for p in build(mlp).parameters() if p.dim() > 1]
    assert shapes == [(4000, 3072), (1000, 4000), (4000, 1000), (10, 4000)]
    convnet = build(load_config(write_config(model={"name": "convnet"})))
    shapes = [tuple(p.shape) for p in convnet.parameters() if p.dim() > 1]
    assert shapes == [(16, 3, 5, 5), (20, 16, 5, 5), (20, 20, 5, 5), (10, 1280)]


@pytest.mark.parametrize(("poolings", "features"), [(0, 20480), (2, 1280), (3, 320)])
def test_the_first_convolutions_are_pooled(write_config, poolings, features):
    convnet = build(load_config(write_config(model={"name": "convnet", "poolings": poolings})))
    convolutions = [index for index, module in enumerate(convnet) if isinstance(module, nn.Conv2d)]
    pooled = [isinstance(convnet[index + 2], nn.MaxPool2d) for index in convolutions]
    assert pooled == [True] * poolings + [False] * (3 - poolings)
    assert convnet[-1].weight.shape == (10, features)
    assert convnet(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("stem", "stages"), [("imagenet", (8, 1)), ("cifar", (32, 4))])
def test_the_resnet_is_torchvisions_but_for_its_stem(write_config, stem, stages):
    network = build(load_config(write_config(model={"name": "resnet18", "stem": stem})))
    seen = []
    for stage in (network.layer1, network.layer4):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert tuple(seen) == stages
    plain = torchvision.models.resnet18(num_classes=10)
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_the_resnet_says_what_it_lacks(write_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"^model\.name: resnet18 needs a package .*: pip install torchvision$"):
        build(load_config(write_config(model={"name": "resnet18"})))


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet18"])
def test_all_layers_but_the_last_take_the_mode(write_config, name):
    path = write_config(model={"name": name})
    settings = {"optimization_mode": "prox_cg7", "tau_prox": 0.3, "gram_reduction": "mean"}
    config = load_config(path, [f"proxprop.{key}={value}" for key, value in settings.items()])
    layers = [module for module in build(config).modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert type(layers[-1]) is nn.Linear
    for layer in layers[:-1]:
        assert {key: getattr(layer, key) for key in settings} == settings


def test_evaluation_is_the_mean_over_examples_whatever_the_batches(write_config, monkeypatch):
    config = load_config(write_config())
    data, model = load(config.data, CPU), build(config)
    whole = evaluate(model, data.train)
    monkeypatch.setattr("experiments.training.train._EVALUATION_BATCH", 33)
    assert evaluate(model, data.train) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_has_pytorchs_defaults(write_config, name, cls):
    config = load_config(write_config(optimizer={"name": name, "lr": 0.01, "weight_decay": 0.01}))
    optimizer = make_optimizer(nn.Linear(2, 2), config.optimizer)
    default = cls(nn.Linear(2, 2).parameters(), lr=0.01, weight_decay=0.01)
    assert type(optimizer) is cls
    assert optimizer.defaults == default.defaults


def test_training_ends_with_the_record_that_diverged(write_config):
    config = load_config(write_config(epochs=5), ["optimizer.lr=1e30"])
    records = list(Training(build(config), load(config.data, CPU), config).records())
    assert [record.epoch for record in records] == [0, 1]
    assert not math.isfinite(records[-1].train_loss)


def test_records_come_as_training_goes(write_config):
    config = load_config(write_config(epochs=10**9))
    loop = Training(build(config), load(config.data, CPU), config).records()
    assert [record.epoch for record in itertools.islice(loop, 3)] == [0, 1, 2]
