"""The bar of one run."""

from __future__ import annotations

import math

from tqdm import tqdm

from experiments.config import Config
from experiments.training.train import EpochRecord


class Progress:
    """A bar over all examples of the run; silent when stderr is no terminal, or unless `shown`."""

    def __init__(self, config: Config, train_examples: int, done: int = 0, *, shown: bool = True) -> None:
        self._config, self._examples = config, train_examples
        self._bar = tqdm(
            total=config.epochs * train_examples,
            initial=done,
            desc=config.name,
            disable=None if shown else True,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self, examples: int) -> None:
        self._bar.update(examples)

    def show(self, record: EpochRecord, seconds: float) -> None:
        """`seconds`: what all epochs so far took."""
        epochs = self._config.expected_epochs(record.epoch, seconds)
        self._bar.total = epochs * self._examples
        speed = self._examples / record.epoch_seconds if record.epoch_seconds else math.nan
        self._bar.set_postfix_str(
            f"epoch {record.epoch}/{epochs}, train loss {record.train_loss:.4f}, "
            f"val loss {record.val_loss:.4f}" + (f", {speed:,.0f} images/s" if record.epoch else "")
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
