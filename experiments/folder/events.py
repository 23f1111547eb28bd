"""TensorBoard events of a run, beside its metrics, where the config asks for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.command.errors import ConfigError
from experiments.config import Config
from experiments.folder.write import writing
from experiments.training.train import EpochRecord

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


@contextlib.contextmanager
def event_writer(
    folder: Path, config: Config, records: Sequence[EpochRecord]
) -> Iterator[Callable[[EpochRecord], object]]:
    """A function that writes a record's numbers, one curve each, into `folder/tensorboard`.

    `records` are those that were written before; later ones, which a crash has made void, are hidden.

    Raises:
        RecordError: here or when writing, where the folder cannot be written.
    """
    if not config.tensorboard:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

    def write(record: EpochRecord) -> None:
        numbers = asdict(record)
        epoch = numbers.pop("epoch")
        with writing(folder):
            for name, value in numbers.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

    with _quiet_threads():
        with writing(folder):
            writer = SummaryWriter(folder / FOLDER, purge_step=len(records))
        try:
            yield write
        finally:
            with contextlib.suppress(OSError):  # of a file that could not be written before, which was told then
                writer.close()


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Within, a thread that cannot write prints no traceback: TensorBoard raises its error in the main thread, too."""
    outside = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, OSError):
            outside(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = outside
