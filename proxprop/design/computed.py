"""Weights that are computed from parameters: masks, parametrizations, views of one flat parameter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxprop.design.autograd import StackedDesign
from proxprop.design.base import Design, MatrixDesign, NoProximalStep, Parameters

_LEAF = "torch::autograd::AccumulateGrad"
_REPLICA = "BroadcastBackward"  # nn.DataParallel: one node for all parameters of a model
COMPILED = "in compiled code; torch.compiler.disable(layer) leaves the layer uncompiled"
_OPAQUE = {_REPLICA: "under nn.DataParallel", "CompiledFunctionBackward": COMPILED}
_MOVES = {
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Narrow", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
    )
} | {"SqueezeBackward1", "SqueezeBackward2"}
"""Nodes of autograd's graph that move or copy entries, each to one place."""


def is_moved(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter, or only holds entries of one, each once: a view, a copy, a replica.

    A direction for such a tensor is one for the parameter, and autograd takes it there.
    """
    node: Any = tensor.grad_fn
    while node is not None and node.name() not in (_LEAF, _REPLICA):
        before = [parent for parent, _ in node.next_functions if parent is not None]
        if len(before) != 1 or not (node.name() in _MOVES or _is_product_with_one(node)):
            return False
        node = before[0]
    return True


def _is_product_with_one(node: Any) -> bool:
    if node.name() != "MulBackward0":
        return False
    factor = node._saved_other if node._saved_self is None else node._saved_self
    # A number of Python's is a tensor without dimensions; one on another device would make the host wait.
    return factor is not None and factor.dim() == 0 and factor.device.type == "cpu" and float(factor) == 1


def parameters_behind(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of autograd's graph that ``tensors`` are computed from, each once.

    Raises:
        NoProximalStep: where a replica lies between, with the parameters of a whole model behind it, or compiled code,
            which cannot be differentiated twice.
    """
    leaves: dict[int, Tensor] = {id(tensor): tensor for tensor in tensors if tensor.grad_fn is None}
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() in _OPAQUE:
            raise NoProximalStep(
                f"no proximal step for a weight that is computed from parameters {_OPAQUE[node.name()]}"
            )
        if node.name() == _LEAF:
            leaves.setdefault(id(node.variable), node.variable)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return list(leaves.values())


def is_linear_now(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether the second derivative of ``tensors`` by ``parameters`` is zero at their current values.

    Tried on ones with random signs; the global random state is left alone.

    Raises:
        NoProximalStep: where autograd cannot differentiate twice, which ``ComputedDesign`` needs.
    """
    v = [_signs(t).requires_grad_() for t in tensors]
    try:
        with torch.enable_grad():
            firsts = torch.autograd.grad(tensors, parameters, v, create_graph=True, allow_unused=True)
            products = [p for p in firsts if p is not None and p.requires_grad]
            signs = [_signs(p) for p in products]
            torch.autograd.grad(products, v, signs, retain_graph=True)
            seconds = torch.autograd.grad(products, parameters, signs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise NoProximalStep("a weight is computed by what autograd cannot differentiate twice") from error
    return not any(bool(second.any()) for second in seconds if second is not None)


def _signs(tensor: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(2, tensor.shape, generator=generator, device="cpu")
    return (2 * signs - 1).to(tensor)


class ComputedDesign(StackedDesign):
    """A J: ``design`` of tensors that are computed from parameters, with J their derivative at the current values.

    Exact where they are linear or affine in the parameters, the linearisation of the layer elsewhere; either way
    the solve is over the parameters, so that its direction descends. J comes from autograd's graph, in which
    the tensors were made: nothing is computed a second time, and a random mask is the one that was used.

    Args:
        design: The design matrix for the tensors that the layer multiplied with.
        tensors: Those of them that are trained.
        parameters: The leaves behind ``tensors``.
        trained: Which of the parameters of ``design`` are ``tensors``.
    """

    def __init__(
        self, design: Design, tensors: Sequence[Tensor], parameters: Sequence[Tensor], trained: Sequence[bool]
    ) -> None:
        # The product J u is the derivative of Jᵀ v by v, applied to u.
        with torch.enable_grad():
            self._v = [torch.zeros_like(t, requires_grad=True) for t in tensors]
            products = torch.autograd.grad(tensors, parameters, self._v, create_graph=True, allow_unused=True)
        used = [product is not None and product.requires_grad for product in products]
        shapes = [p.shape if use else None for p, use in zip(parameters, used, strict=True)]
        super().__init__(shapes, design.dtype, design.device)
        self._design, self._trained, self._tensors = design, trained, tensors
        if isinstance(design, MatrixDesign):
            self.rows = design.rows
        self._products = list(itertools.compress(products, used))
        self._parameters = list(itertools.compress(parameters, used))

    def apply(self, parameters: Parameters) -> Tensor:
        given = [p for p, shape in zip(parameters, self.shapes, strict=True) if p is not None and shape is not None]
        u = [p.to(product.dtype) for p, product in zip(given, self._products, strict=True)]
        images = iter(torch.autograd.grad(self._products, self._v, u, retain_graph=True))
        return self._design.apply(tuple(next(images).to(self.dtype) if train else None for train in self._trained))

    def as_applied(self, output: Tensor) -> Tensor:
        return self._design.as_applied(output)

    def adjoint(self, output: Tensor) -> Parameters:
        given = itertools.compress(self._design.adjoint(output), self._trained)
        z = [p.to(t.dtype) for p, t in zip(given, self._tensors, strict=True) if p is not None]
        products = iter(torch.autograd.grad(self._tensors, self._parameters, z, retain_graph=True))
        return tuple(None if shape is None else next(products).to(self.dtype) for shape in self.shapes)
