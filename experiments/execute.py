"""One validated config -> one run in its folder."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.config import Config
from experiments.data import Data
from experiments.device import memory_errors
from experiments.environment import describe_environment
from experiments.models import build
from experiments.record import RunWriter
from experiments.train import EpochRecord, evaluate, training


def execute(config: Config, data: Data, device: torch.device, folder: Path) -> str:
    """Train as `config` says and record it in `folder`, whatever that held before.

    Args:
        data: what `experiments.data.load` gave for `config.data` on `device`.

    Returns:
        One line that says how the run ended.

    Raises:
        DeviceError: out of memory.
        RecordError: the folder cannot be written (known before training starts).
    """
    start = time.perf_counter()
    environment = describe_environment(device)  # now: the source tree may change while the run goes on
    with RunWriter(folder, config) as writer, memory_errors(device):
        model = build(config).to(device)
        with _Progress(config, len(data.train)) as progress:
            for record in training(model, data, config, progress.advance):
                writer.append(record)
                progress.show(record)
        test_loss, test_accuracy = evaluate(model, data.test)
        status = "diverged" if record.diverged else "finished"
        summary: dict[str, Any] = {
            "name": config.name,
            "status": status,
            "epochs": record.epoch,
            "test_loss": test_loss if math.isfinite(test_loss) else None,  # JSON has no NaN
            "test_accuracy": test_accuracy,
            "seed": config.seed,
            "data": data.identity,
            **environment,
            "seconds": round(time.perf_counter() - start, 3),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        writer.finish(summary)
    epochs = f"{record.epoch} epoch{'s' * (record.epoch != 1)}"
    return (
        f"{config.name}: {status}, {epochs}, train loss {record.train_loss:.4g}, "
        f"test accuracy {test_accuracy:.2%}, wrote {folder}"
    )


class _Progress:
    """A bar over all examples of the run; silent when stderr is no terminal."""

    def __init__(self, config: Config, train_examples: int) -> None:
        self._epochs, self._examples = config.epochs, train_examples
        self._bar = tqdm(
            total=config.epochs * train_examples,
            desc=config.name,
            disable=None,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self, examples: int) -> None:
        self._bar.update(examples)

    def show(self, record: EpochRecord) -> None:
        speed = self._examples / record.epoch_seconds if record.epoch_seconds else math.nan
        self._bar.set_postfix_str(
            f"epoch {record.epoch}/{self._epochs}, train loss {record.train_loss:.4f}, "
            f"val loss {record.val_loss:.4f}" + (f", {speed:,.0f} images/s" if record.epoch else "")
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
