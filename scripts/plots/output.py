"""Pages as the bytes of a file; equal results give equal bytes, as no date goes in."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure as Page

from experiments.command.cli import UsageError, file_path
from experiments.command.errors import RecordError
from experiments.folder.atomic import write_atomically

FORMATS = (".pdf", ".png", ".svg")


def to_pdf(pages: Sequence[Page]) -> bytes:
    """The pages as one PDF."""
    buffer = io.BytesIO()
    with PdfPages(buffer, metadata={"Title": "ProxProp", "CreationDate": None}) as pdf:
        for page in pages:
            pdf.savefig(page)
    return buffer.getvalue()


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option of where a figure goes; see `check_format`."""
    parser.add_argument("--output", metavar="FILE", type=file_path, required=True, help=f"ends in {', '.join(FORMATS)}")


def check_format(path: Path) -> None:
    """
    Raises:
        UsageError: `figure_bytes` does not know the format that the name asks for.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}, got {path}")


def figure_bytes(page: Page, suffix: str) -> bytes:
    """One page as a '.pdf', '.png' or '.svg'."""
    if suffix == ".pdf":
        return to_pdf([page])
    buffer = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None
    page.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """
    Raises:
        RecordError: it cannot be written.
    """
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror}") from error
