"""How far one run is: a bar, or a line now and then."""

from __future__ import annotations

import math
import time

from tqdm import tqdm

from experiments.config import Config
from experiments.training.train import EpochRecord

LINE_SECONDS = 60.0
"""From one line about what goes on to the next."""


class Progress:
    """A bar over all examples of the run; where stderr is no terminal, lines on stdout: one at the start, and at the
    end of an epoch where the last line is a minute old. Nothing unless `shown`.
    """

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
        self._lines = shown and self._bar.disable
        if self._lines:
            self._print(f"under way, epoch {done // train_examples}/{config.epochs}")

    def advance(self, examples: int) -> None:
        self._bar.update(examples)

    def show(self, record: EpochRecord, seconds: float) -> None:
        """`seconds`: what all epochs so far took."""
        epochs = self._config.expected_epochs(record.epoch, seconds)
        self._bar.total = epochs * self._examples
        text = f"epoch {record.epoch}/{epochs}, train loss {record.train_loss:.4f}, val loss {record.val_loss:.4f}"
        if record.epoch:
            text += f", {self._examples / (record.epoch_seconds or math.nan):,.0f} images/s"
        self._bar.set_postfix_str(text)
        # After the last epoch comes the line that says how the run ended.
        if self._lines and record.epoch < epochs and time.monotonic() - self._printed >= LINE_SECONDS:
            self._print(text)

    def _print(self, text: str) -> None:
        print(f"{self._config.name}: {text}", flush=True)
        self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
