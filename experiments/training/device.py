"""Which device a run uses, what it is called, waiting for it, and what makes it reproducible."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from experiments.command.errors import DeviceError
from experiments.config import DEVICE
from experiments.config.wording import PATTERNS


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N` as a `torch.device`.

    Args:
        local_rank: of several processes that train together, the number of this one on its machine; each takes the GPU
            of its number.

    Raises:
        DeviceError: it is none of these, CUDA was asked for by name and is not there, or there are more processes than
            GPUs.
    """
    if not re.fullmatch(f"auto|{DEVICE}", name):  # of a command line; a config's has been looked at
        raise DeviceError(f"device: {PATTERNS['device']}, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if local_rank is not None and name == "cuda" and count:
        if local_rank >= count:
            raise DeviceError(f"device: each process takes a GPU of its own, and there are only {count}; "
                              "start fewer processes, or give device=cpu")  # fmt: skip
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and count == 0:
        raise DeviceError(f"device: {name} asked for, but PyTorch sees no CUDA device; "
                          "allowed here: auto, cpu")  # fmt: skip
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"device: {name} asked for, but there is only cuda:0"
                          + (f" to cuda:{count - 1}" if count > 1 else ""))  # fmt: skip
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU, e.g. `Intel(R) Xeon(R) CPU @ 2.20GHz`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Let the allocator keep large blocks that are freed, for the next step's.

    Otherwise every large tensor on a CPU is fresh memory, which the system has to clear page by page: of a step of the
    ConvNet that is a fifth. For the GNU C library; elsewhere nothing is changed.
    """
    largest = 2**31 - 1
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL("libc.so.6").mallopt
        set_option(-3, largest)  # M_MMAP_THRESHOLD: the size from which on a block is the system's
        set_option(-1, largest)  # M_TRIM_THRESHOLD: how much free memory to keep


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock reads the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of PyTorch's global generators that code on `device` may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Undo what was drawn since `generator_states`; a run that changes devices has only the CPU's."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, PyTorch's global generators are seeded; afterwards, they are as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Where `wanted`: within, PyTorch takes deterministic algorithms alone.

    Raises:
        DeviceError: an operation has none on this device; the text names it.
    """
    if not wanted:
        yield
        return
    # Read by cuBLAS when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        problem = str(error).partition(". ")[0].partition(", but you set")[0]
        raise DeviceError(f"deterministic: cannot be true here: {problem}") from error
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, float32 convolutions are float32: on a GPU PyTorch's default is TF32, of eleven bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a `DeviceError`."""
    advice = "try a smaller batch_size, data.train_samples or model"
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"device: out of memory on {device}; {advice}") from error
    except RuntimeError as error:
        # PyTorch has no class of its own for a failed allocation on the CPU, or for a size beyond all numbers.
        if not any(sign in str(error) for sign in ("DefaultCPUAllocator", "overflow")):
            raise
        raise DeviceError(f"device: out of memory on {device}; {advice}") from error
