"""diagnostics_every: what is recorded of the layers, that it changes no number, and that runs go on with it."""

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import sweep
from experiments.command.errors import RecordError
from experiments.config import load_config
from experiments.data.datasets import load
from experiments.folder.checkpoint import load_checkpoint
from experiments.folder.read import read_diagnostics
from experiments.run import main
from experiments.training.diagnostics import Observer
from experiments.training.networks import build
from experiments.training.train import Training
from proxprop import ProxPropLinear

pytestmark = pytest.mark.usefixtures("one_thread")

TINY, BARE = Path("results/configs/tiny"), Path("bare")
CONVNET = {"name": "convnet", "channels": [6, 8, 8], "kernel_size": 3}
SETTINGS = {
    "mlp cg": {"proxprop": {"optimization_mode": "prox_cg3", "tau_prox": 0.1}},
    "mlp exact": {"proxprop": {"optimization_mode": "prox_exact", "tau_prox": 0.1}},
    "convnet published": {"model": CONVNET, "proxprop": {"optimization_mode": "published_cg2", "tau_prox": 0.1}},
    "gradient": {"proxprop": {"optimization_mode": "gradient", "tau_prox": 0.25}},
    "mean": {"proxprop": {"optimization_mode": "prox_exact", "tau_prox": 5.0, "gram_reduction": "mean"}},
}


def rows(folder):
    """The text of diagnostics.csv, line by line."""
    return (folder / "diagnostics.csv").read_text().splitlines()


def numbers(folder):
    """The text of metrics.csv without the seconds."""
    return [line.rpartition(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def expected(path):
    """Epoch by epoch and step by step, what each layer's .grad is beside that of a plain layer at the same place."""
    config = load_config(path)
    device = torch.device("cpu")
    data = load(config.data, device)
    model = build(config)
    training = Training(model, data, config)
    seen: dict[str, list[tuple[float, float, float]]] = {}
    epochs = []

    def watch():
        """Replace the optimizer's step by one that looks at .grad first."""
        step = training.optimizer.step

        def looking():
            proximal = {name: p.grad.clone() for name, p in model.named_parameters()}
            plain = build(config)
            plain.load_state_dict(model.state_dict())
            layers = [name for name, m in plain.named_modules() if hasattr(m, "tau_prox")]
            for name in layers:
                plain.get_submodule(name).optimization_mode = "gradient"
            batch = watch.batches[len(watch.done)]
            watch.done.append(None)
            images, labels = data.train.images[batch], data.train.labels[batch]
            torch.nn.functional.cross_entropy(plain(images), labels).backward()
            for name in layers:
                keys = [key for key in proximal if key.startswith(f"{name}.")]
                d = torch.cat([proximal[key].flatten() for key in keys]).double()
                g = torch.cat([plain.get_parameter(key).grad.flatten() for key in keys]).double()
                w = torch.cat([plain.get_parameter(key).detach().flatten() for key in keys]).double()
                cosine = float(d @ g / d.norm() / g.norm())
                explicit = 1 if config.proxprop.gram_reduction == "mean" else config.proxprop.tau_prox
                ratio = float(d.norm() / g.norm() / explicit)
                seen.setdefault(name, []).append((cosine, ratio, float(d.norm() / w.norm())))
            step()

        training.optimizer.step = looking

    watch()
    order = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        watch.batches = torch.randperm(len(data.train), generator=order).split(config.batch_size)
        watch.done = []
        training._train_epoch(lambda n: None)
        training._next_epoch()
        epochs.append(dict(seen))
        seen.clear()
    return epochs


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_are_those_of_the_steps(write_config, name):
    path = write_config(epochs=3, **SETTINGS[name])
    assert main([str(path), "diagnostics_every=2"]) == 0
    recorded = read_diagnostics(TINY)
    wanted = expected(path)[1]  # the second epoch alone
    assert list(recorded["layer"]) == list(wanted)
    assert set(recorded["epoch"]) == {2}
    for (layer, steps), (_, row) in zip(wanted.items(), recorded.iterrows(), strict=True):
        cosines, ratios, weights = zip(*steps, strict=True)
        assert (row["steps"], row["not_descent"], row["failed"]) == (3, sum(c <= 0 for c in cosines), 0), layer
        assert row["min_cosine"] == pytest.approx(min(cosines), abs=1e-5)
        assert row["mean_cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
        assert row["mean_step_ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-5)
        assert row["mean_weight_ratio"] == pytest.approx(sum(weights) / 3, rel=1e-5)


def test_a_published_solvers_directions_are_set_beside_the_stated_ones(write_config):
    published = {"optimization_mode": "published_cg2", "tau_prox": 0.1}
    path = str(write_config(epochs=1, model=CONVNET, proxprop=published))
    assert main([path, "diagnostics_every=1"]) == 0
    recorded = read_diagnostics(TINY)
    assert recorded["stated_cosine"].between(-1, 0.999).all()
    assert recorded["stated_ratio"].between(1e-3, 0.99).all()
    same = ["proxprop.optimization_mode=published_cg2-only-recurrence", "--output", str(BARE)]
    assert main([path, "diagnostics_every=1", *same]) == 0  # after two iterations, nothing is lost by rounding
    assert read_diagnostics(BARE)["stated_cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert read_diagnostics(BARE)["stated_ratio"].to_numpy() == pytest.approx(1, abs=1e-5)


def test_older_files_without_what_is_stated_are_read(write_config):
    path = write_config(epochs=1, **SETTINGS["mlp cg"])
    assert main([str(path), "diagnostics_every=1"]) == 0
    (TINY / "diagnostics.csv").write_text("\n".join(line.rsplit(",", 2)[0] for line in rows(TINY)) + "\n")
    assert read_diagnostics(TINY)["stated_ratio"].isna().all()
    assert read_diagnostics(TINY)["min_cosine"].notna().all()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_number_of_the_run_changes(write_config, name):
    path = str(write_config(epochs=3, **SETTINGS[name]))
    assert main([path, "diagnostics_every=1"]) == 0
    assert main([path, "--output", str(BARE)]) == 0
    assert numbers(TINY) == numbers(BARE)
    assert not (BARE / "diagnostics.csv").exists()
    assert len(rows(TINY)) == 1 + 3 * (1 if "model" not in SETTINGS[name] else 3)


@pytest.mark.parametrize("minibatches", [1, 3, 4, 5, 8])
def test_a_run_that_was_stopped_ends_in_the_same_rows(write_config, run_until, minibatches):
    path = str(write_config(epochs=3, **SETTINGS["mlp exact"]))
    assert main([path, "diagnostics_every=2", "--output", "whole"]) == 0
    assert run_until(minibatches, [path, "diagnostics_every=2"]) == 128 + signal.SIGTERM
    assert not list(TINY.glob("*.tmp"))
    assert main([path, "diagnostics_every=2"]) == 0
    assert rows(TINY) == rows(Path("whole"))
    assert numbers(TINY) == numbers(Path("whole"))


def test_another_key_goes_on_with_the_same_run(write_config, run_until):
    path = str(write_config(epochs=3, **SETTINGS["mlp cg"]))
    assert main([path, "--output", str(BARE)]) == 0
    assert run_until(1, [path]) == 143
    assert "observed" not in load_checkpoint(TINY)["training"]
    assert run_until(3, [path, "diagnostics_every=1"]) == 143  # from the second step on, into the second epoch
    state = load_checkpoint(TINY)
    assert [row["steps"] for row in state["layer_records"]] == [2]
    assert main([path]) == 0
    assert [line.split(",")[:3] for line in rows(TINY)[1:]] == [["1", "1", "2"]]
    assert numbers(TINY) == numbers(BARE)


def test_a_fresh_start_leaves_nothing_of_the_former(write_config):
    path = str(write_config(**SETTINGS["mlp cg"]))
    assert main([path, "diagnostics_every=1"]) == 0
    assert main([path, "--overwrite"]) == 0
    assert not (TINY / "diagnostics.csv").exists()
    assert main([path, "diagnostics_every=3", "--overwrite"]) == 0  # no epoch of two is the third
    assert not (TINY / "diagnostics.csv").exists()


def test_a_finished_run_is_the_same_config(write_config, capsys):
    path = str(write_config(**SETTINGS["mlp cg"]))
    assert main([path, "--output", "results/configs/tiny"]) == 0
    assert sweep.main([path, "diagnostics_every=1"]) == 0
    assert "skipped, already in" in capsys.readouterr().out


def observed(layer, x, gradient, steps=1):
    """What an observer records of a layer whose output has this gradient."""
    model = nn.Sequential(layer)
    observer = Observer(model, torch.device("cpu"))
    for _ in range(steps):
        with observer.watching():
            model(x).backward(gradient)
    return observer.records(7)


def test_a_step_without_a_gradient_counts_nowhere():
    layer, x = ProxPropLinear(3, 2, optimization_mode="prox_cg2"), torch.randn(4, 3)
    assert observed(layer, x, torch.zeros(4, 2)) == []
    observer = Observer(layer, torch.device("cpu"))
    for gradient in (torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4, 2)):
        with observer.watching():
            layer(x).backward(gradient)
    (record,) = observer.records(1)
    assert (record.steps, record.not_descent) == (1, 0)
    assert 0 < record.min_cosine == record.mean_cosine <= 1
    observer.reset()
    assert observer.records(1) == []


def test_steps_that_do_not_descend_are_counted():
    class Ascent:
        needs_matrix = needs_parameters = False
        implicit = True

        def direction(self, design, gradient, tau, parameters):
            return tuple(-d for d in design.adjoint(gradient))

    layer = ProxPropLinear(3, 2)
    layer._proximal.mode = Ascent()
    (record,) = observed(layer, torch.randn(4, 3), torch.randn(4, 2), steps=2)
    assert (record.epoch, record.layer, record.steps, record.not_descent) == (7, "0", 2, 2)
    assert record.min_cosine == record.mean_cosine == pytest.approx(-1)


def test_factorisations_that_fail_are_counted():
    layer = ProxPropLinear(2, 3, bias=False, tau_prox=1e30, optimization_mode="prox_exact")
    (record,) = observed(layer, torch.ones(4, 2), torch.ones(4, 3), steps=2)
    assert (record.steps, record.failed, record.not_descent) == (2, 2, 0)
    layer.tau_prox = 1.0
    (record,) = observed(layer, torch.ones(4, 2), torch.ones(4, 3))
    assert record.failed == 0


def test_what_was_seen_by_other_code_is_refused():
    model = nn.Sequential(ProxPropLinear(3, 2))
    observer = Observer(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^other numbers are recorded of layers$"):
        observer.load_state_dict({name: sums[:-1] for name, sums in observer.state_dict().items()})


def test_a_run_that_diverges_has_no_cosines(write_config):
    path = str(write_config(optimizer={"name": "sgd", "lr": 1e30}, **SETTINGS["mlp cg"]))
    assert main([path, "diagnostics_every=1"]) == 0
    last = read_diagnostics(TINY).iloc[-1]
    assert last["steps"] <= 3
    assert last[["min_cosine", "mean_cosine"]].isna().all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("diagnostics_every=0", "diagnostics_every: must be"),
        ("diagnostics_every=often", "diagnostics_every: must be"),
        ("diagnostics_every=true", "diagnostics_every: must be"),
        ("diagnostics_every=1.5", "diagnostics_every: must be"),
    ],
)
def test_what_is_no_number_of_epochs(write_config, capsys, setting, words):
    assert main([str(write_config()), setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1


def test_compiled_steps_are_not_observed(write_config, capsys):
    assert main([str(write_config()), "diagnostics_every=1", "compile=default"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: diagnostics_every: must be left out with compile: default (steps are observed uncompiled), got 1\n"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not there; a run records it with diagnostics_every=1"),
        ("epoch,layer\n1,1\n", "must have the columns epoch,layer,steps,"),
        ("", "cannot be read as diagnostics"),
        ("\0", "must have the columns"),
        ("epoch,layer,steps,min_cosine,mean_cosine,not_descent,mean_step_ratio,mean_weight_ratio,failed\n1,1,x,1,1,1,1,1,1",
         "cannot be read as diagnostics"),
    ],
    ids=["missing", "columns", "empty", "binary", "word"],
)  # fmt: skip
def test_a_file_that_cannot_be_read(tmp_path, content, words):
    if content is not None:
        (tmp_path / "diagnostics.csv").write_text(content)
    with pytest.raises(RecordError, match=f"diagnostics.csv: .*{words}"):
        read_diagnostics(tmp_path)
