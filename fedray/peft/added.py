"""Methods that add small modules of our own: visual prompts and bottleneck adapters."""

import math
from typing import Any, Literal

import torch
from torch import nn

from fedray.peft.parts import blocks_of, freeze


class Prompts(nn.Module):
    """Learnt tokens, shape (length, width).

    Args:
        length: How many.
        width: Their width.
        bound: They start from U(-bound, bound).
        dropout: Applied to them in training.
    """

    def __init__(self, length: int, width: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (N, T, width) with the prompts behind them, (N, T + length, width)."""
        tokens = self.dropout(self.tokens.expand(len(hidden), -1, -1))
        return torch.cat([hidden, tokens.to(hidden.dtype)], 1)


class Prompted(nn.Module):
    """A block before which prompts are appended, or after which so many tokens are cut off."""

    def __init__(self, block: nn.Module, prompts: Prompts | None, cut: int) -> None:
        super().__init__()
        self.block, self.prompts, self.cut = block, prompts, cut

    def forward(self, hidden: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """The block's output, prompts put in and cut off."""
        if self.prompts is not None:
            hidden = self.prompts(hidden)
        hidden = self.block(hidden, *args, **options)
        return hidden[:, : hidden.shape[1] - self.cut] if self.cut else hidden


def prompt(
    trunk: nn.Module, /, length: int = 10, depth: Literal["deep", "shallow"] = "deep", dropout: float = 0.1
) -> nn.Module:
    """Visual prompt tuning (VPT, Jia et al., 2022), as FedPEFT-Prompt uses it.

    Learnt tokens at the end of the sequence, before every block and cut off after it (deep), or before the first
    block and cut off after the last (shallow). They start from U(-v, v) with v = sqrt(6 / (3·P·P + D)), where P is the
    patch size and D the width.

    Args:
        length: Tokens before a block.
        depth: Tokens of its own for every block, or one set for all.
        dropout: Applied to the tokens in training.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be >= 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    blocks, config = blocks_of(freeze(trunk)), getattr(trunk, "config", None)
    width, patch = getattr(config, "hidden_size", None), getattr(config, "patch_size", None)
    if not isinstance(width, int) or not isinstance(patch, int):
        raise ValueError(f"{type(trunk).__name__} has no patches; visual prompts are for vision Transformers")
    bound = math.sqrt(6 / (3 * patch * patch + width))
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        if depth == "deep":
            blocks[i] = Prompted(block, Prompts(length, width, bound, dropout), length)
        elif i in (0, last):
            prompts = Prompts(length, width, bound, dropout) if i == 0 else None
            blocks[i] = Prompted(block, prompts, length if i == last else 0)
    return trunk


class Adapter(nn.Module):
    """A bottleneck: ``up(gelu(down(x)))``."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to ``x``."""
        return self.up(nn.functional.gelu(self.down(x)))


class Adapted(nn.Module):
    """A block's MLP with an adapter on its output, before the block adds it to the residual stream.

    An adapter that many blocks share is a sub-module of the first alone: `torch.func.functional_call` does not put back
    the parameters of a module that it meets in two places.
    """

    def __init__(self, mlp: nn.Module, adapter: Adapter, owns: bool) -> None:
        super().__init__()
        self.mlp, self._used = mlp, (adapter,)
        if owns:
            self.adapter = adapter

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        """``m + adapter(m)`` of the MLP's output m."""
        hidden = self.mlp(*args, **options)
        return hidden + self._used[0](hidden)


def adapter(
    trunk: nn.Module,
    /,
    reduction: int = 8,
    shared: bool = True,
    init: Literal["up_zero", "authors_all_zero"] = "up_zero",
) -> nn.Module:
    """Bottleneck adapters on the output of every block's MLP (Houlsby et al., 2019), as FedPEFT-Adapter uses them.

    Args:
        reduction: The bottleneck is the width divided by this.
        shared: One adapter for all blocks, as in FedPEFT, or one for each.
        init: Zeros in the upper layer alone, so that training starts from the pre-trained model; or, as in FedPEFT's
            released code, in all four tensors, of which then only the upper bias ever moves.
    """
    blocks = blocks_of(freeze(trunk))
    width = getattr(getattr(trunk, "config", None), "hidden_size", None)
    if width is None or not all(hasattr(block, "mlp") for block in blocks):
        raise ValueError(f"{type(trunk).__name__} has no blocks with an mlp; adapters are for those")
    if not 1 <= reduction <= width:
        raise ValueError(f"reduction is {reduction}; it must be between 1 and the width, {width}")

    def made() -> Adapter:
        new = Adapter(width, width // reduction)
        for tensor in new.parameters() if init == "authors_all_zero" else new.up.parameters():
            nn.init.zeros_(tensor)
        return new

    one = made()
    for i, block in enumerate(blocks):
        first = i == 0
        block.mlp = Adapted(block.get_submodule("mlp"), one if shared or first else made(), owns=first or not shared)
    return trunk
