"""What imports what: one direction from room to room, and the download without anything installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "command": set(),
    "config": {"command"},
    "data": {"command", "config"},
    "optimizers": {"command", "config"},
    "training": {"command", "config", "data", "optimizers"},
    "folder": {"command", "config", "data", "training"},
    "launch": {"command", "config", "data", "optimizers", "training", "folder"},
}


def test_every_room_is_known():
    assert {path.parent.name for path in (ROOT / "experiments").glob("*/*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_from_those_before_it(room):
    nodes = [
        node for path in (ROOT / "experiments" / room).glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported = {module.split(".")[1] for module in modules if module.startswith("experiments.")}
    assert "experiments" not in modules  # which would hide the room
    assert imported - {room} <= MAY_IMPORT[room]


def test_the_download_needs_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "get_data.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
