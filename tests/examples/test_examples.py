"""Every example runs, learns, and says in one line what is wrong with its arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import adam_convnet, change_while_training, cifar10_mlp, own_layer
from experiments.command.cli import run_command
from tests.synthetic_cifar import write_small_cifar

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"adam_convnet": adam_convnet, "change_while_training": change_while_training, "own_layer": own_layer}


def test_each_is_tested_and_described():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"cifar10_mlp", *SHORT}
    assert set(re.findall(r"`(\w+)\.py`", (ROOT / "examples" / "README.md").read_text())) == names


@pytest.mark.parametrize("suffix", [".pdf", ".png"])
def test_a_network_of_ones_own_on_cifar10(tmp_path, monkeypatch, capsys, suffix):
    write_small_cifar(tmp_path, monkeypatch)
    drawn, draw = [], cifar10_mlp.draw
    monkeypatch.setattr(cifar10_mlp, "draw", lambda curves, output: drawn.append(curves) or draw(curves, output))
    output = tmp_path / f"figure{suffix}"
    arguments = ["--data", str(tmp_path), "--epochs", "5", "--train-samples", "80", "--output", str(output)]
    assert cifar10_mlp.main(arguments) == 0
    assert output.read_bytes().startswith({".pdf": b"%PDF", ".png": b"\x89PNG"}[suffix])
    assert capsys.readouterr().out.count("epoch 5: training loss") == 2
    plain, proximal = drawn[0]["BackProp"], drawn[0]["ProxProp (3 cg)"]
    assert len(plain) == len(proximal) == 6
    assert plain[0] == proximal[0]
    assert all(curve[-1][0] < 0.95 * curve[0][0] for curve in (plain, proximal))
    assert plain[1][0] != proximal[1][0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data", "none"], "none/cifar-10-batches-py: no such folder"),
        (["--epochs", "0"], "--epochs and --train-samples must be at least 1"),
        (["--train-samples", "-1"], "--epochs and --train-samples must be at least 1"),
        (["--train-samples", "45001"], "data.train_samples: must be at most 45000"),
        (["--output", "figure.doc"], "--output must end in .pdf, .png, .svg and be in a folder that exists"),
        (["--output", "none/figure.pdf"], "--output must end in .pdf, .png, .svg and be in a folder that exists"),
    ],
)
def test_arguments_that_cannot_be_met_are_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: cifar10_mlp.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", SHORT)
def test_a_short_one_learns(name, capsys):
    SHORT[name].main(epochs=3)
    runs = {"adam_convnet": 2}.get(name, 1)
    losses = [float(number) for number in re.findall(r"\b\d\.\d{3,4}$|\b\d\.\d{3}\b", capsys.readouterr().out, re.M)]
    losses = losses[-3 * runs :]
    assert len(losses) == 3 * runs
    for start in range(0, len(losses), 3):
        assert losses[start] > losses[start + 1] > losses[start + 2]


def test_modes_and_step_sizes_are_changed(capsys):
    change_while_training.main(epochs=4)
    settings = re.findall(r"epoch \d: (\w+), τ = ([\d.]+)", capsys.readouterr().out)
    assert settings == [("prox_cg3", "5"), ("prox_cg3", "2.5"), ("prox_exact", "1.25"), ("prox_exact", "0.625")]


def test_an_example_runs_as_a_script_from_anywhere(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "examples" / "change_while_training.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 10
