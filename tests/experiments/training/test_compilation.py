"""Compiled steps give the numbers of plain ones; what cannot be compiled is one line; no step waits for its device."""

import shutil
from pathlib import Path

import pytest
import torch

from experiments import run, sweep
from experiments.config import load_config
from experiments.data.datasets import Data, Split, load
from experiments.folder.read import read_metrics
from experiments.training import compilation
from experiments.training.networks import build
from experiments.training.train import Training

CPU = torch.device("cpu")
MODES = ["gradient", "prox_cg1", "prox_cg3", "prox_cg10", "prox_exact", "published_cg3"]
NETWORKS = {
    "mlp": ({"name": "mlp", "hidden_features": [8, 5]}, {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "convnet": ({"name": "convnet", "channels": [2, 3, 2], "kernel_size": 3}, {"name": "adam", "lr": 0.01}),
}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler here"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def tracing_only(monkeypatch):
    """Compile with a backend that traces a step whole and runs it as it is, which takes no time."""
    monkeypatch.setitem(compilation._BACKENDS, "default", "aot_eager")
    yield
    torch.compiler.reset()


def train(path, folder, how):
    assert run.main([str(path), f"compile={how}", "--output", folder]) == 0
    return torch.tensor(read_metrics(Path(folder)).drop(columns="epoch_seconds").to_numpy())


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_run_has_the_numbers_of_a_plain_one(write_config):
    path = write_config(proxprop={"optimization_mode": "prox_cg1"})  # batches of 40, 40 and 20
    torch.testing.assert_close(train(path, "compiled", "default"), train(path, "plain", "none"), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.usefixtures("tracing_only")
# Of conjugate gradients, the fewest steps that have all a step can have: each more is the same traced once more.
@pytest.mark.parametrize("mode", ["gradient", "prox_cg1", "prox_cg4", "prox_exact", "published_cg3"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_step_is_traced_whole(write_config, network, mode):
    model, optimizer = NETWORKS[network]
    proxprop = {"optimization_mode": mode}
    # Two batches of one size: each other size is traced anew, which the run above has.
    path = write_config(model=model, optimizer=optimizer, proxprop=proxprop, epochs=1, batch_size=50)
    torch.testing.assert_close(train(path, "compiled", "default"), train(path, "plain", "none"), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tracing_only")
def test_one_process_compiles_any_number_of_runs(write_config, monkeypatch):
    monkeypatch.setitem(compilation._BACKENDS, "default", "eager")  # which only traces: the limit is of traces
    for seed in range(10):  # PyTorch compiles the same lines eight times
        config = load_config(write_config(epochs=1, batch_size=100), ["compile=default", f"seed={seed}"])
        assert len(list(Training(build(config), load(config.data, CPU), config).records())) == 2


@pytest.mark.usefixtures("tracing_only")
def test_how_a_run_is_carried_out_makes_no_other_run_of_it(write_config, run_until, capsys):
    path = write_config()
    expected = train(path, "whole", "none")
    assert run_until(4, [str(path), "compile=default", "--output", "resumed"]) == 143
    torch.testing.assert_close(train(path, "resumed", "none"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("main", [run.main, lambda arguments: sweep.main([*arguments, "--check"])])
def test_cuda_graphs_need_cuda(write_config, capsys, main):
    assert main([str(write_config()), "compile=cudagraph"]) == 2
    line = "error: compile: cudagraph needs a CUDA device, got cpu; allowed here: none, default\n"
    assert capsys.readouterr().err == line


def test_another_word_is_refused(write_config, capsys):
    assert run.main([str(write_config()), "compile=fast"]) == 2
    assert capsys.readouterr().err == "error: compile: must be 'none', 'default' or 'cudagraph', got 'fast'\n"


def test_no_compiler_is_one_line(write_config, start, tmp_path):
    # As with CXX=/bin/false in the environment, which PyTorch reads when it is imported.
    before = f"""
import os, torch._inductor.config
os.environ["TORCHINDUCTOR_CACHE_DIR"] = {str(tmp_path / "cache")!r}
torch._inductor.config.cpp.cxx = ("/bin/false",)
"""
    process = start("experiments.run", write_config(), "compile=default", "--output", "out", before=before)
    assert process.wait() == 2
    *_, line = process.errors.strip().splitlines()
    assert line.startswith("error: compile: default does not work here (")
    assert "C++ compiler" in line
    assert line.endswith("; allowed everywhere: none")
    assert "Traceback" not in process.errors


def training_on(device, write_config, network, mode, how="none"):
    model, optimizer = NETWORKS[network]
    path = write_config(model=model, optimizer=optimizer, proxprop={"optimization_mode": mode})
    config = load_config(path, [f"compile={how}"])
    data = load(config.data, CPU)
    splits = (Split(s.images.to(device), s.labels.to(device)) for s in (data.train, data.val, data.test))
    return Training(build(config).to(device), Data(*splits, data.identity), config)


def one_step(training):
    training._step(torch.arange(40, device=training.data.train.labels.device))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_no_step_reads_a_number_back(write_config, network, mode):
    # Tensors of the meta device have shapes and no numbers: whoever asks for one fails, as would branch on one. The
    # library takes the ways there that it takes on a GPU.
    if (network, mode) == ("convnet", "prox_cg1") and torch.__version__ < (2, 14):
        pytest.skip("PyTorch before 2.14 has no matrix-free convolution on the meta device")
    training = training_on(torch.device("meta"), write_config, network, mode)
    training._train_epoch(lambda examples: None)
    assert training.batch == 3
    one_step(training)  # as on a GPU, below
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        training._next_epoch()


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_no_step_waits_for_the_gpu(write_config, network, mode):
    training = training_on(torch.device("cuda"), write_config, network, mode)
    one_step(training)  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # one of PyTorch's parts of a step
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_cuda_graphs_give_the_numbers_of_plain_steps(write_config, network, mode):
    rows = []
    for how in ("cudagraph", "none"):
        records = training_on(torch.device("cuda"), write_config, network, mode, how).records()
        rows.append([[record.minibatch_loss, record.train_loss, record.val_loss] for record in records])
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
