"""The paper's two networks and a modern one: ProxProp layers, and a plain `nn.Linear` as the last one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from experiments.command.errors import ConfigError
from experiments.config import Config, ConvNetConfig, MLPConfig, ResNet18Config
from experiments.training.device import seeded
from proxprop import ProxPropConv2d, ProxPropLinear, convert

_CLASSES = 10


def build(config: Config) -> nn.Module:
    """The network of `config`, initialised on the CPU (PyTorch's defaults) under its seed.

    The start depends on the seed and the sizes alone, so it is the same on every device and in
    every optimization mode. Maps images [N, 3, 32, 32] to logits [N, 10].
    """
    layer_options = config.proxprop.model_dump()
    with seeded(config.seed, torch.device("cpu")):
        if isinstance(config.model, MLPConfig):
            return mlp(config.model, layer_options)
        if isinstance(config.model, ConvNetConfig):
            return convnet(config.model, layer_options)
        return resnet18(config.model, layer_options)


def mlp(config: MLPConfig, layer_options: dict[str, Any]) -> nn.Sequential:
    """The MLP with ReLU: 3072-4000-1000-4000-10 in the paper (Section 5.1)."""
    widths = (3 * 32 * 32, *config.hidden_features)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [ProxPropLinear(fan_in, fan_out, **layer_options), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], _CLASSES))


def convnet(config: ConvNetConfig, layer_options: dict[str, Any]) -> nn.Sequential:
    """The ConvNet: three convolutions with ReLU, the first so many of them followed by max-pooling by 2.

    Two in the paper's published code (which leaves 1280 features to the last layer), three in its text (320).
    """
    layers: list[nn.Module] = []
    padding = config.kernel_size // 2
    for index, (fan_in, fan_out) in enumerate(pairwise((3, *config.channels))):
        layers += [ProxPropConv2d(fan_in, fan_out, config.kernel_size, padding=padding, **layer_options)]
        layers += [nn.ReLU(inplace=True)]
        if index < config.poolings:
            layers.append(nn.MaxPool2d(2))
    features = config.channels[-1] * (32 >> config.poolings) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, _CLASSES))


def resnet18(config: ResNet18Config, layer_options: dict[str, Any]) -> nn.Module:
    """torchvision's resnet18, made for images of 224 pixels; the CIFAR stem neither strides nor pools before stage 1.

    Raises:
        ConfigError: torchvision is not installed.
    """
    try:
        from torchvision.models import resnet18 as plain_resnet18  # slow to import, and only needed here
    except ImportError as error:
        raise ConfigError("model.name: resnet18 needs a package that is not installed: "
                          "pip install torchvision") from error  # fmt: skip
    network: nn.Module = plain_resnet18(num_classes=_CLASSES)
    if config.stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    convert(network, skip="^fc$", **layer_options)
    return network
