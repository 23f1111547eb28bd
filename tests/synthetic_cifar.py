"""Batches of CIFAR-10 made byte by byte, as the official files are laid out, with random pixels."""

import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.data import datasets

IMAGES = 20  # of a batch; the last 10 of the fifth are the validation


def random_batch(seed: int, count: int = IMAGES) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, 10, count).tolist()


def write_small_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy with few images, which is read as a whole one while the test runs."""
    monkeypatch.setattr(datasets, "_BATCH_IMAGES", IMAGES)
    monkeypatch.setattr(datasets, "_CIFAR_TRAIN", 5 * IMAGES - 10)
    folder = root / datasets.FOLDER
    folder.mkdir()
    for number, name in enumerate(datasets.OFFICIAL_MD5):
        (folder / name).write_bytes(official_batch(*random_batch(number)))


def official_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A protocol-2 pickle as Python 2 and its numpy wrote it, opcode by opcode.

    Plain pickling under Python 3 would give other opcodes and other globals.
    """

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()  # SHORT_BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)  # BININT

    code = pixels.dtype.str[1:]
    dtype = b"cnumpy\ndtype\n(" + text(code) + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"(" + b"".join(map(number, pixels.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    array += b"(" + number(0) + b"t" + text("b") + b"tR"
    array += b"(" + number(1) + shape + dtype + b"\x89"
    array += b"T" + struct.pack("<I", pixels.nbytes) + pixels.tobytes() + b"tb"
    entries = text("batch_label") + text("training batch 1 of 5")
    entries += text("labels") + b"](" + b"".join(map(number, labels)) + b"e"
    entries += text("data") + array
    return b"\x80\x02}(" + entries + b"u."
