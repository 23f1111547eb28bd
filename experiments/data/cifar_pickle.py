"""Read CIFAR-10's batch files without letting a pickle run anything.

The official files are protocol-2 pickles by Python 2: a dictionary of strings, lists and one
numpy array. Only the three names that rebuild an array are admitted, and what they stand for here
are plain classes of this file, so not even numpy's own constructors see untrusted arguments (and
it does not matter that numpy 2 moved them).
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from experiments.command.errors import DataError, reason


def read_batch(content: bytes, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of one batch file.

    Args:
        content: the bytes of the file.
        source: the name of the file, for the error.

    Returns:
        uint8 pixels [n, 3072] (the planes red, green, blue, each in rows) and int64 labels [n].

    Raises:
        DataError: a global that is not admitted (nothing is executed), a truncated or damaged
            file, or other contents than pixels and labels.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _Forbidden as error:
        raise DataError(f"{source}: refused, this pickle asks for {error}, "
                        "which no CIFAR-10 file does; nothing was executed") from None  # fmt: skip
    except Exception as error:  # damaged bytes can raise nearly anything inside pickle
        raise DataError(f"{source}: damaged or truncated ({reason(error)}); "
                        "fetch it again with ./get_data.sh") from None  # fmt: skip
    return _checked(loaded, source)


class _Forbidden(Exception):
    """The global that a pickle asked for."""


class _Dtype:
    """Stands for `numpy.dtype`: the type code is all that is kept."""

    def __init__(self, code: bytes | str, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which one-byte numbers do not have."""


class _Array:
    """Stands for `numpy.ndarray`: a uint8 array is built from the raw bytes, nothing else."""

    values: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or is_fortran:
            raise ValueError("the array is not uint8 in C order")
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape):
            raise ValueError(f"the array's bytes do not fill the shape {shape}")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    """Stands for numpy's function of that name, which makes an empty array to be filled."""
    return _Array()


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


# The unpickler in Python, not the one in C: a single flipped bit makes the latter allocate gigabytes for its memo.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Forbidden(repr(f"{module}.{name}"))  # a name may hold anything, newlines too
        return _ADMITTED[module, name]


def _checked(loaded: Any, source: str) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(loaded, dict):
        raise DataError(f"{source}: must hold a dictionary, got {type(loaded).__name__}")
    data, labels = (loaded.get(key, loaded.get(key.decode())) for key in (b"data", b"labels"))
    pixels = getattr(data, "values", None) if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        found = "none" if pixels is None else f"the shape {pixels.shape}"
        raise DataError(f"{source}: 'data' must be a uint8 array of shape (n, 3072), got {found}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        found = f"{len(labels)}" if isinstance(labels, list) else "none"
        raise DataError(f"{source}: 'labels' must be a list of {len(pixels)} labels, got {found}")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise DataError(f"{source}: 'labels' must be integers from 0 to 9, but some are not")
    return pixels, np.array(labels, np.int64)
