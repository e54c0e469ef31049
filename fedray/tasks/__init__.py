"""What is learnt from what."""

from collections.abc import Callable

from fedray.learner import Task
from fedray.tasks.classification import classification

TASKS: dict[str, Callable[..., Task]] = {"classification": classification}
