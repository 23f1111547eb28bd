"""Shampoo (Gupta et al., 2018; in blocks, as Anil et al., 2020), by the package pytorch-optimizer."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer import ScalableShampoo
from torch import Tensor


class Shampoo(ScalableShampoo):  # type: ignore[misc]
    """`ScalableShampoo`, whose state is of tensors alone, as a checkpoint has to be."""

    def state_dict(self) -> dict[str, Any]:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {
            "steps": [group.get("step", 0) for group in self.param_groups],
            "parameters": [_tensors(self.state[p]) if self.state.get(p) else {} for p in parameters],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stored = iter(state["parameters"])
        for group, step in zip(self.param_groups, state["steps"], strict=True):
            group["step"] = step
            for parameter in group["params"]:
                if not (tensors := next(stored)):
                    continue
                parameter.grad = torch.zeros_like(parameter)  # state is made for what has a gradient
                self.init_group({**group, "params": [parameter]})
                parameter.grad = None
                for name, own in _tensors(self.state[parameter]).items():
                    _copy(own, tensors[name])


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a parameter's state: single ones, and lists of them."""
    conditioner = state["pre_conditioner"]
    return {
        "momentum": state["momentum"],
        "graft_momentum": state["graft"].momentum,
        "statistics": conditioner.statistics,
        "pre_conditioners": conditioner.pre_conditioners,
    }


def _copy(own: Tensor | list[Tensor], stored: Tensor | list[Tensor]) -> None:
    for one, other in zip(own, stored, strict=True) if isinstance(own, list) else [(own, stored)]:
        one.copy_(other)
