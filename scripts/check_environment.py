"""Says what this Python lacks of pyproject.toml's requirements (standard library only).

    python scripts/check_environment.py [EXTRA ...]

Exit code 0 and no output when all requirements of the library and of the named extras are
installed in an allowed version; otherwise exit code 1 and one line that names what is missing.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str], text: str) -> list[tuple[str, str]]:
    """The (name, lowest version) pairs of ``dependencies`` and of the named extras.

    ``tomllib`` came with Python 3.11, so the lists are found by pattern; a requirement is always
    written ``"name>=version"``.
    """
    found: list[tuple[str, str]] = []
    for key in ["dependencies", *extras]:
        block = re.search(rf"^{re.escape(key)} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        if block is None:
            raise ValueError(f"pyproject.toml has no extra {key!r}")
        found += re.findall(r'"([\w-]+)>=([\w.]+)"', block.group(1))
    return found


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: '2.11.0+cu128' -> (2, 11, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def missing(extras: list[str], text: str) -> list[str]:
    """What is not installed or too old, as it would be asked for: ['numpy>=1.26', ...]."""
    lacking = []
    for name, lowest in requirements(extras, text):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{name}>={lowest}")
        else:
            if release(installed) < release(lowest):
                lacking.append(f"{name}>={lowest} (has {installed})")
    return lacking


def main() -> int:
    lacking = missing(sys.argv[1:], PYPROJECT.read_text(encoding="utf-8"))
    if lacking:
        print(", ".join(lacking))
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
