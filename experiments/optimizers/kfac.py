"""K-FAC (Martens & Grosse, ICML 2015), by the package asdfghjkl."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proxprop import revert
from proxprop.layers import ProxPropLayer

with warnings.catch_warnings():  # what the package does is deprecated in PyTorch, here and in its steps
    warnings.simplefilter("ignore")
    from asdl import KfacGradientMaker, PreconditioningConfig, SymMatrix

_NEW = 0.05
"""The weight of a new factor in the running average."""
_FACTORS = ("A", "B", "A_inv", "B_inv")


class KFAC(torch.optim.SGD):
    """SGD, perhaps with momentum, on gradients times the inverse of the Fisher matrix's Kronecker factors.

    The factors A (of inputs) and B (of outputs' gradients, for labels drawn from the model) of every layer are running
    averages, renewed and inverted each `update_every` steps; `damping` is shared out between the two by their traces.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        damping: float,
        update_every: int,
    ) -> None:
        if any(isinstance(module, ProxPropLayer) for module in model.modules()):
            revert(model)  # the package takes plain layers alone
        super().__init__(model.parameters(), lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        self._model = model
        self._settings = PreconditioningConfig(damping=damping, ema_decay=1.0, preconditioner_upd_interval=update_every)
        self._maker = KfacGradientMaker(model, self._settings)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss; the preconditioned gradient of it is left in `.grad`.

        NaN where there is no such gradient: the run has diverged.
        """
        self._settings.data_size = len(labels)
        self._settings.ema_decay = _NEW if self._maker.state["step"] else 1.0
        outputs = self._maker.setup_model_call(self._model, images)
        self._maker.setup_loss_call(F.cross_entropy, outputs, labels)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
                _, loss = self._maker.forward_and_backward()
        except ValueError as error:
            if "Simplex" not in str(error):  # outputs are no numbers, so that no labels can be drawn
                raise
            return images.new_tensor(torch.nan)
        except torch.linalg.LinAlgError:  # a factor with its share of the damping is not positive definite
            return images.new_tensor(torch.nan)
        return loss

    def state_dict(self) -> dict[str, Any]:
        factors = {
            name: {factor: getattr(module.fisher.kron, factor) for factor in _FACTORS}
            for name, module in self._model.named_modules()
            if hasattr(module, "fisher")
        }
        return {"sgd": super().state_dict(), "step": self._maker.state["step"], "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["sgd"])
        self._maker.state["step"] = state["step"]
        for name, factors in state["factors"].items():
            module = self._model.get_submodule(name)
            device = next(module.parameters()).device  # checkpoints are read to the CPU
            named = {f"kron_{factor}": factors[factor].to(device) for factor in _FACTORS}
            module.fisher = SymMatrix(**named)
