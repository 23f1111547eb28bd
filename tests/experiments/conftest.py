"""Configs that train in a blink, and CIFAR-10 files made byte by byte."""

import struct
from pathlib import Path

import numpy as np
import pytest
import yaml


@pytest.fixture
def write_config(tmp_path, monkeypatch):
    """Write a small, valid config (dotted changes applied) below an own working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name="tiny", folder="configs", **sections) -> Path:
        config = {
            "name": name,
            "model": {"name": "mlp", "hidden_features": [8]},
            "data": {"name": "digits", "train_samples": 100},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "proxprop": {"optimization_mode": "gradient"},
            "epochs": 2,
            "batch_size": 40,
            "device": "cpu",
            **sections,
        }
        path = tmp_path / folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config))
        return path.relative_to(tmp_path)

    return write


@pytest.fixture
def batch_bytes():
    """The function that lays out a batch as the official files do."""
    return official_batch


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
