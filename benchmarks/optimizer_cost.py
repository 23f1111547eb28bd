"""What a training step takes with each optimizer: seconds and memory, for every config of some files.

    python benchmarks/optimizer_cost.py CONFIG.yaml ... [--device D] [--json FILE]

A step is all of it: forward, backward and the optimizer's own. The images are random ones.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_allocation
from benchmarks.networks import images
from benchmarks.output import add_json, write_json
from experiments.command.cli import Parser, UsageError, run_command, user_path
from experiments.config import Config
from experiments.config.schema import STEP_KEYS, what_a_step_costs
from experiments.config.sweep_file import load_config_file
from experiments.data.datasets import Data, Split
from experiments.optimizers import check_optimizer
from experiments.training.device import device_name, full_precision, keep_freed_memory, resolve_device
from experiments.training.networks import build
from experiments.training.train import Training

ROUND = 10
"""Steps that are timed together; optimizers that renew their preconditioners every so many steps do so in each."""
ROUNDS = 4
"""The first is not counted."""
MEMORY_STEPS = 3
"""From when on all of an optimizer's state is there, which some make in their second step."""

STILL = 1e-9
"""A learning rate."""
_WITHOUT_COST = ("lr", "optimizer.lr", "seed")
"""Parts of a sweep's names."""


def batches(count: int, config: Config, device: torch.device) -> Data:
    """Data of which an epoch is so many steps."""
    torch.manual_seed(0)
    train, rest = (
        Split(*(tensor.to(device) for tensor in images(config.batch_size * number))) for number in (count, 1)
    )
    return Data(train, rest, rest, {})


def seconds_per_step(config: Config, device: torch.device) -> float:
    """The median over rounds of the mean of a round's steps, which follow each other as in training."""
    training = _training(config, batches(ROUND, config, device), ROUNDS)
    records = list(training.records())[1:]
    if records[-1].diverged:
        raise UsageError(f"{config.name}: the loss of round {len(records)} is not finite")
    return statistics.median(record.epoch_seconds for record in records[1:]) / ROUND


def peak_memory(config: Config, device: torch.device) -> float:
    """Bytes at the fullest moment of training: parameters, the optimizer's state and all that a step holds."""
    data = batches(1, config, device)

    def run() -> None:
        for _ in _training(config, data, MEMORY_STEPS).records():
            pass

    return peak_allocation(run, device)


def _training(config: Config, data: Data, epochs: int) -> Training:
    """So many epochs that hardly move: they take what others take, and none diverges on images of noise."""
    optimizer = config.optimizer.model_copy(update={"lr": STILL})
    config = config.model_copy(update={"epochs": epochs, "optimizer": optimizer, "diagnostics_every": None})
    return Training(build(config).to(data.train.labels.device), data, config)


def measure(config: Config, device: torch.device) -> dict[str, Any]:
    """One row: what was measured, and the settings it is for."""
    settings = config.model_dump(include=set(STEP_KEYS))
    return {
        "name": config.name,
        **settings,
        "step_seconds": seconds_per_step(config, device),
        "peak_bytes": peak_memory(config, device),
    }


def main() -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(benchmark)


def benchmark() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", type=user_path, nargs="+", metavar="CONFIG.yaml", help="configs or sweep files")
    parser.add_argument("--device", default="auto")
    add_json(parser)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    every = itertools.chain.from_iterable(load_config_file(path).configs for path in arguments.configs)
    configs = list({what_a_step_costs(config.model_dump()): config for config in every}.values())
    for config in configs:
        check_optimizer(config.optimizer)
    if device.type == "cpu":
        keep_freed_memory()
    header = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(map(str, header.values())))
    rows = []
    with full_precision():
        for config in configs:
            rows.append(measure(config, device))
            print(_line(rows[-1]), flush=True)
            write_json(arguments.json, {**header, "rows": rows})
    return 0


def _line(row: dict[str, Any]) -> str:
    """A row for readers; the JSON has all digits. Of the name, what the numbers depend on."""
    parts = [part for part in row["name"].split(",") if part.partition("=")[0] not in _WITHOUT_COST]
    numbers = f"{row['model']['name']}  {row['step_seconds']:.3f} s  {row['peak_bytes'] / 2**20:.0f} MiB"
    return f"{numbers}  {','.join(parts)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
