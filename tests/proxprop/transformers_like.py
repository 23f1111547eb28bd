"""The ``Conv1D`` of transformers (GPT-2's linear layers), or, where that is not installed, one that looks like it."""

import sys
import types

import torch
from torch import nn

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.nx = nx
            self.weight = nn.Parameter(torch.empty(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))
            nn.init.normal_(self.weight, std=0.02)

        def __repr__(self) -> str:
            return "Conv1D(nf={nf}, nx={nx})".format(**self.__dict__)

        def forward(self, x):
            size_out = (*x.size()[:-1], self.nf)
            x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return x.view(size_out)

    Conv1D.__module__ = "transformers.pytorch_utils"  # by which it is known, and found by pickle
    for name in ("transformers", "transformers.pytorch_utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["transformers.pytorch_utils"].Conv1D = Conv1D

__all__ = ["Conv1D"]
