"""The digits of directions on real data: the tables of docs/algorithm.md.

    python -m benchmarks.accuracy [--root DATA] [--json FILE]

Float32 against float64, networks of seed 0. The paper's are at initialisation and have the first 500 CIFAR-10 training
images; resnet18 (32×32 pixels) has 64 of them and the small GPT this library's source as text, both before and after
ten steps of AdamW. Takes ten minutes on one thread.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import proxprop
from benchmarks.networks import BATCH, NETWORKS, TEXT, with_next
from benchmarks.output import add_json, write_json
from experiments.command.cli import Parser, run_command
from experiments.config import DataConfig
from experiments.data.datasets import load
from experiments.training.device import device_name
from proxprop.design import LinearDesign, Parameters
from proxprop.layers import ProxPropLayer
from proxprop.solvers import CGRules, conjugate_gradients
from proxprop.systems import Dual

SOURCE = Path(proxprop.__file__).parent
CPU = torch.device("cpu")

Captured = tuple[nn.Module, Tensor, Tensor]
"""A hidden layer with its input and the gradient of its output."""


class Case(NamedTuple):
    """How a network is looked at: in which modes, with which τ, and after how many steps of AdamW."""

    modes: tuple[str, ...]
    taus: tuple[float, ...]
    steps: tuple[int, ...] = (0,)
    images: int = BATCH
    """In its batch; 0 for text."""


CASES = {
    "mlp": Case(("prox_exact", "prox_cg10"), (0.05, 50.0)),
    "convnet": Case(("prox_exact", "prox_cg10"), (0.05, 1.0, 50.0)),
    "resnet18_32": Case(("prox_exact", "prox_cg3"), (0.05, 1.0, 50.0), (0, 10), images=64),
    "gpt": Case(("prox_exact", "prox_cg3"), (0.05, 1.0, 50.0), (0, 10), images=0),
}


def source_text() -> Tensor:
    """The library's source from its start on, byte by byte."""
    source = b"".join(path.read_bytes() for path in sorted(SOURCE.rglob("*.py")))
    return torch.tensor(list(source[: math.prod(TEXT)])).reshape(TEXT)


def hidden_layers(model: str, inputs: Tensor, labels: Tensor, steps: int) -> list[Captured]:
    """Those of the network after so many steps with their own directions, in its order."""
    torch.manual_seed(0)
    network = NETWORKS[model].build("prox_exact")
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(steps):
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    captured: dict[nn.Module, Captured] = {}

    def capture(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda g: captured.update({layer: (layer, given[0].detach(), g.clone())}))

    layers = [layer for layer in network.modules() if isinstance(layer, ProxPropLayer)]
    handles = [layer.register_forward_hook(capture) for layer in layers]
    nn.functional.cross_entropy(network(inputs), labels).backward()
    for handle in handles:
        handle.remove()
    return [captured[layer] for layer in layers]


def stacked(parameters: Parameters) -> Tensor:
    return torch.cat([p.flatten().double() for p in parameters if p is not None])


def direction(layer: nn.Module, x: Tensor, gradient: Tensor, tau: float, mode: str) -> Tensor:
    layer.tau_prox, layer.optimization_mode = tau, mode
    layer.zero_grad()
    layer(x).backward(gradient)
    return stacked(tuple(p.grad for p in layer.parameters()))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def accuracy(layers: list[Captured], tau: float, mode: str) -> float:
    """The worst layer's error in float32 against the same layer in float64."""
    errors = []
    for layer, x, gradient in layers:
        precise = x.double() if x.is_floating_point() else x  # an embedding's tokens
        reference = direction(copy.deepcopy(layer).double(), precise, gradient.double(), tau, mode)
        errors.append(error(direction(layer, x, gradient, tau, mode), reference))
    return max(errors)


def lost_digits(layer: nn.Module, x: Tensor, gradient: Tensor, tau: float, iterations: int) -> dict[str, float]:
    """Errors of conjugate gradients on a linear layer against orthogonalised ones in float64."""

    def solve(dtype: torch.dtype, rules: CGRules) -> Tensor:
        design = LinearDesign(x.to(dtype), layer.weight.shape, (True, True))
        return stacked(conjugate_gradients(Dual(design, gradient.to(dtype), 1 / tau), iterations, rules))

    reference = solve(torch.float64, CGRules())
    exact = direction(copy.deepcopy(layer).double(), x.double(), gradient.double(), tau, "prox_exact")
    alone = solve(torch.float64, CGRules(orthogonal=False))
    return {
        "recurrence alone, float32": error(solve(torch.float32, CGRules(orthogonal=False)), reference),
        "recurrence alone, float64": error(alone, reference),
        "orthogonalised, float32": error(solve(torch.float32, CGRules()), reference),
        "to exact, recurrence alone": error(alone, exact),
        "to exact, orthogonalised": error(reference, exact),
    }


def measure() -> int:
    parser = Parser(description="Digits of directions on real images.")
    parser.add_argument("--root", default="data", help="the folder that holds cifar-10-batches-py (default: data)")
    add_json(parser)
    arguments = parser.parse_args()
    data = load(DataConfig(name="cifar10", root=arguments.root, train_samples=BATCH), CPU)
    images, labels = data.train.images, data.train.labels
    first_layer = hidden_layers("mlp", images, labels, steps=0)[0]
    cg: dict[int, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    facts = {"device": device_name(CPU), "torch": torch.__version__, "official": data.identity["official"]}
    facts |= {"batch": BATCH, "seed": 0, "first MLP layer": cg, "layers": rows}
    for n in (3, 5, 10):
        cg[n] = lost_digits(*first_layer, 0.05, n)
        print(f"N = {n}:", ", ".join(f"{name} {value:.1e}" for name, value in cg[n].items()), flush=True)
        write_json(arguments.json, facts)
    for model, case in CASES.items():
        batch = (images[: case.images], labels[: case.images]) if case.images else with_next(source_text())
        for steps in case.steps:
            layers = hidden_layers(model, *batch, steps)
            for mode, tau in itertools.product(case.modes, case.taus):
                row = {"network": model, "steps": steps, "mode": mode, "tau": tau, "error": accuracy(layers, tau, mode)}
                rows.append(row)
                print("{network:11} {steps:2} steps {mode:10} tau {tau:<5g} {error:.1e}".format(**row), flush=True)
                write_json(arguments.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(measure))
