"""What the command lines share."""

import runpy
from pathlib import Path

import pytest

from experiments import run, show, sweep
from experiments.command.cli import user_path
from scripts import full_length, longest_curve, plot_ablation, plot_diagnostics, plot_paper, plot_rivals, plot_sweep


def test_the_package_names_its_commands(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_module("experiments", run_name="__main__")
    err = capsys.readouterr().err
    assert err == "error: say python -m experiments.run, experiments.sweep or experiments.show (see --help)\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_in_front_is_the_home(home):
    assert user_path("~") == home
    assert user_path("~/a/~b") == home / "a" / "~b"
    assert user_path("a/~") == Path("a/~")
    assert user_path("a~") == Path("a~")
    assert user_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


@pytest.mark.parametrize(
    "parser",
    [
        run._parser(),
        sweep._parser(),
        show._parser(),
        *(script.make_parser() for script in (plot_paper, plot_sweep, plot_diagnostics, plot_ablation, plot_rivals)),
        *(script.make_parser() for script in (full_length, longest_curve)),
    ],
)
def test_no_command_takes_a_tilde_for_a_name(parser):
    assert [action.dest for action in parser._actions if action.type is Path] == []


def test_commands_go_home(home, write_config, capsys):
    config = write_config(data={"name": "digits", "root": "~/data", "train_samples": 100})
    home.mkdir()
    (home / "mine").mkdir()
    config.rename(home / "mine" / "tiny.yaml")
    assert sweep.main(["~/mine", "--output", "~/runs"]) == 0
    assert run.main(["~/mine/tiny.yaml", "--output", "~/runs/mine/b", "seed=1"]) == 0
    assert plot_sweep.main(["~/runs", "--x", "optimizer.lr", "--output", "~/x.pdf"]) == 0
    assert (home / "x.csv").exists()
    capsys.readouterr()
    assert show.main(["~/runs"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:-1]] == [["mine/b", "finished"], ["mine/tiny", "finished"]]
    assert not Path("~").exists()
