"""A limit on the seconds of training ends a run as finished, after the epoch that passes it."""

import signal
from pathlib import Path

import pytest

from experiments import run, show, sweep
from experiments.config import dump_config, load_config
from experiments.folder.read import read_metrics, read_run, read_summary
from experiments.folder.write import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path("results/configs/tiny")
AT_ONCE = "time_limit=1e-9"  # seconds, which every epoch passes


@pytest.mark.parametrize(
    ("settings", "epochs", "limited"),
    [
        ([AT_ONCE], 1, True),
        ([AT_ONCE, "min_epochs=3"], 3, True),
        (["time_limit=1e9"], 5, False),
        ([AT_ONCE, "min_epochs=5"], 5, False),
        ([AT_ONCE, "min_epochs=9"], 5, False),  # `epochs` is the most in any case
    ],
)
def test_the_epoch_that_passes_the_limit_is_the_last(write_config, capsys, settings, epochs, limited):
    assert run.main([str(write_config(epochs=5)), *settings]) == 0
    summary = read_summary(TINY)
    assert (summary["status"], summary["epochs"], summary.get("ended_by")) == (
        "finished", epochs, "time_limit" if limited else None,
    )  # fmt: skip
    assert f"finished, {epochs} epoch{'s' * (epochs > 1)}{' (time limit)' * limited}," in capsys.readouterr().out
    assert not (TINY / "checkpoint.pt").exists()
    recorded = read_run(TINY)
    assert (recorded.epochs, recorded.expected_epochs, recorded.seconds_left) == (epochs, epochs, None)


def test_the_limit_changes_no_number(write_config):
    path = str(write_config(epochs=3))
    assert run.main([path, "--output", "whole"]) == 0
    assert run.main([path, AT_ONCE, "min_epochs=2", "--output", "limited"]) == 0
    whole, limited = (read_metrics(Path(folder))[COLUMNS[:-1]] for folder in ("whole", "limited"))
    assert limited.equals(whole.iloc[:3])


def test_a_diverged_run_is_not_ended_by_the_limit(write_config):
    assert run.main([str(write_config(epochs=3)), AT_ONCE, "optimizer.lr=1e30"]) == 0
    summary = read_summary(TINY)
    assert (summary["status"], "ended_by" in summary) == ("diverged", False)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_was_stopped_ends_where_it_would_have(write_config, monkeypatch, epoch):
    arguments = [str(write_config(epochs=5)), AT_ONCE, "min_epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.launch.execute.Progress.show",
            lambda self, record, seconds: record.epoch == epoch and signal.raise_signal(signal.SIGTERM),
        )
        assert run.main(arguments) == 143
    assert read_summary(TINY) is None
    assert run.main(arguments) == 0
    assert read_summary(TINY)["ended_by"] == "time_limit"
    assert read_metrics(TINY)["epoch"].tolist() == [0, 1, 2]


def test_another_limit_is_no_other_config(write_config, capsys):
    path = str(write_config(epochs=3))
    assert sweep.main([path, AT_ONCE]) == 0
    assert sweep.main([path, AT_ONCE]) == 0
    assert "tiny: skipped, already in results/configs/tiny\n" in capsys.readouterr().out
    assert sweep.main([path, "time_limit=5", "min_epochs=2"]) == 0
    assert "tiny, ended by its own time limit after epoch 1 (--overwrite runs it again)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected", "left"),
    [
        ({"time_limit": 10.5}, 6, 6.0),  # 3 epochs of 2 seconds are there: the sixth passes
        ({"time_limit": 10.0}, 6, 6.0),  # 5 epochs do not pass 10 seconds, they meet them
        ({"time_limit": 1.0}, 3, 0.0),
        ({"time_limit": 1.0, "min_epochs": 7}, 7, 8.0),
        ({"time_limit": 1e30}, 40, 74.0),
        ({}, 40, 74.0),
    ],
)
def test_the_time_left_knows_of_the_limit(write_config, capsys, changes, expected, left):
    config = load_config(write_config(epochs=40, **changes))
    TINY.mkdir(parents=True)
    (TINY / "config.yaml").write_text(dump_config(config))
    rows = [f"{epoch},1,1,0.5,1,0.5,{2 if epoch else 0}" for epoch in range(4)]
    (TINY / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    recorded = read_run(TINY)
    assert (recorded.expected_epochs, recorded.seconds_left) == (max(3, expected), left)
    assert show.main(["results"]) == 0
    assert f"3/{max(3, expected)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting", ["time_limit=0", "time_limit=-1", "time_limit=soon", "time_limit=.inf", "min_epochs=0"]
)
def test_a_bad_limit_is_one_line(write_config, capsys, setting):
    assert run.main([str(write_config()), setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {setting.partition('=')[0]}: must be ")
    assert error.count("\n") == 1
