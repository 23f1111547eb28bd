"""CIFAR-10 with the paper's split and the embedded digits, as tensors on the device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.command.cli import user_path
from experiments.command.errors import DataError
from experiments.config import DataConfig
from experiments.data.cifar_files import FOLDER, OFFICIAL_MD5
from experiments.data.cifar_pickle import read_batch

_BATCH_IMAGES = 10_000
_CIFAR_TRAIN = 45_000
_DIGITS_TRAIN, _DIGITS_VAL = 1_200, 297


@dataclass(frozen=True)
class Split:
    """Images [N, 3, 32, 32], float32 in [0, 1], and labels [N], int64 in 0..9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """The three splits on one device, and what identifies them (for `summary.json`)."""

    train: Split
    val: Split
    test: Split
    identity: dict[str, Any]


def training_images(config: DataConfig) -> int:
    """How many images are trained on.

    Raises:
        DataError: `train_samples` exceeds the training set.
    """
    available = _CIFAR_TRAIN if config.name == "cifar10" else _DIGITS_TRAIN
    count = available if config.train_samples is None else config.train_samples
    if count > available:
        raise DataError(
            f"data.train_samples: must be at most {available}, the size of {config.name}'s training set, got {count}"
        )
    return count


def load(config: DataConfig, device: torch.device) -> Data:
    """The data set that `config` names.

    `cifar10`: training images are batches 1-5 without their last 5,000, which are the validation
    set, in file order; pixels are divided by 255, the training maximum (as in the paper's code).
    `digits`: scikit-learn's 1,797 handwritten digits in their order: 1,200 for training, 297 for
    validation, 300 for the test. `train_samples` takes the first n of the training set.

    Raises:
        DataError: files are missing or damaged, or `train_samples` exceeds the training set.
    """
    count = training_images(config)
    if config.name == "cifar10":
        train, val, test, identity = _cifar10(user_path(config.root), count, device)
    else:
        train, val, test, identity = _digits(count, device)
    return Data(train, val, test, {"name": config.name, "train_samples": count, **identity})


def _cifar10(root: Path, count: int, device: torch.device) -> tuple[Split, Split, Split, dict[str, Any]]:
    folder = root / FOLDER
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; run ./get_data.sh, or name the folder that holds {FOLDER} "
                        "(in a config, data.root)")  # fmt: skip
    batches, files_md5 = {}, {}
    for name in OFFICIAL_MD5:
        content = _read(folder / name)
        files_md5[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        batches[name] = _full_batch(content, folder / name)
    *training, test = batches.values()
    pixels = np.concatenate([batch[0] for batch in training])
    labels = np.concatenate([batch[1] for batch in training])

    def split(some_pixels: np.ndarray, some_labels: np.ndarray) -> Split:
        images = torch.tensor(some_pixels, device=device).reshape(-1, 3, 32, 32)
        return Split(images.float().div_(255), torch.tensor(some_labels, device=device))

    return (
        split(pixels[:count], labels[:count]),
        split(pixels[_CIFAR_TRAIN:], labels[_CIFAR_TRAIN:]),
        split(*test),
        {"official": files_md5 == OFFICIAL_MD5, "files_md5": files_md5},
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run ./get_data.sh") from error


def _full_batch(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = read_batch(content, str(path))
    if len(labels) != _BATCH_IMAGES:
        raise DataError(f"{path}: must hold {_BATCH_IMAGES} images, got {len(labels)}")
    return pixels, labels


def _digits(count: int, device: torch.device) -> tuple[Split, Split, Split, dict[str, Any]]:
    try:
        from sklearn.datasets import load_digits  # slow to import, and only needed here
    except ImportError as error:
        raise DataError("data.name: digits needs scikit-learn, which is not installed") from error
    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0..16
    images = torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
    # Every pixel becomes a block of 4x4, the same in the three colours: CIFAR-10's shape.
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat(1, 3, 1, 1)
    labels = torch.tensor(classes, dtype=torch.int64, device=device)

    def split(start: int, stop: int) -> Split:
        return Split(images[start:stop], labels[start:stop])

    val_end = _DIGITS_TRAIN + _DIGITS_VAL
    return (
        split(0, count),
        split(_DIGITS_TRAIN, val_end),
        split(val_end, len(labels)),
        {"official": None, "files_md5": {}},
    )
