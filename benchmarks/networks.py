"""The networks that are measured: the paper's two, and others of today's kinds, all with plain layers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from proxprop import convert
from proxprop.layers import ProxPropLayer
from proxprop.modes import parse_mode

BATCH = 500
"""Images in a batch of the paper's networks."""
TEXT = (16, 129)
"""Sequences in a batch of text, and the tokens of one with the last, which is a label alone."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What is measured.

    Args:
        make: The network with plain layers.
        batch: A batch for it, inputs and labels.
        output: The dotted name of its last layer, which stays plain.
        tau: The step size τ of its ProxProp layers.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    output: str
    tau: float = 1.0

    def build(self, mode: str | None) -> nn.Module:
        """With ProxProp layers in ``mode``, or with plain ones."""
        network = self.make()
        if mode is not None:
            convert(network, tau_prox=self.tau, optimization_mode=mode, skip=f"^{self.output}$")
        return network


def images(count: int) -> tuple[Tensor, Tensor]:
    """Smooth noise, nearer to the spectrum of photographs, which have long-range structure, than noise is."""
    smooth = nn.functional.interpolate(torch.rand(count, 3, 8, 8), size=32, mode="bilinear")
    return smooth, torch.randint(10, (count,))


def tokens() -> tuple[Tensor, Tensor]:
    """16 sequences of 128 tokens; the labels are those that come next."""
    return with_next(torch.randint(256, TEXT))


def with_next(text: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of ``[N, T]`` but the last of each sequence, and flat the ones that come next."""
    return text[:, :-1], text[:, 1:].flatten()


def mlp() -> nn.Sequential:
    """3072-4000-1000-4000-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3072, 4000), nn.ReLU(inplace=True),
        nn.Linear(4000, 1000), nn.ReLU(inplace=True),
        nn.Linear(1000, 4000), nn.ReLU(inplace=True),
        nn.Linear(4000, 10),
    )  # fmt: skip


def convnet() -> nn.Sequential:
    """Three 5×5 convolutions with ReLU, max-pooling behind the first two."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 20, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(20, 20, 5, padding=2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(1280, 10),
    )  # fmt: skip


def resnet18_small_images() -> nn.Module:
    """resnet18 as is usual for 32×32 pixels: a 3×3 convolution at first, and no pooling behind it."""
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class Block(nn.Module):
    """Attention over what came before, then two layers with GELU between them; each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1))  # [N, T, 3, heads, width/heads]
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.second(x))))


class GPT(nn.Module):
    """A small GPT: 2 blocks of width 512 over 128 of 256 tokens."""

    def __init__(self, vocabulary: int = 256, width: int = 512, context: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position.weight))).flatten(0, 1)


def vit() -> nn.Module:
    """A small ViT: 3 blocks of width 256 over 65 tokens; the attention's own weights stay plain."""
    network = torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=3, num_heads=4, hidden_dim=256, mlp_dim=1024, num_classes=10
    )
    nn.init.normal_(network.heads.head.weight, std=0.02)  # torchvision's is zero, and so would be all gradients
    return network


NETWORKS = {
    "mlp": Network(mlp, lambda: images(BATCH), "7", tau=0.05),  # τ as in the paper
    "convnet": Network(convnet, lambda: images(BATCH), "9"),
    "resnet18": Network(lambda: torchvision.models.resnet18(num_classes=10), lambda: images(64), "fc"),
    "resnet18_32": Network(resnet18_small_images, lambda: images(32), "fc"),
    "gpt": Network(GPT, tokens, "head"),
    "vit": Network(vit, lambda: images(64), "heads.head"),
    "convnext": Network(lambda: torchvision.models.convnext_tiny(num_classes=10), lambda: images(32), "classifier.2"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer as a matrix problem: A is m×d (patch rows for a convolution) in each of g groups of o outputs.

    ``gram`` and ``kernel`` count multiply-adds of AᵀA and AAᵀ, by sums over products of pixels where those are fewer.
    """

    g: int
    m: int
    d: int
    o: int
    gram: float
    kernel: float

    @classmethod
    def of(cls, layer: ProxPropLayer, input: Tensor, output: Tensor) -> Shape:
        bias = int(layer.bias is not None)
        if isinstance(layer, nn.Linear):
            m, d, o = output[..., 0].numel(), layer.in_features + bias, layer.out_features
            return cls(1, m, d, o, m * d**2 / 2, m**2 * d / 2)
        g, pixels = layer.groups, input.numel() // layer.in_channels
        m, c, o = output.numel() // layer.out_channels, layer.in_channels // g, layer.out_channels // g
        d = layer.weight[0].numel() + bias
        # An entry of AᵀA depends on the distance of two taps, and on where they stand beside the stride.
        pairs = math.prod(
            len({(i % hop, j - i) for i, j in itertools.product(range(taps), repeat=2)})
            for taps, hop in zip(layer.kernel_size, layer.stride, strict=True)
        )
        return cls(g, m, d, o, m * min(d**2, pairs * c**2) / 2, min(m**2 * d, pixels**2 * c) / 2)

    @property
    def plain(self) -> float:
        """Multiply-adds of the output alone; the gradients of weight and input take as many."""
        return self.g * self.m * self.d * self.o

    def extra(self, mode: str) -> float:
        """Multiply-adds that ``mode`` needs beyond back-propagation, in its cheapest form."""
        m, d, o, gram, kernel = self.m, self.d, self.o, self.gram, self.kernel
        if mode == "gradient":
            return 0.0
        if mode == "prox_exact":
            return self.g * min(gram + d**3 / 3 + d * d * o, kernel + m**3 / 3 + m * m * o)
        n = parse_mode(mode).iterations
        spectral = kernel + 9 * m**3 + 2 * m * m * o  # 9 m³: a symmetric eigendecomposition with its vectors
        return self.g * min(gram + n * d * d * o, kernel + n * m * m * o, spectral, (2 * n - 1) * m * d * o)


@dataclasses.dataclass(frozen=True)
class Call:
    """One ProxProp layer in a step: what came in, and the gradient of what went out."""

    name: str
    layer: ProxPropLayer
    input: Tensor
    gradient: Tensor
    shape: Shape


def calls(network: nn.Module, inputs: Tensor, labels: Tensor) -> list[Call]:
    """Those of one forward and backward pass, in the order of the forward pass; embeddings multiply nothing."""
    found: list[Call] = []
    layers = {module: name for name, module in network.named_modules() if isinstance(module, ProxPropLayer)}
    dotted = {layer: name for layer, name in layers.items() if not isinstance(layer, nn.Embedding)}

    def remember(layer: ProxPropLayer, arguments: tuple[Tensor], output: Tensor) -> None:
        input, shape = arguments[0].detach(), Shape.of(layer, arguments[0], output)
        output.register_hook(lambda g: found.append(Call(dotted[layer], layer, input, g.clone(), shape)))

    handles = [layer.register_forward_hook(remember) for layer in dotted]
    network.zero_grad()  # else directions would be added
    nn.functional.cross_entropy(network(inputs), labels).backward()
    for handle in handles:
        handle.remove()
    return found[::-1]  # a backward pass goes from the last layer to the first


def floor(found: list[Call], mode: str) -> float:
    """Multiply-adds that ``mode`` needs over those of plain back-propagation, each layer in its cheapest form.

    Only ProxProp layers are counted; the first one needs no gradient of its input.
    """
    plain = sum((2 if index == 0 else 3) * call.shape.plain for index, call in enumerate(found))
    return 1 + sum(call.shape.extra(mode) for call in found) / plain
