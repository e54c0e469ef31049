"""What clients keep between rounds: staged while a round runs, committed when it is done everywhere."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedray.algorithm import Client


@dataclass
class ClientStates:
    """What clients keep between rounds, as a backend's driver holds it.

    States are staged by every ``map_reduce`` that succeeds, and committed when the whole round is done. The values
    are handles: the states themselves, or references to them.
    """

    committed: dict[int, tuple[int, Any]] = field(default_factory=dict)  # client id: (round, handle)
    staged: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def of(self, client: Client) -> Any:
        """The handle of what ``client`` kept, or None."""
        return (self.staged.get(client.id) or self.committed.get(client.id) or (0, None))[1]

    def has(self, client: Client) -> bool:
        """Whether ``client`` kept something."""
        return client.id in self.staged or client.id in self.committed

    def stage(self, handles: Iterable[tuple[Client, Any]]) -> None:
        """Take note of what the clients of a successful ``map_reduce`` keep."""
        self.staged |= {client.id: (client.round, handle) for client, handle in handles}

    def commit(self) -> None:
        """The round is done: keep what was staged."""
        self.committed |= self.staged
        self.staged = {}

    def discard(self) -> None:
        """The round failed: forget what was staged."""
        self.staged = {}

    def clear(self) -> None:
        """A training starts: clients keep nothing."""
        self.committed, self.staged = {}, {}
