"""Networks that were saved by torch.jit, such as FID's own Inception-v3."""

from pathlib import Path

import torch
from torch import nn

from fedray.errors import DataError


def load(path: str) -> nn.Module:
    """A network from its file, in evaluation mode.

    Raises:
        DataError: there is no such file, or it holds no network.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{path} does not exist; give a network that was saved by torch.jit.save")
    try:
        return torch.jit.load(str(file), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no network that torch.jit has saved ({reason})") from error
