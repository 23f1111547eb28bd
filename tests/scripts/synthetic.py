"""Results folders with made-up curves, in the format of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HEADER = "epoch,minibatch_loss,train_loss,train_accuracy,val_loss,val_accuracy,epoch_seconds"

# decay of the loss an epoch, seconds an epoch, epochs
SUITE = {
    "mlp_sgd_exact": (0.075, 6.0, 50),
    "mlp_sgd_cg3": (0.05, 2.5, 50),
    "mlp_sgd_cg5": (0.06, 3.0, 50),
    "mlp_sgd_cg10": (0.07, 4.5, 50),
    "mlp_sgd_gradient": (0.03, 1.0, 300),
    "convnet_adam_cg3": (0.02, 3.0, 50),
    "convnet_adam_cg10": (0.022, 5.0, 50),
    "convnet_adam_gradient": (0.014, 1.5, 300),
}
PUBLISHED = {name: row for name, row in SUITE.items() if "_cg" in name}


def summary(name: str, epochs: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "status": "finished",
        "epochs": epochs,
        "test_loss": 1.5,
        "test_accuracy": 0.5125,
        "seed": 0,
        "data": {"name": "cifar10", "official": True, "train_samples": 45000, "files_md5": {}},
        "git_commit": "0123456789abcdef",
        "python": "3.11.7",
        "torch": "2.14.1",
        "device": "cuda",
        "device_name": "Example GPU",
        "threads": 8,
        "seconds": 100.0,
        "date": "2026-05-04T10:00:00+00:00",
        **changes,
    }


def config(name: str, epochs: int, seed: int = 0) -> dict[str, Any]:
    """A config that suits the name: gradient, exact or cgN."""
    kind = name.partition(",")[0].rpartition("_")[2]
    mode = "gradient" if kind == "gradient" else f"prox_{kind}" if kind.startswith(("cg", "exact")) else "prox_cg1"
    return {
        "name": name,
        "model": {"name": "mlp"},
        "optimizer": {"name": "sgd", "lr": 1.0},
        "proxprop": {"optimization_mode": mode},
        "epochs": max(1, epochs),
        "batch_size": 500,
        "seed": seed,
    }


def write_run(
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    decay: float = 0.05,
    epoch_seconds: float = 2.0,
    epochs: int = 4,
    diverges: bool = False,
    finished: bool = True,
    **changes: Any,
) -> Path:
    """Writes one run; ``changes`` go to its summary, ``settings`` to its config. A diverging run ends with NaN."""
    folder.mkdir(parents=True)
    content = config(folder.name, epochs, changes.get("seed", 0)) | (settings or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    lines = [HEADER]
    for epoch in range(epochs + 1):
        loss = 2.3 * (1 + decay) ** -(epoch + 0.7 * (epoch % 3 == 1))
        if diverges:
            loss = 2.3 * 9.0**epoch if epoch < epochs else float("nan")
        accuracy = 0.1 if diverges else 0.1 + 0.45 * (1 - (1 + 3 * decay) ** -epoch)
        seconds = epoch_seconds if epoch else 0
        lines.append(f"{epoch},{loss},{loss},{accuracy},{loss},{accuracy},{seconds}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if finished:
        status = "diverged" if diverges else "finished"
        content = summary(folder.name, epochs, **{"status": status, **changes})
        (folder / "summary.json").write_text(json.dumps(content))
    return folder


def write_suite(results: Path, suite: dict[str, tuple[float, float, int]] = SUITE) -> Path:
    for name, (decay, seconds, epochs) in suite.items():
        write_run(results / name, decay=decay, epoch_seconds=seconds, epochs=epochs)
    return results
