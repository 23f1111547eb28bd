"""What the benchmark of optimizers says of a step's memory and seconds."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import optimizer_cost
from benchmarks.optimizer_cost import ROUND, ROUNDS, batches, measure, peak_memory, seconds_per_step
from experiments.command.errors import ExperimentError
from experiments.config import Config
from experiments.training.train import Training

CPU = torch.device("cpu")
HIDDEN = 200
WEIGHTS = 4 * (3073 * HIDDEN + (HIDDEN + 1) * 10)  # bytes


def config(optimizer: dict[str, object] | None = None):
    return Config.model_validate({
        "name": "tiny",
        "model": {"name": "mlp", "hidden_features": (HIDDEN,)},
        "optimizer": optimizer or {"name": "sgd", "lr": 0.1},
        "proxprop": {"optimization_mode": "gradient"},
        "epochs": 12,
        "batch_size": 2,
    })  # fmt: skip


def test_memory_is_of_parameters_gradients_and_the_optimizers_state() -> None:
    sgd = peak_memory(config(), CPU)
    adam = peak_memory(config({"name": "adam", "lr": 1e-3}), CPU)
    assert 2 * WEIGHTS < sgd < 2.2 * WEIGHTS
    assert 4 * WEIGHTS < adam < 6.2 * WEIGHTS  # two moments more, and what makes a step of them


def test_seconds_are_a_round_s_mean_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Training:
        """Of whose epochs each is a round."""

        def __init__(self, model, data, config):
            assert len(data.train) == ROUND * config.batch_size
            assert config.epochs == ROUNDS == 4

        def records(self):
            for seconds in (0.0, 100.0, 1.0, 2.0, 9.0):
                yield SimpleNamespace(epoch_seconds=seconds * ROUND, diverged=False)

    monkeypatch.setattr(optimizer_cost, "Training", Training)
    assert seconds_per_step(config(), CPU) == pytest.approx(2.0)


def test_a_row_says_what_it_is_for() -> None:
    row = measure(config(), CPU)
    assert row["model"]["name"] == "mlp"
    assert row["optimizer"]["lr"] == 0.1
    assert row["proxprop"]["optimization_mode"] == "gradient"
    assert row["batch_size"] == 2
    assert row["step_seconds"] > 0


def test_a_step_size_that_would_diverge_is_measured_as_any_other() -> None:
    hot = config({"name": "sgd", "lr": 1e30})
    row = measure(hot, CPU)
    assert row["optimizer"]["lr"] == 1e30
    assert row["step_seconds"] > 0


def test_steps_are_not_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        optimizer_cost, "Training", lambda model, data, config: seen.append(config) or Training(model, data, config)
    )
    observed = config().model_copy(update={"diagnostics_every": 1})
    peak_memory(observed, CPU)
    assert seen[0].diagnostics_every is None


def test_settings_that_cost_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "configs/rivals/base_mlp.yaml"
    for name, grid in (("a", "{optimizer.lr: [0.1, 0.2], proxprop.optimization_mode: [gradient, prox_cg3]}"),
                       ("b", "{optimizer.lr: [0.3], batch_size: [7]}")):  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\nseeds: 2\ngrid: {grid}\n")
    measured = []

    def row(config: Config, device: torch.device) -> dict[str, object]:
        measured.append((config.batch_size, config.proxprop.optimization_mode))
        return {"model": {"name": "mlp"}, "step_seconds": 1.0, "peak_bytes": 1.0, "name": config.name}

    monkeypatch.setattr(optimizer_cost, "measure", row)
    monkeypatch.setattr(sys, "argv", ["optimizer_cost", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert optimizer_cost.main() == 0
    assert measured == [(500, "gradient"), (500, "prox_cg3"), (7, "gradient")]


def test_a_loss_that_is_not_finite_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(ROUND, config(), CPU)
    data.train.images[-1] = float("nan")
    monkeypatch.setattr(optimizer_cost, "batches", lambda *_: data)
    with pytest.raises(ExperimentError, match=r"^tiny: the loss of round 1 is not finite$"):
        seconds_per_step(config(), CPU)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("name=sgd,tau_prox=0.1,lr=0.1,seed=1", "mlp  1.000 s  3 MiB  name=sgd,tau_prox=0.1"),
        ("mlp_sgd_cg3,seed=1", "mlp  1.000 s  3 MiB  mlp_sgd_cg3"),
        ("lr=0.1", "mlp  1.000 s  3 MiB"),
    ],
)
def test_a_printed_row_is_named_by_what_it_depends_on(name: str, printed: str) -> None:
    row = {"model": {"name": "mlp"}, "step_seconds": 1.0, "peak_bytes": 3.0 * 2**20, "name": name}
    assert optimizer_cost._line(row) == printed


def test_rows_are_kept_whatever_becomes_of_a_later_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(__file__).parents[2] / "configs/rivals/base_mlp.yaml"
    (tmp_path / "a.yaml").write_text(f"extends: {base}\ngrid: {{batch_size: [5, 6, 7]}}\n")

    def row(config: Config, device: torch.device) -> dict[str, object]:
        if config.batch_size == 7:
            signal.raise_signal(signal.SIGINT)
        return {"model": {"name": "mlp"}, "step_seconds": 1.0, "peak_bytes": 1.0, "name": config.name}

    file = tmp_path / "costs.json"
    monkeypatch.setattr(optimizer_cost, "measure", row)
    monkeypatch.setattr(sys, "argv", ["optimizer_cost", str(tmp_path / "a.yaml"), "--json", str(file)])
    assert optimizer_cost.main() == 130
    assert capsys.readouterr().err == "interrupted: the files written so far are kept\n"
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["batch_size=5", "batch_size=6"]
