"""Published weights of torchvision's networks, as safetensors files of their state_dicts, checked tensor by tensor."""

from pathlib import Path

import torch

from fedray.errors import DataError

Tensors = dict[str, torch.Tensor]
_SHOWN = 3  # names in a message


def read(file: str | Path, network: str) -> Tensors:
    """The tensors of a file, by name.

    Args:
        file: A safetensors file.
        network: Whose state_dict it should hold, for the message.

    Raises:
        DataError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read as safetensors ({error}); save {network}'s state_dict so") from error


def fitted(weights: Tensors, expected: Tensors, file: str | Path, network: str) -> Tensors:
    """The weights, with the counters of batch norm, which old files have not and nobody needs.

    Raises:
        DataError: naming tensors that are missing, superfluous or of another shape than those that are expected.
    """
    uncounted = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith("num_batches_tracked")}
    weights = uncounted | weights
    found, wanted = ({n: t.shape for n, t in tensors.items()} for tensors in (weights, expected))
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise DataError(
            f"{file} does not hold torchvision's {network}: its {', '.join(odd[:_SHOWN])} have other names or shapes"
        )
    return weights
