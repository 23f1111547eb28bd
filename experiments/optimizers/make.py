"""From `optimizer` in a config to an optimizer of a model."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from experiments.command.errors import ConfigError
from experiments.config import OptimizerConfig

#: The module that an optimizer needs beside PyTorch, and the package to install for it.
_NEEDED = {
    "soap": ("pytorch_optimizer", "pytorch-optimizer"),
    "shampoo": ("pytorch_optimizer", "pytorch-optimizer"),
    "kfac": ("asdl", "asdfghjkl"),
    "isaac": ("isaac", "isaac"),
}


@runtime_checkable
class MakesGradients(Protocol):
    """An optimizer that has its own way through the model."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy; what a step needs of it is left in `.grad`."""


def check_optimizer(config: OptimizerConfig) -> None:
    """
    Raises:
        ConfigError: the optimizer needs a package that is not installed, or a newer PyTorch.
    """
    if config.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer.name: muon needs PyTorch 2.9 or newer, this is {torch.__version__}")
    if config.name not in _NEEDED:
        return
    module, package = _NEEDED[config.name]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"optimizer.name: {config.name} needs a package that is not installed: pip install {package}")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `model`'s parameters.

    `kfac` and `isaac` have layers of their own or observe plain ones: they replace `model`'s ProxProp layers in place,
    with the same parameters.
    """
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    match config.name:
        case "sgd":
            return torch.optim.SGD(model.parameters(), **rates, **momentum)
        case "adam":
            return torch.optim.Adam(model.parameters(), **rates)
        case "adamw":
            return torch.optim.AdamW(model.parameters(), **rates)
        case "muon":
            from experiments.optimizers.muon import MuonAndAdamW

            return MuonAndAdamW(model, **rates, **momentum)
        case "soap":
            from pytorch_optimizer import SOAP

            return SOAP(model.parameters(), **rates, precondition_frequency=config.update_every)
        case "shampoo":
            from experiments.optimizers.shampoo import Shampoo

            return Shampoo(model.parameters(), **rates, preconditioning_compute_steps=config.update_every)
        case "kfac":
            from experiments.optimizers.kfac import KFAC

            return KFAC(model, **rates, **momentum, damping=config.damping, update_every=config.update_every)
        case "isaac":
            from experiments.optimizers.isaac import with_isaac_layers

            return torch.optim.SGD(with_isaac_layers(model, config.damping).parameters(), **rates, **momentum)
