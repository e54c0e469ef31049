"""Methods that choose among what a pre-trained module already has."""

import re

from torch import nn

from fedray.peft.parts import blocks_of, freeze, train_only


def full(trunk: nn.Module, /) -> nn.Module:
    """Everything is trained and sent: full fine-tuning."""
    return trunk.requires_grad_(True)


def head(trunk: nn.Module, /) -> nn.Module:
    """Nothing of the pre-trained module; the classification head alone (linear probing)."""
    return freeze(trunk)


def bias(trunk: nn.Module, /) -> nn.Module:
    """Every bias, of LayerNorms and of the patch embedding too (BitFit, Ben Zaken et al., 2022; FedPEFT-Bias)."""
    return train_only(trunk, lambda name: "bias" in name.rpartition(".")[2], "biases")


def layernorm(trunk: nn.Module, /) -> nn.Module:
    """Weights and biases of every LayerNorm or RMSNorm."""
    norms = {
        path
        for path, module in trunk.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }
    return train_only(trunk, lambda name: name.rpartition(".")[0] in norms, "LayerNorm")


def last_blocks(trunk: nn.Module, /, count: int = 1) -> nn.Module:
    """The last Transformer blocks.

    Args:
        count: How many blocks.
    """
    blocks = blocks_of(trunk)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count is {count}; it must be between 1 and {len(blocks)}, the blocks that there are")
    freeze(trunk)
    for block in blocks[-count:]:
        block.requires_grad_(True)
    return trunk


def coop(trunk: nn.Module, /, length: int = 16) -> nn.Module:
    """Learnt vectors before the class names in the text prompts of `clip` (CoOp, Zhou et al., 2022).

    The image tower is frozen; the vectors are shared by all classes and start from N(0, 0.02²).

    Args:
        length: How many vectors.
    """
    learn_context = getattr(trunk, "learn_context", None)
    if learn_context is None:
        raise ValueError("coop learns the text prompts of CLIP; use it with task.model.name=clip")
    freeze(trunk)
    learn_context(length)
    return trunk


def linear_names(trunk: nn.Module, targets: list[str] | None, usual: tuple[tuple[str, ...], ...]) -> list[str]:
    """The whole names of the linear layers that ``targets`` ends the names of.

    Args:
        trunk: Where they are.
        targets: The last parts of names, each of which some layer must have; None for the first that fits of ``usual``.
        usual: What targets are called in the usual architectures.
    """
    found = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    for choice in [targets] if targets else usual:
        matched = [name for name in found if re.search(rf"(^|\.)({'|'.join(map(re.escape, choice))})$", name)]
        if {name.rpartition(".")[2] for name in matched} == {last.rpartition(".")[2] for last in choice}:
            return matched
    last = sorted({name.rpartition(".")[2] for name in found})
    given = f"targets is {targets}" if targets else "targets is not given, and none of the usual fit"
    raise ValueError(f"{given}; the linear layers of {type(trunk).__name__} are called {last}")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer
