"""Many runs: checked first, finished ones skipped, a failure does not stop the others."""

import shutil
from pathlib import Path

import pytest

from experiments import show
from experiments.folder.read import read_metrics, read_summary
from experiments.launch import serial
from experiments.sweep import main

OUT = Path("out/configs")


@pytest.fixture
def three(write_config):
    for name in "abc":
        write_config(name)
    return ["configs", "--output", "out"]


def modified(name):
    return (OUT / name / "summary.json").stat().st_mtime_ns


def error_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_runs_all_then_skips_what_is_finished(three, capsys):
    assert main(three) == 0
    assert [folder.name for folder in sorted(OUT.iterdir())] == ["a", "b", "c"]
    before = modified("a")
    (OUT / "b" / "summary.json").unlink()  # as if it had been interrupted
    capsys.readouterr()
    assert main(three) == 0
    out = capsys.readouterr().out
    assert "a: skipped, already in out/configs/a\n" in out
    assert "b: finished, 2 epochs" in out
    assert modified("a") == before
    assert read_summary(OUT / "b")["status"] == "finished"


def test_diverged_runs_are_done_too(three, capsys):
    assert main([*three, "optimizer.lr=1e30"]) == 0
    capsys.readouterr()
    assert main([*three, "optimizer.lr=1e30"]) == 0
    assert capsys.readouterr().out.count("skipped, already") == 3


def test_a_finished_run_of_another_device_is_not_silently_skipped(three, capsys):
    assert main(["configs/b.yaml", "--output", "out"]) == 0
    capsys.readouterr()
    summary = OUT / "b" / "summary.json"
    summary.write_text(summary.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert main([*three, "device=cpu"]) == 2
    assert error_line(capsys) == (
        "error: out/configs/b: holds a run made on cuda, not on cpu; give --overwrite or another --output\n"
    )
    assert not (OUT / "a").exists()


def test_a_finished_run_of_another_config_is_not_silently_skipped(three, capsys):
    assert main(["configs/b.yaml", "--output", "out"]) == 0
    capsys.readouterr()
    changed = [*three, "epochs=1", "optimizer.lr=0.2"]
    assert main(changed) == 2
    assert error_line(capsys) == (
        "error: out/configs/b: holds a run of another config (different: optimizer.lr, epochs); "
        "give --overwrite or another --output\n"
    )
    assert not (OUT / "a").exists()
    assert main([*changed, "--overwrite"]) == 0
    assert len(read_metrics(OUT / "b")) == 2


def test_a_run_that_fails_is_reported_and_the_others_go_on(three, capsys):
    OUT.mkdir(parents=True)
    (OUT / "b").write_text("in the way")
    assert main(three) == 1
    out, err = capsys.readouterr()
    assert err == ("error: b: out/configs/b: cannot write the run here: File exists; choose another --output\n")
    assert read_summary(OUT / "a")["status"] == "finished"
    assert read_summary(OUT / "c")["status"] == "finished"
    table = out.split("\n\n")[1].splitlines()
    assert [line.split()[1] for line in table[1:4]] == ["finished", "failed", "finished"]


def test_a_fault_in_one_run_is_not_the_others(three, capsys, monkeypatch):
    real = serial.execute

    def execute(config, *arguments, **options):
        return real(config, *arguments, **options) if config.name != "b" else [][0]

    monkeypatch.setattr(serial, "execute", execute)
    assert main(three) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: b: Traceback (most recent call last):")
    assert err.endswith("\nIndexError: list index out of range\n")
    assert [read_summary(OUT / name) is not None for name in "abc"] == [True, False, True]
    assert "2 finished, 1 failed" in out


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("metrics.csv", "out/configs/b/metrics.csv: cannot be read as metrics: No such file or directory"),
        ("config.yaml", "out/configs/b: cannot read the run's config: out/configs/b/config.yaml: cannot read this "
                        "config: No such file or directory"),
    ],
)  # fmt: skip
def test_a_finished_run_of_which_a_file_is_lost_is_told_and_can_be_made_again(three, capsys, lost, problem):
    assert main(three) == 0
    before = modified("a")
    (OUT / "b" / lost).unlink()
    capsys.readouterr()
    assert main(three) == 1
    out, err = capsys.readouterr()
    assert err == f"error: b: {problem}; delete out/configs/b to have this finished run made again\n"
    assert "2 finished, 1 failed" in out
    assert show.main(["out"]) == 0
    out, err = capsys.readouterr()
    assert "configs/b unreadable" in out
    assert err == f"note: {problem}\n"
    shutil.rmtree(OUT / "b")
    assert main(three) == 0
    assert modified("a") == before


def test_all_configs_are_checked_before_anything_runs(three, capsys):
    Path("configs/c.yaml").write_text("name: c\nepochs: -1\n")
    assert main(three) == 2
    assert error_line(capsys).startswith("error: configs/c.yaml: model: missing")
    assert not Path("out").exists()


def test_missing_data_is_known_before_anything_runs(three, write_config, capsys):
    write_config("c", data={"name": "cifar10"})
    assert main(three) == 2
    assert error_line(capsys).startswith("error: data/cifar-10-batches-py: no such folder; run ./g")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none.yaml"], "error: none.yaml: cannot read this config: No such file or directory"),
        (["empty"], "error: empty: no *.yaml in this folder"),
        (["epochs=1"], "error: no config given: name at least one file or folder"),
        (["configs", "name=x"], "error: name: configs/a.yaml and configs/b.yaml would both write"),
        (["configs", "device=tpu"], "error: configs/a.yaml: device: must be auto, cpu, cuda or"),
        ([], "error: the following arguments are required: FOLDER_OR_FILE"),
    ],
)
def test_bad_arguments_are_one_line(three, capsys, arguments, line):
    Path("empty").mkdir()
    assert main(arguments) == 2
    assert error_line(capsys).startswith(line)


def test_a_file_given_twice_runs_once(three, capsys):
    assert main(["configs/a.yaml", *three]) == 0
    assert capsys.readouterr().out.count("a: finished") == 1


def test_shared_data_is_loaded_once(three, monkeypatch):
    calls = []
    real = serial.load
    monkeypatch.setattr(serial, "load", lambda *key: calls.append(key) or real(*key))
    assert main(three) == 0
    assert len(calls) == 1


def test_check_finds_errors_and_runs_nothing(three, capsys):
    assert main([*three, "--check"]) == 0
    assert main([*three, "--check", "optimiser.lr=1"]) == 2
    assert "optimiser: unknown key; did you mean optimizer?" in error_line(capsys)
    assert not OUT.exists()
