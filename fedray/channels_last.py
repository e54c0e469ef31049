"""Images with the channels in the last place, which PyTorch calls a memory format: strides change, and shapes do not.

A processor's convolutions and pools then work on the channels of a place at once. Pools gain most, and lose it again
where a gradient comes to them in the other format, as it does from a flattening.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import pooling

_POOLS = (pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)


def lay_out(model: nn.Module) -> nn.Module:
    """The same model, with its weights in this format, and pools that want gradients in it."""
    for module in model.modules():
        if isinstance(module, _POOLS):
            module.register_forward_hook(_bring_gradient)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def laid_out(x: torch.Tensor) -> torch.Tensor:
    """Images, (n, channels, height, width), in this format; any other tensor as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def select(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor, in its own format, which ``index_select`` would not keep; indexing, which would, is slower."""
    if x.is_contiguous() or x.dim() != 4:
        return x.index_select(0, rows)
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def _bring_gradient(_pool: nn.Module, _inputs: Any, y: torch.Tensor) -> None:
    if y.requires_grad:
        y.register_hook(laid_out)
