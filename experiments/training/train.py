"""Training, which yields one record an epoch and can be stopped between any two steps, and evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import Config
from experiments.data.datasets import Data, Split
from experiments.optimizers import MakesGradients, make_optimizer
from experiments.training.compilation import loss_function
from experiments.training.device import generator_states, set_generator_states, synchronize
from experiments.training.diagnostics import LayerRecord, Observer
from experiments.training.parallel import ALONE, Processes

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


class Training:
    """A model on its way: parameters, optimizer, order of the examples, generators and position.

    Between two minibatches, `state_dict` has all of these; loaded into a `Training` of the same config and data, it
    goes on as if it had never stopped, to the last bit where the device computes reproducibly.

    Several processes that train `together` have all data and the same order each, and take their parts of every
    minibatch; all call the same methods. The state is that of one process.

    Attributes:
        epoch: how many epochs are finished.
        batch: how many minibatches of the current epoch are.
        layer_records: what the layers did in the last epoch, where `diagnostics_every` says to record it.
    """

    def __init__(self, model: nn.Module, data: Data, config: Config, together: Processes = ALONE) -> None:
        self.model, self.data, self.config = model, data, config
        self.optimizer = make_optimizer(model, config.optimizer)
        self._loss_of = loss_function(model, config.compile)
        self._together = together
        self._joined = together.joined_model(model, self.optimizer)
        self.epoch, self.batch = 0, 0
        self.layer_records: list[LayerRecord] = []
        self._observer = Observer(model, self._device)
        self._begun = False  # whether there is a record of the start
        # Its own generator, on the CPU: the order of the examples is the same on every device.
        self._order = torch.Generator().manual_seed(config.seed if config.order_seed is None else config.order_seed)
        self._order_at_start = self._order.get_state()  # of the current epoch
        # Summed on the device: no synchronisation a step.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._seconds = 0.0  # of the current epoch, up to `_since`
        self._since: float | None = None  # while it is under way

    def records(self, on_batch: Callable[[int], object] = lambda n: None) -> Iterator[EpochRecord]:
        """Train, yielding a record before training and after every epoch; a diverged one is the last.

        `on_batch` is called with the size of each minibatch after its step; what it raises leaves a state to go on
        from.
        """
        if not self._begun:
            self._begun = True
            yield self._evaluated(minibatch_loss=None, seconds=0.0)
        diverged = False
        while self.epoch < self.config.epochs and not diverged:
            self._train_epoch(on_batch)
            record = self._next_epoch()
            diverged = record.diverged
            yield record

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dictionaries alone."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "begun": self._begun,
            "order": self._order_at_start,
            "loss_sum": self._together.sum(self._loss_sum),
            "seconds": self._epoch_seconds(),
            "generators": generator_states(self._device),
            **({"observed": self._observer.state_dict()} if self._is_observed else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch, self._begun = state["epoch"], state["batch"], state["begun"]
        self._order_at_start = state["order"]
        # That of all processes so far.
        self._loss_sum = state["loss_sum"].to(self._device) * self._together.is_first
        self._seconds = state["seconds"]
        set_generator_states(self._device, state["generators"])
        if self._is_observed and "observed" in state:
            self._observer.load_state_dict(state["observed"])

    @property
    def _device(self) -> torch.device:
        return self.data.train.labels.device

    @property
    def _is_observed(self) -> bool:
        """Whether the current epoch is one whose layers are recorded."""
        every = self.config.diagnostics_every
        return every is not None and (self.epoch + 1) % every == 0

    def _train_epoch(self, on_batch: Callable[[int], object]) -> None:
        """What is left of the current epoch."""
        train = self.data.train
        self.model.train()
        self._since = self._clock()
        try:
            self._order.set_state(self._order_at_start)
            permutation = torch.randperm(len(train), generator=self._order).to(self._device)
            for rows in permutation.split(self.config.batch_size)[self.batch :]:
                self._step(rows)
                on_batch(len(rows))
        finally:
            self._seconds, self._since = self._epoch_seconds(), None

    def _step(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        with self._observer.watching() if self._is_observed else contextlib.nullcontext():
            loss = self._gradients(rows)
        self.optimizer.step()
        self._loss_sum += loss.detach() * (len(rows) / self._together.size)
        self.batch += 1

    def _gradients(self, rows: Tensor) -> Tensor:
        """The mean loss over the examples `rows`; what the optimizer needs to know of it is left in `.grad`."""
        if isinstance(self.optimizer, MakesGradients):
            return self.optimizer.gradients(self.data.train.images[rows], self.data.train.labels[rows])
        loss = self._loss(rows)
        loss.backward()
        return loss

    def _loss(self, rows: Tensor) -> Tensor:
        """The mean over the examples `rows`; of several processes, the mean of their losses is that."""
        train, size = self.data.train, self._together.size
        mine = self._together.share(rows)
        images, labels = train.images[mine], train.labels[mine]
        if size == 1:
            return self._loss_of(images, labels)
        # Parts may differ in size, and be empty.
        return F.cross_entropy(self._joined(images), labels, reduction="sum") * (size / len(rows))

    def _next_epoch(self) -> EpochRecord:
        """Close the current epoch: its record, and the position at the start of the next one."""
        loss, seconds = self._together.sum(self._loss_sum).item() / len(self.data.train), self._seconds
        self.layer_records = self._observer.records(self.epoch + 1) if self._is_observed else []
        self._observer.reset()
        self.epoch, self.batch = self.epoch + 1, 0
        self._order_at_start = self._order.get_state()
        self._loss_sum.zero_()
        self._seconds = 0.0
        return self._evaluated(loss, seconds)

    def _evaluated(self, minibatch_loss: float | None, seconds: float) -> EpochRecord:
        train_loss, train_accuracy = evaluate(self.model, self.data.train, self._together)
        val_loss, val_accuracy = evaluate(self.model, self.data.val, self._together)
        record = EpochRecord(
            epoch=self.epoch,
            minibatch_loss=train_loss if minibatch_loss is None else minibatch_loss,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            epoch_seconds=seconds,
        )
        return self._together.of_first(record)  # with its seconds, by which all decide when to end

    def _epoch_seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else self._clock() - self._since)

    def _clock(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, together: Processes = ALONE) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the examples of `split`, of which each process takes a part."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros_like(loss)
    parts = (together.share(tensor).split(_EVALUATION_BATCH) for tensor in (split.images, split.labels))
    for images, labels in zip(*parts, strict=True):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    loss, correct = together.sum(torch.stack([loss, correct]))
    return loss.item() / len(split), correct.item() / len(split)
