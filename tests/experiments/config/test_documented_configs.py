"""The YAML files that README.md and docs/experiments.md show are configs that load as they say, and their commands
name configs that run."""

import re
import shutil
from pathlib import Path

import pytest

from experiments.config.sweep_file import load_config_file

ROOT = Path(__file__).resolve().parents[3]
PAGES = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/experiments.md"))
FILES = dict(re.findall(r"```yaml\n# (configs/mine/\w+\.yaml)[^\n]*\n(.*?)```", PAGES, re.S))


@pytest.fixture
def mine(tmp_path):
    """A copy of configs/ with these files in it."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "mine").mkdir()
    for path, content in FILES.items():
        (tmp_path / path).write_text(content)
    return tmp_path / "configs" / "mine"


def test_all_are_there():
    assert sorted(FILES) == ["configs/mine/steps.yaml", "configs/mine/wide.yaml", "configs/mine/widths.yaml"]


def test_a_run(mine):
    (config,) = load_config_file(mine / "wide.yaml").configs
    assert (config.name, config.model.hidden_features, config.optimizer.name) == ("wide", (8000, 1000, 8000), "sgd")
    assert config.proxprop.optimization_mode == "prox_cg5"


def test_sweeps(mine):
    steps, widths = (load_config_file(mine / name).configs for name in ("steps.yaml", "widths.yaml"))
    assert (len(steps), len(widths)) == (3 * 2 * 2, 2 * 3 * 2)
    assert "hidden_features=8000x1000,tau_prox=0.05,seed=0" in [config.name for config in widths]


def test_commands_name_one_run(mine):
    named = re.findall(r"experiments\.run (configs/\S+\.yaml)", PAGES)
    assert len(named) > 3
    for path in named:
        assert len(load_config_file(mine.parents[1] / path).configs) == 1
