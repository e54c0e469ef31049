"""A model with the params of many clients at once.

The clients' examples follow one another in the batch, shape (clients·n, ...), so that whatever a model does to each
example by itself stays as it is; that includes all frozen layers, which so make one pass for all clients. Only
layers with trained params are told otherwise: they cut the batch into the clients' parts, and multiply each by its
client's own weights. On a processor this is several times faster than a functional transform of the whole model.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedray.dense import StepInBackward, dense

Own = dict[str, torch.Tensor]  # a layer's trained params by their names in the layer, each (clients, ...)


class StackedModel:
    """A copy of a model whose layers compute with stacked params; what is frozen is shared with the model.

    Args:
        model: Its layers with trained params must all be in `LAYERS`.

    Raises:
        ValueError: they are not; the message names the first that is not.
    """

    def __init__(self, model: nn.Module) -> None:
        unknown = unknown_layer(model)
        if unknown is not None:
            raise ValueError(f"{unknown} has params that cannot be stacked")
        frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in frozen})
        self._slots: dict[str, tuple[Own, str]] = {}
        self._early = StepInBackward()
        for path, layer in self.model.named_modules():
            own: Own = {}
            for name, p in layer.named_parameters(recurse=False):
                if p.requires_grad:
                    self._slots[f"{path}.{name}" if path else name] = own, name
            if any(slot is own for slot, _ in self._slots.values()):
                layer.forward = partial(LAYERS[type(layer)], layer, own, lambda: self._early)

    def run(
        self,
        params: Mapping[str, torch.Tensor],
        fn: Callable[[nn.Module, Any], torch.Tensor],
        batch: Any,
        early: StepInBackward | None = None,
    ) -> torch.Tensor:
        """``fn(model, batch)`` with ``params``, each of shape (clients, ...).

        Args:
            params: Every trained parameter by name.
            fn: What to compute.
            batch: Of what; its tensors have the shape (clients·n, ...).
            early: What the backward pass may make of the step.
        """
        self._early = early or StepInBackward()
        for name, (own, short) in self._slots.items():
            own[short] = params[name]
        try:
            return fn(self.model, batch)
        finally:
            for own, _ in self._slots.values():
                own.clear()


def unknown_layer(model: nn.Module) -> str | None:
    """The path and type of a layer with trained params that cannot be stacked, or None if all can."""
    for path, layer in model.named_modules():
        trained = any(p.requires_grad for p in layer.parameters(recurse=False))
        if trained and not (type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"):
            return f"{path or 'the model itself'} ({type(layer).__name__})"
    return None


def _linear(layer: nn.Linear, own: Own, early: Callable[[], StepInBackward], x: torch.Tensor) -> torch.Tensor:
    if "weight" not in own:
        return _plus(F.linear(x, layer.weight), own.get("bias"), layer.bias)
    weight = own["weight"]
    y = dense(x.reshape(len(weight), -1, x.shape[-1]), weight, own.get("bias", layer.bias), early())
    return y.view(*x.shape[:-1], -1)


def _layer_norm(layer: nn.LayerNorm, own: Own, _early: Callable[[], StepInBackward], x: torch.Tensor) -> torch.Tensor:
    y = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return _plus(_times(y, own.get("weight"), layer.weight), own.get("bias"), layer.bias)


def _group_norm(layer: nn.GroupNorm, own: Own, _early: Callable[[], StepInBackward], x: torch.Tensor) -> torch.Tensor:
    y = F.group_norm(x, layer.num_groups, None, None, layer.eps).movedim(1, -1)
    return _plus(_times(y, own.get("weight"), layer.weight), own.get("bias"), layer.bias).movedim(-1, 1)


def _embedding(
    layer: nn.Embedding, own: Own, _early: Callable[[], StepInBackward], index: torch.Tensor
) -> torch.Tensor:
    weight = own["weight"]
    first = torch.arange(len(weight), device=index.device) * layer.num_embeddings
    rows = index.reshape(len(weight), -1) + first[:, None]
    return F.embedding(rows, weight.flatten(0, 1)).view(*index.shape, -1)


def _conv2d(layer: nn.Conv2d, own: Own, _early: Callable[[], StepInBackward], x: torch.Tensor) -> torch.Tensor:
    if "weight" in own:
        weight = own["weight"]
        count = len(weight)
        side_by_side = (
            x.view(count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        )  # the clients as groups of channels
        y = F.conv2d(
            side_by_side,
            weight.flatten(0, 1),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups * count,
        )
        y = y.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)
    else:
        y = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return _plus(y.movedim(1, -1), own.get("bias"), layer.bias).movedim(-1, 1)


def _plus(y: torch.Tensor, stacked: torch.Tensor | None, shared: torch.Tensor | None) -> torch.Tensor:
    """y + b, where b is each client's own or, frozen, everybody's; (clients·n, ..., d) and (clients, d) or (d,)."""
    if stacked is None:
        return y if shared is None else y + shared
    flat = stacked.flatten(1)  # a norm over several dimensions has a bias of that shape
    return (y.reshape(len(flat), -1, flat.shape[1]) + flat[:, None]).view(y.shape)


def _times(y: torch.Tensor, stacked: torch.Tensor | None, shared: torch.Tensor | None) -> torch.Tensor:
    if stacked is None:
        return y if shared is None else y * shared
    flat = stacked.flatten(1)
    return (y.reshape(len(flat), -1, flat.shape[1]) * flat[:, None]).view(y.shape)


LAYERS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.Conv2d: _conv2d,
}
