"""Training: one epoch, the evaluation, and the loop that yields one record an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from experiments.config import Config, OptimizerConfig
from experiments.data import Data, Split
from experiments.device import synchronize

_EVALUATION_BATCH = 2_500


@dataclass(frozen=True)
class EpochRecord:
    """One row of `metrics.csv`.

    Losses are mean cross-entropies over examples, accuracies fractions in [0, 1].
    `minibatch_loss` is the mean over the epoch's minibatches before each step; before training
    (epoch 0) it is the training loss. `epoch_seconds` covers training alone.
    """

    epoch: int
    minibatch_loss: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    epoch_seconds: float

    @property
    def diverged(self) -> bool:
        return not (math.isfinite(self.minibatch_loss) and math.isfinite(self.train_loss))


def training(
    model: nn.Module, data: Data, config: Config, on_batch: Callable[[int], object] = lambda n: None
) -> Iterator[EpochRecord]:
    """Train `model` in place, yielding a record before training and after every epoch.

    A diverged record is the last one. `on_batch` is called with the size of each minibatch.
    """
    device = data.train.labels.device
    optimizer = make_optimizer(model, config.optimizer)
    # Its own generator, on the CPU: the order of the examples is the same on every device.
    order = torch.Generator().manual_seed(config.seed)
    record = _evaluated(model, data, epoch=0, minibatch_loss=None, epoch_seconds=0.0)
    yield record
    while record.epoch < config.epochs and not record.diverged:
        synchronize(device)
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, data.train, config.batch_size, order, on_batch)
        synchronize(device)
        seconds = time.perf_counter() - start
        record = _evaluated(model, data, record.epoch + 1, loss, seconds)
        yield record


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Split,
    batch_size: int,
    order: torch.Generator,
    on_batch: Callable[[int], object] = lambda n: None,
) -> float:
    """One pass over `train`, reshuffled; the mean over its examples of the minibatch losses."""
    model.train()
    device = train.labels.device
    total = torch.zeros((), dtype=torch.float64, device=device)  # summed there: no sync a step
    for rows in torch.randperm(len(train), generator=order).to(device).split(batch_size):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(train.images[rows]), train.labels[rows])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
        on_batch(len(rows))
    return total.item() / len(train)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the examples of `split`."""
    model.eval()
    device = split.labels.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    batches = zip(split.images.split(_EVALUATION_BATCH), split.labels.split(_EVALUATION_BATCH), strict=True)
    for images, labels in batches:
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(split), correct.item() / len(split)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.name == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _evaluated(
    model: nn.Module, data: Data, epoch: int, minibatch_loss: float | None, epoch_seconds: float
) -> EpochRecord:
    train_loss, train_accuracy = evaluate(model, data.train)
    val_loss, val_accuracy = evaluate(model, data.val)
    return EpochRecord(
        epoch=epoch,
        minibatch_loss=train_loss if minibatch_loss is None else minibatch_loss,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        epoch_seconds=epoch_seconds,
    )
