"""The digits of directions on real images: the tables of docs/algorithm.md.

    python -m benchmarks.accuracy [--root DATA] [--json FILE]

The first 500 CIFAR-10 training images, networks at initialisation (seed 0), float32 against float64. Takes a minute.
"""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import BATCH, NETWORKS
from benchmarks.output import add_json, write_json
from experiments.command.cli import Parser, run_command
from experiments.config import DataConfig
from experiments.data.datasets import load
from experiments.training.device import device_name
from proxprop import ProxPropConv2d, ProxPropLinear
from proxprop.design import LinearDesign, Parameters
from proxprop.solvers import CGRules, conjugate_gradients
from proxprop.systems import Dual

CASES = {"mlp": (0.05, 50.0), "convnet": (0.05, 1.0, 50.0)}
MODES = ("prox_exact", "prox_cg10")
CPU = torch.device("cpu")

Captured = tuple[nn.Module, Tensor, Tensor]
"""A hidden layer with its input and the gradient of its output."""


def hidden_layers(model: str, images: Tensor, labels: Tensor) -> list[Captured]:
    torch.manual_seed(0)
    network = NETWORKS[model].build("prox_exact")
    captured: list[Captured] = []
    handles = []

    def capture(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda g: captured.append((layer, inputs[0].detach(), g.clone())))

    for layer in network:
        if isinstance(layer, (ProxPropLinear, ProxPropConv2d)):
            handles.append(layer.register_forward_hook(capture))
    nn.functional.cross_entropy(network(images), labels).backward()
    for handle in handles:
        handle.remove()
    return captured[::-1]  # a backward pass goes from the last layer to the first


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
        reference = direction(copy.deepcopy(layer).double(), x.double(), gradient.double(), tau, mode)
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
    layers = {m: hidden_layers(m, data.train.images, data.train.labels) for m in CASES}
    cg: dict[int, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    facts = {"device": device_name(CPU), "torch": torch.__version__, "official": data.identity["official"]}
    facts |= {"batch": BATCH, "seed": 0, "first MLP layer": cg, "layers": rows}
    for n in (3, 5, 10):
        cg[n] = lost_digits(*layers["mlp"][0], 0.05, n)
        print(f"N = {n}:", ", ".join(f"{name} {value:.1e}" for name, value in cg[n].items()), flush=True)
        write_json(arguments.json, facts)
    for model, taus in CASES.items():
        for mode, tau in itertools.product(MODES, taus):
            row = {"network": model, "mode": mode, "tau": tau, "error": accuracy(layers[model], tau, mode)}
            rows.append(row)
            print("{network:8} {mode:10} tau {tau:<5g} {error:.1e}".format(**row), flush=True)
            write_json(arguments.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(measure))
