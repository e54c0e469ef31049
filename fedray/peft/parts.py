"""The parts of a pre-trained Transformer that methods speak of: its blocks, and what of it is trained."""

from collections.abc import Callable

import torch
from torch import nn

Method = Callable[[nn.Module], nn.Module]
"""A pre-trained module to one in which exactly the chosen part has ``requires_grad``; it may change its argument."""


class Tuned(nn.Module):
    """A pre-trained module of which a method's part is trained, while the rest stays in evaluation mode.

    In training mode are the modules that the method added, and those of which every parameter is trained; so a
    frozen backbone's dropout is off, as in the released code of FedPEFT (Sun et al., 2022). Parameters are called
    ``trunk.*``.

    Args:
        trunk: The pre-trained module.
        method: Which part of it is trained; applied once, here.
        call: ``call(trunk, *inputs)`` is the forward pass; ``trunk(*inputs)`` if None.
    """

    def __init__(self, trunk: nn.Module, method: Method, call: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        before = set(trunk.modules())
        self.trunk = method(trunk)
        self._call = call
        self._held = [module for module in _not_wholly_trained(self.trunk) if module in before]
        self.train()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What ``call`` makes of the inputs."""
        return self.trunk(*inputs) if self._call is None else self._call(self.trunk, *inputs)

    def skip_preparation(self) -> None:
        """Be called with what has gone through a part of the trunk already, and so is no raw input any more."""
        self._call = getattr(self._call, "through", self._call)

    def train(self, mode: bool = True) -> "Tuned":
        """Training mode for what is trained or was added; evaluation mode for the rest, whatever ``mode`` is."""
        super().train(mode)
        for module in self._held:
            module.training = False
        return self


def _not_wholly_trained(module: nn.Module) -> list[nn.Module]:
    parameters = list(module.parameters())
    if parameters and all(p.requires_grad for p in parameters):
        return []
    return [module, *(inner for child in module.children() for inner in _not_wholly_trained(child))]


def freeze(module: nn.Module) -> nn.Module:
    """The module itself, with nothing trained."""
    return module.requires_grad_(False)


def train_only(module: nn.Module, chosen: Callable[[str], bool], what: str) -> nn.Module:
    """The module itself, with the parameters trained whose names are ``chosen``.

    Raises:
        ValueError: there are none; the message says that the module has no ``what``.
    """
    found = False
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(chosen(name))
        found = found or parameter.requires_grad
    if not found:
        raise ValueError(f"{type(module).__name__} has no {what}; choose another method")
    return module


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The Transformer blocks of a module: the longest list in it of modules of one class.

    Raises:
        ValueError: there is no such list, as in a network of stages.
    """
    lists = [
        inner
        for inner in module.modules()
        if isinstance(inner, nn.ModuleList)
        and len({type(block) for block in inner}) == 1
        and next(inner.parameters(), None) is not None
    ]
    if not lists:
        raise ValueError(f"{type(module).__name__} has no list of equal blocks; choose full, head, bias or layernorm")
    return max(lists, key=len)
