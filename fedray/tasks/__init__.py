"""What is learnt from what."""

from collections.abc import Callable

from fedray.learner import Task
from fedray.tasks.classification import classification
from fedray.tasks.generation import generation
from fedray.tasks.language import language_modeling

TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "generation": generation,
    "language_modeling": language_modeling,
}
