"""Tensors travel as numpy arrays: in shared memory, without a copy, where Ray would pickle a torch tensor."""

import warnings
from typing import Any

import numpy as np
import ray.util
import torch


def travel_as_arrays() -> None:
    """Let this process send and receive tensors as arrays. Every process that uses Ray here calls it once.

    A received tensor shares memory with every other receiver on its node, so it is never written to; the fold
    over a cohort checks that.
    """
    ray.util.register_serializer(torch.Tensor, serializer=_to_array, deserializer=_from_array)


def _to_array(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype | None]:
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:  # unknown to numpy
        return tensor.contiguous().view(torch.uint16).numpy(), torch.bfloat16
    return tensor.numpy(), None


def _from_array(sent: Any) -> torch.Tensor:
    array, dtype = sent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.view(dtype)
