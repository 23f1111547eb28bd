"""Several processes that train one model together: their group, what each of them computes, and how they end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.command.errors import ConfigError, DeviceError, ExperimentError, Interrupted, ToldElsewhere, reason
from experiments.command.streams import quiet_stderr
from experiments.command.torchrun import Place, place
from experiments.config import WITHOUT_PROXPROP, Config
from proxprop import defer
from proxprop.layers import ProxPropLayer
from proxprop.modes import check_together, parse_mode

_TOLD = "told"  # counts, in the processes' store, those that had something to tell
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")

T = TypeVar("T")


class Processes:
    """The processes of a run; all of them call the same methods in the same order.

    Of one process alone, everything is its own.

    Attributes:
        size: how many there are.
        is_first: whether this one writes the run's folder.
        local_rank: this one's number on its machine; None where it is alone.
    """

    def __init__(self, here: Place | None = None) -> None:
        self.size = 1 if here is None else here.size
        self.is_first = here is None or here.rank == 0
        self.local_rank = None if here is None else here.local_rank
        self._rank = 0 if here is None else here.rank
        # Of the gradients: NCCL's on GPUs. All else goes through gloo, as the hosts need it.
        self._group: dist.ProcessGroup | None = None

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of `rows`, which all have; it may be empty."""
        return rows.tensor_split(self.size)[self._rank]

    def of_first(self, value: T) -> T:
        """The first process's `value`."""
        if self.size == 1:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' tensors, which have one shape; a new one, on the same device."""
        if self.size == 1:
            return numbers
        total = numbers.to("cpu", copy=True)
        dist.all_reduce(total)
        return total.to(numbers.device)

    def meet(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier()

    def begin(self, device: torch.device, **facts: Any) -> None:
        """To call before all else, with what has to be the same in all processes.

        Raises:
            DeviceError: something differs.
        """
        if self.size == 1:
            return
        mine = {"device": device.type, "torch": str(torch.__version__), **facts}
        for name, value in self.of_first(mine).items():
            if mine[name] != value:
                raise DeviceError(f"process {self._rank} has another {name} than process 0; all need the same")
        self.meet()  # where one differs, none begins
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._group = dist.new_group(backend="nccl")

    def joined_model(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """`model`, to call for the loss: each backward pass ends with the mean of all processes' gradients.

        ProxProp layers then take one step of all processes' rows, before the optimizer's. `model` itself stays as it
        is for all else.
        """
        if self.size == 1:
            return model
        joined = DistributedDataParallel(model, process_group=self._group)
        implicit = (m for m in model.modules() if isinstance(m, ProxPropLayer) and m.optimization_mode != "gradient")
        if next(implicit, None) is not None:
            defer(model, optimizer, process_group=self._group)
        return joined


ALONE = Processes()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Within, the processes that torchrun has started are a group; without torchrun, this one is alone.

    Standard output is that of the first. When one fails or is stopped, all end, and one of them raises what is to be
    told.

    Raises:
        ToldElsewhere: another process tells why.
        DeviceError: another process is gone, for a reason that it could not tell, or was not found.
    """
    here = place()
    if here is None:
        yield ALONE
        return
    try:
        store, rank, size = next(iter(dist.rendezvous("env://")))
    except RuntimeError as error:
        raise DeviceError(f"the {here.size} processes cannot find each other: {reason(error)}") from error
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        with contextlib.ExitStack() as stack:
            if rank:
                nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
                stack.enter_context(contextlib.redirect_stdout(nothing))
            yield Processes(here)
    except (ExperimentError, OSError, Interrupted):
        if not _is_first_to_tell(store):
            raise ToldElsewhere from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)):
            raise
        if not _is_first_to_tell(store):
            raise ToldElsewhere from None
        raise DeviceError(
            "another process of this run has ended or cannot be reached; what was recorded so far is kept"
        ) from error
    finally:
        # NCCL may wait there for processes that have ended; they all end, and the system closes their connections.
        if dist.is_initialized() and (sys.exc_info()[0] is None or dist.get_pg_count() == 1):
            dist.destroy_process_group()


def _is_first_to_tell(store: dist.Store) -> bool:
    try:
        with quiet_stderr():  # of a lost connection PyTorch's C++ code tells in fifty lines
            return store.add(_TOLD, 1) == 1
    except RuntimeError:  # the process that held it has ended
        return False


def check_parallel(config: Config, together: Processes) -> None:
    """
    Raises:
        ConfigError: the config asks for what several processes do not do.
    """
    if together.size == 1:
        return
    mode = config.proxprop.optimization_mode
    try:
        check_together(parse_mode(mode), "sum", deferred=True)
    except ValueError:
        raise ConfigError(f"proxprop.optimization_mode: {mode} has no deferred step, which {together.size} processes "
                          "need; allowed here: prox_exact, prox_cgN, gradient") from None  # fmt: skip
    if config.optimizer.name in WITHOUT_PROXPROP:
        raise ConfigError(f"optimizer.name: {config.optimizer.name} trains in one process, got {together.size}")
    if config.compile != "none":
        raise ConfigError(f"compile: must be none with {together.size} processes, got {config.compile}")
    if config.diagnostics_every is not None:
        raise ConfigError(f"diagnostics_every: must be left out with {together.size} processes (each sees its own part "
                          f"of a step), got {config.diagnostics_every}")  # fmt: skip
    if config.device.startswith("cuda:"):
        raise ConfigError(f"device: must be auto, cpu or cuda with {together.size} processes (each takes a GPU of its "
                          f"own), got {config.device}")  # fmt: skip
