"""What an implicit step costs: forward + backward of the paper's networks, over the same networks with plain layers.

    python benchmarks/step_cost.py [--device D] [--model mlp|convnet] [--modes M ...] [--compile HOW]
                                   [--json FILE]

Plain and ProxProp networks take turns within one process, so that a machine's moods hit both; a ratio is the median
over rounds of (ProxProp time / plain time of the same round). How to read the table: README.md beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_allocation
from benchmarks.networks import BATCH, NETWORKS, floor
from experiments.command.cli import Parser, UsageError, run_command
from experiments.config import Compile
from experiments.training.compilation import check_compile, compile_errors, loss_function
from experiments.training.device import device_name, resolve_device
from proxprop import ProxPropConv2d, ProxPropLinear
from proxprop.modes import parse_mode

MODES = ["gradient", "prox_cg1", "prox_cg3", "prox_cg10", "prox_exact"]
TAU = {"mlp": 0.05, "convnet": 1.0}  # as in the paper


class Step:
    """Forward + backward of a network on one batch; ``mode`` None means plain layers.

    ``how`` is the training's ``compile`` key.
    """

    def __init__(self, model: str, mode: str | None, device: torch.device, how: str = "none") -> None:
        torch.manual_seed(0)
        layers: tuple[Callable[..., nn.Module], Callable[..., nn.Module]] = (nn.Linear, nn.Conv2d)
        if mode is not None:
            settings = {"tau_prox": TAU[model], "optimization_mode": mode}
            layers = (functools.partial(ProxPropLinear, **settings), functools.partial(ProxPropConv2d, **settings))
        self.network = NETWORKS[model](*layers).to(device)
        self._loss_of = loss_function(self.network, how)
        # Images have long-range structure, noise has none: smooth noise is nearer to the real spectrum.
        smooth = nn.functional.interpolate(torch.rand(BATCH, 3, 8, 8), size=32, mode="bilinear")
        self.images, self.labels = smooth.to(device), torch.randint(10, (BATCH,)).to(device)

    def __call__(self) -> None:
        self.network.zero_grad()
        self._loss_of(self.images, self.labels).backward()

    def peak_memory(self, device: torch.device) -> float:
        """Bytes held at the fullest moment of a step, parameters and images included."""
        self.network.zero_grad()
        resident = sum(t.nbytes for t in (*self.network.parameters(), self.images))
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


def measure(model: str, mode: str, device: torch.device, how: str, seconds: float) -> dict[str, float | str]:
    """Time ``mode`` against plain layers in turns, for about ``seconds`` and seven rounds at the least."""
    plain, proximal = Step(model, None, device, how), Step(model, mode, device, how)
    for run in (plain, proximal) * 4:  # libraries are loaded, and what is compiled or captured is so now
        timed(run, device)
    rounds: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 7 or time.perf_counter() < until:
        rounds.append((timed(plain, device), timed(proximal, device)))
    ratios = sorted(proximal_time / plain_time for plain_time, proximal_time in rounds)
    quarter = len(ratios) // 4
    return {
        "model": model,
        "mode": mode,
        "ratio": statistics.median(ratios),
        "low": ratios[quarter],
        "high": ratios[-1 - quarter],
        "floor": floor(model, mode),
        "memory": proximal.peak_memory(device) / plain.peak_memory(device),
        "plain_ms": 1000 * statistics.median(plain_time for plain_time, _ in rounds),
        "rounds": len(rounds),
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
    parser.add_argument("--model", choices=sorted(NETWORKS), help="one network only")
    parser.add_argument("--modes", nargs="+", type=mode_name, default=MODES, metavar="MODE")
    parser.add_argument(
        "--seconds", type=seconds_number, default=10.0, help="how long to measure each mode (default 10)"
    )
    parser.add_argument("--compile", choices=get_args(Compile), default="none", help="both networks (default none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        raise UsageError(f"--json: there is no folder {arguments.json.parent}")
    device = resolve_device(arguments.device)
    check_compile(arguments.compile, device)
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, batch {BATCH}, "
        f"compile {arguments.compile}"
    )
    print(f"{'model':8} {'mode':11} {'ratio':>6} {'quartiles':>12} {'floor':>6} {'memory':>7} {'plain':>9}")
    rows = []
    for model in [arguments.model] if arguments.model else sorted(NETWORKS, reverse=True):
        for mode in arguments.modes:
            with compile_errors(arguments.compile):
                row = measure(model, mode, device, arguments.compile, arguments.seconds)
            rows.append(row)
            print(
                f"{model:8} {mode:11} {row['ratio']:6.2f} {row['low']:6.2f}-{row['high']:.2f} "
                f"{row['floor']:6.2f} {row['memory']:7.2f} {row['plain_ms']:6.0f} ms",
                flush=True,
            )
    if arguments.json:
        header = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        header |= {"batch": BATCH, "compile": arguments.compile, "rows": rows}
        arguments.json.write_text(json.dumps(header, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
