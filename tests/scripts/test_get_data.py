"""get_data.sh and scripts/get_data.py, with tiny stand-ins for the batches."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from experiments.data.cifar_files import OFFICIAL_MD5
from scripts import get_data
from scripts.get_data import ARCHIVE_MD5, FILES_MD5, FOLDER, DataError, download, main

UNREACHABLE = "http://127.0.0.1:9/cifar-10-python.tar.gz"


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "disk" / FOLDER
    folder.mkdir(parents=True)
    for name in FILES_MD5:
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def archive(batches: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk" / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(batches, FOLDER)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def run(data: Path, *options: object) -> int:
    return main(["--data", str(data), *map(str, options)])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_checksums_are_those_of_torchvision_and_of_the_experiments() -> None:
    listed = dict(CIFAR10.train_list + CIFAR10.test_list)
    assert {**listed, CIFAR10.meta["filename"]: CIFAR10.meta["md5"]} == FILES_MD5
    assert (CIFAR10.tgz_md5, CIFAR10.url) == (ARCHIVE_MD5, get_data.URL)
    assert OFFICIAL_MD5.items() <= FILES_MD5.items()


@pytest.mark.parametrize("parent", [False, True], ids=["folder", "its parent"])
def test_from_a_folder(parent: bool, batches: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--from", batches.parent if parent else batches) == 0
    assert "unofficial copy" in capsys.readouterr().out
    assert contents(data / FOLDER) == contents(batches)
    assert [path.name for path in data.iterdir()] == [FOLDER]


def test_from_an_archive(archive: Path, batches: Path, data: Path) -> None:
    assert run(data, "--from", archive) == 0
    assert contents(data / FOLDER) == contents(batches)
    assert [path.name for path in data.iterdir()] == [FOLDER]


def test_official_files_are_said_to_be(
    batches: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in batches.iterdir()}
    monkeypatch.setattr(get_data, "FILES_MD5", official)
    assert run(data, "--from", batches) == 0
    assert "the official files" in capsys.readouterr().out


def test_complete_data_is_left_alone(batches: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(batches, data / FOLDER)
    assert run(data, "--url", UNREACHABLE) == 0
    assert capsys.readouterr().out.endswith("; it was there already\n")
    assert run(data, "--from", batches) == 0
    assert capsys.readouterr().out.endswith("(--from was not used; remove the folder to replace it)\n")


def test_a_source_that_does_not_exist_is_named_though_data_is_there(
    batches: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "--from", batches) == 0
    capsys.readouterr()
    assert run(data, "--from", tmp_path / "nope") == 2
    assert "nope does not exist" in error_line(capsys)


def test_a_tilde_in_front_is_the_home(archive: Path, data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--data", "~/data", "--from", "~/disk/archive.tar.gz"]) == 0
    assert sorted(contents(data / FOLDER)) == sorted(FILES_MD5)
    assert main(["--data=~/other", "--from=~/none"]) == 2
    assert error_line(capsys) == f"error: --from: {tmp_path}/none does not exist\n"


def test_incomplete_data_is_named(batches: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(batches, data / FOLDER)
    (data / FOLDER / "test_batch").unlink()
    assert run(data) == 2
    assert "lacks test_batch: remove it" in error_line(capsys)


def test_an_archive_cut_short_leaves_nothing(archive: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive.write_bytes(archive.read_bytes()[:-60])
    assert run(data, "--from", archive) == 2
    assert "is no readable tar archive" in error_line(capsys)
    assert list(data.iterdir()) == []


def test_an_archive_of_something_else(tmp_path: Path, data: Path, capsys) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    assert run(data, "--from", other) == 2
    assert "is not CIFAR-10" in error_line(capsys)


def test_an_archive_writes_nowhere_else(archive: Path, data: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(archive) as good, tarfile.open(hostile, "w") as tar:
        for member in good:
            tar.addfile(member, good.extractfile(member) if member.isfile() else None)
        for name in (f"../../{FOLDER}/evil", f"{FOLDER}/../../evil", "/tmp/evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo(f"{FOLDER}/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert run(data, "--from", hostile) == 0
    assert not any(path.is_symlink() for path in data.rglob("*"))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "absent"], "absent does not exist"),
        (["--form", "x"], "unrecognized arguments: --form x (see --help)"),
    ],
)
def test_wrong_arguments(options: list[str], message: str, data: Path, capsys) -> None:
    assert run(data, *options) == 2
    assert message in error_line(capsys)


def test_a_folder_without_batches(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert run(data, "--from", tmp_path / "empty") == 2
    assert f"is no {FOLDER} folder: it lacks data_batch_1" in error_line(capsys)


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="no curl")


@needs_curl
def test_offline_says_what_to_do(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--url", UNREACHABLE) == 2
    line = error_line(capsys)
    assert f"cannot download {UNREACHABLE}" in line
    assert "./get_data.sh --from PATH" in line


@needs_curl
@pytest.mark.parametrize("already", [0, 7, 1000])
def test_download_continues(already: int, tmp_path: Path) -> None:
    content = bytes(range(250)) * 4
    (tmp_path / "served").write_bytes(content)
    (tmp_path / "archive.part").write_bytes(content[:already])
    digest = hashlib.md5(content).hexdigest()
    download((tmp_path / "served").as_uri(), tmp_path / "archive", digest)
    assert (tmp_path / "archive").read_bytes() == content
    assert not (tmp_path / "archive.part").exists()


@needs_curl
def test_a_download_of_something_else_is_removed(tmp_path: Path) -> None:
    (tmp_path / "served").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the official archive"):
        download((tmp_path / "served").as_uri(), tmp_path / "archive", ARCHIVE_MD5)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_the_shell_file_works_from_another_folder(root: Path, batches: Path, tmp_path: Path) -> None:
    command = [str(root / "get_data.sh"), "--from", f"disk/{FOLDER}", "--data", "with space"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "with space" / FOLDER) == contents(batches)


def test_wget_does_where_there_is_no_curl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(get_data.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "wget" else None)
    command = get_data.download_command(UNREACHABLE, tmp_path / "part")
    assert list(map(str, command)) == [
        *("/usr/bin/wget", "--continue", "--no-verbose", "--tries", "3"),
        *("--output-document", str(tmp_path / "part"), UNREACHABLE),
    ]


def test_a_download_without_either_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(get_data.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"^a download needs curl or wget: install one of them$"):
        get_data.download_command(UNREACHABLE, tmp_path / "part")
