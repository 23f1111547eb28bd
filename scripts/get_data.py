"""Gets CIFAR-10 (the Python batches) into a folder, by download or from disk.

Standard library only, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, run_command, user_path
from experiments.command.errors import DataError
from experiments.data.cifar_files import FOLDER, OFFICIAL_MD5

ROOT = Path(__file__).resolve().parents[1]
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE = "cifar-10-python.tar.gz"
FILES_MD5 = {**OFFICIAL_MD5, "batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
MIB = 2**20


def md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def missing_files(folder: Path) -> list[str]:
    return [name for name in FILES_MD5 if not (folder / name).is_file()]


def is_official(folder: Path) -> bool:
    return all(md5(folder / name) == expected for name, expected in FILES_MD5.items())


def describe(folder: Path) -> str:
    kind = "the official files" if is_official(folder) else "an unofficial copy (MD5s differ)"
    return f"{folder}: {kind}"


# --- from disk


def copy_folder(source: Path, target: Path) -> None:
    """Copies the batches of ``source``, or of the ``cifar-10-batches-py`` in it."""
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    if missing := missing_files(folder):
        raise DataError(f"{folder} is no {FOLDER} folder: it lacks {', '.join(missing)}")
    for name in FILES_MD5:
        shutil.copyfile(folder / name, target / name)


def extract(archive: Path, target: Path) -> None:
    """Extracts the known batch files alone: no other name, link or path of the archive is used."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.parent.name == FOLDER and path.name in FILES_MD5:
                    with tar.extractfile(member) as content, (target / path.name).open("wb") as out:
                        shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is no readable tar archive: {error}") from None
    if missing := missing_files(target):
        raise DataError(f"{archive} is not CIFAR-10: it lacks {FOLDER}/{', '.join(missing)}")


def install(source: Path, data: Path) -> Path:
    """Makes ``data/cifar-10-batches-py`` from a folder or an archive, whole or not at all."""
    if not source.exists():
        raise DataError(f"{source} does not exist")
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix=".incomplete-") as temporary:
        target = Path(temporary) / FOLDER
        target.mkdir()
        if source.is_dir():
            copy_folder(source, target)
        else:
            extract(source, target)
        return target.rename(data / FOLDER)


# --- from the network


def download_command(url: str, part: Path) -> list[str]:
    """curl, else wget: both continue a partial file."""
    if curl := shutil.which("curl"):
        resume = [curl, "--location", "--continue-at", "-", "--retry", "3"]
        return [*resume, "--fail", "--silent", "--show-error", "--output", str(part), url]
    if wget := shutil.which("wget"):
        return [wget, "--continue", "--no-verbose", "--tries", "3", "--output-document", part, url]
    raise DataError("a download needs curl or wget: install one of them")


def fetch(url: str, part: Path) -> None:
    """Downloads ``url``, continuing ``part``; shows the progress on a terminal."""
    command = download_command(url, part)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while process.poll() is None:
            if sys.stderr.isatty() and part.exists():
                print(f"\r{part.stat().st_size / MIB:6.0f} MiB", end="", file=sys.stderr)
            time.sleep(0.2)
    finally:
        process.kill()
        _, messages = process.communicate()
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    if process.returncode:
        lines = messages.decode(errors="replace").strip().splitlines()
        raise DataError(f"cannot download {url} ({lines[-1] if lines else 'no reason given'})")


def download(url: str, archive: Path, expected: str) -> None:
    """Makes ``archive`` from ``url``; what an interruption leaves is continued the next time."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    if not (part.exists() and md5(part) == expected):
        fetch(url, part)
    if (actual := md5(part)) != expected:
        part.unlink()
        raise DataError(
            f"{url} is not the official archive (MD5 {actual}, not {expected}); what was downloaded is removed"
        )
    part.rename(archive)


# --- the command


def get_data(data: Path, source: Path | None, url: str) -> str:
    """Makes ``data/cifar-10-batches-py`` where it is not yet; returns what to say about it."""
    folder = data / FOLDER
    if source is not None and not source.exists():
        raise DataError(f"--from: {source} does not exist")
    if folder.exists():
        if missing := missing_files(folder):
            raise DataError(f"{folder} lacks {', '.join(missing)}: remove it and run this again")
        unused = " (--from was not used; remove the folder to replace it)" if source is not None else ""
        return f"{describe(folder)}; it was there already{unused}"
    if source is None:
        source = data / ARCHIVE
        if not source.exists():
            try:
                download(url, source, ARCHIVE_MD5)
            except DataError as error:
                raise DataError(
                    f"{error}; put {ARCHIVE} or {FOLDER} on this disk by other means and run ./get_data.sh --from PATH"
                ) from None
    return describe(install(source, data))


def get(options: argparse.Namespace) -> int:
    print(get_data(options.data, options.source, options.url))
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="get_data.sh",
        description="Downloads CIFAR-10, checks it, and extracts it into data/. "
        "An interrupted download is continued; does nothing when the data is there.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        type=user_path,
        help=f"take {ARCHIVE} or a {FOLDER} folder from disk (a copy that is not the official "
        "one is accepted and said to be so)",
    )
    parser.add_argument("--data", metavar="DIR", type=user_path, default=ROOT / "data", help="default: %(default)s")
    parser.add_argument("--url", default=URL, help="a mirror of the official archive (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 2 after one line on stderr, or 130 and the like when interrupted."""
    return run_command(lambda: get(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
