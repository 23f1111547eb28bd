"""No change moves results unnoticed: one short epoch of each network and mode gives the numbers it always gave.

After a change that is meant to move them, write them again and say in the commit why:

    python -m tests.experiments.training.test_pinned_curves

In float64, parameters too, so that what differs between CPUs, thread counts and PyTorch versions is rounding alone.
With other instruction sets it moves the numbers by 4e-11 at most (the ConvNet's published_cg3), and by 1e-14 otherwise.
A rule of the solver left out moves them by 3e-5 and more, τ changed by 1e-5 of itself by 1e-8 or so.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

from experiments.config import parse_config
from experiments.data.datasets import Data, Split, load
from experiments.training.networks import build
from experiments.training.train import Training

PINNED = Path(__file__).with_name("pinned_curves.json")
MODES = ["gradient", "prox_cg1", "prox_cg3", "prox_cg10", "prox_exact", "published_cg3"]
NETWORKS = {
    "mlp": {
        "model": {"name": "mlp", "hidden_features": [40, 20]},
        "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.9, "nesterov": True},
    },
    "convnet": {
        "model": {"name": "convnet", "channels": [4, 5, 5], "kernel_size": 5},
        "optimizer": {"name": "adam", "lr": 0.01},
    },
}


def curve(network: str, mode: str) -> dict[str, list[float]]:
    """Losses before and after one epoch of twelve minibatches of the digits, and the mean over these."""
    settings = NETWORKS[network]
    if mode == "gradient" and network == "mlp":
        settings = {**settings, "optimizer": {**settings["optimizer"], "lr": 0.05}}  # else it diverges
    config = parse_config(
        yaml.safe_dump(
            {
                **settings,
                "name": "pinned",
                "data": {"name": "digits", "train_samples": 300},
                "proxprop": {"optimization_mode": mode, "tau_prox": 1.0},
                "epochs": 1,
                "batch_size": 25,
            }
        )
    )
    data = load(config.data, torch.device("cpu"))
    splits = (Split(split.images.double(), split.labels) for split in (data.train, data.val, data.test))
    torch.set_default_dtype(torch.float64)  # parameters are drawn in it, too
    try:
        model = build(config)
    finally:
        torch.set_default_dtype(torch.float32)
    records = list(Training(model, Data(*splits, data.identity), config).records())
    losses = ("minibatch_loss", "train_loss", "val_loss")
    return {name: [getattr(record, name) for record in records] for name in losses}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_numbers_are_those_they_always_were(network: str, mode: str) -> None:
    expected = json.loads(PINNED.read_text())[network][mode]
    for name, values in curve(network, mode).items():
        assert values == pytest.approx(expected[name], rel=1e-8), name


if __name__ == "__main__":
    curves = {network: {mode: curve(network, mode) for mode in MODES} for network in NETWORKS}
    PINNED.write_text(json.dumps(curves, indent=2) + "\n")
