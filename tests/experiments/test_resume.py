"""A run that was stopped, however that happened, ends in the numbers of one that was not."""

import contextlib
import itertools
import os
import pickle
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import run, sweep
from experiments.command.errors import CheckpointError, RecordError
from experiments.config import load_config
from experiments.data.datasets import load
from experiments.folder.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from experiments.folder.environment import describe_environment
from experiments.folder.read import read_config, read_metrics, read_summary
from experiments.folder.write import RunWriter
from experiments.launch.execute import execute
from experiments.run import main
from experiments.training.device import seeded
from experiments.training.networks import build
from experiments.training.train import Training

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = Path("results/configs/tiny")
BATCHES = 3  # of the tiny config's epoch: 40, 40 and 20 examples

SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True}
PROX_SGD = {"name": "sgd", "lr": 1.0, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.002}
GRADIENT = {"optimization_mode": "gradient"}
PROX = {"optimization_mode": "prox_cg3", "tau_prox": 0.1}
EXACT = {"optimization_mode": "prox_exact", "tau_prox": 0.1}


def numbers(folder):
    """The text of metrics.csv without its last column, the seconds."""
    return [line.rpartition(",")[0] for line in rows(folder)]


def facts(folder):
    """The lines of summary.json without those of the time."""
    lines = (folder / "summary.json").read_text().splitlines()
    return [line for line in lines if not line.startswith(('  "seconds"', '  "date"'))]


def assert_same_run(folder, other):
    assert numbers(folder) == numbers(other)
    assert facts(folder) == facts(other)


def assert_tidy(folder):
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".lock", "config.yaml", "metrics.csv", "summary.json"]


def one_line_error(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


# --- whole runs, killed -------------------------------------------------------------------------------------------


# From a thread of the process itself: on a busy machine, another process may come when all is over.
KILL_SOON = """
import os, signal, threading, time
from pathlib import Path

def kill():
    path = Path({path!r})
    while not path.exists() or path.read_text().count("\\n") < {rows}:
        time.sleep(0.001)
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("optimizer", "proxprop"), [(PROX_SGD, PROX), (ADAM, GRADIENT)], ids=["momentum-prox_cg3", "adam"]
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(write_config, start, tmp_path, optimizer, proxprop):
    sections = {"model": {"name": "mlp", "hidden_features": [16]}, "data": {"name": "digits", "train_samples": 480}}
    path = write_config(optimizer=optimizer, proxprop=proxprop, epochs=20, **sections)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start("experiments.run", path, "--output", whole).wait() == 0

    moments, kills, killed_rows = random.Random(7), 0, []
    for _ in range(4):
        wanted = (len(rows(parts)) if kills else 0) + moments.randint(2, 3)
        killer = KILL_SOON.format(path=str(parts / "metrics.csv"), rows=wanted, seconds=moments.uniform(0, 0.05))
        process = start("experiments.run", path, "--output", parts, before=killer)
        if process.wait() == 0:
            break
        assert process.wait() == -signal.SIGKILL
        kills += 1
        assert not (parts / "summary.json").exists()
        killed_rows.append(rows(parts)[:-1])
    else:
        assert start("experiments.run", path, "--output", parts).wait() == 0
    assert kills >= 3

    assert_same_run(parts, whole)
    assert_tidy(parts)
    # All rows but the last one were gone on from, not computed again: their seconds, too, are those of the killed run.
    assert max(map(len, killed_rows)) > 3
    assert all(rows(parts)[: len(before)] == before for before in killed_rows)


def rows(folder):
    return (folder / "metrics.csv").read_text().splitlines()


KILL_AFTER_RECORD = """
import os, signal
from experiments.folder.write import RunWriter

append = RunWriter.append

def append_and_die(self, record, layer_records):
    append(self, record, layer_records)
    if record.epoch == {epoch}:
        os.kill(os.getpid(), signal.SIGKILL)

RunWriter.append = append_and_die
"""


def test_no_more_epochs_are_lost_than_between_two_checkpoints(write_config, start, tmp_path):
    path = write_config(optimizer=SGD, epochs=8, checkpoint_every=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start("experiments.run", path, "--output", whole).wait() == 0
    # A record is written before the checkpoint of the same epoch.
    for killed_at, saved in [(3, None), (5, 3), (6, 3), (7, 6)]:
        process = start("experiments.run", path, "--output", parts, before=KILL_AFTER_RECORD.format(epoch=killed_at))
        assert process.wait() == -signal.SIGKILL
        assert numbers(parts) == numbers(whole)[: killed_at + 2]
        state = load_checkpoint(parts)
        assert (state and state["training"]["epoch"]) == saved
        assert killed_at - (saved or 0) <= 3
    kept = rows(parts)[: 6 + 2]
    assert start("experiments.run", path, "--output", parts).wait() == 0
    assert_same_run(parts, whole)
    assert_tidy(parts)
    assert rows(parts)[: 6 + 2] == kept


def test_seconds_before_a_stop_in_the_midst_of_an_epoch_count(write_config):
    config = load_config(write_config(epochs=1))
    training = Training(build(config), load(config.data, CPU), config)
    states = []

    def on_batch(_):
        time.sleep(0.05)
        states.append(training.state_dict())

    (*_, record) = training.records(on_batch)
    assert [state["seconds"] >= 0.05 * (1 + index) for index, state in enumerate(states)] == [True] * BATCHES
    assert record.epoch_seconds >= states[-1]["seconds"]


def test_a_run_that_another_process_finished_meanwhile_is_kept(write_config):
    """The folder was free when it was looked at, and held a finished run when it was locked."""
    path = write_config()
    assert main([str(path)]) == 0
    before = (TINY / "summary.json").read_bytes()
    config = load_config(path)
    with pytest.raises(RecordError, match="already holds a finished run; give --overwrite"):
        execute(config, load(config.data, CPU), CPU, TINY)
    assert (TINY / "summary.json").read_bytes() == before


def test_an_unfinished_run_of_another_config_is_kept(write_config, capsys, run_until):
    path = str(write_config(epochs=4, checkpoint_every=4))
    assert main([path]) == 0
    (TINY / "summary.json").unlink()  # as a kill before the first checkpoint leaves it
    before = (TINY / "metrics.csv").read_bytes()
    capsys.readouterr()
    for command in ([path], ["configs"]):
        entry = run if command == [path] else sweep
        assert entry.main([*command, "optimizer.lr=0.5"]) == 2
        line = one_line_error(capsys)
        assert "run of another config (different: optimizer.lr); give --overwrite or another --output" in line
    assert (TINY / "metrics.csv").read_bytes() == before


def test_what_a_kill_left_half_written_is_removed(write_config):
    TINY.mkdir(parents=True)
    for name in ("checkpoint.pt.tmp", "metrics.csv.tmp", "summary.json.tmp", "config.yaml.tmp", ".owner.json.tmp"):
        (TINY / name).write_text("half")
    assert main([str(write_config(epochs=1))]) == 0
    assert_tidy(TINY)


# --- states between two minibatches -------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def train(training, minibatches=None):
    """Records, up to the end or until so many minibatches are done."""
    records, done, stopped = [], itertools.count(1), False

    def on_batch(_):
        if next(done) == minibatches:
            raise Stopped

    try:
        for record in training.records(on_batch):
            records.append({**asdict(record), "epoch_seconds": None})
    except Stopped:
        stopped = True
    assert stopped == (minibatches is not None)
    return records


def assert_same_state(one, other):
    """Bit for bit, whatever is nested in what."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same_state(first, second)
    else:
        assert one == other


def with_dropout(config):
    """A model whose steps draw from PyTorch's global generator."""
    with seeded(config.seed, CPU):
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 10))


def through_a_file(state, folder):
    save_checkpoint(folder, state)
    return load_checkpoint(folder)


def stop_and_go_on(config, make, minibatches, folder, change=lambda state: state):
    """Records and final state of a training stopped after so many minibatches, and of its uninterrupted twin."""
    data = load(config.data, CPU)
    with seeded(config.seed, CPU):
        whole = Training(make(config), data, config)
        expected = train(whole)
    with seeded(config.seed, CPU):
        first = Training(make(config), data, config)
        records = train(first, minibatches)
        state = change(through_a_file(first.state_dict(), folder))
    other = config.model_copy(update={"seed": config.seed + 1})  # nothing may be right by chance
    with seeded(other.seed, CPU):
        second = Training(make(other), data, other)
        second.load_state_dict(state)
        records += train(second)
    return records, second.state_dict(), expected, whole.state_dict()


@pytest.mark.parametrize("minibatches", [1, 3, 4, 8, 12])
@pytest.mark.parametrize(
    ("optimizer", "proxprop", "make"),
    [
        (SGD, GRADIENT, build),
        (PROX_SGD, PROX, build),
        (PROX_SGD, EXACT, build),
        (ADAM, PROX, build),
        (SGD, GRADIENT, with_dropout),
        (ADAM, GRADIENT, with_dropout),
    ],
    ids=["nesterov", "prox_cg3", "prox_exact", "adam-prox_cg3", "dropout", "dropout-adam"],
)
def test_a_state_between_two_minibatches_is_all_there_is(
    write_config, tmp_path, optimizer, proxprop, make, minibatches
):
    config = load_config(write_config(optimizer=optimizer, proxprop=proxprop, epochs=4, seed=3))
    records, state, expected, expected_state = stop_and_go_on(config, make, minibatches, tmp_path)
    assert records == expected
    assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]
    for timed in (state, expected_state):
        timed.pop("seconds")
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("key", ["model", "optimizer", "batch", "order", "loss_sum", "generators"])
def test_every_part_of_the_state_counts(write_config, tmp_path, key):
    """Without any one of them, the run goes on otherwise: the test above would notice its loss."""
    config = load_config(write_config(optimizer=SGD, epochs=3, seed=3))
    fresh = Training(with_dropout(config), load(config.data, CPU), config).state_dict()
    records, _, expected, _ = stop_and_go_on(
        config, with_dropout, BATCHES + 1, tmp_path, change=lambda state: {**state, key: fresh[key]}
    )
    assert records != expected


# --- checkpoints that cannot be trusted ---------------------------------------------------------------------------


@pytest.fixture
def stopped(write_config, run_until, capsys):
    """Arguments of a run that was stopped in its second epoch, and goes on when they are given again."""
    arguments = [str(write_config(optimizer=SGD, epochs=3))]
    assert run_until(BATCHES + 1, arguments) == 143
    assert (TINY / CHECKPOINT).exists()
    capsys.readouterr()
    return arguments


def assert_refused(arguments, capsys, reason):
    """With one line, and nothing is touched; to start afresh, one has to say so."""
    before = {path.name: path.read_bytes() for path in TINY.iterdir()}
    assert main(arguments) == 2
    line = one_line_error(capsys)
    assert line.startswith(f"{TINY / CHECKPOINT}: {reason}"), line
    assert line.endswith("; remove it or give --overwrite to start afresh")
    assert line.isprintable()
    assert {path.name: path.read_bytes() for path in TINY.iterdir()} == before

    assert main([*arguments, "--overwrite"]) == 0
    assert read_summary(TINY)["status"] == "finished"
    assert_tidy(TINY)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_refused(stopped, capsys, share):
    content = (TINY / CHECKPOINT).read_bytes()
    (TINY / CHECKPOINT).write_bytes(content[: int(share * len(content))])
    assert_refused(stopped, capsys, "cut short or damaged (")


def test_a_checkpoint_with_a_damaged_byte_is_refused(stopped, capsys):
    content = bytearray((TINY / CHECKPOINT).read_bytes())
    content[len(content) // 2] ^= 0x10
    (TINY / CHECKPOINT).write_bytes(content)
    assert_refused(stopped, capsys, "cut short or damaged (")


def test_no_damaged_byte_changes_what_is_loaded(tmp_path):
    """Most are noticed; the others are in a ZIP archive's padding and dates."""
    state = {"config": "name: a\n", "training": {"weight": torch.arange(200.0), "epoch": 3}}
    save_checkpoint(tmp_path, state)
    path = tmp_path / CHECKPOINT
    content, expected = path.read_bytes(), load_checkpoint(tmp_path)
    weight = content.index(torch.arange(200.0).numpy().tobytes())
    positions = random.Random(0).choices(range(len(content)), k=150)
    accepted = set()
    for position in [*positions, weight, weight + 799]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        loaded, problem = loaded_or_problem(tmp_path)
        if problem is None:
            assert_same_state(loaded, expected)
            accepted.add(position)
        else:
            assert problem.startswith(f"{path}: ")
            assert problem.isprintable()
    assert not accepted & set(range(weight, weight + 800))
    assert len(accepted) < 100


def loaded_or_problem(folder):
    try:
        return load_checkpoint(folder), None
    except CheckpointError as error:
        return None, str(error)


class Malicious:
    """What unpickles by making a file."""

    def __reduce__(self):
        return os.mkdir, ("malice",)


@pytest.mark.parametrize("how", ["a bare pickle", "within torch's archive"])
def test_code_in_a_checkpoint_is_not_run(stopped, capsys, how):
    with (TINY / CHECKPOINT).open("wb") as file:
        if how == "a bare pickle":
            pickle.dump(Malicious(), file)
        else:
            torch.save({"format": 1, "config": Malicious()}, file)
    assert_refused(stopped, capsys, "")
    assert not Path("malice").exists()


def test_a_checkpoint_of_another_config_is_refused_with_what_differs(stopped, capsys):
    assert_refused([*stopped, "optimizer.lr=0.5", "epochs=4"], capsys,
                   "of another config (different: optimizer.lr, epochs)")  # fmt: skip


def test_a_checkpoint_made_with_other_data_is_refused(stopped, capsys, monkeypatch):
    def load_others(*arguments):
        data = load(*arguments)
        return replace(data, identity={**data.identity, "files_md5": {"data_batch_1": "0"}})

    monkeypatch.setattr(run, "load", load_others)
    assert_refused(stopped, capsys, "made with other data than data.root now holds")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {**state, "format": 0}, "not a checkpoint of this version"),
        (lambda state: [1, 2], "not a checkpoint of this version"),
        (lambda state: {key: value for key, value in state.items() if key != "records"}, "of another version of"),
        (lambda state: {**state, "records": [{"loss": 1.0}]}, "of another version of"),
        (lambda state: {**state, "config": "name: a"}, "of another version of"),
        (lambda state: {**state, "training": {**state["training"], "model": {}}}, "of another version of"),
    ],
    ids=["format", "list", "no records", "other records", "other config", "other model"],
)
def test_a_checkpoint_of_another_version_is_refused(stopped, capsys, change, reason):
    torch.save(change(load_checkpoint(TINY)), TINY / CHECKPOINT)
    assert_refused(stopped, capsys, reason)


def test_afresh_is_as_if_there_were_no_checkpoint(stopped):
    assert main([*stopped, "--overwrite"]) == 0
    assert main([*stopped, "--output", "whole"]) == 0
    assert_same_run(TINY, Path("whole"))


def test_a_summary_is_never_beside_the_config_of_another_run(write_config, monkeypatch):
    path = str(write_config(epochs=1))
    assert main([path]) == 0
    replace = Path.replace

    def killed(source, target):
        replace(source, target)
        if Path(target).name == "config.yaml":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        main([path, "optimizer.lr=0.123", "--overwrite"])
    assert read_config(TINY).optimizer.lr == 0.123
    assert read_summary(TINY) is None


# --- what may differ between a run's parts ------------------------------------------------------------------------


def test_how_a_run_is_carried_out_may_change_on_the_way(write_config, run_until, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = str(write_config(epochs=5, device="auto"))
    assert run_until(BATCHES + 1, [path]) == 143
    assert run_until(BATCHES + 1, [path, "device=cpu", "checkpoint_every=4"]) == 143
    assert main([path, "tensorboard=true", "device=cpu"]) == 0
    assert main([path, "--output", "whole"]) == 0
    assert_same_run(TINY, Path("whole"))


# --- more epochs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "proxprop"), [(PROX_SGD, PROX), (ADAM, GRADIENT)])
@pytest.mark.parametrize("minibatches", [None, 1, BATCHES + 1, 2 * BATCHES])
def test_a_run_made_longer_is_a_run_of_that_length(write_config, run_until, minibatches, optimizer, proxprop):
    """Finished or stopped, and before its first checkpoint, too."""
    path = str(write_config(optimizer=optimizer, proxprop=proxprop, epochs=2, keep_checkpoint=True))
    if minibatches is None:
        assert main([path]) == 0
    else:
        assert run_until(minibatches, [path]) == 143
    assert main([path, "epochs=5"]) == 0
    assert main([path, "epochs=5", "--output", "whole"]) == 0
    assert_same_run(TINY, Path("whole"))
    assert read_config(TINY) == load_config(path, ["epochs=5"])
    assert_same_state(load_checkpoint(TINY)["training"], load_checkpoint(Path("whole"))["training"])


def test_a_sweep_makes_its_runs_longer_and_keeps_their_states(write_config, capsys):
    for name in "ab":
        write_config(name, keep_checkpoint=name == "a")
    assert sweep.main(["configs"]) == 0
    before = load_checkpoint(Path("results/configs/a"))
    capsys.readouterr()
    assert sweep.main(["configs"]) == 0
    assert capsys.readouterr().out.count("skipped, already") == 2
    assert load_checkpoint(Path("results/configs/a"))["records"] == before["records"]

    assert sweep.main(["configs", "epochs=4"]) == 2  # before anything runs
    line = "results/configs/b: holds a finished run of 2 epochs, which cannot be made longer, as its last state was not"
    assert one_line_error(capsys).startswith(line)
    assert sweep.main(["configs/a.yaml", "epochs=4"]) == 0
    assert sweep.main(["configs/a.yaml", "epochs=4", "keep_checkpoint=false"]) == 0
    assert "a: skipped, already" in capsys.readouterr().out
    assert read_summary(Path("results/configs/a"))["epochs"] == 4
    assert (Path("results/configs/a") / CHECKPOINT).exists()  # as the run was made


def test_a_run_is_not_made_shorter_nor_longer_with_other_settings(write_config, run_until, capsys):
    path = str(write_config(epochs=4, keep_checkpoint=True))
    assert run_until(BATCHES + 1, [path]) == 143
    for arguments, keys in ([["epochs=3"], "epochs"], [["epochs=5", "seed=2"], "epochs, seed"]):
        capsys.readouterr()
        assert main([path, *arguments]) == 2
        assert f"of another config (different: {keys})" in one_line_error(capsys)
    assert main([path]) == 0
    for epochs in (3, 4):
        capsys.readouterr()
        assert main([path, f"epochs={epochs}"]) == 2
        assert one_line_error(capsys).startswith(f"{TINY}: already holds a finished run; ")


def test_a_diverged_run_with_more_epochs_is_the_same_run(write_config, capsys):
    path = str(write_config(optimizer={"name": "sgd", "lr": 1e30}, keep_checkpoint=True))
    assert sweep.main([path]) == 0
    before = numbers(TINY)
    assert not (TINY / CHECKPOINT).exists()
    assert sweep.main([path, "epochs=5"]) == 0
    assert numbers(TINY) == before
    assert read_config(TINY).epochs == 5
    assert read_summary(TINY)["status"] == "diverged"


def test_a_kill_while_a_run_is_made_longer_loses_nothing(write_config, monkeypatch):
    """Between any two of the files that its start writes."""
    path = str(write_config(keep_checkpoint=True))
    assert main([path]) == 0
    assert main([path, "epochs=4", "--output", "whole"]) == 0
    before = (TINY / "metrics.csv").read_text()
    for killed_at in ("config.yaml", "metrics.csv"):
        write = RunWriter._write

        def killed(self, name, text, before=None, killed_at=killed_at, write=write):
            if name == killed_at:
                raise KeyboardInterrupt
            write(self, name, text, before)

        with monkeypatch.context() as patch:
            patch.setattr(RunWriter, "_write", killed)
            with pytest.raises(KeyboardInterrupt, match=r"^$"):
                main([path, "epochs=4"])
        assert (read_summary(TINY) is None) == (killed_at == "metrics.csv")  # not beside the config of a longer run
        assert (TINY / "metrics.csv").read_text() == before
    assert main([path, "epochs=4"]) == 0
    assert_same_run(TINY, Path("whole"))


def test_other_environments_are_kept_in_the_summary(write_config, run_until, monkeypatch):
    path = str(write_config(epochs=5))
    assert run_until(BATCHES + 1, [path]) == 143
    first = describe_environment(CPU)
    second = {**first, "torch": "9.9.9"}
    monkeypatch.setattr("experiments.launch.execute.describe_environment", lambda *_: second)
    assert run_until(BATCHES, [path]) == 143  # one minibatch of the second epoch is done
    assert run_until(1, [path]) == 143  # the same environment once more
    third = {**first, "device_name": "abacus"}
    monkeypatch.setattr("experiments.launch.execute.describe_environment", lambda *_: third)
    assert main([path]) == 0
    summary = read_summary(TINY)
    assert {key: summary[key] for key in third} == third
    assert summary["earlier_environments"] == [{"until_epoch": 1, **first}, {"until_epoch": 2, **second}]

    assert main([path, "--output", "whole"]) == 0
    assert "earlier_environments" not in read_summary(Path("whole"))
    assert numbers(TINY) == numbers(Path("whole"))


def test_time_spent_is_that_of_all_parts(write_config, run_until):
    path = str(write_config(epochs=3))
    assert run_until(BATCHES + 1, [path]) == 143
    state = load_checkpoint(TINY)
    assert state["seconds"] > 0
    assert state["training"]["seconds"] > 0  # of the epoch that was broken off
    save_checkpoint(TINY, {**state, "seconds": 1000.0, "training": {**state["training"], "seconds": 500.0}})
    assert main([path]) == 0
    assert 1000 < read_summary(TINY)["seconds"] < 1100
    assert 500 < read_metrics(TINY)["epoch_seconds"][2] < 600
    assert read_metrics(TINY)["epoch_seconds"][3] < 100


def test_a_sweep_goes_on_from_its_runs_checkpoints(write_config, run_until, capsys):
    for name in "ab":
        write_config(name, epochs=3, optimizer=SGD)
    assert run_until(3 * BATCHES + 2, ["configs"], main=sweep.main) == 143  # in b's first epoch
    out, err = capsys.readouterr()
    assert "a: finished, 3 epochs" in out
    assert err.startswith(
        "interrupted: b: stopped after epoch 0 and 2 minibatches, its state saved in results/configs/b;"
    )
    assert sweep.main(["configs"]) == 0
    assert "a: skipped, already" in capsys.readouterr().out
    assert sweep.main(["configs", "--output", "whole"]) == 0
    for name in "ab":
        assert_same_run(Path("results/configs") / name, Path("whole/configs") / name)


# --- reproducibility ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden_features": [8]}, {"name": "convnet", "channels": [2, 2, 2]}])
def test_deterministic_runs_are_identical(write_config, monkeypatch, model):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seen = []
    start_writing = RunWriter.start
    monkeypatch.setattr(
        RunWriter,
        "start",
        lambda *arguments: seen.append(torch.are_deterministic_algorithms_enabled()) or start_writing(*arguments),
    )
    path = str(write_config(deterministic=True, model=model, proxprop=PROX, optimizer=PROX_SGD))
    for folder in "ab":
        assert main([path, "--output", folder]) == 0
    assert main([path, "deterministic=false", "--output", "c"]) == 0
    assert_same_run(Path("a"), Path("b"))
    assert numbers(Path("a")) == numbers(Path("c"))  # which is so on the CPU anyway
    assert seen == [True, True, False]
    assert not torch.are_deterministic_algorithms_enabled()


class WithoutDeterministicAlgorithm(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10].clone().put_(torch.tensor([0]), torch.tensor([0.0]))


def test_an_operation_without_a_deterministic_algorithm_is_one_line(write_config, capsys, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = nn.Sequential(WithoutDeterministicAlgorithm(), nn.Linear(10, 10))
    monkeypatch.setattr("experiments.launch.execute.build", lambda config: model)
    path = str(write_config(deterministic=True))
    assert main([path]) == 2
    out, err = capsys.readouterr()
    assert out == "tiny: under way, epoch 0/2\n"
    assert err.startswith("error: deterministic: cannot be true here: put_")
    assert err.count("\n") == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert main([path, "deterministic=false", "--overwrite"]) == 0


def start_and_batches(config):
    """The first record, and all minibatches in their order."""
    model, batches = build(config), []

    def note(module, arguments):
        if module.training:
            batches.append(arguments[0].clone())

    model.register_forward_pre_hook(note)
    records = list(Training(model, load(config.data, CPU), config).records())
    return records[0].train_loss, torch.cat(batches)


def test_the_order_of_the_data_has_a_seed_of_its_own(write_config):
    path = write_config()
    seed0, seed1, seed0_order1, seed1_order0, seed2_order1 = (
        start_and_batches(load_config(path, overrides))
        for overrides in (["seed=0"], ["seed=1"], ["seed=0", "order_seed=1"], ["seed=1", "order_seed=0"],
                          ["seed=2", "order_seed=1"])
    )  # fmt: skip
    assert len(seed0[1]) == 2 * 100  # two epochs
    # The order is order_seed's, by default seed's ...
    for one, other in [(seed0, seed1_order0), (seed1, seed0_order1), (seed1, seed2_order1)]:
        assert torch.equal(one[1], other[1])
        assert one[0] != other[0]
    assert not torch.equal(seed0[1], seed1[1])
    assert not torch.equal(seed0[1][:100], seed0[1][100:])
    # ... and the start is seed's alone.
    assert seed0[0] == seed0_order1[0]
    assert seed1[0] == seed1_order0[0]


# --- TensorBoard --------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def test_events_go_on_with_a_resumed_run(write_config, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = str(write_config(epochs=6, checkpoint_every=2, tensorboard=True))

    def crash(progress, record, seconds):
        if record.epoch == 5:
            raise Crash("after the events of epoch 5 are written")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.launch.execute.Progress.show", crash)
        with pytest.raises(Crash, match="after the events"):
            main([path])
    assert load_checkpoint(TINY)["training"]["epoch"] == 4
    before = read_metrics(TINY)
    assert len(before) == 6
    assert main([path]) == 0
    metrics = read_metrics(TINY)

    events = accumulator.EventAccumulator(str(TINY / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(column for column in metrics.columns if column != "epoch")
    for column in events.Tags()["scalars"]:
        scalars = events.Scalars(column)
        assert [event.step for event in scalars] == list(range(7))
        assert [event.value for event in scalars] == pytest.approx(metrics[column].tolist(), rel=1e-6)
    # Epoch 5 was run twice, and its second time is the one that counts.
    assert metrics["epoch_seconds"][5] != before["epoch_seconds"][5]


def test_no_events_unless_asked_for(write_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([str(write_config())]) == 0
    assert_tidy(TINY)


@pytest.mark.parametrize("command", [main, sweep.main])
def test_tensorboard_that_is_not_installed_is_one_line(write_config, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    assert command([str(write_config()), "tensorboard=true"]) == 2
    assert one_line_error(capsys) == (
        "tensorboard: true needs a package that is not installed: pip install tensorboard"
    )
    assert not Path("results").exists()


def test_a_diverged_run_is_over_and_has_no_checkpoint(write_config, run_until):
    path = str(write_config(epochs=5))
    assert run_until(BATCHES + 1, [path, "optimizer.lr=1e30"]) == 0  # it diverges before
    assert read_summary(TINY)["status"] == "diverged"
    assert_tidy(TINY)
