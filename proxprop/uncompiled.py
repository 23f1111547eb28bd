"""What a compiler leaves as it is. Compiled code alone imports this module, as it imports the compiler."""

from __future__ import annotations

from typing import Any

import torch

_REASON = (
    "of ProxProp layers, Linear and Conv1d/2d/3d are compiled alone, without a row mask or a deferred step; leave out "
    "fullgraph=True, and this layer runs uncompiled"
)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


try:
    call = torch.compiler.disable(_call, reason=_REASON)  # type: ignore[no-untyped-call]
except TypeError:  # before PyTorch 2.7
    call = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
