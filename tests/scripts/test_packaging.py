"""pyproject.toml, requirements.txt and environment.yml agree."""

import re
from pathlib import Path

import pytest
import yaml

from scripts.check_environment import missing, release, requirements

EXTRAS = ["experiments", "rivals", "dev"]


@pytest.fixture(scope="module")
def pyproject(root: Path) -> str:
    return (root / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, set[str]]:
    """The pinned versions of each name; different Pythons may have different ones."""
    found: dict[str, set[str]] = {}
    for line in (root / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r"([\w-]+)==([\w.]+)( ; .+)?", line)
            assert pin, f"requirements.txt: not an exact pin: {line}"
            found.setdefault(pin[1], set()).add(pin[2])
    return found


def test_requirements_are_read_as_toml_reads_them(pyproject: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is new in Python 3.11")
    project = tomllib.loads(pyproject)["project"]
    listed = list(project["dependencies"])
    for extra in EXTRAS:
        listed += project["optional-dependencies"][extra]
    assert [f"{name}>={lowest}" for name, lowest in requirements(EXTRAS, pyproject)] == listed


def test_the_library_needs_torch_alone(pyproject: str) -> None:
    assert requirements([], pyproject) == [("torch", "2.6")]


def test_every_requirement_is_pinned_in_its_range(pyproject: str, pins: dict[str, set[str]]) -> None:
    for name, lowest in requirements(EXTRAS, pyproject):
        assert name in pins
        assert all(release(version) >= release(lowest) for version in pins[name]), name


def test_environment_yml_takes_the_pins(root: Path) -> None:
    python, pip, packages = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["-r requirements.txt", "-e ."]}
    assert release(python.partition("=")[2]) >= (3, 10)


def test_missing_names_what_is_absent_or_old() -> None:
    text = 'dependencies = ["pytest>=1.0"]\ndev = [\n    "pytest>=999.1",\n    "no-such-name>=1",\n]\n'
    assert missing([], text) == []
    old, absent = missing(["dev"], text)
    assert old.startswith("pytest>=999.1 (has ")
    assert absent == "no-such-name>=1"


def test_an_unknown_extra_is_an_error(pyproject: str) -> None:
    with pytest.raises(ValueError, match="no extra 'docs'"):
        requirements(["docs"], pyproject)


@pytest.mark.parametrize(("version", "numbers"), [("2.11.0+cu128", (2, 11, 0)), ("3.1rc1", (3, 1)), ("?", ())])
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
