"""The benchmarks that no other test runs come to their end, and refuse what they cannot do before they begin."""

import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from benchmarks import accuracy, checkpoint_cost, optimizer_cost, step_cost
from benchmarks.accuracy import Case
from benchmarks.networks import GPT, NETWORKS, Network, tokens
from experiments.command.cli import run_command
from tests.synthetic_cifar import IMAGES, write_small_cifar

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "accuracy": lambda: run_command(accuracy.measure),
    "checkpoint_cost": lambda: run_command(checkpoint_cost.main),
    "optimizer_cost": optimizer_cost.main,
    "step_cost": step_cost.main,
}


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return COMMANDS[name]()


def test_digits_of_directions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def small() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))

    write_small_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(accuracy, "BATCH", IMAGES)
    monkeypatch.setitem(NETWORKS, "mlp", Network(small, NETWORKS["mlp"].batch, "3"))
    small_gpt = Network(lambda: GPT(width=16, blocks=1), tokens, "head")
    monkeypatch.setitem(NETWORKS, "gpt", small_gpt)
    mlp, gpt = Case(("prox_exact", "prox_cg10"), (0.05,)), Case(("prox_exact",), (1.0,), (0, 1), images=0)
    monkeypatch.setattr(accuracy, "CASES", {"mlp": mlp, "gpt": gpt})
    file = tmp_path / "accuracy.json"
    assert run(monkeypatch, "accuracy", "--root", str(tmp_path), "--json", str(file)) == 0
    written = json.loads(file.read_text())
    assert [(row["network"], row["steps"], row["mode"]) for row in written["layers"]] == [
        *(("mlp", 0, mode) for mode in ("prox_exact", "prox_cg10")),
        *(("gpt", steps, "prox_exact") for steps in (0, 1)),
    ]
    assert all(0 < row["error"] < 1e-3 for row in written["layers"])
    assert written["first MLP layer"]["3"]["orthogonalised, float32"] < 1e-3


def test_the_documentation_shows_the_digits_that_were_measured() -> None:
    def shown(*errors: float) -> str:
        return ", ".join(f"**{e:.2f}**" if e > 0.1 else re.sub("e-0", "e-", f"{e:.1e}") for e in errors)

    page = (ROOT / "docs/algorithm.md").read_text()
    facts = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())
    for name, text in [("recurrence alone, float32",) * 2, ("recurrence alone, float64",) * 2,
                       ("orthogonalised, float32", "orthogonalised, float32 (what `prox_cgN` does)")]:  # fmt: skip
        cells = [shown(facts["first MLP layer"][n][name]) for n in ("3", "5", "10")]
        assert f"| {text} | {' | '.join(cells)} |" in page
    errors = defaultdict(list)
    for row in facts["layers"]:
        errors[row["network"], row["mode"], row["tau"]].append(row["error"])
    for network, label in [("mlp", "MLP"), ("convnet", "ConvNet"), ("resnet18_32", "resnet18"), ("gpt", "GPT")]:
        for mode in accuracy.CASES[network].modes:
            cells = [shown(*errors[network, mode, tau]) for tau in (0.05, 1.0, 50.0)]
            assert f"| {label}, `{mode}` | {' | '.join(cells)} |".replace("|  |", "| |") in page


def test_seconds_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint_cost, "CONFIGS", ("convnet_adam_gradient",))
    monkeypatch.setattr(checkpoint_cost, "STEPS", 2)
    clock = SimpleNamespace(perf_counter=itertools.count(0, 2).__next__)  # two seconds each time it is looked at
    monkeypatch.setattr(checkpoint_cost, "time", clock)
    file = tmp_path / "checkpoint.json"
    assert run(monkeypatch, "checkpoint_cost", "--device", "cpu", "--json", str(file)) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["run"] == "convnet_adam_gradient"
    assert (row["epoch_s"], row["save_s"], row["load_s"]) == (90 * 2, 2, 2)
    assert row["save_ratio"] == 2 / 180


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_without_a_folder_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    configs = ["configs/paper/mlp_sgd_cg3.yaml"] if name == "optimizer_cost" else []
    assert run(monkeypatch, name, *configs, "--json", str(tmp_path / "none" / "x.json")) == 2
    error = capsys.readouterr().err
    assert error == f"error: argument --json: there is no folder {tmp_path / 'none'} (see --help)\n"


def test_a_folder_for_checkpoints_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run(monkeypatch, "checkpoint_cost", "--folder", "/none") == 2
    assert capsys.readouterr() == ("", "error: argument --folder: /none is no folder (see --help)\n")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "accuracy"])
def test_a_device_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    configs = ["configs/paper/mlp_sgd_cg3.yaml"] if name == "optimizer_cost" else []
    assert run(monkeypatch, name, *configs, "--device", "foo") == 2
    assert capsys.readouterr().err == "error: device: must be auto, cpu, cuda or cuda:N, got 'foo'\n"


def test_layers_are_measured_for_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(step_cost, "measure_layer", lambda *given: seen.append(given[3]) or {})
    for seconds in ([], ["--seconds", "7"]):
        assert run(monkeypatch, "step_cost", "--layers", "--model", "convnet", "--modes", "gradient", *seconds) == 0
    assert seen == [1.0] * 3 + [7.0] * 3


def test_layers_are_not_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "step_cost", "--layers", "--compile", "default") == 2
    assert capsys.readouterr().err == "error: --layers are measured without --compile (see --help)\n"


@pytest.mark.parametrize("module", [step_cost, checkpoint_cost])
def test_steps_are_measured_with_the_memory_that_training_keeps(monkeypatch: pytest.MonkeyPatch, module) -> None:
    seen = []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: seen.append("kept"))
    monkeypatch.setattr(module, "measure", lambda *_: seen.append("measured") or defaultdict(float))
    assert run(monkeypatch, module.__name__.rpartition(".")[2], "--device", "cpu") == 0
    assert seen[:2] == ["kept", "measured"]
