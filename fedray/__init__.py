"""fedray: federated learning with foundation and generative models, simulated on Ray clusters."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.aggregators import Aggregator
    from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm
    from fedray.backends.serial import SerialBackend
    from fedray.learner import Learner, Task
    from fedray.local_training import LocalTraining
    from fedray.rounds import rounds
    from fedray.run import Run, resume, run
    from fedray.samplers import Population
    from fedray.tasks.classification import classification

_HOME = {
    "Aggregator": "fedray.aggregators",
    "Backend": "fedray.algorithm",
    "Client": "fedray.algorithm",
    "ClientResult": "fedray.algorithm",
    "FederatedAlgorithm": "fedray.algorithm",
    "Learner": "fedray.learner",
    "LocalTraining": "fedray.local_training",
    "Population": "fedray.samplers",
    "Run": "fedray.run",
    "SerialBackend": "fedray.backends.serial",
    "Task": "fedray.learner",
    "classification": "fedray.tasks",
    "resume": "fedray.run",
    "rounds": "fedray.rounds",
    "run": "fedray.run",
}

__all__ = list(_HOME)


class _Package(ModuleType):
    """Importing the modules ``fedray.run`` and ``fedray.rounds`` does not put them in the functions' place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``fedray --help`` does not load PyTorch."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedray' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
