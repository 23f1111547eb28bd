"""The benchmark measures what it says it does."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step_cost
from benchmarks.networks import NETWORKS, Call, Network, Shape, calls, floor
from benchmarks.step_cost import Step, measure, measure_layer
from experiments.config import Config, load_config
from experiments.training.networks import build
from proxprop import convert, revert
from proxprop.layers import ProxPropLayer

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_plain_or_converted_but_for_its_last_layer(name):
    plain, proximal = NETWORKS[name].build(None), NETWORKS[name].build("prox_cg3")
    assert not any(isinstance(module, ProxPropLayer) for module in plain.modules())
    others = {n for n, m in proximal.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, ProxPropLayer)}
    assert NETWORKS[name].output in others
    assert any(isinstance(module, ProxPropLayer) for module in proximal.modules())


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mlp", {"name": "mlp"}),
        ("convnet", {"name": "convnet"}),
        ("resnet18", {"name": "resnet18", "stem": "imagenet"}),
        ("resnet18_32", {"name": "resnet18", "stem": "cifar"}),
    ],
)
def test_networks_of_the_experiments_are_those(name, model):
    config = load_config(Path("configs/paper/convnet_adam_cg3.yaml")).model_dump() | {"model": model}
    network = build(Config.model_validate(config))
    revert(network)
    assert str(network) == str(NETWORKS[name].build(None))


def test_calls_are_those_of_layers_that_multiply():
    """The GPT has all kinds: embeddings, layers that are called on sequences, attention without weights."""
    torch.manual_seed(0)
    network = NETWORKS["gpt"].build("prox_exact")
    found = calls(network, *NETWORKS["gpt"].batch())
    assert [call.name for call in found] == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("qkv", "proj", "fc1", "fc2")]
    assert {(call.shape.m, call.shape.d, call.shape.o) for call in found} == {
        (2048, 513, 1536), (2048, 513, 512), (2048, 513, 2048), (2048, 2049, 512)
    }  # fmt: skip
    assert 1 < floor(found, "prox_cg1") < floor(found, "prox_exact") < 2


def test_a_row_of_each_table(monkeypatch):
    def small():
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU(), nn.Linear(4, 10))

    monkeypatch.setitem(NETWORKS, "mlp", Network(small, NETWORKS["mlp"].batch, "3"))
    seconds = iter([9.0, 99.0] * 2 + [1.0, 2.0, 2.0, 5.0, 1.0, 3.0, 4.0, 16.0, 2.0, 10.0])  # two rounds do not count
    with monkeypatch.context() as patch:
        patch.setattr(step_cost, "timed", lambda run, device: next(seconds))
        row = measure("mlp", "gradient", CPU, "none", seconds=1e-9)
    assert (row["low"], row["ratio"], row["high"]) == (2.5, 3.0, 4.0)  # of 2, 2.5, 3, 4 and 5
    assert (row["plain_ms"], row["rounds"]) == (2000, 5)
    assert row["floor"] == 1
    step = Step("mlp", "prox_cg3", CPU)
    (call,) = calls(step.network, step.inputs, step.labels)
    monkeypatch.setattr(step_cost, "peak_allocation", lambda run, device: next(peaks))
    peaks = iter([7.0 * 3073**2, 3.0 * 3073**2])
    row = measure_layer(call, "prox_exact", CPU, 1e-9)
    assert (row["form"], row["memory"]) == ("Dual", 0.5)  # 4·d² bytes more, over 8·d²


@pytest.mark.parametrize("layer", [nn.Linear(300, 20), nn.Conv2d(3, 16, 5)])
def test_a_layer_holds_no_more_than_itself(layer):
    """Gradients of a step before are freed outside of what is measured."""
    network = nn.Sequential(layer, nn.Flatten())
    convert(network, tau_prox=1.0, optimization_mode="gradient")
    inputs = torch.rand(50, 300) if isinstance(layer, nn.Linear) else torch.rand(5, 3, 32, 32)
    (call,) = calls(network, inputs, torch.zeros(len(inputs), dtype=torch.long))
    assert measure_layer(call, "gradient", CPU, 1e-9)["memory"] == 0


TALL, WIDE = Shape(2, 10, 6, 3, gram=180, kernel=300), Shape(1, 2, 50, 3, gram=2500, kernel=100)


@pytest.mark.parametrize(
    ("shape", "mode", "multiply_adds"),
    [
        (TALL, "gradient", 0),
        (TALL, "prox_exact", 2 * (180 + 6 * 6 * 6 / 3 + 6 * 6 * 3)),
        (TALL, "prox_cg1", 2 * 10 * 6 * 3),  # A alone
        (TALL, "prox_cg3", 2 * (180 + 3 * 6 * 6 * 3)),
        (TALL, "published_cg3", 2 * (180 + 3 * 6 * 6 * 3)),
        (TALL, "published_cg3-only-stop", 2 * (180 + 3 * 6 * 6 * 3)),
        (WIDE, "prox_exact", 100 + 2 * 2 * 2 / 3 + 2 * 2 * 3),
        (WIDE, "prox_cg3", 100 + 3 * 2 * 2 * 3),
        (WIDE, "prox_cg10", 100 + 9 * 2 * 2 * 2 + 2 * 2 * 2 * 3),  # the kernel's eigenvectors
    ],
)
def test_multiply_adds_of_a_mode(shape, mode, multiply_adds):
    assert shape.extra(mode) == pytest.approx(multiply_adds)


@pytest.mark.parametrize(
    ("layer", "size", "shape"),
    [
        (nn.Linear(3, 4), (2, 5, 3), Shape(1, 10, 4, 4, gram=10 * 4 * 4 / 2, kernel=10 * 10 * 4 / 2)),
        # 5·5 distances of taps, 2·2 pairs of channels; products of 25 pixels of 2 channels.
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 5, 5), Shape(2, 25, 19, 3, 25 * 25 * 4 / 2, 25 * 25 * 2 / 2)),
        # Of three taps the outer two, which the stride makes alike, have 5 distances to others, and the middle one 3.
        (nn.Conv2d(1, 2, 3, 2, padding=1), (1, 1, 5, 5), Shape(1, 9, 10, 2, 9 * 8 * 8 / 2, 25 * 25 / 2)),
        (nn.Conv2d(3, 2, 1), (1, 3, 2, 2), Shape(1, 4, 4, 2, 4 * 9 / 2, 4 * 4 * 3 / 2)),
    ],
)
def test_a_layer_as_a_matrix_problem(layer, size, shape):
    input = torch.ones(size)
    assert Shape.of(layer, input, layer(input)) == shape


def test_a_floor_is_over_two_products_of_the_first_layer_and_three_of_others():
    first, second = (Call("", None, None, None, shape) for shape in (TALL, WIDE))
    assert floor([first, second], "prox_cg3") == 1 + (1008 + 136) / (2 * 360 + 3 * 300)
