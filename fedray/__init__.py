"""fedray: federated learning with foundation and generative models, simulated on Ray clusters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.aggregators import Aggregator
    from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm
    from fedray.backends.serial import SerialBackend
    from fedray.learner import Learner, Task
    from fedray.local_training import LocalTraining
    from fedray.runs import Run, resume, run
    from fedray.samplers import Population
    from fedray.tasks.classification import classification
    from fedray.tasks.language import language_modeling

_HOME = {
    "Aggregator": "fedray.aggregators",
    "Backend": "fedray.algorithm",
    "Client": "fedray.algorithm",
    "ClientResult": "fedray.algorithm",
    "FederatedAlgorithm": "fedray.algorithm",
    "Learner": "fedray.learner",
    "LocalTraining": "fedray.local_training",
    "Population": "fedray.samplers",
    "Run": "fedray.runs",
    "SerialBackend": "fedray.backends.serial",
    "Task": "fedray.learner",
    "classification": "fedray.tasks",
    "language_modeling": "fedray.tasks",
    "resume": "fedray.runs",
    "run": "fedray.runs",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``fedray --help`` does not load PyTorch."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedray' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
