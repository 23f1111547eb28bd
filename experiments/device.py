"""Which device a run uses, what it is called, and waiting for it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from experiments.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N` as a `torch.device`.

    Raises:
        DeviceError: CUDA was asked for by name and is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock reads the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a `DeviceError`."""
    advice = "try a smaller batch_size, data.train_samples or model"
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"device: out of memory on {device}; {advice}") from error
    except RuntimeError as error:
        # PyTorch has no class of its own for a failed allocation on the CPU.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise DeviceError(f"device: out of memory on {device}; {advice}") from error
