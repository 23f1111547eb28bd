"""Muon for the hidden layers' weights, AdamW for all else, as Muon's authors advise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from proxprop.layers import ProxPropLayer


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` of the weights of ProxProp layers, `torch.optim.AdamW` of all other parameters.

    A kernel is the matrix with a row for each output channel. Muon's steps have the size of AdamW's
    (`match_rms_adamw`), so that both have one learning rate.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, momentum: float, nesterov: bool) -> None:
        self._weights = [layer.weight for layer in model.modules() if isinstance(layer, ProxPropLayer)]
        hidden = set(map(id, self._weights))
        others = [parameter for parameter in model.parameters() if id(parameter) not in hidden]
        super().__init__([{"params": self._weights}, {"params": others}], {"lr": lr})
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in self._weights]  # the same memory
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
