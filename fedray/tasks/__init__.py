"""What is learnt from what."""

from collections.abc import Callable

from fedray.learner import Task
from fedray.tasks.classification import classification
from fedray.tasks.language import language_modeling

TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "language_modeling": language_modeling,
}
