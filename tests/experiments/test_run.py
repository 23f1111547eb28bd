"""One run: what it leaves on disk, and that nothing computed is lost."""

import json
import re
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.command import cli
from experiments.command.errors import DeviceError, RecordError
from experiments.config import load_config
from experiments.folder.read import read_config, read_metrics, read_summary
from experiments.folder.write import COLUMNS
from experiments.run import main
from experiments.training.device import resolve_device

TINY = Path("results/configs/tiny")


def test_what_a_run_leaves(write_config, capsys):
    path = write_config(seed=3)
    assert main([str(path), "optimizer.lr=0.2"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"tiny: under way, epoch 0/2\ntiny: finished, 2 epochs, train loss .*\n", out)
    assert out.endswith(f", wrote {TINY}\n")
    assert err == ""  # the bar is silent when stderr is no terminal
    assert sorted(file.name for file in TINY.iterdir()) == [
        ".lock",  # which nobody holds any more
        "config.yaml",
        "metrics.csv",
        "summary.json",
    ]
    assert read_config(TINY) == load_config(path, ["optimizer.lr=0.2"])
    metrics = read_metrics(TINY)
    assert (TINY / "metrics.csv").read_text().splitlines()[0] == (
        "epoch,minibatch_loss,train_loss,train_accuracy,val_loss,val_accuracy,epoch_seconds"
    )
    assert metrics["epoch"].tolist() == [0, 1, 2]
    assert metrics["minibatch_loss"][0] == metrics["train_loss"][0]
    summary = read_summary(TINY)
    assert summary["status"] == "finished"
    assert (summary["name"], summary["epochs"], summary["seed"]) == ("tiny", 2, 3)
    assert summary["data"]["train_samples"] == 100
    assert summary["torch"] == torch.__version__
    assert summary["device"] == "cpu"
    assert summary["device_name"]
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["date"].endswith("+00:00")


def test_same_seed_same_metrics(write_config):
    path = str(write_config())
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([path, f"seed={seed}", "--output", folder]) == 0
    numbers = COLUMNS[:-1]  # all but the seconds
    a, b, c = (read_metrics(Path(folder))[numbers] for folder in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_divergence_keeps_the_metrics_and_is_no_error(write_config, capsys):
    assert main([str(write_config(epochs=5)), "optimizer.lr=1e30"]) == 0
    assert "tiny: diverged, 1 epoch, train loss nan" in capsys.readouterr().out
    assert read_metrics(TINY)["train_loss"].isna().tolist() == [False, True]
    summary = json.loads((TINY / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["status"], summary["epochs"], summary["test_loss"]) == ("diverged", 1, None)


def test_a_finished_run_is_kept_unless_told(write_config, capsys):
    path = str(write_config())
    assert main([path]) == 0
    before = (TINY / "metrics.csv").read_bytes()
    capsys.readouterr()
    assert main([path, "epochs=1"]) == 2
    assert capsys.readouterr().err == (
        f"error: {TINY}: already holds a finished run; give --overwrite or another --output\n"
    )
    assert (TINY / "metrics.csv").read_bytes() == before
    assert main([path, "epochs=1", "--overwrite"]) == 0
    assert len(read_metrics(TINY)) == 2


def test_an_unfinished_run_without_a_checkpoint_is_started_afresh(write_config):
    path = str(write_config())
    TINY.mkdir(parents=True)
    (TINY / "metrics.csv").write_text("rubbish")
    assert main([path]) == 0
    assert len(read_metrics(TINY)) == 3


@pytest.mark.parametrize("key", ["data.train_samples=1201", "data.name=cifar10"])
def test_unusable_data_is_known_before_anything_is_written(write_config, capsys, key):
    assert main([str(write_config()), key]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: data")
    assert line.count("\n") == 1
    assert not Path("results").exists()


def test_unwritable_folder_is_known_before_training(write_config, capsys, monkeypatch):
    monkeypatch.setattr("experiments.launch.execute.Training.records", lambda *_: pytest.fail("trained"))
    Path("file").write_text("")
    assert main([str(write_config()), "--output", "file/run"]) == 2
    assert capsys.readouterr().err == (
        "error: file/run: cannot write the run here: Not a directory; choose another --output\n"
    )


def test_too_large_a_model_is_one_line(write_config, capsys):
    assert main([str(write_config()), f"model.hidden_features=[{10**12}]"]) == 2
    assert capsys.readouterr().err.startswith("error: device: out of memory on cpu; try a smaller")


def test_a_bug_is_not_hidden():
    def broken():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.run_command(broken)


def test_cuda_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match=r"^device: cuda asked for, .* allowed here: auto, cpu$"):
        resolve_device("cuda")


def test_cuda_index_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match=r"^device: cuda:2 asked for, .* cuda:0 to cuda:1$"):
        resolve_device("cuda:2")


def test_a_row_cut_off_by_a_crash_is_left_out(write_config):
    assert main([str(write_config())]) == 0
    metrics = TINY / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-5])
    assert read_metrics(TINY)["epoch"].tolist() == [0, 1]


def test_reading_what_is_no_run(tmp_path):
    assert read_summary(tmp_path) is None
    with pytest.raises(RecordError, match=r"metrics\.csv: cannot be read as metrics: No such file"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecordError, match=r"metrics\.csv: must have the columns epoch,minibatch"):
        read_metrics(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RecordError, match=r"summary\.json: cannot be read as a summary: "):
        read_summary(tmp_path)
    with pytest.raises(RecordError, match=r"cannot read the run's config: .*config\.yaml"):
        read_config(tmp_path)


def test_settings_before_the_config_are_one_line(capsys):
    assert run.main(["epochs=2", "configs/a.yaml"]) == 2
    assert capsys.readouterr().err == "error: expected a config file before epochs=2 (see --help)\n"
