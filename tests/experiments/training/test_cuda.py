"""On a GPU: runs are those of the CPU to rounding, repeat themselves, and go on where they stopped."""

from pathlib import Path

import pytest
import torch

from experiments.folder.read import read_metrics
from experiments.run import main
from experiments.training.device import full_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
MODELS = {
    "mlp": {"name": "mlp", "hidden_features": [8]},
    "convnet": {"name": "convnet", "channels": [2, 3, 2], "kernel_size": 3},
}
MODES = ["gradient", "prox_cg3", "prox_exact", "published_cg3"]


def numbers(folder):
    return read_metrics(Path(folder)).drop(columns="epoch_seconds").to_numpy()


@pytest.fixture
def config(write_config):
    def write(model, mode, **changes):
        adam = {"name": "adam", "lr": 0.01}
        return str(write_config(model=MODELS[model], proxprop={"optimization_mode": mode}, optimizer=adam, **changes))

    return write


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_that_of_the_cpu_to_rounding(config, model, mode):
    path = config(model, mode)
    for device in ("cpu", "cuda"):
        assert main([path, f"device={device}", "--output", device]) == 0
    torch.testing.assert_close(*(torch.tensor(numbers(device)) for device in ("cuda", "cpu")), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_a_deterministic_run_goes_on_to_the_last_digit(config, model, mode, run_until, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    path = config(model, mode, deterministic=True, device="cuda")
    assert main([path, "--output", "whole"]) == 0
    assert run_until(4, [path, "--output", "resumed"]) == 143
    assert main([path, "--output", "resumed"]) == 0
    assert numbers("resumed").tolist() == numbers("whole").tolist()


def test_convolutions_of_a_run_have_the_digits_of_float32():
    torch.manual_seed(0)
    images, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(images.double(), weight.double())
    with full_precision():
        found = torch.nn.functional.conv2d(images.cuda(), weight.cuda()).cpu().double()
    assert (found - exact).norm() < 1e-6 * exact.norm()
