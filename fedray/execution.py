"""How clients are computed: what changes a run's speed and the rounding of its results, and nothing else."""

from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Execution:
    """How clients are computed; a part of the configuration, because it changes the last bits of a result.

    Args:
        group: Clients that train in one call, where the algorithm allows it; auto by the model's layers, 1 if compiled.
        compile: Compile the training step of clients that train one by one; minutes at the first run.
        channels_last: Keep images with the channels in the last place; auto for convolutions on CPUs, or in bfloat16.
        precision: float32, or bfloat16 for mixed precision: faster on GPUs of 2020 and later, mostly slower on CPUs.
        cuda_graphs: On a GPU, record the step of clients that train one by one, where it can be; the same bytes.
    """

    group: int | Literal["auto"] = "auto"
    compile: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.group != "auto" and self.group < 1:
            raise ValueError(f"group is {self.group}; it must be >= 1")

    @property
    def size(self) -> int:
        """Clients that train in one call; without a choice, one."""
        return 1 if self.group == "auto" else self.group

    def puts_channels_last(self, model: torch.nn.Module, device: torch.device) -> bool:
        """Whether images of this model have the channels in the last place on a device."""
        if self.channels_last != "auto":
            return self.channels_last
        convolves = any(isinstance(module, torch.nn.Conv2d) for module in model.modules())
        # a GPU gains little or nothing in float32
        return convolves and (device.type == "cpu" or self.precision == "bfloat16")

    def with_format(self, model: torch.nn.Module, *devices: str) -> "Execution":
        """The same with the format that the rule chooses, if it chooses the same on all these devices."""
        found = {self.puts_channels_last(model, torch.device(device)) for device in devices}
        return replace(self, channels_last=found.pop() if len(found) == 1 else "auto")


ONE_BY_ONE = Execution(group=1)
