"""How a step's forward and backward pass are carried out: operation by operation, compiled, or as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.command.errors import DeviceError

LossOf = Callable[[Tensor, Tensor], Tensor]
"""The mean cross-entropy of images `[N, 3, 32, 32]` with labels `[N]`, to call `backward` on."""

_BACKENDS = {
    "default": "inductor",  # fuses operations
    "cudagraph": "cudagraphs",  # the same operations, launched together
}


def loss_function(model: nn.Module, how: str) -> LossOf:
    """The loss of `model`, and with it the backward pass, the way that `compile: how` says.

    Compiling happens in the first call for each batch size, and ends what was compiled before.
    """

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    if how == "none":
        return loss_of
    # Every run compiles the same lines for a model of its own; PyTorch gives up on the ninth.
    torch.compiler.reset()
    compiled: LossOf = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=_BACKENDS[how])
    return compiled


def check_compile(how: str, device: torch.device) -> None:
    """
    Raises:
        DeviceError: `compile` asks for what the device does not have.
    """
    if how == "cudagraph" and device.type != "cuda":
        raise DeviceError(f"compile: cudagraph needs a CUDA device, got {device}; allowed here: none, default")


@contextlib.contextmanager
def compile_errors(how: str) -> Iterator[None]:
    """Turn a failure to compile into a `DeviceError`; a missing C++ compiler is the usual one."""
    if how == "none":
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and only needed here

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200]
        raise DeviceError(f"compile: {how} does not work here ({reason}); allowed everywhere: none") from error
