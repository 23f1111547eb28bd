"""What an implicit step costs: forward + backward of some networks, over the same networks with plain layers.

    python benchmarks/step_cost.py [--device D] [--model NAME ...] [--modes M ...] [--compile HOW] [--layers]
                                   [--seconds S] [--json FILE]

Plain and ProxProp networks take turns within one process, so that a machine's moods hit both; a ratio is the median
over rounds of (ProxProp time / plain time of the same round). How to read the table: README.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_allocation
from benchmarks.networks import NETWORKS, Call, calls, floor
from benchmarks.output import add_json, write_json
from experiments.command.cli import Parser, run_command
from experiments.config import Compile
from experiments.training.compilation import check_compile, compile_errors, loss_function
from experiments.training.device import device_name, full_precision, keep_freed_memory, resolve_device
from proxprop.modes import parse_mode
from proxprop.observe import observing

MODES = ["gradient", "prox_cg1", "prox_cg3", "prox_cg10", "prox_exact"]


class Step:
    """Forward + backward of a network on one batch; ``mode`` None means plain layers.

    ``how`` is the training's ``compile`` key.
    """

    def __init__(self, model: str, mode: str | None, device: torch.device, how: str = "none") -> None:
        torch.manual_seed(0)
        self.network = NETWORKS[model].build(mode).to(device)
        self._loss_of = loss_function(self.network, how)
        self.inputs, self.labels = (tensor.to(device) for tensor in NETWORKS[model].batch())

    def __call__(self) -> None:
        self.network.zero_grad()
        self._loss_of(self.inputs, self.labels).backward()

    def peak_memory(self, device: torch.device) -> float:
        """Bytes held at the fullest moment of a step, parameters and inputs included."""
        self.network.zero_grad()
        resident = sum(t.nbytes for t in (*self.network.parameters(), self.inputs))
        return resident + peak_allocation(self, device)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run; on a GPU between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_turns(
    plain: Callable[[], None], proximal: Callable[[], None], device: torch.device, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of both in each round, for about ``seconds`` and five rounds at the least."""
    for run in (plain, proximal) * 2:  # libraries are loaded, and what is compiled or captured is so now
        timed(run, device)
    rounds: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < until:
        rounds.append((timed(plain, device), timed(proximal, device)))
    return rounds


def measure(model: str, mode: str, device: torch.device, how: str, seconds: float) -> dict[str, float | str]:
    """Time ``mode`` against plain layers, in turns."""
    plain, proximal = Step(model, None, device, how), Step(model, mode, device, how)
    rounds = in_turns(plain, proximal, device, seconds)
    ratios = sorted(proximal_time / plain_time for plain_time, proximal_time in rounds)
    quarter = len(ratios) // 4
    return {
        "model": model,
        "mode": mode,
        "ratio": statistics.median(ratios),
        "low": ratios[quarter],
        "high": ratios[-1 - quarter],
        "floor": floor(calls(proximal.network, proximal.inputs, proximal.labels), mode),
        "memory": proximal.peak_memory(device) / plain.peak_memory(device),
        "plain_ms": 1000 * statistics.median(plain_time for plain_time, _ in rounds),
        "rounds": len(rounds),
    }


def measure_layer(call: Call, mode: str, device: torch.device, seconds: float) -> dict[str, float | str]:
    """Time a layer in ``mode`` against ``gradient``, in turns; ``memory`` is what it holds more, over 8·g·d² bytes."""
    input = call.input.requires_grad_()
    forms: list[str] = []

    def clear() -> None:
        call.layer.zero_grad()
        input.grad = None

    def step(mode: str) -> Callable[[], None]:
        def run() -> None:
            call.layer.optimization_mode = mode
            clear()
            call.layer(input).backward(call.gradient)

        return run

    def peak(run: Callable[[], None]) -> float:
        clear()  # freed within, gradients of the step before would lower the peak
        return peak_allocation(run, device)

    plain, proximal = step("gradient"), step(mode)
    call.layer.optimization_mode = mode
    clear()
    with observing(call.layer, lambda d: forms.append(type(d.system).__name__)):
        call.layer(input).backward(call.gradient)
    rounds = in_turns(plain, proximal, device, seconds)
    shape = call.shape
    extra = peak(proximal) - peak(plain)
    return {
        "layer": call.name,
        "groups": shape.g,
        "rows": shape.m,
        "columns": shape.d,
        "outputs": shape.o,
        "mode": mode,
        "form": forms[0],
        "ratio": statistics.median(proximal_time / plain_time for plain_time, proximal_time in rounds),
        "floor": 1 + shape.extra(mode) / (3 * shape.plain),
        "memory": extra / (8 * shape.g * shape.d**2),
        "plain_ms": 1000 * statistics.median(plain_time for plain_time, _ in rounds),
    }


def mode_name(text: str) -> str:
    try:
        parse_mode(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def seconds_number(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return seconds


def main() -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(benchmark)


def benchmark() -> int:
    parser = Parser(description="Cost of a ProxProp step over a step with plain layers.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="these networks only")
    parser.add_argument("--modes", nargs="+", type=mode_name, default=MODES, metavar="MODE")
    parser.add_argument(
        "--seconds",
        type=seconds_number,
        help="how long to measure each mode (default 10, and 1 for a single layer), five rounds at the least",
    )
    parser.add_argument("--compile", choices=get_args(Compile), default="none", help="both networks (default none)")
    parser.add_argument("--layers", action="store_true", help="a table of single layers, one for each size")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.layers and arguments.compile != "none":
        parser.error("--layers are measured without --compile")
    arguments.seconds = arguments.seconds or (1.0 if arguments.layers else 10.0)
    device = resolve_device(arguments.device)
    check_compile(arguments.compile, device)
    if device.type == "cpu":
        keep_freed_memory()
    threads = torch.get_num_threads()
    how = arguments.compile
    print(f"{device_name(device)}, {threads} threads, PyTorch {torch.__version__}, compile {how}")
    header = {"device": device_name(device), "threads": threads, "torch": torch.__version__, "compile": how}
    rows = []
    with full_precision():
        for row in _layers(arguments, device) if arguments.layers else _networks(arguments, device):
            rows.append(row)
            print("  ".join(_cell(name, value) for name, value in row.items()), flush=True)
            write_json(arguments.json, {**header, "rows": rows})
    return 0


def _networks(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, float | str]]:
    for model, mode in itertools.product(arguments.model, arguments.modes):
        with compile_errors(arguments.compile):
            yield measure(model, mode, device, arguments.compile, arguments.seconds)


def _layers(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, float | str]]:
    for model in arguments.model:
        step = Step(model, "prox_cg1", device)
        found = {call.shape: call for call in calls(step.network, step.inputs, step.labels)}
        for call, mode in itertools.product(found.values(), arguments.modes):
            yield {"model": model} | measure_layer(call, mode, device, arguments.seconds)


def _cell(name: str, value: float | str) -> str:
    """One of a table's, under its name at a fixed width."""
    return f"{name} {value:8.2f}" if isinstance(value, float) else f"{name} {value}"


if __name__ == "__main__":
    sys.exit(main())
