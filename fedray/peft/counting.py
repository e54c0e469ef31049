"""How much is trained and sent: exact counts of a model's tensors, which a model without memory has, too."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Count:
    """What a model has and what of it is trained, in parameters and bytes.

    Attributes:
        trained: Parameters that are trained, and therefore sent.
        total: All parameters, with those that the method added.
        bytes: Bytes of the trained ones, as they are sent in one direction by one client.
    """

    trained: int
    total: int
    bytes: int

    @property
    def mib(self) -> float:
        """``bytes`` in MiB (2^20 bytes)."""
        return self.bytes / 2**20


def count(model: nn.Module) -> Count:
    """Count a model's parameters, on any device, "meta" included.

    >>> count(nn.Linear(3, 2))
    Count(trained=8, total=8, bytes=32)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return Count(
        sum(p.numel() for p in trained),
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() * p.element_size() for p in trained),
    )


def paper_cost_mib(parameters: int, clients: int) -> float:
    """FedPEFT's cost column: one direction of one round in MiB, from parameters rounded to 0.01 million.

    >>> round(paper_cost_mib(179_812, 8), 2)
    5.49
    """
    return round(parameters / 1e6, 2) * 1e6 * clients * 4 / 2**20


def table(models: Mapping[str, nn.Module], clients: int = 1) -> str:
    """A Markdown table of models by name: what is trained, its part of all, and MiB sent a round in one direction.

    Args:
        models: Models by the name of their row; they may live on the device "meta".
        clients: Clients a round, each of which sends what is trained.
    """
    lines = ["| method | trained | % of the model | MiB a round |", "|---|---:|---:|---:|"]
    for name, model in models.items():
        found = count(model)
        part = 100 * found.trained / found.total
        lines.append(f"| {name} | {found.trained:,} | {part:.3f} | {clients * found.mib:.2f} |")
    return "\n".join(lines)
