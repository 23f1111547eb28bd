"""What a checkpoint costs: seconds to save it and to go on from it, beside those of an epoch of training.

python -m benchmarks.checkpoint_cost [--device D] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import add_json, write_json
from experiments.command.cli import Parser, run_command, user_path
from experiments.config import load_config
from experiments.data.datasets import Data, Split
from experiments.folder.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from experiments.training.device import device_name, keep_freed_memory, resolve_device, synchronize
from experiments.training.networks import build
from experiments.training.train import Training

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("mlp_sgd_gradient", "mlp_sgd_cg3", "convnet_adam_gradient", "convnet_adam_cg3")
STEPS, EPOCH_STEPS, REPETITIONS = 9, 90, 5  # 45,000 images in batches of 500


def measure(name: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """One of the paper's runs: an epoch is measured over a tenth of its steps, on random images."""
    config = load_config(ROOT / "configs" / "paper" / f"{name}.yaml", ["epochs=1"])
    images = torch.rand(STEPS * config.batch_size, 3, 32, 32, device=device)
    split = Split(images, torch.randint(10, (len(images),), device=device))
    data = Data(split, split, split, {})
    with torch.random.fork_rng():
        training = Training(build(config).to(device), data, config)
    times: list[float] = []

    def on_batch(_: int) -> None:
        synchronize(device)
        times.append(time.perf_counter())

    list(training.records(on_batch))
    step = statistics.median(after - before for before, after in itertools.pairwise(times))
    epoch = EPOCH_STEPS * step
    save = seconds(lambda: save_checkpoint(folder, training.state_dict()))
    load = seconds(lambda: training.load_state_dict(load_checkpoint(folder) or {}))
    size = (folder / CHECKPOINT).stat().st_size
    return {"run": name, "bytes": size, "epoch_s": epoch, "save_s": save, "load_s": load, "save_ratio": save / epoch}


def seconds(action: Callable[[], Any]) -> float:
    """Median duration, what it did being on the disk."""
    durations = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        action()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def _folder(text: str) -> Path:
    path = user_path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no folder")
    return path


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=_folder, help="where checkpoints go (default: the temporary folder)")
    add_json(parser)
    options = parser.parse_args()
    device = resolve_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    header = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    rows = []
    print(f"{'run':24} {'MB':>7} {'epoch s':>8} {'save s':>7} {'load s':>7}  save / epoch")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in CONFIGS:
            row = measure(name, device, Path(folder))
            rows.append(row)
            print(
                f"{name:24} {row['bytes'] / 1e6:7.1f} {row['epoch_s']:8.2f} {row['save_s']:7.3f} {row['load_s']:7.3f}"
                f"  {row['save_ratio']:12.2%}",
                flush=True,
            )
            write_json(options.json, {**header, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
