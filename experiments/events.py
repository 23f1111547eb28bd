"""TensorBoard events of a run, beside its metrics, where the config asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from experiments.config import Config
from experiments.errors import ConfigError
from experiments.train import EpochRecord

FOLDER = "tensorboard"


def check_tensorboard(config: Config) -> None:
    """
    Raises:
        ConfigError: the config wants TensorBoard, which is not installed.
    """
    if not config.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError("tensorboard: true needs a package that is not installed: "
                          "pip install tensorboard") from error  # fmt: skip


@contextmanager
def event_writer(
    folder: Path, config: Config, records: Sequence[EpochRecord]
) -> Iterator[Callable[[EpochRecord], object]]:
    """A function that writes a record's numbers, one curve each, into `folder/tensorboard`.

    `records` are those that were written before; later ones, which a crash has made void, are hidden.
    """
    if not config.tensorboard:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    writer = SummaryWriter(folder / FOLDER, purge_step=len(records))

    def write(record: EpochRecord) -> None:
        numbers = asdict(record)
        epoch = numbers.pop("epoch")
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    with writer:
        yield write
