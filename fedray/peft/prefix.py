"""The first part of a tuned Transformer, which nothing trained has a part in, cut off from the rest."""

from typing import Any

import torch
from torch import nn

from fedray.peft.parts import Tuned, blocks_of


def fixed_blocks(tuned: Tuned, x: torch.Tensor) -> int:
    """How many blocks, from the input on, pass inputs on that nothing trained has changed; 0 if there are no blocks.

    Args:
        tuned: In training mode.
        x: What it is called with.
    """
    try:
        blocks = blocks_of(tuned.trunk)
    except ValueError:
        return 0
    trained: list[bool] = []  # whether the input of each block depends on what is trained
    hooks = [block.register_forward_pre_hook(lambda _, args: trained.append(args[0].requires_grad)) for block in blocks]
    try:
        with torch.enable_grad():
            tuned(x)
    finally:
        for hook in hooks:
            hook.remove()
    return max((number for number, depends in enumerate(trained) if not depends), default=0)


class Prefix(nn.Module):
    """Inputs to what the block after the first ``count`` ones is given, (N, tokens, width).

    Args:
        tuned: A whole one, which this does not change.
        count: Blocks.
    """

    def __init__(self, tuned: Tuned, count: int) -> None:
        super().__init__()
        self.tuned, self._count = tuned, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activations of inputs."""
        found: list[torch.Tensor] = []

        def note(_block: nn.Module, args: Any) -> None:
            found.append(args[0])
            raise _Reached

        hook = blocks_of(self.tuned.trunk)[self._count].register_forward_pre_hook(note)
        try:
            self.tuned(x)
        except _Reached:
            return found[0]
        finally:
            hook.remove()
        raise AssertionError("the block was not reached")


class _Reached(BaseException):
    """Ends a forward pass at the block whose input is wanted; no model takes it for an error of its own."""


def cut(tuned: Tuned, count: int) -> Tuned:
    """The same without what `Prefix` computes, in place: it is called with that. What is left keeps its names."""
    trunk: Any = tuned.trunk
    entrance = _Given(trunk.embeddings)
    trunk.embeddings = entrance
    blocks = blocks_of(trunk)
    for number in range(count):
        blocks[number] = _Given(blocks[number], entrance)
    tuned.skip_preparation()
    return tuned


class _Given(nn.Module):
    """Stands for a module that has been passed: its output is what the model is called with, whatever comes between.

    It has the attributes of the module, which some models look at, but not its parameters.
    """

    def __init__(self, of: nn.Module, entrance: "_Given | None" = None) -> None:
        super().__init__()
        self._of, self._entrance = [of], [entrance or self]  # in lists, so that they are no sub-modules
        self._x: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][0], name)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What was given at the entrance."""
        entrance = self._entrance[0]
        if entrance is self:
            self._x = x
        assert entrance._x is not None
        return entrance._x
