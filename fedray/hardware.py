"""What computes: the device by its name, and in such a way that it computes the same again."""

import os

import torch


def device_of(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    On a GPU some kernels add in whatever order their threads come. For a run to have the same bytes again, PyTorch is
    told to take those with a fixed order, and to warn where an operation has none.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass for nothing
    return device
